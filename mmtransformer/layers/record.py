"""Attention weights of any layer, on request; without a recording nothing is computed or kept.

with record_attention(model.decoder, keep="cross_attn") as record:
    model.logits(batch)
record["blocks.0.cross_attn"]        # (b h q k)
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmtransformer.layers.attention import Attention
from mmtransformer.layers.cache import KeyValue, KVCache
from mmtransformer.layers.kernels import capped, softmax
from mmtransformer.layers.masks import Mask, broadcast
from mmtransformer.layers.positions import RotaryAngles


def has_attention(model: nn.Module) -> bool:
    """Whether a module has attention layers whose weights can be recorded; none that transformers has built does."""
    return any(isinstance(layer, Attention) for layer in model.modules())


@contextmanager
def record_attention(model: nn.Module, keep: str | Callable[[str], bool] = "") -> Iterator[dict[str, Tensor]]:
    """Records the weights of attention layers while the context is open; the result of the model stays the same.

    The weights are computed again beside the fast kernel, in float32 and without gradient. A layer that runs several
    times (decoding with a cache) keeps its last weights. Only what the thread runs that opened the context is recorded.

    Args:
        model: any module with `Attention` layers inside.
        keep: which layers: part of the name, or a function of the name; "" = all.

    Yields:
        A dictionary, filled as the model runs: layer name -> weights (b h q k).

    Raises:
        ValueError: if no layer is kept.
    """
    wanted = keep if callable(keep) else lambda name: keep in name
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Attention) and wanted(name)}
    if not layers:
        kept = f" with {keep!r} in its name" if isinstance(keep, str) and keep else ""
        raise ValueError(f"{type(model).__name__} has no attention layer{kept} whose weights can be recorded")
    record: dict[str, Tensor] = {}
    handles = [layer.register_forward_hook(_recorder(name, record), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def rollout(weights: Iterable[Tensor]) -> Tensor:
    """How much each token of the first layer is in each token of the last: attention rollout (arXiv:2005.00928).

    Heads are averaged, a residual counts as much as its branch, and layers are multiplied.

    Args:
        weights: self-attention of each layer, first layer first, each (b h q q); such as `record.values()`.

    Returns:
        (b q q), the last layer's tokens over the first layer's; each row sums to 1 if the layers' do.

    Raises:
        ValueError: if there is no layer, or one that is not self-attention over the same tokens.
    """
    found: Tensor | None = None
    for layer in weights:
        mean = layer.float().mean(1)
        if mean.shape[1] != mean.shape[2] or (found is not None and found.shape != mean.shape):
            raise ValueError(f"rollout takes square weights (b h q q) of equal size, not {tuple(layer.shape)}")
        mixed = (mean + torch.eye(mean.shape[1], device=mean.device)) / 2
        found = mixed if found is None else mixed @ found
    if found is None:
        raise ValueError("rollout needs the weights of 1 layer at least, not of 0")
    return found


def _recorder(name: str, record: dict[str, Tensor]) -> Callable:
    mine = threading.get_ident()  # The model's layers are shared by all threads, and so are their hooks.

    def hook(layer: Attention, args: tuple, *rest: Any) -> None:  # kwargs and output; other threads may see it half put
        if threading.get_ident() == mine:  # up or half taken down: without kwargs, then
            record[name] = _weights(layer, *args, **rest[0])

    return hook


@torch.no_grad()
def _weights(
    layer: Attention,
    x: Tensor,
    context: Tensor | KeyValue | None = None,
    *,
    mask: Mask | None = None,
    rope: RotaryAngles | None = None,
    cache: KVCache | None = None,
) -> Tensor:
    # The layer has run: its cache already holds the new keys.
    q, kv = layer.project(x, context if cache is None else cache.view())
    k = kv.k
    if rope is not None:
        q, k = rope.rotate(q), k if cache is not None else rope.rotate(k)
    return attention_weights(q, k, mask, layer.softcap)


def attention_weights(q: Tensor, k: Tensor, mask: Mask | None = None, softcap: float | None = None) -> Tensor:
    """The weights that `attend` puts on keys (n g k c) for queries (b h q c), in float32: (b h q k)."""
    k = k.repeat_interleave(q.shape[0] // k.shape[0], 0).repeat_interleave(q.shape[1] // k.shape[1], 1).float()
    scores = (q.float() * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return softmax(capped(scores, softcap), broadcast(mask, q.shape[2], k.shape[2], q.device))
