"""Small random models that transformers alone holds, unlike most: codebooks, no chat template, no words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from support import hub_families as usual
from support.hub_families import SIDE, SIGLIP, Made, named, text_of
from support.hub_models import IDS, TEXT, WIDTH, talk, words
from support.public import noisy

hf: Any = transformers
CODES: Any = {"num_embeddings": 16, "base_channels": 32, "num_res_blocks": 1}


def janus() -> Made:
    """A model that draws too, with parts for that."""
    tokenizer = named(image_token="<image>", boi_token="<begin>", eoi_token="<end>")
    vision = {key: SIGLIP[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    vision |= {"image_size": 28, "patch_size": 7, "projection_dim": 24, "mlp_ratio": 1.5, "depth": 2}
    codes = {"embed_dim": 8, "latent_channels": 8, "channel_multiplier": [1, 1], "num_patches": 4, **CODES}
    codes |= {"projection_dim": 24, "image_token_embed_dim": 24}
    config = hf.JanusConfig(
        text_config=text_of(tokenizer), vision_config=vision, vq_config=codes, image_token_id=tokenizer.image_token_id,
        **IDS,
    )  # fmt: skip
    processor = hf.JanusProcessor(
        hf.JanusImageProcessor(size=SIDE), tokenizer, num_image_tokens=16, chat_template=talk("<image>")
    )
    return hf.JanusForConditionalGeneration(config), processor


def chameleon() -> Made:
    """Pictures as words of a codebook; no chat template."""
    marks = {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"}
    pieces = [f"IMGIMG{letter}Z" for letter in "ABCDEFGH"]
    tokenizer = words(*marks.values(), "<sep>", *pieces, extra_special_tokens=marks, sep_token="<sep>")
    codes = {**CODES, "embed_dim": 8, "latent_channels": 8, "channel_multiplier": [1, 1, 1], "num_embeddings": 8}
    config = hf.ChameleonConfig(
        **TEXT, **IDS, vocab_size=len(tokenizer) + 3, vocabulary_map=tokenizer.get_vocab(),
        vq_config={**codes, "resolution": 32, "attn_resolutions": []},
    )  # fmt: skip
    side = {"height": 16, "width": 16}
    pixels = hf.ChameleonImageProcessor(size={"shortest_edge": 16}, crop_size=side)
    return hf.ChameleonForConditionalGeneration(config), hf.ChameleonProcessor(pixels, tokenizer, image_seq_length=16)


def emu3() -> Made:
    """Pictures as words of a codebook, as many as their sizes make."""
    marks = {
        "image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>",
    }  # fmt: skip
    pieces = (f"<|visual token {i:06d}|>" for i in range(16))
    tokenizer = words(*marks.values(), "<|extra_200|>", *pieces, extra_special_tokens=marks)
    codes = {
        "codebook_size": 16, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "num_res_blocks": 1,
        "channel_multiplier": [1, 1, 1, 1], "hidden_size": 32, "attn_resolutions": [3], "temporal_downsample_factor": 1,
    }  # fmt: skip
    text = {**text_of(tokenizer, "emu3_text_model"), "attention_dropout": 0.0}
    config = hf.Emu3Config(vq_config=codes, text_config=text, vocabulary_map=tokenizer.get_vocab(), **IDS)
    pixels = hf.Emu3ImageProcessor(min_pixels=32 * 32, max_pixels=48 * 48)
    return hf.Emu3ForConditionalGeneration(config), hf.Emu3Processor(pixels, tokenizer, chat_template=talk("<image>"))


def fast_vlm() -> Made:
    """Convolutions of timm's."""
    tokenizer = named(image_token="<image>")
    tower = {"inference_mode": True, "layers": (1, 1, 1, 1, 1), "embed_dims": (8, 8, 16, 32, 32)}
    vision = {
        "model_type": "timm_wrapper", "architecture": "fastvit_mci3", "do_pooling": True, "global_pool": "avg",
        "hidden_size": 64, "initializer_range": 0.02, "model_args": tower,
    }  # fmt: skip
    config = hf.FastVlmConfig(
        vision_config=vision, text_config=text_of(tokenizer, "qwen2"), image_token_index=tokenizer.image_token_id,
        image_seq_length=1, **IDS,
    )  # fmt: skip
    side = {"height": 64, "width": 64}
    pixels = hf.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=side)
    processor = hf.LlavaProcessor(
        pixels, tokenizer, patch_size=64, vision_feature_select_strategy="full", chat_template=talk("<image>\n")
    )
    return hf.FastVlmForConditionalGeneration(config), processor


def pix2struct() -> Made:
    """An encoder-decoder whose prompt stands in the decoder."""
    tokenizer = words(around=True)
    text = {"vocab_size": len(tokenizer) + 3, "hidden_size": 24, "d_kv": 6, "d_ff": 31, "num_layers": 2, "num_heads": 4}
    vision = {
        "hidden_size": 24, "patch_embed_hidden_size": 147, "d_ff": 31, "d_kv": 12, "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }  # fmt: skip
    config = hf.Pix2StructConfig(text_config={**text, **IDS, "decoder_start_token_id": 1}, vision_config=vision, **IDS)
    pixels = hf.Pix2StructImageProcessor(patch_size={"height": 7, "width": 7})
    return hf.Pix2StructForConditionalGeneration(config), hf.Pix2StructProcessor(pixels, tokenizer)


def gemma4() -> Made:
    """Pictures of their own sizes, with the places of patches; linear layers inside others."""
    marks = {f"{name}_token": f"<{name}>" for name in ("image", "boi", "eoi", "audio", "boa", "eoa")}
    tokenizer = words(*marks.values(), "<|video|>", extra_special_tokens=marks)
    found = {f"{key}_id": tokenizer.convert_tokens_to_ids(mark) for key, mark in marks.items()}
    found["eoa_token_index"] = found.pop("eoa_token_id")
    text = text_of(tokenizer, "gemma4_text", head_dim=8, global_head_dim=8, sliding_window=256)
    text |= {"vocab_size_per_layer_input": len(tokenizer) + 3, "hidden_size_per_layer_input": 8}
    vision = {**WIDTH, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 7, "pooling_kernel_size": 2}
    config = hf.Gemma4Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"]}, audio_config=None, **found, **IDS,
        vision_config={**vision, "position_embedding_size": 64},
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
    )  # fmt: skip
    parts = (
        hf.Gemma4AudioFeatureExtractor(),
        hf.Gemma4ImageProcessor(patch_size=7, pooling_kernel_size=2, max_soft_tokens=70),
        tokenizer,
        hf.Gemma4VideoProcessor(),
    )
    return hf.Gemma4ForConditionalGeneration(config), hf.Gemma4Processor(*parts, chat_template=talk("<image>"))


def t5gemma2() -> Made:
    """An encoder-decoder that talks: the picture is in the encoder."""
    tokenizer = named(image_token="<soft>", boi_token="<boi>", eoi_token="<eoi>")
    soft, begin, end = tokenizer.convert_tokens_to_ids(["<soft>", "<boi>", "<eoi>"])
    text = {**text_of(tokenizer), "head_dim": 6, "sliding_window": 64, "query_pre_attn_scalar": 6}
    del text["model_type"]
    encoder = {
        "text_config": text, "mm_tokens_per_image": 4, "image_token_index": soft, "boi_token_index": begin,
        "vision_config": {**WIDTH, "image_size": 28, "patch_size": 7, "vision_use_head": False}, "eoi_token_index": end,
    }  # fmt: skip
    config = hf.T5Gemma2Config(encoder=encoder, decoder=text, image_token_index=soft, eoi_token_index=end, **IDS)
    pixels = hf.Gemma3ImageProcessor(size=SIDE)
    processor = hf.Gemma3Processor(pixels, tokenizer, image_seq_length=4, chat_template=talk("<boi>"))
    return hf.T5Gemma2ForConditionalGeneration(config), processor


def got_ocr2() -> Made:
    """A prompt of the processor's own where nothing is said."""
    tokenizer = words("<img>", "</img>", "<imgpad>", "<|im_start|>", "<|im_end|>")
    vision = {
        "hidden_size": 24, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 64,
        "patch_size": 1, "window_size": 8, "global_attn_indexes": [], "mlp_dim": 31,
    }  # fmt: skip
    mark = tokenizer.convert_tokens_to_ids("<imgpad>")
    config = hf.GotOcr2Config(
        vision_config=vision,
        text_config=text_of(tokenizer, "qwen2"),
        image_token_index=mark,
        tie_word_embeddings=False,
        **IDS,
    )
    pixels = hf.GotOcr2ImageProcessor(size={"height": 64, "width": 64})
    return hf.GotOcr2ForConditionalGeneration(config), hf.GotOcr2Processor(pixels, tokenizer)


def video_llama_3() -> Made:
    """Patches of all pictures in one row, each with how many are merged."""
    tokenizer = named(image_token="<image>", video_token="<video>")
    config = hf.VideoLlama3Config(
        text_config=text_of(tokenizer, "qwen2"), vision_config={**WIDTH, "hidden_size": 32, "patch_size": 7},
        image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id, **IDS,
    )  # fmt: skip
    sizes = {"shortest_edge": 28 * 28, "longest_edge": 42 * 42}
    parts = (hf.VideoLlama3ImageProcessor(patch_size=7, size=sizes), tokenizer, hf.VideoLlama3VideoProcessor())
    return hf.VideoLlama3ForConditionalGeneration(config), hf.VideoLlama3Processor(
        *parts, chat_template=talk("<image>")
    )


FAMILIES: dict[str, Callable[[], Made]] = {
    made.__name__: made
    for made in (
        usual.qwen2_vl, usual.qwen3_vl, usual.qwen3_5, usual.glm4v, usual.idefics2, usual.mistral3, usual.pixtral,
        usual.mllama, usual.llama4, usual.aya_vision, usual.cohere2_vision, usual.lfm2_vl, usual.perception_lm,
        usual.ovis2, usual.vipllava, usual.llava_next_video, usual.video_llava, usual.deepseek_vl, janus, chameleon,
        emu3, fast_vlm, pix2struct, gemma4, t5gemma2, got_ocr2, video_llama_3,
    )
}  # fmt: skip


def family_folder(path: Path, name: str) -> Made:
    """Writes a folder; gives model and processor."""
    torch.manual_seed(0)
    model, processor = FAMILIES[name]()
    model = noisy(model, 0.3, seed=3)
    model.generation_config.update(**IDS)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return model, processor
