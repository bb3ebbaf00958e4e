"""Small random models that transformers alone holds, in folders as hubs have them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, processors
from transformers import (
    BartConfig,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Florence2VisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    Kosmos2Processor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from support.public import byte_level, noisy

WIDTH: Any = {"hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT: Any = {**WIDTH, "num_key_value_heads": 2, "max_position_embeddings": 509}
IDS: Any = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


def talk(image: str) -> str:
    """A chat template."""
    return (
        "{% for m in messages %}<s>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type']=='image' %}" + image +
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )  # fmt: skip


def words(*specials: str, **more: Any) -> Any:
    """A tokenizer with special words."""
    backend = byte_level(["<s>", "<pad>", "</s>"])
    backend.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in specials])
    if more.pop("around", False):
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left", **more
    )


def qwen2_5_vl() -> tuple[Any, Any]:
    """Qwen2.5-VL: windows, and positions of three axes."""
    start, end, image, video = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
    tokenizer = words(start, end, image, video)
    find = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 1], "rope_theta": 1000.0}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 31, "num_heads": 4, "out_hidden_size": 24, "patch_size": 7,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 28, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, **IDS, "vocab_size": len(tokenizer) + 3, "rope_parameters": rope}, vision_config=vision,
        image_token_id=find(image), video_token_id=find(video), vision_start_token_id=find(start),
        vision_end_token_id=find(end), **IDS,
    )  # fmt: skip
    pixels = Qwen2VLImageProcessor(
        patch_size=7, merge_size=2, temporal_patch_size=2, min_pixels=28 * 28, max_pixels=56 * 56
    )
    videos = Qwen2VLVideoProcessor(patch_size=7, merge_size=2)
    processor = Qwen2_5_VLProcessor(pixels, tokenizer, videos, chat_template=talk(f"{start}{image}{end}"))
    return Qwen2_5_VLForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    """InternVL: tiles, pixel shuffle."""
    specials = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tokenizer = words(*specials.values(), extra_special_tokens=specials)
    config = InternVLConfig(
        vision_config={**WIDTH, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config={"model_type": "qwen2", **TEXT, **IDS, "vocab_size": len(tokenizer) + 3},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4, **IDS,
    )  # fmt: skip
    pixels = GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = InternVLProcessor(
        pixels, tokenizer, InternVLVideoProcessor(), image_seq_length=4, chat_template=talk("<IMG_CONTEXT>\n")
    )
    return InternVLForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    """Gemma 3: images see each other both ways."""
    specials = {"image_token": "<image_soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokenizer = words(*specials.values(), extra_special_tokens=specials)
    find = tokenizer.convert_tokens_to_ids
    config = Gemma3Config(
        text_config={**TEXT, **IDS, "vocab_size": len(tokenizer) + 3, "head_dim": 6, "sliding_window": 64},
        vision_config={**WIDTH, "image_size": 28, "patch_size": 7, "vision_use_head": False}, mm_tokens_per_image=4,
        image_token_index=find("<image_soft>"), boi_token_index=find("<boi>"), eoi_token_index=find("<eoi>"),
        **IDS,
    )  # fmt: skip
    pixels = Gemma3ImageProcessor(size={"height": 28, "width": 28})
    processor = Gemma3Processor(pixels, tokenizer, image_seq_length=4, chat_template=talk("<boi>"))
    return Gemma3ForConditionalGeneration(config), processor


def florence2() -> tuple[Any, Any]:
    """Florence-2: an encoder-decoder."""
    tokenizer = words("<image>", around=True, extra_special_tokens={"image_token": "<image>"})
    text = BartConfig(
        vocab_size=len(tokenizer) + 3, d_model=24, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=31, decoder_ffn_dim=31, max_position_embeddings=127,
        decoder_start_token_id=2, **IDS,
    )  # fmt: skip
    vision = Florence2VisionConfig(
        embed_dim=[8, 12], num_heads=[2, 3], num_groups=[2, 3], depths=[1, 1], patch_size=[7, 3], patch_stride=[4, 2],
        patch_padding=[3, 1], patch_prenorm=[False, True], window_size=4, projection_dim=24, max_position_embeddings=20,
    )  # fmt: skip
    config = Florence2Config(
        text_config=text, vision_config=vision, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), **IDS
    )
    pixels = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False, image_seq_length=17)
    return Florence2ForConditionalGeneration(config), Florence2Processor(
        pixels, tokenizer, num_additional_image_tokens=1
    )


def kosmos2() -> tuple[Any, Any]:
    """Kosmos-2: images stand in slots that a mask names."""
    tags = ["<image>", "</image>", "<grounding>", "<phrase>", "</phrase>", "<object>", "</object>"]
    tags += ["</delimiter_of_multi_objects/>"]
    tokenizer = words(*tags, *(f"<patch_index_{i:04d}>" for i in range(4)), around=False, unk_token="</s>")
    text = {
        "vocab_size": len(tokenizer) + 3, "embed_dim": 24, "layers": 2, "ffn_dim": 31, "attention_heads": 4,
        "max_position_embeddings": 509, **IDS,
    }  # fmt: skip
    config = Kosmos2Config(
        text_config=text, vision_config={**WIDTH, "image_size": 28, "patch_size": 7}, latent_query_num=64, **IDS
    )
    pixels = CLIPImageProcessor(size={"height": 28, "width": 28}, do_center_crop=False)
    processor = Kosmos2Processor(pixels, tokenizer, num_patch_index_tokens=4)
    return Kosmos2ForConditionalGeneration(config), processor


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_5_vl": qwen2_5_vl, "internvl": internvl, "gemma3": gemma3, "florence2": florence2, "kosmos-2": kosmos2,
}  # fmt: skip


_FLAT = {"gemma3": 0.3, "florence2": 1.0, "kosmos-2": 1.0}
"""Those whose last norm would have one word win again and again, and what their embeddings are multiplied by."""


def hub_folder(path: Path, name: str) -> tuple[Any, Any]:
    """Writes a folder; gives model and processor."""
    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, processor = MODELS[name]()
    model = noisy(model, 0.7 if name in _FLAT else 0.3, seed=3)
    if name in _FLAT:
        model.get_input_embeddings().weight.data *= _FLAT[name]
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.data.zero_()
            elif "norm" in key and parameter.ndim == 1:  # Gemma's stand for 1 + themselves
                parameter.data = 0.3 * torch.randn_like(parameter) + (name != "gemma3")
    model.generation_config.update(**IDS)
    if name == "florence2":
        model.generation_config.update(decoder_start_token_id=2, forced_eos_token_id=None, forced_bos_token_id=None)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return model, processor
