"""CoCa of open_clip, there and back: by its definition written out, and beside itself where it is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtransformer import (
    BlockConfig,
    CaptionBatch,
    GenerationConfig,
    OpenCoCa,
    OutputConfig,
    PatchConfig,
    ViT,
    generate,
)
from mmtransformer.weights import load_open_coca, open_coca_to_open_clip, save_open_coca
from mmtransformer.weights.captioners.open_coca import open_coca_from_state
from support.public import close, noisy

VOCAB, END = 53, 7


def coca(width: int = 24, activation: Any = "gelu") -> OpenCoCa:
    torch.manual_seed(1)
    vision = ViT(
        21, 7, 24, 2, 3, patches=PatchConfig(bias=False, norm=True), block=BlockConfig(activation, 1e-5),
        output=OutputConfig("none"),
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


# --- open_clip's forward pass, by its names


def attended(s: dict[str, Tensor], p: str, x: Tensor, y: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    weights = (
        s[f"{p}in_proj_weight"].chunk(3) if f"{p}in_proj_weight" in s else [s[f"{p}{n}_proj_weight"] for n in "qkv"]
    )
    given = zip((x, y, y), weights, s[f"{p}in_proj_bias"].chunk(3), strict=True)
    q, k, v = (F.linear(t, w, b).unflatten(-1, (heads, -1)).transpose(1, 2) for t, w, b in given)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return F.linear(out, s[f"{p}out_proj.weight"], s[f"{p}out_proj.bias"])


def normed(s: dict[str, Tensor], p: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{p}.weight"], s[f"{p}.bias"])


def block(s: dict[str, Tensor], p: str, x: Tensor, heads: int, act: Any, mask: Any = None, image: Any = None) -> Tensor:
    y = normed(s, f"{p}ln_1", x)
    x = x + attended(s, f"{p}attn.", y, y if image is None else normed(s, f"{p}ln_1_kv", image), heads, mask)
    hidden = act(F.linear(normed(s, f"{p}ln_2", x), s[f"{p}mlp.c_fc.weight"], s[f"{p}mlp.c_fc.bias"]))
    return x + F.linear(hidden, s[f"{p}mlp.c_proj.weight"], s[f"{p}mlp.c_proj.bias"])


def reference(config: dict[str, Any], s: dict[str, Tensor], pixels: Tensor, tokens: Tensor) -> Any:
    """Logits (n q v), and image and text vectors; padding has id 0."""
    heads, (n, q) = config["text_cfg"]["heads"], tokens.shape
    act: Any = (lambda x: x * (1.702 * x).sigmoid()) if config.get("quick_gelu") else F.gelu
    x = F.conv2d(pixels, s["visual.conv1.weight"], stride=7).flatten(2).transpose(1, 2)
    x = torch.cat((s["visual.class_embedding"].expand(n, 1, -1), x), 1) + s["visual.positional_embedding"]
    x = normed(s, "visual.ln_pre", x)
    for i in range(config["vision_cfg"]["layers"]):
        x = block(s, f"visual.transformer.resblocks.{i}.", x, 3, act)
    asked = normed(s, "visual.attn_pool.ln_q", s["visual.attn_pool.query"])[None].expand(n, -1, -1)
    keys = normed(s, "visual.attn_pool.ln_k", x)
    pooled = attended(s, "visual.attn_pool.attn.", asked, keys, config["vision_cfg"]["attn_pooler_heads"])
    pooled = normed(s, "visual.ln_post", pooled)
    image = F.normalize(pooled[:, 0] @ s["visual.proj"], dim=-1)
    y = torch.cat((s["text.token_embedding.weight"][tokens], s["text.cls_emb"].expand(n, 1, -1)), 1)
    y = y + s["text.positional_embedding"][: q + 1]
    causal = torch.ones(q + 1, q + 1, dtype=torch.bool).tril()
    mask = causal & F.pad(tokens != 0, (1, 0), value=True)[:, None, None]
    for i in range(config["text_cfg"]["layers"]):
        y = block(s, f"text.transformer.resblocks.{i}.", y, heads, act, mask)
    text = F.normalize(normed(s, "text.ln_final", y[:, -1]) @ s["text.text_projection"], dim=-1)
    z = y[:, :-1]
    for i in range(config["multimodal_cfg"]["layers"]):
        z = block(s, f"text_decoder.resblocks.{i}.", z, heads, act, causal[:q, :q])
        z = block(s, f"text_decoder.cross_attn.{i}.", z, heads, act, image=pooled[:, 1:])
    return normed(s, "text_decoder.ln_final", z) @ s["text_decoder.text_projection"], image, text


def given(pixels: Tensor, tokens: Tensor, real: Tensor) -> CaptionBatch:
    return CaptionBatch(tokens, real, real, pixels=pixels)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_by_definition(shape: str) -> None:
    ours = coca(*SHAPES[shape])
    config, state = open_coca_to_open_clip(ours)
    pixels, tokens, real = inputs()
    padded = F.pad(tokens.masked_fill(~real, 0), (0, 3))
    logits, image, text = reference(config, state, pixels, padded)
    batch = given(pixels, tokens, real)
    close(ours.logits(batch)[real], logits[:, :9][real])
    close(ours.embed_images(batch), image)
    close(ours.embed_texts(batch), text)
    again = open_coca_from_state(config, state, "it")
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_ids_of_left_padded_prompts_are_those_of_each_alone(shape: str, beams: int) -> None:
    """A search written out over the definition: every beam's whole text is read again for each token."""
    ours = coca(*SHAPES[shape])
    ours.lm_head.weight.data[0] = 0  # So that it is never written: open_clip would take it for padding.
    config, state = open_coca_to_open_clip(ours)
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

    config, state = open_coca_to_open_clip(ours)
    config = {name: value for name, value in config.items() if name != "custom_text"}
    theirs = CoCa(**config).eval()
    theirs.load_state_dict(state, strict=True)
    pixels, tokens, real = inputs()
    text, whole = tokens.masked_fill(~real, 0), given(pixels, tokens, real)
    image, embs = theirs._encode_image(pixels)
    close(ours.embed_images(whole), image)
    close(ours.embed_texts(whole), theirs.encode_text(F.pad(text, (0, 3))))
    logits = theirs.text_decoder(embs, theirs._encode_text(text)[1])
    close(ours.logits(whole)[real], logits[real])


def test_what_is_refused() -> None:
    config, state = open_coca_to_open_clip(coca())
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
        open_coca_to_open_clip(OpenCoCa(tower, VOCAB, 24, 1, 1, 3, num_queries=3, pool_heads=3))
    with pytest.raises(ValueError, match=r"num_queries \(1\) must be at least 2"):
        OpenCoCa(ViT(21, 7, 24, 1, 3), num_queries=1)
