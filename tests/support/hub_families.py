"""More small random models that transformers alone holds, one for each way that pictures come in; see hub_models."""

from typing import Any

import transformers

from support.hub_models import IDS, TEXT, WIDTH, talk, words

hf: Any = transformers
SIGLIP: Any = {"model_type": "siglip_vision_model", **WIDTH, "image_size": 28, "patch_size": 7}
CLIP: Any = {"model_type": "clip_vision_model", **WIDTH, "image_size": 28, "patch_size": 7, "projection_dim": 24}
PIXTRAL: Any = {"model_type": "pixtral", **WIDTH, "image_size": 70, "patch_size": 7}
AXES: Any = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 1000.0}
SIDE: Any = {"height": 28, "width": 28}
Made = tuple[Any, Any]


def text_of(tokenizer: Any, kind: str = "llama", **more: Any) -> Any:
    """A language model's configuration."""
    return {"model_type": kind, **TEXT, **IDS, "vocab_size": len(tokenizer) + 3, **more}


def named(**specials: str) -> Any:
    """A tokenizer that knows special words by name."""
    return words(*specials.values(), extra_special_tokens=specials)


def _qwen(kind: str, config: Any, processor: Any, video: Any, text: Any, vision: Any) -> Made:
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = words(*marks)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    found = dict(zip(names, tokenizer.convert_tokens_to_ids(list(marks)), strict=True))
    text = {**text_of(tokenizer, ""), "rope_parameters": AXES, **text}
    del text["model_type"]
    model = getattr(hf, f"{kind}ForConditionalGeneration")(
        config(text_config=text, vision_config={"depth": 2, "num_heads": 4, "patch_size": 7, **vision}, **found, **IDS)
    )
    pixels = hf.Qwen2VLImageProcessor(patch_size=7, merge_size=2, min_pixels=28 * 28, max_pixels=56 * 56)
    template = talk("<|vision_start|><|image_pad|><|vision_end|>")
    return model, processor(pixels, tokenizer, video(patch_size=7, merge_size=2), chat_template=template)


def qwen2_vl() -> Made:
    """Positions of three axes."""
    vision = {"embed_dim": 32, "hidden_size": 24, "mlp_ratio": 2}
    return _qwen("Qwen2VL", hf.Qwen2VLConfig, hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor, {}, vision)


def qwen3_vl() -> Made:
    """Features of several depths go into several layers."""
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 31, "out_hidden_size": 24}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    kinds = (hf.Qwen3VLConfig, hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor)
    return _qwen("Qwen3VL", *kinds, {"head_dim": 6}, vision)


def qwen3_5() -> Made:
    """A state instead of keys and values in some layers."""
    vision = {"hidden_size": 32, "intermediate_size": 31, "out_hidden_size": 24, "num_position_embeddings": 16}
    text = {
        "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {**AXES, "partial_rotary_factor": 0.75},
    }  # fmt: skip
    return _qwen("Qwen3_5", hf.Qwen3_5Config, hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor, text, vision)


def glm4v() -> Made:
    """As Qwen2-VL, with marks of its own."""
    names = ("image", "video", "image_start", "image_end", "video_start", "video_end")
    marks = ("image", "video", "begin_of_image", "end_of_image", "begin_of_video", "end_of_video")
    tokenizer = words(*(f"<|{mark}|>" for mark in marks))
    found = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for name, mark in zip(names, marks)}
    text = text_of(tokenizer, "glm4v_text")
    text["rope_parameters"] = {**AXES, "partial_rotary_factor": 1.0}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 31, "num_heads": 4, "patch_size": 7, "out_hidden_size": 24,
        "image_size": 56,
    }  # fmt: skip
    config = hf.Glm4vConfig(text_config=text, vision_config=vision, **found, **IDS)
    sizes = {"shortest_edge": 2 * 28 * 28, "longest_edge": 2 * 56 * 56}
    pixels = hf.Glm4vImageProcessor(patch_size=7, merge_size=2, size=sizes)
    videos = hf.Glm4vVideoProcessor(patch_size=7, merge_size=2)
    template = talk("<|begin_of_image|><|image|><|end_of_image|>")
    return hf.Glm4vForConditionalGeneration(config), hf.Glm4vProcessor(
        pixels, tokenizer, videos, chat_template=template
    )


def idefics2() -> Made:
    """Pictures padded to the largest, with a mask of pixels."""
    tokenizer = words("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    resampler = {
        "hidden_size": 24, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2,
        "resampler_head_dim": 12, "num_key_value_heads": 2,
    }  # fmt: skip
    config = hf.Idefics2Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), perceiver_config=resampler,
        vision_config={**WIDTH, "image_size": 70, "patch_size": 7}, text_config=text_of(tokenizer, "mistral"), **IDS,
    )  # fmt: skip
    pixels = hf.Idefics2ImageProcessor(size={"shortest_edge": 28, "longest_edge": 70}, do_image_splitting=False)
    processor = hf.Idefics2Processor(pixels, tokenizer, image_seq_len=3, chat_template=talk("<image>"))
    return hf.Idefics2ForConditionalGeneration(config), processor


def mistral3() -> Made:
    """Pictures of their own sizes, padded, with the sizes."""
    tokenizer = words("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = hf.Mistral3Config(
        vision_config=PIXTRAL, text_config=text_of(tokenizer, "mistral", tie_word_embeddings=True),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"), spatial_merge_size=2, **IDS,
    )  # fmt: skip
    pixels = hf.PixtralImageProcessor(size={"longest_edge": 70}, patch_size={"height": 7, "width": 7})
    processor = hf.PixtralProcessor(pixels, tokenizer, patch_size=7, spatial_merge_size=2, chat_template=talk("[IMG]"))
    return hf.Mistral3ForConditionalGeneration(config), processor


def pixtral() -> Made:
    """A llava with a vision encoder that is not held here."""
    tokenizer = words("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = hf.LlavaConfig(
        vision_config=PIXTRAL, text_config=text_of(tokenizer, "mistral"), vision_feature_layer=-1,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"), vision_feature_select_strategy="full", **IDS,
    )  # fmt: skip
    pixels = hf.PixtralImageProcessor(size={"longest_edge": 70}, patch_size={"height": 7, "width": 7})
    processor = hf.PixtralProcessor(pixels, tokenizer, patch_size=7, chat_template=talk("[IMG]"))
    return hf.LlavaForConditionalGeneration(config), processor


def mllama() -> Made:
    """Tiles beside the text: cross-attention, with a mask of what each word sees."""
    tokenizer = words("<|image|>", "<|python_tag|>")
    vision = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4,
        "intermediate_size": 31, "vision_output_dim": 48, "image_size": 28, "patch_size": 7, "max_num_tiles": 4,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }  # fmt: skip
    text = {
        **TEXT, **IDS, "num_hidden_layers": 3, "vocab_size": len(tokenizer), "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    }  # fmt: skip
    mark = tokenizer.convert_tokens_to_ids("<|image|>")
    config = hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=mark)
    pixels = hf.MllamaImageProcessor(size=SIDE, max_image_tiles=4)
    processor = hf.MllamaProcessor(pixels, tokenizer, chat_template=talk("<|image|>"))
    return hf.MllamaForConditionalGeneration(config), processor


def llama4() -> Made:
    """Tiles in bfloat16."""
    marks = ("image", "image_start", "image_end", "patch", "tile_x_separator", "tile_y_separator")
    tokenizer = words(*(f"<|{mark}|>" for mark in marks))
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128,
        "vision_output_dim": 32, "image_size": 28, "patch_size": 7, "projector_input_dim": 32,
        "projector_output_dim": 32, "pixel_shuffle_ratio": 0.5, "rope_theta": 1000,
    }  # fmt: skip
    text = {**text_of(tokenizer, "llama4_text"), "intermediate_size_mlp": 32, "head_dim": 6, "num_local_experts": 2}
    patch = tokenizer.convert_tokens_to_ids("<|patch|>")
    config = hf.Llama4Config(
        vision_config=vision, text_config={**text, "moe_layers": []}, image_token_index=patch, **IDS
    )
    pixels = hf.Llama4ImageProcessor(size=SIDE, max_patches=4)
    processor = hf.Llama4Processor(
        pixels, tokenizer, patch_size=7, pixel_shuffle_ratio=0.5, chat_template=talk("<|image|>")
    )
    return hf.Llama4ForConditionalGeneration(config), processor


def aya_vision() -> Made:
    """Tiles, with a name each."""
    marks = ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE")
    tokenizer = words(*marks, "TILE_GLOBAL")
    config = hf.AyaVisionConfig(
        vision_config=SIGLIP, text_config=text_of(tokenizer, "cohere2", head_dim=6, sliding_window=64),
        downsample_factor=2, image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"), **IDS,
    )  # fmt: skip
    pixels = hf.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = hf.AyaVisionProcessor(
        pixels, tokenizer, patch_size=7, img_size=28, downsample_factor=2, chat_template=talk("<image>")
    )
    return hf.AyaVisionForConditionalGeneration(config), processor


def cohere2_vision() -> Made:
    """Tiles, and lines that end."""
    tokenizer = named(image_token="<patch>", boi_token="<img>", eoi_token="</img>", img_line_break_token="<break>")
    config = hf.Cohere2VisionConfig(
        vision_config=SIGLIP, text_config=text_of(tokenizer, "cohere2", head_dim=6, sliding_window=64),
        downsample_factor=2, image_token_id=tokenizer.image_token_id, alignment_intermediate_size=32, **IDS,
    )  # fmt: skip
    pixels = hf.Cohere2VisionImageProcessor(size=SIDE, min_patches=1, max_patches=4, patch_size=2)
    processor = hf.Cohere2VisionProcessor(pixels, tokenizer, chat_template=talk("<patch>"))
    return hf.Cohere2VisionForConditionalGeneration(config), processor


def lfm2_vl() -> Made:
    """Tiles of several sizes, convolutions in the text."""
    tiles = (f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5))
    tokenizer = words("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *tiles)
    vision = {**WIDTH, "model_type": "siglip2_vision_model", "num_patches": 16, "patch_size": 7}
    text = text_of(tokenizer, "lfm2", layer_types=["conv", "full_attention"], block_multiple_of=8, conv_L_cache=3)
    config = hf.Lfm2VlConfig(
        vision_config={**vision, "vision_use_head": False}, text_config=text, projector_hidden_size=32,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), downsample_factor=2, **IDS,
    )  # fmt: skip
    pixels = hf.Lfm2VlImageProcessor(
        encoder_patch_size=7, tile_size=28, min_tiles=2, max_tiles=4, min_image_tokens=2, max_image_tokens=4
    )
    return hf.Lfm2VlForConditionalGeneration(config), hf.Lfm2VlProcessor(
        pixels, tokenizer, chat_template=talk("<image>")
    )


def perception_lm() -> Made:
    """Tiles that stay with their picture; a tower of timm's."""
    tokenizer = named(image_token="<|image|>", video_token="<|video|>")
    vit = {
        "depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": [28, 28], "patch_size": 7, "global_pool": "",
        "class_token": False, "use_post_transformer_norm": False, "ref_feat_shape": [4, 4],
    }  # fmt: skip
    vision = {
        "model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "do_pooling": False,
        "num_classes": 0, "initializer_range": 0.02, "model_args": vit, "num_features": 24,
    }  # fmt: skip
    config = hf.PerceptionLMConfig(
        vision_config=vision, vision_use_cls_token=False, text_config=text_of(tokenizer), projector_pooling_ratio=2,
        image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id, **IDS,
    )  # fmt: skip
    pixels = hf.PerceptionLMImageProcessor(tile_size=28, max_num_tiles=4, size=SIDE)
    processor = hf.PerceptionLMProcessor(
        hf.PerceptionLMVideoProcessor(), pixels, tokenizer, patch_size=7, chat_template=talk("<|image|>")
    )
    return hf.PerceptionLMForConditionalGeneration(config), processor


def ovis2() -> Made:
    """Pictures as words of a visual vocabulary."""
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>", "<IMG_ATOM>", "<image>"]
    tokenizer = words(*marks)
    find = tokenizer.convert_tokens_to_ids
    vision = {
        **WIDTH, "image_size": 28, "patch_size": 7, "vocab_size": 40, "hidden_stride": 2,
        "num_visual_indicator_tokens": 5,
    }  # fmt: skip
    config = hf.Ovis2Config(
        vision_config=vision, text_config=text_of(tokenizer, "qwen2"), image_token_id=find("<IMG_ATOM>"),
        visual_indicator_token_ids=find(marks[:5]), vocab_size=len(tokenizer) + 3, hidden_size=24, **IDS,
    )  # fmt: skip
    pixels = hf.Ovis2ImageProcessor(size=SIDE, crop_to_patches=True, max_patches=4)
    processor = hf.Ovis2Processor(pixels, tokenizer, image_seq_length=4, chat_template=talk("<image>"))
    return hf.Ovis2ForConditionalGeneration(config), processor


def vipllava() -> Made:
    """Features of several layers side by side."""
    tokenizer = named(image_token="<image>")
    config = hf.VipLlavaConfig(
        vision_config={**CLIP, "num_hidden_layers": 3}, text_config=text_of(tokenizer), vision_feature_layers=[-2, 1],
        image_token_index=tokenizer.image_token_id, **IDS,
    )  # fmt: skip
    pixels = hf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=SIDE)
    return hf.VipLlavaForConditionalGeneration(config), _llava(hf.LlavaProcessor, pixels, tokenizer)


def _llava(kind: Any, *parts: Any) -> Any:
    strategy = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return kind(*parts, patch_size=7, chat_template=talk("<image>\n"), **strategy)


def llava_next_video() -> Made:
    """Tiles of pictures, where videos could be."""
    tokenizer = named(image_token="<image>", video_token="<video>")
    points = [[28, 56], [56, 28], [56, 56]]
    config = hf.LlavaNextVideoConfig(
        vision_config=CLIP, text_config=text_of(tokenizer), image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id, image_grid_pinpoints=points, **IDS,
    )  # fmt: skip
    pixels = hf.LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=SIDE, image_grid_pinpoints=points)
    videos = hf.LlavaNextVideoVideoProcessor()
    return hf.LlavaNextVideoForConditionalGeneration(config), _llava(
        hf.LlavaNextVideoProcessor, videos, pixels, tokenizer
    )


def video_llava() -> Made:
    """A tower for pictures and one for videos."""
    tokenizer = words("<image>", "<video>")
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    config = hf.VideoLlavaConfig(
        vision_config=CLIP, text_config=text_of(tokenizer), image_token_index=image, video_token_index=video, **IDS
    )
    pixels = hf.VideoLlavaImageProcessor(size={"shortest_edge": 28}, crop_size=SIDE)
    videos = hf.VideoLlavaVideoProcessor()
    return hf.VideoLlavaForConditionalGeneration(config), _llava(hf.VideoLlavaProcessor, pixels, videos, tokenizer)


def deepseek_vl() -> Made:
    """One picture of one size."""
    tokenizer = named(image_token="<image_placeholder>")
    config = hf.DeepseekVLConfig(
        vision_config=SIGLIP, text_config=text_of(tokenizer), image_token_id=tokenizer.image_token_id, **IDS
    )
    pixels = hf.DeepseekVLImageProcessor(size=SIDE)
    processor = hf.DeepseekVLProcessor(
        pixels, tokenizer, num_image_tokens=16, chat_template=talk("<image_placeholder>")
    )
    return hf.DeepseekVLForConditionalGeneration(config), processor
