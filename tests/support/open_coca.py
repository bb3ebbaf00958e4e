"""open_clip's CoCa written out: its forward pass by its names."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
