"""Greedy generation of a language model shaped as GPT-2 small (50,257 words, random weights, fp32, 64 new tokens),
against transformers' generate with the same weights: the ids must be the same.

python tests/benchmarks/bench_lm.py [--threads N] [--pairs N] [--only NAME] [--weights fp32|bf16|int8]
    [--peer fp32|bf16]

`--weights` is what ours computes with, `--peer` what the peer does: float32, as it comes, unless told.
"""

from typing import Any

import torch
import transformers
from harness import agreement, compare, start
from torch import Tensor

from mmtransformer import CaptionBatch, generate
from mmtransformer.layers.weight_prepacking import prepack_weights
from mmtransformer.weights import from_transformers

PROMPT, NEW, VOCAB = 16, 64, 50257
TARGETS = {"fp32": {1: 1.0, 8: 2.2, 32: 1.0}, "int8": {1: 2.0, 8: 3.0, 32: 2.0}, "bf16": {1: None, 8: None, 32: None}}
"""By weights and rows; `dtype="auto"` takes int8 for a model of this size."""


def make_peer() -> Any:
    """GPT-2 small with branches three times as loud, so that what is written depends on all of it."""
    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    peer: Any = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in peer.transformer.h.parameters():
            parameter.mul_(3)
    peer.generation_config.eos_token_id = peer.generation_config.pad_token_id = VOCAB - 1
    return peer


def ours_ids(model: Any, tokens: Tensor) -> list[list[int]]:
    yes = torch.ones_like(tokens, dtype=torch.bool)
    batch = CaptionBatch(tokens, yes, ~yes)
    found = generate(model, batch, eos_id=VOCAB - 1, max_new_tokens=NEW, min_new_tokens=NEW)
    return [texts[0].tokens for texts in found]


def peer_ids(peer: Any, tokens: Tensor) -> list[list[int]]:
    with torch.inference_mode():
        out = peer.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )  # fmt: skip
    return out[:, PROMPT:].tolist()


def main() -> None:
    args = start(__doc__ or "", weights=("fp32", "bf16", "int8"), peer=("fp32", "bf16"))
    peer = make_peer()
    ours = from_transformers(peer)
    peer = peer.bfloat16() if args.peer == "bf16" else peer
    ours = prepack_weights(ours.bfloat16() if args.weights == "bf16" else ours, int8=args.weights == "int8")
    for rows, target in TARGETS[args.weights].items():
        name, tokens = f"greedy, {NEW} tokens, rows: {rows}", torch.randint(0, VOCAB - 1, (rows, PROMPT))
        if args.only in name:
            print(f"{name}: {agreement(ours_ids(ours, tokens), peer_ids(peer, tokens))}")
            compare(
                f"{name}, {args.weights}, prepacked"
                + (", the peer too" if args.peer == args.weights != "fp32" else ""),
                lambda tokens=tokens: ours_ids(ours, tokens),
                lambda tokens=tokens: peer_ids(peer, tokens),
                pairs=args.pairs,
                target=target if args.peer == "fp32" else None,
                unit=(rows * NEW, "tokens"),
            )


if __name__ == "__main__":
    main()
