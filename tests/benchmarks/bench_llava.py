"""LLaVA 1.5, LLaVA-NeXT and SmolVLM, greedily, one picture and eight, against transformers on the same weights.

Towers and language models are of a small kind (ViT-S, a Llama of 12 blocks of 576), with random weights; what is
theirs is how many tokens a picture has: 256 (LLaVA), 3 tiles (NeXT), 5 tiles of 16 (SmolVLM). 20 new tokens behind a
prompt of 20 words. The ids must be the same in float32.

python tests/benchmarks/bench_llava.py [--threads N] [--pairs N] [--only NAME] [--weights fp32|bf16]

`--weights` is what ours computes with; transformers computes in float32.
"""

import tempfile
from typing import Any

import torch
from harness import agreement, compare, start
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.utils import logging

from mmtransformer import Llava, TiledBatch, generate
from mmtransformer.layers.weight_packing import for_inference
from mmtransformer.weights import load_idefics3, load_llava

IMAGE, NEW, SIZE = 31999, 20, (300, 500)
TOWER = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
TEXT = {"vocab_size": 32000, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 4096, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def loud(model: nn.Module) -> Any:
    """Random, and so loud that texts depend on pictures and rounding decides no token."""
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            parameter.data.normal_(std=0.3)
        elif parameter.ndim > 1:
            parameter.data.normal_(std=2.5 * parameter[0].numel() ** -0.5)
    return model.eval()


def peers() -> dict[str, Any]:
    clip, llama = CLIPVisionConfig(**TOWER, image_size=224, patch_size=14), LlamaConfig(**TEXT)
    siglip = TOWER | {"image_size": 256, "patch_size": 16}
    points = [[224, 448], [448, 224], [448, 448]]
    return {
        "LLaVA": lambda: LlavaForConditionalGeneration(
            LlavaConfig(vision_config=clip, text_config=llama, image_token_index=IMAGE)
        ),
        "LLaVA-NeXT": lambda: LlavaNextForConditionalGeneration(
            LlavaNextConfig(vision_config=clip, text_config=llama, image_token_index=IMAGE, image_grid_pinpoints=points)
        ),
        "SmolVLM": lambda: SmolVLMForConditionalGeneration(
            SmolVLMConfig(vision_config=siglip, text_config=llama, image_token_id=IMAGE, scale_factor=4)
        ),
    }


def inputs(family: str, ours: Llava, rows: int) -> tuple[TiledBatch, dict[str, Any]]:
    """The same pictures and prompts for both."""
    side, sizes = ours.vision.image_size[0], torch.tensor([SIZE] * rows)
    tiles = 1 if family == "LLaVA" else 5
    count = tiles * 256 // ours.proj.pixel_shuffle**2
    if family == "LLaVA-NeXT":
        grid = ours.tiles.tiles(SIZE, (side, side))
        tiles, count = 1 + grid[0] * grid[1], ours.tiles.num_tokens(SIZE, grid, ours.vision.grid)
    text = torch.randint(3, IMAGE, (rows, 20))
    tokens = torch.cat((text[:, :4], torch.full((rows, count), IMAGE), text[:, 4:]), 1)
    pixels, yes = torch.randn(rows, tiles, 3, side, side), torch.ones_like(tokens, dtype=torch.bool)
    batch = TiledBatch(tokens, yes, ~yes, pixels)
    given: dict[str, Any] = {"input_ids": tokens, "attention_mask": yes.long(), "pixel_values": pixels}
    if family == "LLaVA":
        given["pixel_values"] = pixels[:, 0]
    if family == "LLaVA-NeXT":
        batch.image_sizes, given["image_sizes"] = sizes[:, None], sizes
    return batch, given


def ours_ids(ours: Llava, batch: TiledBatch) -> list[list[int]]:
    texts = generate(ours, batch, eos_id=2, max_new_tokens=NEW, min_new_tokens=NEW)
    return [best.tokens for best, *_ in texts]


def peer_ids(peer: Any, given: dict[str, Any]) -> list[list[int]]:
    with torch.inference_mode():
        rows = peer.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return rows[:, given["input_ids"].shape[1] :].tolist()


def main() -> None:
    args = start(__doc__ or "", weights=("fp32", "bf16"))
    logging.set_verbosity_error()
    for family, make in peers().items():
        if args.only not in family:
            continue
        peer = loud(make())
        with tempfile.TemporaryDirectory() as folder:
            peer.save_pretrained(folder)
            ours = for_inference((load_idefics3 if family == "SmolVLM" else load_llava)(folder), args.weights)
        for rows in (1, 8):
            batch, given = inputs(family, ours, rows)
            found, want = ours_ids(ours, batch), peer_ids(peer, given)
            name = f"{family}, pictures: {rows}, {args.weights}"
            print(f"{name}: {agreement(found, want)}; {len({tuple(row) for row in want})} different texts")
            compare(
                name,
                lambda ours=ours, batch=batch: ours_ids(ours, batch),
                lambda peer=peer, given=given: peer_ids(peer, given),
                target=1.0,
                pairs=args.pairs,
                unit=(rows, "pictures"),
            )


if __name__ == "__main__":
    main()
