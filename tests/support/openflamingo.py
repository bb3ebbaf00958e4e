"""OpenFlamingo: no package of it can be installed, so its definition is written down here, with its names."""

import torch
from torch import Tensor

DIM, VISUAL = 24, 20
HEADS, WIDTH = 2, 64


def norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, WIDTH)).transpose(-2, -3)


def feed(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    hidden = norm(x, state, f"{name}.0") @ state[f"{name}.1.weight"].T
    return 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)) @ state[f"{name}.3.weight"].T


def perceiver(state: dict[str, Tensor], x: Tensor, depth: int) -> Tensor:
    """Visual tokens (i t p d) of one row's pictures -> (i l d)."""
    if "perceiver.frame_embs" in state:
        x = x + state["perceiver.frame_embs"][: x.shape[1], None]
    x = x.flatten(1, 2)
    if "perceiver.media_time_embs" in state:
        x = x + state["perceiver.media_time_embs"][: len(x)]
    latents = state["perceiver.latents"].expand(len(x), -1, -1)
    for n in range(depth):
        name = f"perceiver.layers.{n}.0"
        media, asking = norm(x, state, f"{name}.norm_media"), norm(latents, state, f"{name}.norm_latents")
        q = split(asking @ state[f"{name}.to_q.weight"].T) * WIDTH**-0.5
        k, v = (torch.cat((media, asking), 1) @ state[f"{name}.to_kv.weight"].T).chunk(2, -1)
        weights = (q @ split(k).transpose(-1, -2)).softmax(-1)
        out = (weights @ split(v)).transpose(-2, -3).flatten(-2)
        latents = latents + out @ state[f"{name}.to_out.weight"].T
        latents = latents + feed(latents, state, f"perceiver.layers.{n}.1")
    return norm(latents, state, "perceiver.norm")


def gated(state: dict[str, Tensor], name: str, x: Tensor, latents: Tensor, media: Tensor) -> Tensor:
    """One row's tokens (q d), latents (i l c), the number (q) of each token's last picture, 0 = none yet."""
    q = split(norm(x, state, f"{name}.attn.norm") @ state[f"{name}.attn.to_q.weight"].T) * WIDTH**-0.5
    k, v = (latents.flatten(0, 1) @ state[f"{name}.attn.to_kv.weight"].T).chunk(2, -1)
    times = torch.arange(1, len(latents) + 1).repeat_interleave(latents.shape[1])
    scores = (q @ split(k).transpose(-1, -2)).masked_fill(media[:, None] != times, torch.finfo(x.dtype).min)
    weights = scores.softmax(-1).masked_fill((media == 0)[:, None], 0.0)
    out = (weights @ split(v)).transpose(-2, -3).flatten(-2)
    x = x + state[f"{name}.attn_gate"].tanh() * (out @ state[f"{name}.attn.to_out.weight"].T)
    return x + state[f"{name}.ff_gate"].tanh() * feed(x, state, f"{name}.ff")


def checkpoint(numbers: tuple[int, ...], times: bool = False, *, layers: str = "transformer.h") -> dict[str, Tensor]:
    """A small one with all names and shapes of a real one."""
    shapes: dict[str, tuple[int, ...]] = {"perceiver.latents": (5, VISUAL)}
    if times:
        shapes |= {"perceiver.frame_embs": (4, VISUAL), "perceiver.media_time_embs": (3, 1, VISUAL)}
    inner = HEADS * WIDTH

    def norms(*names: str, dim: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{part}": (dim,) for name in names for part in ("weight", "bias")}

    def layer(name: str, dim: int, context: int) -> dict[str, tuple[int, ...]]:
        wide = {"to_q": (inner, dim), "to_kv": (2 * inner, context), "to_out": (dim, inner)}
        return {f"{name}.{key}.weight": shape for key, shape in wide.items()}

    def mlp(name: str, dim: int) -> dict[str, tuple[int, ...]]:
        return norms(f"{name}.0", dim=dim) | {f"{name}.1.weight": (4 * dim, dim), f"{name}.3.weight": (dim, 4 * dim)}

    for n in range(2):
        name = f"perceiver.layers.{n}"
        shapes |= norms(f"{name}.0.norm_media", f"{name}.0.norm_latents", dim=VISUAL) | layer(
            f"{name}.0", VISUAL, VISUAL
        )
        shapes |= mlp(f"{name}.1", VISUAL)
    shapes |= norms("perceiver.norm", dim=VISUAL)
    for n in numbers:
        name = f"lang_encoder.{layers}.{n}.gated_cross_attn_layer"
        shapes |= {f"{name}.attn_gate": (1,), f"{name}.ff_gate": (1,)} | norms(f"{name}.attn.norm", dim=DIM)
        shapes |= layer(f"{name}.attn", DIM, VISUAL) | mlp(f"{name}.ff", DIM)
    torch.manual_seed(8)
    return {name: (0.3 * torch.randn(shape) + (len(shape) == 1)).double() for name, shape in shapes.items()}
