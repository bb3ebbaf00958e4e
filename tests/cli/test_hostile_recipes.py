"""Files made to do harm: checkpoints, model folders and recipes that want to run code. None does."""

import inspect
import io
import json
import os
import pickle
import re
import struct
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmtransformer import ImageCaptioner, ImageTransform, TextDecoder, Tokenizer, VisionEncoderDecoder, ViT, weights
from mmtransformer.cli import main
from mmtransformer.cli.guards.errors import one_line
from mmtransformer.cli.guards.trust import BUILDERS, _builds, _object, check_names
from mmtransformer.training.engine.checkpoints import AtomicCheckpointIO, CheckpointError, newest
from mmtransformer.weights import load_lm

ROOT = Path(__file__).parents[2]


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


class HarmfulDict(dict):
    """A dictionary that is more than one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self['path'])!r}, 'w').close()",)


@pytest.fixture
def harm(tmp_path: Path) -> Path:
    """The file that must not come to be."""
    return tmp_path / "harm was done"


def saved(content: Any, **arguments: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **arguments)
    return file.getvalue()


def repacked(data: bytes, change: Callable[[str, bytes], tuple[str, bytes]], **more: bytes) -> bytes:
    """A torch archive with changed members, and more of them."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for info in old.infolist():
            new.writestr(*change(info.filename, old.read(info)))
        for name, content in more.items():
            new.writestr(name, content)
    return file.getvalue()


def script(harm: Path) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)
    return file.getvalue()


def bomb(harm: Path) -> bytes:
    """A thousand times as large as it looks."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": {}}, 2))
        archive.writestr("archive/data/0", bytes(1 << 27))
    return file.getvalue()


def doubled(times: int) -> dict[str, Any]:
    """A few values in the file, more than memory has room for where they are shown or compared."""
    value: dict[str, Any] = {"a": "x"}
    for _ in range(times):
        value = {"a": value, "b": value}
    return value


def nested(times: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(times):
        value = {"a": value}
    return value


CHECKPOINTS: dict[str, Callable[[Path], bytes]] = {
    "a bare pickle": lambda harm: pickle.dumps({"state_dict": Harm(harm)}),
    "at the root": lambda harm: saved(Harm(harm)),
    "deep in the hyper-parameters": lambda harm: saved({"state_dict": {}, "hparams": {"a": [1, {"b": Harm(harm)}]}}),
    "as a weight": lambda harm: saved({"state_dict": {"weight": Harm(harm)}}),
    "in the optimizer's state": lambda harm: saved({"state_dict": {}, "optimizers": [{"state": {0: (Harm(harm),)}}]}),
    "as a key": lambda harm: saved({"state_dict": {}, "callbacks": {Harm(harm): 1}}),
    "a dictionary that is more": lambda harm: saved({"state_dict": HarmfulDict(path=harm)}),
    "the format of old": lambda harm: saved({"state_dict": {}, "x": Harm(harm)}, _use_new_zipfile_serialization=False),
    "a module as a whole": lambda harm: saved({"state_dict": {}, "model": nn.Linear(2, 2)}),
    "a script": script,
    "names that climb out": lambda harm: repacked(
        saved({"state_dict": {}}), lambda name, data: (name, data), **{f"../../../../..{harm}": b"x"}
    ),
    "a pickle behind the pickle": lambda harm: repacked(
        saved({"state_dict": {}}),
        lambda name, data: (name, pickle.dumps(Harm(harm)) if name.endswith("data.pkl") else data),
    ),
    "a bomb": bomb,
    "weights that are none": lambda harm: saved({"state_dict": {"weight": "x"}}),
    "weights without names": lambda harm: saved({"state_dict": {5: torch.zeros(1)}}),
    "weights that are sparse": lambda harm: saved({"state_dict": {"weight": torch.eye(3).to_sparse()}}),
    "weights without numbers": lambda harm: saved({"state_dict": {"weight": torch.empty(3, device="meta")}}),
    "no weights": lambda harm: saved({"state_dict": None}),
    "a list for the loops": lambda harm: saved({"state_dict": {}, "loops": []}),
    "a word for the rows": lambda harm: saved({"state_dict": {}, "rows": "x"}),
    "a step before the first": lambda harm: saved({"state_dict": {}, "global_step": -5}),
    "nothing but loops": lambda harm: saved({"state_dict": {}, "loops": {}}),
    "of no version": lambda harm: saved({"state_dict": {}, "pytorch-lightning_version": "x"}),
    "what is there twice, again and again": lambda harm: saved({"state_dict": {}, "model": doubled(40)}),
    "too deep to be shown": lambda harm: saved({"state_dict": {}, "model": nested(100)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_runs_nothing(kind: str, tmp_path: Path, harm: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(CHECKPOINTS[kind](harm))
    assert not harm.exists()
    with pytest.raises(CheckpointError, match=r"last\.ckpt: ") as caught:
        AtomicCheckpointIO().load_checkpoint(path)
    assert "\n" not in str(caught.value)
    newest(tmp_path)
    assert not harm.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt"]


def test_the_harm_is_real(harm: Path) -> None:
    """What the library refuses would do harm elsewhere."""
    torch.load(io.BytesIO(CHECKPOINTS["as a weight"](harm)), weights_only=False)
    assert harm.exists()


# -------------------------------------------------------------------------------------------------- model folders


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    decoder = TextDecoder(300, 16, 1, 2, max_len=24, context_dim=16)
    captioner = VisionEncoderDecoder(ViT(16, 8, 16, 1, 2, class_token=False, pool="mean"), decoder)
    tokenizer = Tokenizer.train(["a red star", "a blue dog"], 300)
    ImageCaptioner(captioner, tokenizer, ImageTransform(16), device="cpu").save_pretrained(folder)
    return folder


def header(length: int, text: bytes) -> bytes:
    return struct.pack("<Q", length) + text


def tensor(start: int, end: int, shape: list[int], kind: str = "F32") -> bytes:
    text = json.dumps({"weight": {"dtype": kind, "shape": shape, "data_offsets": [start, end]}}).encode()
    return header(len(text), text) + bytes(16)


FILES: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "weights: a pickle": ("model.safetensors", lambda harm: pickle.dumps(Harm(harm))),
    "weights: a torch archive": ("model.safetensors", lambda harm: saved(Harm(harm))),
    "weights: an endless header": ("model.safetensors", lambda harm: header(2**63 - 1, b"{}")),
    "weights: a header of 100 MB": ("model.safetensors", lambda harm: header(10**8 + 1, b"{" + b" " * 1000)),
    "weights: a header that is not JSON": ("model.safetensors", lambda harm: header(8, b"import os")),
    "weights: past the end": ("model.safetensors", lambda harm: tensor(0, 10**12, [25 * 10**10])),
    "weights: before the start": ("model.safetensors", lambda harm: tensor(-16, 16, [8])),
    "weights: an overflowing shape": ("model.safetensors", lambda harm: tensor(0, 16, [2**62, 2**62, 2**62])),
    "weights: of no known type": ("model.safetensors", lambda harm: tensor(0, 16, [4], "PICKLE")),
    "config: a function": ("config.json", lambda harm: json.dumps({"class": "os.system", "args": {}}).encode()),
    "config: a class of Python": (
        "config.json",
        lambda harm: json.dumps({"class": "subprocess.Popen", "args": {"args": ["touch", str(harm)]}}).encode(),
    ),
    "config: a class inside": (
        "config.json",
        lambda harm: json.dumps(
            {"class": "VisionEncoderDecoder", "args": {"vision": {"class": "Popen", "args": {}}, "decoder": {}}}
        ).encode(),
    ),
    "config: a public name that is no model": (
        "config.json",
        lambda harm: json.dumps({"class": "Tokenizer", "args": {"backend": str(harm)}}).encode(),
    ),
    "config: not a name": ("config.json", lambda harm: json.dumps({"class": ["ViT"], "args": {}}).encode()),
    "config: too deep": ("config.json", lambda harm: b'{"class":' * 100_000),
    "preprocessor: what is not its own": (
        "preprocessor.json",
        lambda harm: json.dumps({"image_size": 16, "class_path": "os.system"}).encode(),
    ),
    "tokenizer: a pickle": ("tokenizer.json", lambda harm: pickle.dumps(Harm(harm))),
    "tokenizer: too deep": ("tokenizer.json", lambda harm: b"[" * 100_000),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_model_folder_runs_nothing(kind: str, tmp_path: Path, harm: Path, model: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    name, content = FILES[kind]
    (folder / name).write_bytes(content(harm))
    with pytest.raises(ValueError) as caught:
        ImageCaptioner.from_pretrained(folder, device="cpu")
    assert one_line(caught.value)
    assert not harm.exists()


def test_code_that_comes_with_a_hub_model_is_not_run(tmp_path: Path, harm: Path) -> None:
    pytest.importorskip("transformers")
    code = f"open({str(harm)!r}, 'w').close()\nclass Own: pass\n"
    (tmp_path / "own.py").write_text(code)
    kinds = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoModel": "own.Own"}
    config = {"model_type": "own", "auto_map": kinds, "architectures": ["Own"]}
    for kind in ("own", "gpt_neo"):  # unknown to transformers, and known
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": kind}))
        (tmp_path / "pytorch_model.bin").write_bytes(saved({"weight": Harm(harm)}))
        with pytest.raises(ValueError):
            load_lm(tmp_path)
        assert not harm.exists()


# -------------------------------------------------------------------------------------------------------- recipes


def recipe(model: Any, **more: Any) -> str:
    return json.dumps({"model": model, "trainer": {"max_steps": 1, "accelerator": "cpu", **more}})


def hook(what: Any) -> str:
    """A recipe whose callback calls something, as a type that asks for any callable lets it."""
    callback = {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": what}}
    return json.dumps({"trainer": {"callbacks": [callback]}})


RECIPES: dict[str, Callable[[str], str]] = {
    "a model of Python's": lambda harm: recipe(
        {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", harm]}}
    ),
    "a function": lambda harm: recipe({"class_path": "os.system", "init_args": {"command": f"touch {harm}"}}),
    "a part of the model": lambda harm: recipe(
        {
            "class_path": "mmtransformer.training.Captioning",
            "init_args": {"captioner": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", harm]}}},
        }
    ),
    "a callback": lambda harm: recipe(
        None, callbacks=[{"class_path": "subprocess.Popen", "init_args": {"args": ["touch", harm]}}]
    ),
    "a logger": lambda harm: recipe(
        None, logger={"class_path": "subprocess.Popen", "init_args": {"args": ["touch", harm]}}
    ),
    "a plugin": lambda harm: recipe(
        None, plugins=[{"class_path": "subprocess.Popen", "init_args": {"args": ["touch", harm]}}]
    ),
    "a strategy": lambda harm: recipe(
        None, strategy={"class_path": "subprocess.Popen", "init_args": {"args": ["touch", harm]}}
    ),
    "a hook that is called with what the recipe gives": lambda harm: hook(
        {"class_path": "os.system", "init_args": {"command": f"touch {harm}"}}
    ),
    "a hook that reads pickles": lambda harm: hook(
        {"class_path": "torch.load", "init_args": {"f": "evil.ckpt", "weights_only": False}}
    ),
    "a hook that makes an archive run": lambda harm: hook(
        {"class_path": "torch.jit.load", "init_args": {"f": "evil.pt"}}
    ),
    "a hook of Python's own": lambda harm: hook("os.system"),
    "a strategy's hook": lambda harm: json.dumps(
        {
            "trainer": {
                "strategy": {
                    "class_path": "lightning.pytorch.strategies.DDPStrategy",
                    "init_args": {
                        "ddp_comm_hook": {"class_path": "os.system", "init_args": {"command": f"touch {harm}"}}
                    },
                }
            }
        }
    ),
    "a reader of checkpoints in place of a class": lambda harm: recipe(
        {
            "class_path": "mmtransformer.training.Captioning.load_from_checkpoint",
            "init_args": {"checkpoint_path": "evil.ckpt", "weights_only": False},
        }
    ),
    "too deep": lambda harm: "model: " + "[" * 100_000,
    "aliases of aliases": lambda harm: "".join(
        [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10 if i else ['x'] * 10)}]\n" for i in range(9)]
    ),
    "an alias of itself": lambda harm: "model: &a [*a]\n",
    "YAML's own way": lambda harm: f"model: !!python/object/apply:os.system ['touch \"{harm}\"']\n",
    "YAML's new object": lambda harm: f"model: !!python/object/new:subprocess.Popen [['touch', {harm!r}]]\n",
}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_recipe_runs_only_what_fits(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPES[kind]("harm"))
    Path("evil.ckpt").write_bytes(saved({"state_dict": {}, "x": Harm(tmp_path / "harm")}))
    Path("evil.pt").write_bytes(script(tmp_path))
    words = ["--config", str(ROOT / "recipes/caption_scenes.yaml"), "--config", str(path)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(["fit", *words, "--data.source.train_size=8"])
    assert code == 2
    told = capsys.readouterr().err
    assert "mmt fit: error: " in told
    assert told.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.ckpt", "evil.pt", "recipe.yaml"]


def spec(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


def called(name: str, **arguments: Any) -> dict[str, Any]:
    """A callback's place for a function, where the recipe names one with arguments."""
    return spec("lightning.pytorch.callbacks.LambdaCallback", setup=spec(name, **arguments))


CALLBACKS: dict[str, tuple[str, Any]] = {
    "a command of the library": ("mmtransformer.cli.main", called("mmtransformer.cli.main", argv=["recipes"])),
    "what no annotation gives a class": (
        "check_recipe",
        called("mmtransformer.cli.guards.trust.check_recipe", path="x"),
    ),
    "a reader of models": ("load_vit", called("mmtransformer.weights.load_vit", source="x")),
    "a function itself": (
        "mmtransformer.cli.main",
        spec("lightning.pytorch.callbacks.LambdaCallback", setup="mmtransformer.cli.main"),
    ),
    "in another's place": (
        "mmtransformer.cli.main",
        spec("lightning.pytorch.callbacks.BackboneFinetuning", lambda_func=spec("mmtransformer.cli.main")),
    ),
    "where anything may stand": (
        "logging.FileHandler",
        spec(
            "lightning.pytorch.callbacks.RichProgressBar",
            console_kwargs={"x": spec("logging.FileHandler", filename="harm")},
        ),
    ),
}


@pytest.mark.parametrize("kind", CALLBACKS)
def test_a_callback_calls_nothing_of_the_library(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, callback = CALLBACKS[kind]
    Path("recipe.yaml").write_text(json.dumps({"trainer": {"callbacks": [callback]}}))
    for command in ("fit", "plan"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert main([command, "--config", "caption_scenes", "--config", "recipe.yaml"]) == 2
        told = capsys.readouterr().err
        assert f"{name} is not run" in told
        assert told.count("\n") == 1 + (command == "plan")  # which says first what it does
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_function_of_the_users_own_makes_no_function() -> None:
    """What returns a class may stand for the class, but is not called to make a hook."""
    check_names({"model": spec("mmtransformer.weights.load_vit", source="folder")})
    with pytest.raises(ValueError, match="load_vit is not run"):
        check_names({"a": called("mmtransformer.weights.load_vit", source="folder")})


def test_the_builders_are_there_and_write_nothing() -> None:
    for name in BUILDERS:
        found = _object(name)
        assert f"{found.__module__}.{found.__qualname__}" == name
    package = Path(weights.__file__).parent
    readers = {
        name for path in package.rglob("*.py") for name in re.findall(r"^def (load_\w+)", path.read_text(), re.M)
    }
    assert readers == {name for name in weights.__all__ if name.startswith("load_")}
    for name in weights.__all__:
        if inspect.isroutine(found := getattr(weights, name)):
            full = f"{found.__module__}.{name}"
            assert _builds(full) == (name in readers or full in BUILDERS)


def test_checkpoints_of_others_are_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plugin = "lightning.pytorch.plugins.io.TorchCheckpointIO"
    Path("recipe.yaml").write_text(json.dumps({"trainer": {"plugins": [{"class_path": plugin}]}}))
    words = ["--config", "caption_scenes", "--config", str(ROOT / "recipes/tiny.yaml"), "--config", "recipe.yaml"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["fit", *words]) == 2
    told = capsys.readouterr().err
    assert "TorchCheckpointIO" in told
    assert told.count("\n") == 1


SUB_FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "deep": ("nested more than 50 deep", lambda path: path.write_text("[" * 100_000)),
    "aliases": (
        "its aliases stand for more than",
        lambda path: path.write_text(
            "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10 if i else ['x'] * 10)}]\n" for i in range(9))
        ),
    ),
    "large": ("are too many for a recipe", lambda path: path.write_text("#" * (2 << 20))),
    "not UTF-8": ("not UTF-8", lambda path: path.write_bytes(b"class_path: \xff")),
    "a pipe": ("not a regular file", lambda path: os.mkfifo(path)),
}


@pytest.mark.parametrize("key", ["model", "trainer", "data.transform", "model.init_args.captioner"])
@pytest.mark.parametrize("kind", SUB_FILES)
def test_every_file_of_a_recipe_is_looked_through(
    kind: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    why, make = SUB_FILES[kind]
    make(tmp_path / "part.yaml")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(["fit", "--config", "caption_scenes", f"--{key}=part.yaml"])
    told = capsys.readouterr().err
    assert code == 2
    assert why in told
    assert "part.yaml" in told
    assert told.count("\n") == 1
    Path("whole.yaml").write_text(f"{key.partition('.')[0]}: part.yaml\n")
    with pytest.raises(ValueError, match=why):  # named in a recipe, too
        main(["fit", "--debug", "--config", "caption_scenes", "--config=whole.yaml"])


def own_hook(*args: Any, **kwargs: Any) -> None:
    """What a user may name: it is in a module of their own."""


def test_a_recipe_may_name_what_is_its_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "own_module", sys.modules[__name__])
    monkeypatch.setattr(own_hook, "__module__", "own_module")
    reader = {"class_path": "mmtransformer.weights.load_vit", "init_args": {"source": "folder"}}
    relu = {"class_path": "torch.nn.ReLU"}
    check_names({"a": own_hook, "b": [reader, relu], "c": {"class_path": "own_module.nn.Identity"}})
    for name in ("os.system", "torch.load", "subprocess.run", "own_module.own_hook"):  # the last says no type
        with pytest.raises(ValueError, match=f"{name} is not run"):
            check_names({"a": [{"b": {"class_path": name, "init_args": {}}}]})


def test_a_recipe_may_name_what_is_in_a_folder_without_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_folder/parts").mkdir(parents=True)
    text = "from mmtransformer import ViT\n\n\ndef tower() -> ViT:\n    return ViT(16, 8, 24, 1, 4)\n"
    (tmp_path / "own_folder/parts/mine.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    check_names({"vision": {"class_path": "own_folder.parts.mine.tower", "init_args": {}}})


def test_a_recipe_may_name_an_installed_module_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("some_library")
    library.__file__ = "/usr/lib/python3/site-packages/some_library/__init__.py"
    for name, bases in (("Net", (torch.nn.Module,)), ("Caller", ())):
        kind = type(name, bases, {"__module__": "some_library", "__call__": lambda self: None})
        setattr(library, name, kind)
    monkeypatch.setitem(sys.modules, "some_library", library)
    check_names({"model": {"class_path": "some_library.Net", "init_args": {}}})
    with pytest.raises(ValueError, match=r"some_library\.Caller is not run"):
        check_names({"hook": {"class_path": "some_library.Caller"}})


def test_a_hostile_checkpoint_stops_mmt_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Path
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "last.ckpt").write_bytes(CHECKPOINTS["as a weight"](harm))
    words = ["fit", "--config", str(ROOT / "recipes/caption_scenes.yaml"), "--resume"]
    words += ["--config", str(ROOT / "recipes/tiny.yaml"), f"--trainer.default_root_dir={tmp_path}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main([*words, "--data.source.train_size=8", "--trainer.enable_progress_bar=false"])
    assert code == 2
    assert "refused, as it holds more than tensors and plain data" in capsys.readouterr().err
    assert not harm.exists()
