"""OpenFlamingo by its folder: checkpoint.pt between a CLIP and a language model of others, by its definition."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from mmtransformer import ImageCaptioner
from mmtransformer.backbones.hf.decoder import HFDecoder
from mmtransformer.serialization.hub import HubOptions
from mmtransformer.serialization.printable import printable
from mmtransformer.weights.captioners import openflamingo
from mmtransformer.weights.captioners.openflamingo import PUBLISHED, openflamingo_config
from mmtransformer.weights.shared.folders import read_tensors
from support.cli import mmt
from support.hub_models import words
from support.openflamingo import DIM, VISUAL, checkpoint, gated, perceiver
from support.public import close, first_logits, ids, load, noisy, pictures

TEXTS = ["Output:", "a photo of", "two dogs and"]
LAYERS = {"gpt_neox": "gpt_neox.layers", "mpt": "transformer.blocks", "mosaic_gpt": "transformer.blocks",
          "llama": "model.layers"}  # fmt: skip
EMBED = {"gpt_neox": "gpt_neox.embed_in", "mpt": "transformer.wte", "mosaic_gpt": "transformer.wte",
         "llama": "model.embed_tokens"}  # fmt: skip


def language_model(kind: str, size: int) -> Any:
    """A random one of transformers; of MosaicGPT, which it has not, an MPT without the norms of queries and keys."""
    torch.manual_seed(5)
    plain: Any = {"vocab_size": size, "hidden_size": DIM, "num_hidden_layers": 4, "num_attention_heads": 4,
                  "intermediate_size": 37, "max_position_embeddings": 97}  # fmt: skip
    if kind == "gpt_neox":
        return noisy(GPTNeoXForCausalLM(GPTNeoXConfig(**plain)), 0.2)
    if kind == "llama":
        return noisy(LlamaForCausalLM(LlamaConfig(**plain)), 0.2)
    return noisy(MptForCausalLM(MptConfig(vocab_size=size, d_model=DIM, n_heads=4, n_layers=4, max_seq_len=97)), 0.2)


def folder(path: Path, kind: str, every: int = 2) -> tuple[dict[str, Tensor], Any, Any]:
    """A folder as published, the models around it below it. Also its tensors, the language model, the tower."""
    tokenizer = words()
    size = len(tokenizer)
    model = language_model(kind, size)
    tokenizer.save_pretrained(path / "lm")
    vision: Any = {"hidden_size": VISUAL, "intermediate_size": 31, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "image_size": 28, "patch_size": 7, "hidden_act": "quick_gelu"}  # fmt: skip
    torch.manual_seed(6)
    tower = noisy(CLIPVisionModel(CLIPVisionConfig(**vision)), 0.3)
    tower.save_pretrained(path / "clip")
    model.save_pretrained(path / "lm")
    if kind == "mosaic_gpt":
        as_mosaic(path / "lm", model)
    state = checkpoint(tuple(range(every - 1, 4, every)), layers=LAYERS[kind])
    state = {name: tensor.float() for name, tensor in state.items()}
    rows = 3 + size  # <|endofchunk|>, <image>, <PAD>
    state[f"lang_encoder.{EMBED[kind]}.weight"] = torch.randn(rows, DIM)
    if kind == "gpt_neox":
        state["lang_encoder.embed_out.weight"] = torch.randn(rows, DIM)
    said = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 1, "model_state_dict": said}, path / "checkpoint.pt")
    (path / "config.json").write_text(json.dumps({"lang_encoder_path": "lm", "clip_vision_encoder_path": "clip"}))
    return state, model, tower


def as_mosaic(path: Path, model: Any) -> None:
    """The folder in MosaicGPT's words, with norms of queries and keys."""
    state = {}
    for name, tensor in model.state_dict().items():
        for new, old in {
            ".norm_": ".ln_",
            ".ffn.up_proj.": ".mlp.mlp_up.",
            ".ffn.down_proj.": ".mlp.mlp_down.",
        }.items():
            name = name.replace(new, old)
        state[name] = tensor
    torch.manual_seed(9)
    state |= {f"transformer.blocks.{i}.attn.{p}_ln.weight": 1 + 0.5 * torch.randn(DIM) for i in range(4) for p in "qk"}
    del state["lm_head.weight"]
    for file in path.glob("model*"):
        file.unlink()
    torch.save(state, path / "pytorch_model.bin")
    said = {"model_type": "mosaic_gpt", "d_model": DIM, "n_heads": 4, "n_layers": 4, "max_seq_len": 97, "mlp_ratio": 4,
            "vocab_size": model.config.vocab_size, "alibi": True, "alibi_bias_max": 8, "attn_qk_ln": True,
            "no_bias": True, "learned_pos_emb": False, "attn_clip_qkv": None}  # fmt: skip
    (path / "config.json").write_text(json.dumps(said))


def mosaic(state: dict[str, Tensor], x: Tensor, before: Callable[[int, Tensor], Tensor]) -> Tensor:
    """MosaicGPT's blocks of one row (q d), by its definition, without its last norm."""
    q = len(x)
    past = torch.arange(q)[:, None] - torch.arange(q)
    slopes = 2.0 ** (-8 * torch.arange(1, 5) / 4)
    bias = (-past * slopes[:, None, None]).masked_fill(past < 0, -torch.inf)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (DIM,), state[f"{name}.weight"])

    for i in range(4):
        x, name = before(i, x), f"transformer.blocks.{i}"
        parts = (norm(x, f"{name}.ln_1") @ state[f"{name}.attn.Wqkv.weight"].T).chunk(3, -1)
        parts = norm(parts[0], f"{name}.attn.q_ln"), norm(parts[1], f"{name}.attn.k_ln"), parts[2]
        queries, keys, values = (part.unflatten(-1, (4, -1)).transpose(0, 1) for part in parts)
        weights = (queries @ keys.transpose(-1, -2) * (DIM / 4) ** -0.5 + bias).softmax(-1)
        x = x + (weights @ values).transpose(0, 1).flatten(1) @ state[f"{name}.attn.out_proj.weight"].T
        hidden = F.gelu(norm(x, f"{name}.ln_2") @ state[f"{name}.mlp.mlp_up.weight"].T)
        x = x + hidden @ state[f"{name}.mlp.mlp_down.weight"].T
    return norm(x, "transformer.ln_f")


def definition(
    kind: str, path: Path, parts: tuple[dict[str, Tensor], Any, Any], pixels: Tensor, row: list[int]
) -> Tensor:
    """Logits (q v) of one picture and the ids of a text, by the maths of open_flamingo."""
    state, model, tower = parts
    features = tower(pixels[None]).last_hidden_state[:, None, 1:]  # its patches, before the norm behind the blocks
    latents = perceiver(state, features, depth=2)
    image = model.config.vocab_size + 1  # behind <|endofchunk|>
    media = (torch.tensor(row) == image).long().cumsum(0)
    embedding = state[f"lang_encoder.{EMBED[kind]}.weight"]

    def before(i: int, x: Tensor) -> Tensor:
        name = f"lang_encoder.{LAYERS[kind]}.{i}.gated_cross_attn_layer"
        return gated(state, name, x, latents, media) if f"{name}.attn_gate" in state else x

    if kind == "mosaic_gpt":
        return mosaic(read_tensors(path / "lm"), embedding[row], before) @ embedding.T
    hooks = []
    for i, layer in enumerate(model.get_submodule(LAYERS[kind])):

        def hook(_: Any, args: Any, given: Any, i: int = i) -> Any:
            if args:
                return (before(i, args[0][0])[None], *args[1:]), given
            return args, given | {"hidden_states": before(i, given["hidden_states"][0])[None]}

        hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    hidden = model.base_model(inputs_embeds=embedding[row][None]).last_hidden_state[0]
    for one in hooks:
        one.remove()
    head = state.get("lang_encoder.embed_out.weight", embedding)
    if kind == "llama":
        own = model.lm_head.weight
        head = torch.cat((own, own.new_zeros(len(embedding) - len(own), DIM)))
    return hidden @ head.T


@pytest.mark.filterwarnings("ignore:.*those of the rest are zeros")
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_it_is_by_its_definition(kind: str, tmp_path: Path) -> None:
    parts = folder(tmp_path, kind, every=2 if kind == "gpt_neox" else 1)
    ours, images = load(tmp_path), pictures()
    assert isinstance(ours.model.decoder, HFDecoder) == (kind != "llama")
    end, image = parts[1].config.vocab_size, parts[1].config.vocab_size + 1
    assert ours.tokenizer.eos_ids == (end,)
    rows = [[image, *words()(text, add_special_tokens=False).input_ids] for text in TEXTS]
    batch = ours.processor.with_prompts(ours.batch(images), TEXTS)  # pyright: ignore[reportOptionalMemberAccess]
    assert [r[m].tolist() for r, m in zip(batch.tokens, batch.attention_mask, strict=True)] == rows
    pixels = [ours.transform(picture) for picture in images]
    alone = [definition(kind, tmp_path, parts, p, row)[-1] for p, row in zip(pixels, rows, strict=True)]
    close(first_logits(ours, images, TEXTS), torch.stack(alone))
    for i, row in enumerate(rows):
        text = [*row]
        while len(text) - len(row) < 6:
            text.append(int(definition(kind, tmp_path, parts, pixels[i], text)[-1].argmax()))
            if text[-1] == end:
                text.pop()
                break
        assert ids(ours, images[i : i + 1], TEXTS[i : i + 1], max_new_tokens=6) == [text[len(row) :]]
    told = {"max_new_tokens": 6, "num_beams": 3}
    one_by_one = [ids(ours, images[i : i + 1], TEXTS[i : i + 1], **told)[0] for i in range(3)]
    assert ids(ours, images, TEXTS, **told) == one_by_one
    assert ids(ours, images, [None, *TEXTS[1:]], **told) == one_by_one  # "Output:" is what is said unless told
    assert first_logits(ours, images[:1] * 2, ["<image>a photo of", "a photo of"]).unique(dim=0).shape[0] == 1


def test_commands_reach_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Captioned, scored, the connector trained on to an adapter, which is merged into a folder of the same kind."""
    monkeypatch.setenv("PATH", "")  # without Java there is no METEOR, which would take most of the time
    path = tmp_path / "base"
    state, *_ = folder(path, "gpt_neox")
    (tmp_path / "pairs").mkdir()
    for i, image in enumerate(pictures() * 4):
        image.save(tmp_path / f"pairs/{i}.png")
        (tmp_path / f"pairs/{i}.txt").write_text(["a red star", "two dogs", "a man in the picture"][i % 3])
    one = str(tmp_path / "pairs/0.png")
    code, said, err = mmt(capsys, "caption", one, "--model", str(path), "--device", "cpu")
    assert code == 0, err
    assert said.removesuffix("\n") == printable(load(path)(one)[0][0].text)
    data = ["--data", str(tmp_path / "pairs"), "--split", "val", "--device", "cpu"]
    code, _, err = mmt(capsys, "evaluate", "--model", str(path), "--max-new-tokens", "6", *data)
    assert code == 0, err

    def fit(run: Path, *more: str) -> None:
        words = [
            "--config", "recipes/finetune_hub.yaml", "--model.init", str(path), "--data.source",
            str(tmp_path / "pairs"), "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu",
            "--trainer.default_root_dir", str(run), "--data.batch_size", "4", "--data.max_len", "30",
            "--trainer.precision", "32-true", *more,
        ]  # fmt: skip
        code, _, err = mmt(capsys, "fit", *words)
        assert code == 0, err

    fit(tmp_path / "run", "--model.tuning.parts", "[connector]", "--model.tuning.method", "full")
    out = tmp_path / "merged"
    code, said, err = mmt(capsys, "export", str(tmp_path / "run/model"), str(out))
    assert (code, said) == (0, f"{out}: as open_flamingo reads it\n"), err
    after = read_tensors(out)
    assert after.keys() == state.keys()
    kept = {name for name in state if torch.equal(state[name], after[name])}
    assert {"lang_encoder.gpt_neox.embed_in.weight", "lang_encoder.embed_out.weight"} <= kept
    assert "perceiver.latents" not in kept
    images = pictures()
    tuned, merged = load(tmp_path / "run/model"), load(out)
    close(first_logits(tuned, images, TEXTS), first_logits(merged, images, TEXTS))
    fit(tmp_path / "other", "--model.tuning.parts", "[decoder]", "--model.tuning.target_modules", "[query_key_value]")
    code, _, err = mmt(capsys, "export", str(tmp_path / "other/model"), str(tmp_path / "no"))
    assert code == 2
    assert "has no place for the decoder, which was changed" in err
    assert not (tmp_path / "no").exists()


def test_the_names_of_the_released_ones(tmp_path: Path) -> None:
    cache = tmp_path / "models--openflamingo--OpenFlamingo-4B-vitl-rpj3b" / "snapshots" / "0123"
    plain = tmp_path / "OpenFlamingo-9B-vitl-mpt7b"
    for path in (cache, plain):
        path.mkdir(parents=True)
        (path / "checkpoint.pt").touch()
    found = openflamingo_config(cache)
    assert found["lang_encoder_path"] == found["tokenizer_path"] == "togethercomputer/RedPajama-INCITE-Base-3B-v1"
    assert found["clip_vision_encoder_path"] == "openai/clip-vit-large-patch14"
    assert openflamingo_config(plain)["lang_encoder_path"] == PUBLISHED[plain.name]


def test_the_models_around_it_are_looked_up_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Account, cache and quiet reach them, also when it is written; the revision is of its own repository alone."""
    folder(tmp_path / "model", "gpt_neox")
    said = {"lang_encoder_path": "some/lm", "clip_vision_encoder_path": "some/clip"}
    (tmp_path / "model/config.json").write_text(json.dumps(said))
    asked: list[tuple[str, HubOptions]] = []

    def find(name: str | Path, options: HubOptions = HubOptions()) -> Path:  # noqa: B008 (frozen)
        if str(name).startswith("some/"):
            asked.append((str(name), options))
        return tmp_path / "model" / str(name).removeprefix("some/")

    monkeypatch.setattr(openflamingo, "find_folder", find)
    given: dict[str, Any] = {"token": "hf_secret", "cache_dir": tmp_path / "cache", "local_files_only": True}
    model = ImageCaptioner.from_pretrained(tmp_path / "model", device="cpu", revision="v2", **given)
    assert {name for name, _ in asked} == {"some/lm", "some/clip"}
    assert {options for _, options in asked} == {HubOptions(**given)}
    asked.clear()
    model.save_pretrained(tmp_path / "again")
    assert {options for _, options in asked} == {HubOptions(**given)}


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no language model": (
        lambda path: (path / "config.json").unlink(),
        "is an OpenFlamingo without its language model",
    ),
    "one that is a number": (
        lambda path: (path / "config.json").write_text('{"lang_encoder_path": 7}'),
        "lang_encoder_path is 7, not a folder",
    ),
    "another language model": (lambda path: narrower(path / "lm"), "it is another language model"),
    "code in the checkpoint": (lambda path: torch.save({"x": Bomb()}, path / "checkpoint.pt"), "more than tensors"),
    "no embedding": (lambda path: without(path, "embed_in"), "has no embedding of <image> and <|endofchunk|>"),
    "a tensor too few": (lambda path: without(path, "latents"), 'has no tensor "perceiver.latents"'),
}


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/never"),))


def narrower(path: Path) -> None:
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=4,
                                             intermediate_size=9))  # fmt: skip
    model.save_pretrained(path)


def without(path: Path, part: str) -> None:
    state = torch.load(path / "checkpoint.pt", weights_only=True)["model_state_dict"]
    torch.save({name: tensor for name, tensor in state.items() if part not in name}, path / "checkpoint.pt")


@pytest.mark.parametrize("kind", BAD)
def test_what_is_bad_is_said_in_a_line(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path / "model", "gpt_neox")
    change, message = BAD[kind]
    change(tmp_path / "model")
    pictures()[0].save(tmp_path / "x.png")
    asked = ["caption", str(tmp_path / "x.png"), "--model", str(tmp_path / "model"), "--device", "cpu"]
    code, _, err = mmt(capsys, *asked)
    assert code == 2
    assert message in err.splitlines()[-1]  # transformers has a bar of its own for what it loads
    assert "Traceback" not in err


def test_a_head_without_the_new_tokens_is_told(tmp_path: Path) -> None:
    folder(tmp_path, "llama")
    with pytest.warns(
        UserWarning, match=r"its head has \d+ rows, and \d+ tokens are embedded: those of the rest are zeros"
    ):
        ImageCaptioner.from_pretrained(tmp_path, device="cpu")
