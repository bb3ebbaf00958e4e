"""What a user finds by looking: `dir`, submodules as attributes, reprs, and types for checkers."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from mmtransformer import ImageCaptioner, ImageTransform, TextDecoder, Tokenizer, VisionEncoderDecoder, ViT

ROOT = Path(__file__).parents[1]


def test_the_package_shows_public_names_and_submodules_only() -> None:
    code = "import mmtransformer as mm; mm.weights.load_lm; mm.data, mm.training; print(*dir(mm))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    shown = {name for name in done.stdout.split() if not name.startswith("__")}
    submodules = {path.stem for path in (ROOT / "mmtransformer").iterdir() if path.name[0] not in "_."}
    assert {"ViT", "generate", "weights", "layers"} <= shown
    assert not {name for name in shown if name[0] == "_" or name == "TYPE_CHECKING"}
    assert submodules - {"recipes", "py"} <= shown


def test_reprs_say_what_it_is() -> None:
    tokenizer = Tokenizer.train(["a red star", "빨간 별"], 300, languages=["en", "ko"])
    assert repr(tokenizer) == f"Tokenizer({tokenizer.vocab_size} tokens, languages en, ko)"
    vit = ViT(32, 8, 16, 1, 2, class_token=False, pool="mean")
    model = VisionEncoderDecoder(vit, TextDecoder(tokenizer.vocab_size, 16, 1, 2, max_len=64, context_dim=16))
    captioner = ImageCaptioner(model, tokenizer, ImageTransform(32), device="cpu")
    assert repr(captioner) == (
        f"ImageCaptioner(VisionEncoderDecoder, 0.0 million parameters, {tokenizer.vocab_size} tokens, "
        "languages en, ko, fp32 on cpu)"
    )


def test_a_name_that_is_not_here_is_answered_with_the_nearest() -> None:
    import mmtransformer as mm

    for name, said in (
        ("ImageCaptionner", "has no attribute 'ImageCaptionner'; did you mean 'ImageCaptioner'?"),
        ("load_vit", "; it is mmtransformer.weights.load_vit"),
        ("finetune_clip", "; it is mmtransformer.training.finetune_clip"),
        ("CaptionData", "; it is mmtransformer.data.CaptionData"),
        ("open_pairs", "; it is mmtransformer.data.open_pairs"),
        ("something_else", "has no attribute 'something_else'"),
    ):
        with pytest.raises(AttributeError) as error:
            getattr(mm, name)
        assert str(error.value).endswith(said)
    assert not hasattr(mm, "_repr_html_")


def test_what_arguments_and_results_are_stands_where_one_looks() -> None:
    import mmtransformer as mm

    for package, names in (
        (mm, {"HubOptions", "SumAndCount"}),
        (mm.training, {"TuningConfig"}),
        (mm.data, {"SceneWorld"}),
    ):
        assert names <= set(dir(package))
        assert all(isinstance(getattr(package, name), type) for name in names)


def test_types_are_found() -> None:
    assert (ROOT / "mmtransformer" / "py.typed").is_file()


@pytest.mark.parametrize(
    "package", ["mmtransformer", "mmtransformer.weights", "mmtransformer.data", "mmtransformer.training"]
)
def test_what_type_checkers_see_is_there(package: str) -> None:
    module = import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert sorted(map(str, seen)) == module.__all__
    for name, home in seen.items():
        assert getattr(module, str(name)) is getattr(import_module(str(home)), str(name))
