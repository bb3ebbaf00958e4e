"""What every test gets: one thread, the same seeds, no network, and no global state left behind."""

import os
import random
import socket
from collections.abc import Iterator

# Read by libraries when they are first imported: hub clients never ask a network, plots open no window.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"

import numpy as np
import pytest
import torch

from mmtransformer.layers.kernels import fast_in_bfloat16


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in another order, a seed each")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the processes of -n share the cores
    # Autograd starts its threads at the first backward pass, one a device. The stand-in of a GPU must not be counted:
    # with a thread of its own, no forked process could compute a gradient any more.
    torch.zeros((), requires_grad=True).backward()
    fast_in_bfloat16()  # Asked once a process: of this CPU, not of one that a test makes believe.


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (seed := config.getoption("--shuffle")) is not None:  # files among each other, and the tests of each file
        chance, files = random.Random(seed), {item.path for item in items}
        place = {path: chance.random() for path in sorted(files)}
        items.sort(key=lambda item: (place[item.path], chance.random()))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (some libraries draw from the global generator)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What large data sets leave in the user's cache lies where the test's own files do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def settings_restored() -> Iterator[None]:
    """Training sets some of torch's global settings; the next test must not see them, whichever fixture trained."""
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)  # module fixtures that are set up next see it too
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests marked `network` may connect to another machine; processes of one machine may talk."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("localhost", "127.0.0.1", "::1"):  # type: ignore[index]
            raise OSError(f"a test tried to connect to {address}; mark it with pytest.mark.network")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)
