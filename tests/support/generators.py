"""Small models of every kind that writes text, with prompts for them and what they write."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from mmtransformer import (
    AttentionConfig,
    Blip2,
    Blip2QFormer,
    CaptionBatch,
    CoCa,
    ExtendedDecoder,
    Flamingo,
    GatedBlockConfig,
    Git,
    MLPConfig,
    NormConfig,
    PaliGemma,
    PositionConfig,
    PrefixCaptioner,
    QFormer,
    Seq2SeqBatch,
    TextDecoder,
    Transformer,
    VisionEncoderDecoder,
    ViT,
    generate,
)

EOS, VOCAB, DIM, ROWS = 2, 23, 24, 3


def noisy(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def decoder(**options: Any) -> TextDecoder:
    return TextDecoder(VOCAB, DIM, 2, 4, max_len=37, **options)


def vit() -> ViT:
    return ViT(16, 8, DIM, 1, 4)


LLAMA: dict[str, Any] = {
    "attention": AttentionConfig(num_kv_heads=2, bias=False),
    "mlp": MLPConfig("swiglu", bias=False),
    "norm": NormConfig("rms"),
    "positions": PositionConfig("rotary"),
}


LONG = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 11, "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 7.0]}  # fmt: skip


QUERIES: dict[str, Any] = {"num_queries": 3, "dim": DIM, "depth": 2, "num_heads": 4, "visual_dim": DIM}


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": decoder,
    "llama": lambda: decoder(**LLAMA | {"attention": AttentionConfig(2, bias=False, qk_norm="rms")}),
    "window": lambda: decoder(**LLAMA | {"attention": AttentionConfig(2, bias=False, window=5)}),
    "longrope": lambda: decoder(
        **LLAMA | {"positions": PositionConfig("rotary", scaling=LONG), "attention": AttentionConfig(2, 4, bias=False)}
    ),
    "extended": lambda: ExtendedDecoder(decoder(), 3),
    "transformer": lambda: Transformer(VOCAB, DIM, 2, 4, mlp_dim=31, max_len=37),
    "cross-attention": lambda: VisionEncoderDecoder(vit(), decoder(context_dim=DIM)),
    "flamingo": lambda: Flamingo(vit(), decoder(), gated=GatedBlockConfig(3, 7), visible_images="all_previous"),
    "blip2": lambda: Blip2(vit(), QFormer(**QUERIES), decoder()),
    "image-text": lambda: Blip2QFormer(vit(), QFormer(**QUERIES, vocab_size=VOCAB, max_len=37)),
    "paligemma": lambda: PaliGemma(vit(), decoder()),
    "git": lambda: Git(vit(), decoder()),
    "prefix": lambda: PrefixCaptioner(vit(), decoder()),
    "coca": lambda: CoCa(vit(), decoder(), decoder(context_dim=DIM, positions=PositionConfig("rotary")), num_heads=4),
}


def batch_for(model: Any, seed: int, rows: int = ROWS) -> Any:
    """Prompts of 4, 2 and 3 tokens, padded on the left; two pictures a row."""
    torch.manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (rows, 4))
    attention_mask = torch.arange(4) >= torch.tensor([0, 2, 1, 3, 1])[:rows, None]
    if isinstance(model, Transformer):
        source = torch.randint(3, VOCAB, (rows, 6))
        seen = torch.arange(6) < torch.tensor([6, 3, 4, 5, 6])[:rows, None]
        return Seq2SeqBatch(source, seen, tokens, attention_mask, attention_mask)
    batch = CaptionBatch(tokens, attention_mask, attention_mask, pixels=torch.randn(rows, 2, 3, 16, 16))
    if isinstance(model, Flamingo):  # Rows see none, one or both of their pictures, by a mask.
        last = torch.tensor([0, 1, 2, 1, 2])[:rows, None].expand(rows, 4)
        return replace(batch, image_index=torch.where(attention_mask, last, 0))
    return batch if hasattr(model, "vision") else CaptionBatch(tokens, attention_mask, attention_mask)


def told(model: Any, batch: Any, **options: Any) -> list[list[tuple[list[int], float]]]:
    found = generate(model, batch, eos_id=EOS, max_new_tokens=9, **options)
    return [[(text.tokens, round(text.log_prob, 3)) for text in row] for row in found]
