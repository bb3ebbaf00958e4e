"""A hub that stops answering, as a server on this machine: given up within few tries, whatever is asked of it."""

import socket
import threading
import time

import pytest
from huggingface_hub import constants, utils

from mmtransformer.serialization import hub_requests
from mmtransformer.serialization.hub_requests import TRIES, Stalled, few_tries


class Server:
    """Takes every connection, sends the same bytes to each, and then no more; `seen` are the requests."""

    def __init__(self, says: bytes) -> None:
        self.says, self.seen = says, []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/file"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.seen.append((connection.recv(4096), connection))
            connection.sendall(self.says)

    def close(self) -> None:
        self._socket.close()
        for _, connection in self.seen:
            connection.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_requests, "LOOK", 0.1)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"


@pytest.mark.parametrize("says", [b"", HEAD + b"x" * 10])
def test_silence_is_given_up(says: bytes) -> None:
    """Before an answer and in the middle of one, for requests without a limit of their own, as those of lists."""
    server, began = Server(says), time.monotonic()
    wait = {"base_wait_time": 0.01, "max_wait_time": 0.01, "max_retries": 50}
    with pytest.raises(Stalled, match=r"nothing came in 3 tries of 0\.1 s"), few_tries():
        utils.http_backoff("GET", server.url, timeout=None, **wait)
    server.close()
    assert time.monotonic() - began < 5
    assert len(server.seen) == TRIES
    hooks = utils.get_session().event_hooks
    assert all("few_tries" not in hook.__qualname__ for some in hooks.values() for hook in some)


def test_what_gets_ahead_or_answers_goes_on() -> None:
    """Other bytes of the same file, and a hub that is busy, are not the same silence."""
    busy = Server(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    with few_tries():
        for _ in range(TRIES + 2):
            assert utils.get_session().get(busy.url).status_code == 429
    busy.close()
    silent = Server(b"")
    with few_tries():
        for at in range(TRIES + 2):
            with pytest.raises(Exception, match="timed out"):
                utils.get_session().get(silent.url, headers={"Range": f"bytes={at}-"})
    silent.close()
