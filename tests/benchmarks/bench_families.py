"""LLaVA 1.5, LLaVA-NeXT, SmolVLM, BLIP-2, PaliGemma and Idefics, greedily, against transformers on the same weights.

One picture and eight. Towers and language models are of a small kind (ViT-S, 12 blocks of 576), with random weights;
what is theirs is how pictures reach the text: 256 tokens (LLaVA, PaliGemma), 3 tiles (NeXT), 5 tiles of 16 (SmolVLM),
32 queries of a Q-Former (BLIP-2), 64 latents and gated attention before every fourth block (Idefics). 20 new tokens
behind a prompt of 20 words. The ids must be the same in float32.

python tests/benchmarks/bench_families.py [--threads N] [--pairs N] [--only NAME] [--weights fp32|bf16]

`--weights` is what ours computes with; transformers computes in float32.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from harness import agreement, compare, start
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    OPTConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.utils import logging

from mmtransformer import CaptionBatch, Captioner, Llava, TiledBatch, generate
from mmtransformer.layers.weight_prepacking import for_inference
from mmtransformer.weights import load_blip2, load_idefics, load_idefics3, load_llava, load_paligemma

IMAGE, NEW, SIZE, WORDS, QUERIES = 31999, 20, (300, 500), 20, 32
TOWER = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
TEXT = {"vocab_size": 32000, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 4096, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def loud(model: nn.Module) -> Any:
    """Random, and so loud that texts depend on pictures and rounding decides no token."""
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "alpha" in name:  # alpha: Idefics' gates, which begin at zero
            parameter.data.normal_(std=0.3)
        elif parameter.ndim > 1:
            scale = 1.0 if "vision" in name else 2.5
            parameter.data.normal_(std=scale * parameter[0].numel() ** -0.5)
    return model.eval()


def llava() -> nn.Module:
    clip = CLIPVisionConfig(**TOWER, image_size=224, patch_size=14)
    config = LlavaConfig(vision_config=clip, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config)


def llava_next() -> nn.Module:
    clip, points = CLIPVisionConfig(**TOWER, image_size=224, patch_size=14), [[224, 448], [448, 224], [448, 448]]
    config = LlavaNextConfig(
        vision_config=clip, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE, image_grid_pinpoints=points
    )
    return LlavaNextForConditionalGeneration(config)


def smolvlm() -> nn.Module:
    siglip = TOWER | {"image_size": 256, "patch_size": 16}
    config = SmolVLMConfig(vision_config=siglip, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=4)
    return SmolVLMForConditionalGeneration(config)


def blip2() -> nn.Module:
    opt = OPTConfig(vocab_size=32000, hidden_size=576, word_embed_proj_dim=576, ffn_dim=2304, num_hidden_layers=12,
                    num_attention_heads=9, max_position_embeddings=512)  # fmt: skip
    qformer = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536,
               "encoder_hidden_size": 384}  # fmt: skip
    config = Blip2Config(
        vision_config=TOWER | {"image_size": 224, "patch_size": 14}, qformer_config=qformer, text_config=opt,
        num_query_tokens=QUERIES, image_token_index=IMAGE,
    )  # fmt: skip
    return Blip2ForConditionalGeneration(config)


def paligemma() -> nn.Module:
    siglip = TOWER | {"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 14,
                      "vision_use_head": False}  # fmt: skip
    gemma = TEXT | {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 64}
    config = PaliGemmaConfig(
        vision_config=siglip, text_config=gemma, projection_dim=576, hidden_size=576, image_token_index=IMAGE
    )
    return PaliGemmaForConditionalGeneration(config)


def idefics() -> nn.Module:
    vision = {"embed_dim": 384, "image_size": 224, "patch_size": 14, "intermediate_size": 1536, "num_hidden_layers": 12,
              "num_attention_heads": 6}  # fmt: skip
    resampler = {"use_resampler": True, "resampler_n_latents": 64, "resampler_depth": 2, "resampler_n_heads": 6,
                 "resampler_head_dim": 64}  # fmt: skip
    text = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    config = IdeficsConfig(
        **text, vision_config=vision, perceiver_config=resampler, use_resampler=True, cross_layer_interval=4
    )
    return IdeficsForVisionText2Text(config)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[str], Any]]] = {
    "LLaVA": (llava, load_llava),
    "LLaVA-NeXT": (llava_next, load_llava),
    "SmolVLM": (smolvlm, load_idefics3),
    "BLIP-2": (blip2, load_blip2),
    "PaliGemma": (paligemma, load_paligemma),
    "Idefics": (idefics, load_idefics),
}


def inputs(family: str, ours: Any, rows: int) -> tuple[CaptionBatch, dict[str, Any]]:
    """The same pictures and prompts for both."""
    if isinstance(ours, Llava):
        return tiled_inputs(family, ours, rows)
    text, pixels = torch.randint(3, IMAGE, (rows, WORDS)), torch.randn(rows, 3, 224, 224)
    yes = torch.ones_like(text, dtype=torch.bool)
    batch, given = CaptionBatch(text, yes, ~yes, pixels), {"input_ids": text, "pixel_values": pixels}
    if family == "Idefics":
        batch.image_index = torch.ones_like(text)
        given |= {"pixel_values": pixels[:, None], "image_attention_mask": yes.long()[..., None]}
    else:
        count = QUERIES if family == "BLIP-2" else 256
        given["input_ids"] = torch.cat((torch.full((rows, count), IMAGE), text), 1)
    if family == "PaliGemma":
        given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    return batch, given | {"attention_mask": torch.ones_like(given["input_ids"])}


def tiled_inputs(family: str, ours: Llava, rows: int) -> tuple[TiledBatch, dict[str, Any]]:
    """The same of those whose pictures stand in the text, some of them in tiles."""
    side, sizes = ours.vision.image_size[0], torch.tensor([SIZE] * rows)
    tiles = 1 if family == "LLaVA" else 5
    count = tiles * 256 // ours.projector.pixel_shuffle**2
    if family == "LLaVA-NeXT":
        grid = ours.tiles.tiles(SIZE, (side, side))
        tiles, count = 1 + grid[0] * grid[1], ours.tiles.num_tokens(SIZE, grid, ours.vision.grid_size)
    text = torch.randint(3, IMAGE, (rows, WORDS))
    tokens = torch.cat((text[:, :4], torch.full((rows, count), IMAGE), text[:, 4:]), 1)
    pixels, yes = torch.randn(rows, tiles, 3, side, side), torch.ones_like(tokens, dtype=torch.bool)
    batch = TiledBatch(tokens, yes, ~yes, pixels)
    given: dict[str, Any] = {"input_ids": tokens, "attention_mask": yes.long(), "pixel_values": pixels}
    if family == "LLaVA":
        given["pixel_values"] = pixels[:, 0]
    if family == "LLaVA-NeXT":
        batch.image_sizes, given["image_sizes"] = sizes[:, None], sizes
    return batch, given


def ours_ids(ours: Captioner, batch: CaptionBatch) -> list[list[int]]:
    texts = generate(ours, batch, eos_id=2, max_new_tokens=NEW, min_new_tokens=NEW)
    return [best.tokens for best, *_ in texts]


def peer_ids(peer: Any, given: dict[str, Tensor]) -> list[list[int]]:
    with torch.inference_mode():
        rows = peer.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return rows[:, -NEW:].tolist()


def main() -> None:
    args = start(__doc__ or "", weights=("fp32", "bf16"))
    logging.set_verbosity_error()
    for family, (make, load) in FAMILIES.items():
        if args.only not in family:
            continue
        torch.manual_seed(0)
        peer = loud(make())
        with tempfile.TemporaryDirectory() as folder:
            peer.save_pretrained(folder)
            ours = for_inference(load(folder), args.weights)
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
