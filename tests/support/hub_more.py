"""More small random folders of public captioners, see `support.hub`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from transformers import (
    BertConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    OPTConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
    T5Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)
from transformers.models.smolvlm import processing_smolvlm

from support.hub_parts import TEMPLATE, VISION, WIDTH, bert, chatting, llama
from support.public import byte_level, word_pieces

QFORMER: Any = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 29,
           "max_position_embeddings": 37, "encoder_hidden_size": 24}  # fmt: skip


def vit_bert(path: Path) -> Any:
    """A vision-encoder-decoder around a BERT."""
    tokenizer = bert()
    tokenizer.save_pretrained(path)
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(path)
    text = BertConfig(**WIDTH, vocab_size=len(tokenizer), max_position_embeddings=61)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**VISION), text, decoder_start_token_id=2, eos_token_id=3, pad_token_id=0
    )
    return VisionEncoderDecoderModel(config)


def _with_image(bos: str, **more: Any) -> Any:
    """A tokenizer that begins with `bos` and has a placeholder."""
    backend = byte_level(["<s>", "<pad>", "</s>"])
    start = backend.token_to_id(bos)
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, start)])
    backend.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token="</s>", pad_token="<pad>", unk_token="</s>", **more
    )


def blip2_t5(path: Path) -> Any:
    """BLIP-2 around a T5."""
    tokenizer = _with_image("</s>")
    kind: Any = T5Config
    text = kind(
        vocab_size=len(tokenizer) + 3, d_model=12, d_kv=4, d_ff=37, num_layers=2, num_heads=3, bos_token_id=1,
        feed_forward_proj="gated-gelu", dense_act_fn="gelu", decoder_start_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=VISION, qformer_config=QFORMER | {"vocab_size": 43}, text_config=text, num_query_tokens=3,
        image_text_hidden_size=11, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    pixels = BlipImageProcessor(size={"height": 28, "width": 28})
    Blip2Processor(pixels, tokenizer, num_query_tokens=3).save_pretrained(path)
    return Blip2ForConditionalGeneration(config)


def instructblip(path: Path) -> Any:
    """InstructBLIP around an OPT."""
    tokenizer, reader = _with_image("<s>"), word_pieces()
    reader.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    questions = PreTrainedTokenizerFast(
        tokenizer_object=reader, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
    text = OPTConfig(
        vocab_size=len(tokenizer) + 3, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, ffn_dim=37,
        max_position_embeddings=61, word_embed_proj_dim=12, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    config = InstructBlipConfig(
        vision_config=VISION, qformer_config=QFORMER | {"vocab_size": len(questions) + 2}, text_config=text,
        num_query_tokens=3, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    pixels = BlipImageProcessor(size={"height": 28, "width": 28})
    InstructBlipProcessor(pixels, tokenizer, questions, num_query_tokens=3).save_pretrained(path)
    return InstructBlipForConditionalGeneration(config)


def smolvlm(path: Path) -> Any:
    """SmolVLM, which cuts pictures into tiles."""
    module: Any = processing_smolvlm
    module.num2words = str  # a package that says numbers of films; not needed for pictures
    words = chatting()
    words.add_special_tokens({"additional_special_tokens": ["<video>"]})
    config = SmolVLMConfig(
        vision_config=VISION, text_config=LlamaConfig(**llama(words)), tie_word_embeddings=True,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    pixels = SmolVLMImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    SmolVLMProcessor(
        pixels, words, SmolVLMVideoProcessor(), image_seq_len=4, chat_template=TEMPLATE
    ).save_pretrained(path)  # fmt: skip
    return SmolVLMForConditionalGeneration(config)


def paligemma(path: Path) -> Any:
    """PaliGemma 2."""
    tokenizer = _with_image("<s>", padding_side="left")
    pixels: Any = SiglipImageProcessor(size={"height": 28, "width": 28})
    pixels.image_seq_length = 16
    PaliGemmaProcessor(pixels, tokenizer).save_pretrained(path)  # It adds 1,152 tokens of places and shapes.
    text = {
        "model_type": "gemma2", "vocab_size": len(tokenizer), "max_position_embeddings": 97, "num_hidden_layers": 2,
        "intermediate_size": 29, "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    config = PaliGemmaConfig(
        vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}, text_config=text,
        projection_dim=24, hidden_size=24, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    model = PaliGemmaForConditionalGeneration(config)
    model.generation_config.update(bos_token_id=0, pad_token_id=1, eos_token_id=2)
    return model


MORE: dict[str, Callable[[Path], Any]] = {
    "vit-bert": vit_bert, "blip2-t5": blip2_t5, "instructblip": instructblip, "smolvlm": smolvlm,
    "paligemma": paligemma,
}  # fmt: skip
