"""Models of a user's own classes: saved under their import path, and loaded where that has been imported."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtransformer import TextDecoder, VisionEncoderDecoder, ViT
from mmtransformer.connectors.base import Connector
from mmtransformer.layers.lora import add_lora
from mmtransformer.serialization.model_kinds import own_modules
from mmtransformer.serialization.pretrained import Pretrained, from_config, refuse_unsaved, to_config


@dataclass(frozen=True)
class Scale:
    by: float = 1.0


class MyConnector(Connector):
    def __init__(self, visual_dim: int, dim: int, *, skip: int = -1, scale: Scale | None = None) -> None:
        super().__init__()
        self.visual_dim, self.dim, self.skip, self.scale = visual_dim, dim, skip, scale
        self.proj = nn.Linear(visual_dim, dim)

    def forward(self, visual_tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.proj(visual_tokens) * (self.scale.by if self.scale else 1.0)


class Forgets(MyConnector):
    def __init__(self, visual_dim: int, dim: int, hidden_dim: int = 3) -> None:
        super().__init__(visual_dim, dim)


class PassesOn(MyConnector):
    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)


class Calls(MyConnector):
    def __init__(self, visual_dim: int, dim: int, act: Any = torch.relu) -> None:
        super().__init__(visual_dim, dim)
        self.act = act


class Unsaid(MyConnector):
    def __init__(self, visual_dim: int, dim: int, settings: Any = Scale()) -> None:
        super().__init__(visual_dim, dim)
        self.settings = settings


class Doubles(MyConnector):
    """Keeps another number than it was given."""

    def __init__(self, visual_dim: int, dim: int, heads: int = 1) -> None:
        super().__init__(visual_dim, dim)
        self.heads = 2 * heads
        self.more = nn.ModuleList(nn.Linear(2, 2) for _ in range(heads))


class Counts(MyConnector):
    """Computes with numbers, which the meta device has none of; what it keeps is no number that it takes."""

    def __init__(self, visual_dim: int, dim: int, count: int = 2) -> None:
        super().__init__(visual_dim, dim)
        self.rates = torch.linspace(0, 1, count).tolist()
        self.count: Any = count


class Bare(Pretrained, nn.Module):
    pass


class Inner:
    class Nested(MyConnector):
        pass


class NotSaved(nn.Module):
    pass


def captioner(connector: Connector | None = None) -> VisionEncoderDecoder:
    decoder = TextDecoder(53, 24, 1, 4, max_len=29, context_dim=12)
    return VisionEncoderDecoder(ViT(16, 8, 20, 1, 4), decoder, connector=connector or MyConnector(20, 12))


def test_own_parts_are_saved_and_loaded_under_their_import_path(tmp_path: Path) -> None:
    model = captioner(MyConnector(20, 12, skip=-2, scale=Scale(0.5)))
    assert own_modules(model) == [__name__]
    refuse_unsaved(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text("utf-8"))["args"]["connector"]
    assert saved["class"] == f"{__name__}.MyConnector"
    again = VisionEncoderDecoder.from_pretrained(tmp_path)
    assert isinstance(again.connector, MyConnector)
    assert (again.connector.skip, again.connector.scale) == (-2, Scale(0.5))
    x = torch.rand(1, 1, 4, 20)
    assert torch.equal(again.connector(x), model.connector(x))
    assert isinstance(from_config(to_config(Bare())), Bare)  # It has no constructor of its own.
    connector = captioner(Counts(20, 12))
    connector.save_pretrained(tmp_path / "counts")
    assert isinstance(VisionEncoderDecoder.from_pretrained(tmp_path / "counts").connector, Counts)


def test_nothing_is_imported_because_a_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner().save_pretrained(tmp_path / "model")
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "model" / "config.json"
    text = path.read_text("utf-8")

    def refused(name: str, message: str) -> None:
        path.write_text(text.replace(f"{__name__}.MyConnector", name), "utf-8")
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: {message}"):
            VisionEncoderDecoder.from_pretrained(tmp_path / "model")

    refused(
        "mine.My", r"mine\.My is a class of your own: import mine first \(in Python `import mine`.* --import mine\)"
    )
    refused("__main__.My", r'__main__\.My is a class of a script.*is "mine\.My" in')
    refused(f"{__name__}.Gone", rf"{__name__}\.Gone is a class of your own, and {__name__}, as it is imported, has no")
    for name in (f"{__name__}.NotSaved", f"{__name__}.Path", "torch.nn.Linear", "os.system", f"{__name__}.captioner"):
        refused(name, ".*has no such model")
    for name in ("mmtransformer.captioners.base.Captioner", "My", "a b.My", ".My", "mine."):
        refused(name, f'mmtransformer has no model class "{re.escape(name)}"')

    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"looked for {name}")

    monkeypatch.setitem(sys.modules, "lazy", Lazy("lazy"))
    refused("lazy.My", "lazy.My is a class of your own")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Forgets, r"its constructor takes hidden_dim, and does not keep it: self\.hidden_dim = hidden_dim"),
        (PassesOn, r"its constructor takes \*args: int, \*\*kwargs: int: name each argument"),
        (Calls, "config.json holds numbers, texts, lists of them and models: .*not JSON serializable"),
        (Unsaid, r"annotate its settings \(settings: Scale\): config"),
        (Inner.Nested, "it is not found under this name again; let the class stand at the top of a module"),
    ],
)
def test_what_could_not_be_loaded_is_refused_before_training(
    kind: type[Connector], message: str, tmp_path: Path
) -> None:
    model = captioner(kind(20, 12))
    for refuse in (refuse_unsaved, lambda model: model.save_pretrained(tmp_path / "model")):
        with pytest.raises(
            ValueError, match=rf"connector \({__name__}\.{kind.__qualname__}\) cannot be saved: {message}"
        ):
            refuse(model)
    assert not (tmp_path / "model").exists()


def test_numbers_that_are_not_those_of_the_constructor_are_refused() -> None:
    with pytest.raises(ValueError, match=r"its arguments say nothing of .*connector\.more\.1\.weight"):
        refuse_unsaved(captioner(Doubles(20, 12)))
    connector = Counts(20, 12)
    connector.count = "two"
    with pytest.raises(ValueError, match=r"Counts cannot be built: count is 'two'"):
        refuse_unsaved(captioner(connector))


def test_what_is_no_pretrained_is_told_what_to_derive_from() -> None:
    model = captioner()
    model.connector = NotSaved()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(
        ValueError, match=rf"connector \({__name__}\.NotSaved\) cannot be saved: only what is a .*Pretrained"
    ):
        refuse_unsaved(model)


def test_low_rank_products_are_merged_by_the_time_that_a_model_is_saved() -> None:
    pytest.importorskip("peft")
    model = captioner()
    add_lora(model.decoder)
    refuse_unsaved(model)
