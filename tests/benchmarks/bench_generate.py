"""Decoding: a captioner (ViT-Ti/16, GPT-2-small-shaped decoder, 50,257 words) with 5 beams, 1 and 8 pictures, against
transformers' generate with the same weights; the ids must be the same.

Then what a token costs while the picture's tokens grow, and that beams share the picture's keys and values.

python tests/benchmarks/bench_generate.py [--threads N] [--pairs N] [--only NAME] [--weights fp32|bf16|int8]

`--weights` is what ours computes with; the peer stays in float32.
"""

from dataclasses import replace
from statistics import median

import torch
from harness import agreement, compare, start, timed
from peer import VOCAB, caption_batch, make_ours, make_peer
from torch import Tensor, nn

from mmtransformer import CaptionBatch, VisionEncoderDecoder, generate
from mmtransformer.layers.weight_prepacking import prepack_weights

BEAMS, NEW = 5, 20


def prompts(rows: int) -> CaptionBatch:
    """Pictures with a begin token each."""
    batch = caption_batch(rows)
    tokens = batch.tokens[:, :1]
    yes = torch.ones_like(tokens, dtype=torch.bool)
    return CaptionBatch(tokens, yes, ~yes, pixels=batch.pixels)


def ours_ids(model: VisionEncoderDecoder, batch: CaptionBatch) -> list[list[int]]:
    found = generate(model, batch, eos_id=VOCAB - 1, max_new_tokens=NEW, min_new_tokens=NEW, num_beams=BEAMS)
    return [texts[0].tokens for texts in found]


def peer_ids(peer: nn.Module, batch: CaptionBatch) -> list[list[int]]:
    assert batch.pixels is not None
    with torch.inference_mode():
        out = peer.generate(
            batch.pixels[:, 0], decoder_input_ids=batch.tokens, max_new_tokens=NEW, min_new_tokens=NEW, num_beams=BEAMS
        )  # fmt: skip
    return out[:, 1:].tolist()


def token_cost(model: VisionEncoderDecoder, visual_tokens: int, rows: int = 4) -> tuple[float, int]:
    """CPU milliseconds of a step of `rows` pictures with 5 beams each; bytes of the pictures' keys and values."""
    batch = prompts(rows)
    tokens = torch.randn(rows, 1, visual_tokens, model.vision.dim)
    batch = CaptionBatch(batch.tokens, batch.attention_mask, batch.loss_mask, visual_tokens=tokens)
    with torch.inference_mode():
        logits, state = model.prefill(batch, expand_size=BEAMS, max_new_tokens=NEW)
        shared: list[Tensor] = [x for kv in state.context for x in kv]
        calls = []
        for _ in range(NEW - 1):
            calls.append(timed(lambda: model.decode_step(logits.argmax(1), state)).cpu)
            state.reorder(torch.arange(rows * BEAMS))
    assert all(x.shape[0] == rows for x in shared), "beams copied the pictures' keys and values"
    assert all(a is b for a, b in zip(shared, (x for kv in state.context for x in kv), strict=True))
    return 1e3 * median(calls), sum(x.numel() * x.element_size() for x in shared)


def main() -> None:
    args = start(__doc__ or "", weights=("fp32", "bf16", "int8"))
    peer = make_peer().eval()
    with torch.no_grad():  # Louder branches, so that texts depend on pictures and rounding decides no token.
        for parameter in [*peer.decoder.transformer.h.parameters(), *peer.encoder.layers.parameters()]:
            parameter.mul_(3)
    peer.generation_config.eos_token_id = peer.generation_config.pad_token_id = VOCAB - 1
    ours = make_ours(peer).eval()
    ours = prepack_weights(ours.bfloat16() if args.weights == "bf16" else ours, int8=args.weights == "int8")
    for rows in (1, 8):
        name, batch = f"{BEAMS} beams, {NEW} tokens, pictures: {rows}", prompts(rows)
        if args.only in name:
            assert batch.pixels is not None
            own = replace(batch, pixels=batch.pixels.to(next(ours.parameters()).dtype))
            print(f"{name}: {agreement(ours_ids(ours, own), peer_ids(peer, batch))}")
            compare(
                f"{name}, {args.weights}, prepacked",
                lambda batch=own: ours_ids(ours, batch),
                lambda batch=batch: peer_ids(peer, batch),
                pairs=args.pairs,
                unit=(rows * NEW, "tokens"),
            )
    if args.only in "token cost" and args.weights == "fp32":
        print(f"a step of 4 pictures with {BEAMS} beams each; keys and values of the pictures, all layers:")
        for visual_tokens in (49, 197, 577):
            cost, size = token_cost(ours, visual_tokens)
            print(
                f"  {visual_tokens:4} visual tokens: {cost:7.1f} ms CPU, {size / 2**20:6.1f} MiB (one copy a picture)"
            )


if __name__ == "__main__":
    main()
