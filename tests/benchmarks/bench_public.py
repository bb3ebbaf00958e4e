"""Public captioners with each family's own search, one picture and eight, against transformers on the same weights.

BLIP-base (384 px, greedy, 20 new tokens), ViT-GPT2 (224 px, 4 beams, 15 new tokens) and GIT-base (224 px, greedy, 20
new tokens), in their published shapes with random weights; or small ones, which only say that all runs. The ids must be
the same in float32.

python tests/benchmarks/bench_public.py [--threads N] [--pairs N] [--only NAME] [--weights fp32|bf16|int8|auto]
                                        [--peer fp32|bf16] [--size base|small]

`--weights` is what ours computes with (auto: what `dtype="auto"` takes here), `--peer` what transformers does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import agreement, compare, start
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.utils import logging

from mmtransformer import CaptionBatch, Captioner, GenerationConfig, generate
from mmtransformer.layers.weight_prepacking import for_inference
from mmtransformer.pipelines.base import resolve_precision
from mmtransformer.weights import from_transformers

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def loud(model: nn.Module) -> Any:
    """Random, and so loud that texts depend on pictures and rounding decides no token."""
    for name, parameter in model.named_parameters():
        if "word_embeddings" in name or "wte" in name:
            parameter.data.normal_(std=0.3)
        elif parameter.ndim > 1:
            parameter.data.normal_(std=2.5 * parameter[0].numel() ** -0.5)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def blip(small: bool) -> tuple[nn.Module, int, int, dict[str, Any]]:
    """BLIP-base: the model, its images' side, the first id of a text, and its search."""
    vision: dict[str, Any] = SMALL | {"image_size": 64} if small else {}
    text: dict[str, Any] = SMALL if small else {"num_attention_heads": 12}
    config = BlipConfig(vision_config=vision, text_config=text)
    return loud(BlipForConditionalGeneration(config)), 64 if small else 384, 30522, {"max_new_tokens": 20}


def vit_gpt2(small: bool) -> tuple[nn.Module, int, int, dict[str, Any]]:
    """The same of nlpconnect/vit-gpt2-image-captioning."""
    vision = ViTConfig(**SMALL, image_size=64) if small else ViTConfig()
    text = GPT2Config(n_embd=64, n_layer=2, n_head=4) if small else GPT2Config()
    end = text.vocab_size - 1
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        vision, text, decoder_start_token_id=end, eos_token_id=end, pad_token_id=end
    )
    search = {"max_new_tokens": 15, "num_beams": 4}
    return loud(VisionEncoderDecoderModel(config)), 64 if small else 224, end, search


def git(small: bool) -> tuple[nn.Module, int, int, dict[str, Any]]:
    """The same of microsoft/git-base."""
    vision: dict[str, Any] = SMALL | {"image_size": 64} if small else {}
    text: dict[str, Any] = SMALL if small else {}
    config = GitConfig(vision_config=vision, **text)
    return loud(GitForCausalLM(config)), 64 if small else 224, 101, {"max_new_tokens": 20}


FAMILIES: dict[str, tuple[Callable[[bool], tuple[Any, int, int, dict[str, Any]]], int]] = {
    "BLIP": (blip, 102),
    "ViT-GPT2": (vit_gpt2, 50256),
    "GIT": (git, 102),
}

TARGETS = {"BLIP": 2.0, "ViT-GPT2": 1.5, "GIT": 1.0}
"""In float32 on both sides."""


def ours_ids(model: Captioner, pixels: Tensor, first: int, end: int, search: dict[str, Any]) -> list[list[int]]:
    tokens = torch.full((len(pixels), 1), first)
    yes = torch.ones_like(tokens, dtype=torch.bool)
    config = GenerationConfig(**search, min_new_tokens=search["max_new_tokens"])
    return [texts[0].tokens for texts in generate(model, CaptionBatch(tokens, yes, ~yes, pixels), config, eos_id=end)]


def peer_ids(peer: Any, pixels: Tensor, search: dict[str, Any]) -> list[list[int]]:
    with torch.inference_mode():
        rows = peer.generate(pixel_values=pixels.to(peer.dtype), **search, min_new_tokens=search["max_new_tokens"])
    return rows[:, 1:].tolist()


def main() -> None:
    args = start(__doc__ or "", weights=("fp32", "bf16", "int8", "auto"), peer=("fp32", "bf16"), size=("base", "small"))
    logging.set_verbosity_error()
    for family, (make, end) in FAMILIES.items():
        names = {r: f"{family} {args.size}, pictures: {r}, {args.weights} beside {args.peer}" for r in (1, 8)}
        if not any(args.only in name for name in names.values()):
            continue
        peer, side, first, search = make(args.size == "small")
        ours = from_transformers(peer)
        precision = resolve_precision(args.weights, None, "cpu", ours.decoder)
        ours = for_inference(ours, precision)
        peer = peer.bfloat16() if args.peer == "bf16" else peer
        for rows, name in names.items():
            pixels = torch.randn(rows, 3, side, side)
            if args.only not in name:
                continue
            found, want = ours_ids(ours, pixels, first, end, search), peer_ids(peer, pixels, search)
            print(f"{name}: {agreement(found, want)}; {len({tuple(row) for row in want})} different texts")
            same = args.weights == args.peer == "fp32"
            compare(
                name,
                partial(ours_ids, ours, pixels, first, end, search),
                partial(peer_ids, peer, pixels, search),
                target=TARGETS[family] if same else 2.0,
                pairs=args.pairs,
                unit=(rows, "pictures"),
            )


if __name__ == "__main__":
    main()
