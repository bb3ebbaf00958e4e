"""CoCa of open_clip, there and back: by its definition written out, and beside itself where it is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtransformer import (
    CaptionBatch,
    GenerationConfig,
    OpenCoCa,
    ViT,
    ViTBlockConfig,
    ViTOutputConfig,
    ViTPatchConfig,
    generate,
)
from mmtransformer.weights import load_open_coca, save_open_coca
from mmtransformer.weights.captioners.open_coca import open_coca_from_state, to_open_coca
from support.open_coca import reference
from support.public import close, noisy

VOCAB, END = 53, 7


def coca(width: int = 24, activation: Any = "gelu") -> OpenCoCa:
    torch.manual_seed(1)
    vision = ViT(
        21, 7, 24, 2, 3, patches=ViTPatchConfig(bias=False, pre_norm=True), block=ViTBlockConfig(activation, 1e-5),
        output=ViTOutputConfig("none"),
    )  # fmt: skip
    heads = width // 8
    model = OpenCoCa(
        vision, VOCAB, width, 2, 3, heads, max_len=12, num_queries=5, pool_heads=heads, activation=activation
    )
    return noisy(model, 0.3)


SHAPES: dict[str, tuple[int, Any]] = {"as wide as the tower": (24, "gelu"), "narrower": (16, "quick_gelu")}


def inputs(q: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    real = torch.arange(q) < torch.tensor([9, 4, 6])[:, None]
    return torch.randn(3, 3, 21, 21), torch.randint(1, VOCAB, (3, q)), real


def given(pixels: Tensor, tokens: Tensor, real: Tensor) -> CaptionBatch:
    return CaptionBatch(tokens, real, real, pixels=pixels)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_by_definition(shape: str) -> None:
    ours = coca(*SHAPES[shape])
    config, state = to_open_coca(ours)
    pixels, tokens, real = inputs()
    padded = F.pad(tokens.masked_fill(~real, 0), (0, 3))
    logits, image, text = reference(config, state, pixels, padded)
    batch = given(pixels, tokens, real)
    close(ours.logits(batch)[real], logits[:, :9][real])
    close(ours.image_features(batch), image)
    close(ours.text_features(batch), text)
    again = open_coca_from_state(config, state, "it")
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_ids_of_left_padded_prompts_are_those_of_each_alone(shape: str, beams: int) -> None:
    """A search written out over the definition: every beam's whole text is read again for each token."""
    ours = coca(*SHAPES[shape])
    ours.lm_head.weight.data[0] = 0  # So that it is never written: open_clip would take it for padding.
    config, state = to_open_coca(ours)
    pixels, _, _ = inputs()
    prompts = [[3], [3, 9, 11], [3, 20]]
    wanted = []
    for n, prompt in enumerate(prompts):
        alive, done = [(0.0, prompt)], []
        for _ in range(6):
            found = []
            for score, ids in alive:
                logits = reference(config, state, pixels[n : n + 1], torch.tensor([ids]))[0][0, -1]
                more = logits.log_softmax(-1).topk(2 * beams)
                found += [(score + s, [*ids, t]) for s, t in zip(*(x.tolist() for x in more), strict=True)]
            found = sorted(found, reverse=True)[: 2 * beams]
            done += [(s / (len(ids) - len(prompt)), ids[:-1]) for s, ids in found[:beams] if ids[-1] == END]
            alive = [one for one in found if one[1][-1] != END][:beams]
        done += [(s / (len(ids) - len(prompt)), ids) for s, ids in alive]
        wanted.append(max(done)[1][len(prompt) :])
    real = torch.arange(3) >= torch.tensor([2, 0, 1])[:, None]
    tokens = torch.tensor([[0, 0, 3], [3, 9, 11], [0, 3, 20]])
    batch = CaptionBatch(tokens, real, torch.zeros_like(real), pixels=pixels)
    search = GenerationConfig(max_new_tokens=6, num_beams=beams)
    found = [list(best.tokens) for best, *_ in generate(ours, batch, search, eos_id=END)]
    assert found == wanted


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_open_clip_reads_what_is_written(shape: str, tmp_path: Path) -> None:
    ours = coca(*SHAPES[shape])
    save_open_coca(ours, tmp_path)
    again = load_open_coca(tmp_path)
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in again.state_dict().items())
    again.save_pretrained(tmp_path / "ours")
    OpenCoCa.from_pretrained(tmp_path / "ours")
    pytest.importorskip("open_clip")
    from open_clip.coca_model import CoCa  # pyright: ignore[reportMissingImports]

    config, state = to_open_coca(ours)
    config = {name: value for name, value in config.items() if name != "custom_text"}
    theirs = CoCa(**config).eval()
    theirs.load_state_dict(state, strict=True)
    pixels, tokens, real = inputs()
    text, whole = tokens.masked_fill(~real, 0), given(pixels, tokens, real)
    image, embs = theirs._encode_image(pixels)
    close(ours.image_features(whole), image)
    close(ours.text_features(whole), theirs.encode_text(F.pad(text, (0, 3))))
    logits = theirs.text_decoder(embs, theirs._encode_text(text)[1])
    close(ours.logits(whole)[real], logits[real])


def test_what_is_refused() -> None:
    config, state = to_open_coca(coca())
    for part, changed, message in (
        ("vision_cfg", {"attentional_pool": False}, "attentional_pool is False"),
        ("text_cfg", {"embed_cls": False}, "embed_cls is False"),
        ("multimodal_cfg", {"width": 16}, "width is 16, and OpenCoCa has only 24"),
    ):
        with pytest.raises(ValueError, match=message):
            open_coca_from_state(config | {part: config[part] | changed}, state, "it")
    with pytest.raises(ValueError, match="has no multimodal_cfg: not a CoCa"):
        open_coca_from_state({k: v for k, v in config.items() if k != "multimodal_cfg"}, state, "it")
    with pytest.raises(ValueError, match=r"missing: text\.cls_emb"):
        open_coca_from_state(config, {k: v for k, v in state.items() if k != "text.cls_emb"}, "it")
    tower = ViT(21, 7, 24, 1, 3, class_token=False, pool="mean")
    with pytest.raises(ValueError, match="nothing like class_token=False"):
        to_open_coca(OpenCoCa(tower, VOCAB, 24, 1, 1, 3, num_queries=3, pool_heads=3))
    with pytest.raises(ValueError, match=r"num_queries \(1\) must be at least 2"):
        OpenCoCa(ViT(21, 7, 24, 1, 3), num_queries=1)
