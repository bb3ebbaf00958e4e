"""Small random folders of public captioners, as hubs have them, for tests that fine-tune and compare them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GPT2Config,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessor,
    IdeficsProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from support.hub_more import MORE
from support.hub_parts import POINTS, TEMPLATE, VISION, WIDTH, bert, chatting, llama
from support.public import byte_level, noisy, pictures


def blip(path: Path) -> Any:
    """BLIP."""
    tokenizer = bert()
    ids = {"bos_token_id": len(tokenizer), "sep_token_id": 3, "pad_token_id": 0, "eos_token_id": 2}
    text = {**WIDTH, "vocab_size": len(tokenizer) + 3, "max_position_embeddings": 61, **ids}
    model = BlipForConditionalGeneration(BlipConfig(vision_config=VISION, text_config=text, image_text_hidden_size=11))
    BlipProcessor(BlipImageProcessor(size={"height": 28, "width": 28}), tokenizer).save_pretrained(path)
    return model


def vit_gpt2(path: Path) -> Any:
    """A vision-encoder-decoder."""
    backend = byte_level(["<|endoftext|>"])
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end, pad_token=end
    ).save_pretrained(path)
    text = GPT2Config(vocab_size=backend.get_vocab_size(), n_embd=24, n_layer=2, n_head=3, n_positions=61)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**VISION), text, decoder_start_token_id=0, eos_token_id=0, pad_token_id=0
    )
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(path)
    model = VisionEncoderDecoderModel(config)
    model.generation_config.update(num_beams=2, max_length=16)  # pyright: ignore[reportOptionalMemberAccess]
    return model


def git(path: Path) -> Any:
    """GIT."""
    tokenizer = bert()
    config = GitConfig(
        vision_config=VISION, **WIDTH, vocab_size=len(tokenizer), max_position_embeddings=61, eos_token_id=3,
        bos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    pixels = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    GitProcessor(pixels, tokenizer).save_pretrained(path)
    return GitForCausalLM(config)


def blip2(path: Path) -> Any:
    """BLIP-2 around an OPT."""
    backend = byte_level(["<s>", "<pad>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    backend.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    newline = backend.token_to_id("Ċ")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>"
    )
    text = OPTConfig(
        vocab_size=len(tokenizer) + 3, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, ffn_dim=37,
        max_position_embeddings=61, word_embed_proj_dim=24, bos_token_id=2, eos_token_id=newline, pad_token_id=1,
    )  # fmt: skip
    qformer = {
        "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 29, "vocab_size": 43,
        "max_position_embeddings": 17, "encoder_hidden_size": 24,
    }  # fmt: skip
    config = Blip2Config(
        vision_config=VISION, qformer_config=qformer, text_config=text, num_query_tokens=3, image_text_hidden_size=11,
        image_token_index=backend.token_to_id("<image>"),
    )  # fmt: skip
    pixels = BlipImageProcessor(size={"height": 28, "width": 28})
    Blip2Processor(pixels, tokenizer, num_query_tokens=3).save_pretrained(path)
    return Blip2ForConditionalGeneration(config)


def llava(path: Path) -> Any:
    """LLaVA 1.5."""
    words = chatting()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**llama(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    pixels = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        pixels, words, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(path)  # fmt: skip
    return LlavaForConditionalGeneration(config)


def llava_next(path: Path) -> Any:
    """LLaVA-NeXT, which cuts pictures into tiles."""
    words = chatting()
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**llama(words)), image_grid_pinpoints=POINTS,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    pixels = LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=POINTS
    )
    LlavaNextProcessor(
        pixels, words, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(path)  # fmt: skip
    return LlavaNextForConditionalGeneration(config)


def idefics3(path: Path) -> Any:
    """Idefics3, which cuts pictures into tiles."""
    words = chatting()
    config = Idefics3Config(
        vision_config=VISION, text_config=LlamaConfig(**llama(words)), tie_word_embeddings=True,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    pixels = Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    Idefics3Processor(pixels, words, image_seq_len=4, chat_template=TEMPLATE).save_pretrained(path)
    return Idefics3ForConditionalGeneration(config)


def onevision(path: Path) -> Any:
    """LLaVA-OneVision, which cuts pictures into tiles."""
    words = chatting()
    words.add_special_tokens({"additional_special_tokens": ["<video>"]})
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False), text_config=Qwen2Config(**llama(words)),
        image_grid_pinpoints=POINTS, image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"), vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    pixels = LlavaOnevisionImageProcessor(
        size={"height": 28, "width": 28}, image_grid_pinpoints=POINTS, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    LlavaOnevisionProcessor(
        pixels, words, LlavaOnevisionVideoProcessor(), num_image_tokens=16, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2", chat_template=TEMPLATE,
    ).save_pretrained(path)  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config)


def idefics(path: Path) -> Any:
    """Idefics, the first one."""
    words = chatting()
    ids: Any = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    vision = {"embed_dim": 24, "image_size": 28, "patch_size": 7, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 31}  # fmt: skip
    config = IdeficsConfig(
        vocab_size=len(words), **WIDTH, cross_layer_interval=1, use_resampler=True, vision_config=vision,
        max_position_embeddings=97, perceiver_config={
            "resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 8,
        }, **ids,
    )  # fmt: skip
    IdeficsProcessor(IdeficsImageProcessor(image_size=28), words).save_pretrained(path)
    model = IdeficsForVisionText2Text(config)
    model.generation_config.update(**ids)
    return model


FAMILIES: dict[str, Callable[[Path], Any]] = {
    "blip": blip, "vit-gpt2": vit_gpt2, "git": git, "blip2": blip2, "llava": llava, "llava-next": llava_next,
    "llava-onevision": onevision, "idefics": idefics, "idefics3": idefics3, **MORE,
}  # fmt: skip


def folder(path: Path, family: str, scale: float = 0.3) -> Path:
    """A folder of a small random model of a family."""
    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    noisy(FAMILIES[family](path), scale, seed=3).save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    return path


def pairs(path: Path, count: int = 12) -> Path:
    """Pictures of three shapes, with captions."""
    path.mkdir()
    images, texts = pictures(), ["a red star", "two dogs that run", "a man in the picture"]
    for i in range(count):
        images[i % 3].save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(texts[i % 3])
    return path
