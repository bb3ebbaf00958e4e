"""Small dual encoders in folders as hubs have them, with tokenizer and image processor: for several tests."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    BertConfig,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    XLMRobertaConfig,
    XLMRobertaTokenizer,
)

from support.public import WORDS, noisy, word_pieces

TEXTS = [
    "a photo of two dogs",
    "A Red star, and a small blue circle!",
    "강아지 it's 3 o'clock",
    "describe the image" * 9,
]

SMALL: dict[str, Any] = {
    "vision": {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
               "image_size": 21, "patch_size": 7},
    "text": {"hidden_size": 20, "intermediate_size": 29, "num_hidden_layers": 3, "num_attention_heads": 2,
             "max_position_embeddings": 17},
    "width": 13,
}  # fmt: skip
OTHER: dict[str, Any] = {
    "vision": {"hidden_size": 20, "intermediate_size": 53, "num_hidden_layers": 3, "num_attention_heads": 2,
               "image_size": 20, "patch_size": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-4},
    "text": {"hidden_size": 28, "intermediate_size": 41, "num_hidden_layers": 1, "num_attention_heads": 4,
             "max_position_embeddings": 23, "hidden_act": "gelu", "layer_norm_eps": 1e-4},
    "width": 31,
}  # fmt: skip
SHAPES = {"small": SMALL, "other": OTHER}


def clip_vocabulary() -> tuple[dict[str, int], Any]:
    """A byte-level BPE whose words end with </w>, as CLIP's."""
    backend = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # fmt: skip
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=letters, end_of_word_suffix="</w>",
                                  show_progress=False)  # fmt: skip
    backend.train_from_iterator(WORDS * 3, trainer)
    model = json.loads(backend.to_str())["model"]
    vocab = dict(model["vocab"])
    for letter in letters:
        vocab.setdefault(letter, len(vocab))
        vocab.setdefault(f"{letter}</w>", len(vocab))
    for token in ("<|startoftext|>", "<|endoftext|>"):  # the last ids, as there
        vocab[token] = len(vocab)
    return vocab, [tuple(pair) for pair in model["merges"]]


def unigram() -> tokenizers.Tokenizer:
    """Words as SigLIP's tokenizer.json has them: small letters, no punctuation, an end and no beginning."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
         normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
                                      show_progress=False)  # fmt: skip
    backend.train_from_iterator(WORDS * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return backend


def gemma_like() -> tokenizers.Tokenizer:
    """A BPE with bytes to fall back on, as SigLIP 2 has Gemma's: an end, no beginning, and padding of its own."""
    letters = sorted({letter for text in WORDS for letter in text.replace(" ", "▁")})
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*specials, *(f"<0x{i:02X}>" for i in range(256)), *letters])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return backend


def xlm_roberta(length: int) -> Any:
    """An XLM-R tokenizer: pieces of words, <s> and </s> around a text, padding with the id 1."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=130, special_tokens=specials, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator([*WORDS * 3, *TEXTS], trainer)
    pieces = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["vocab"]]
    return XLMRobertaTokenizer(vocab=pieces, model_max_length=length)


def many_lingual(kind: str, sizes: dict[str, Any]) -> tuple[Any, Any]:
    """AltCLIP, MetaCLIP 2 and CLIP towers beside a BERT or an XLM-R: model and tokenizer."""
    length, width = sizes["text"]["max_position_embeddings"], sizes["width"]
    tokenizer: Any = xlm_roberta(length)
    text = {"vocab_size": len(tokenizer), **sizes["text"]}
    ends = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    if kind == "metaclip_2":
        both: dict[str, Any] = {"text_config": text | ends, "vision_config": sizes["vision"]}
        return MetaClip2Model(MetaClip2Config(**both, projection_dim=width)), tokenizer
    roberta = text | {"max_position_embeddings": length + 2, "hidden_act": "gelu", "layer_norm_eps": 1e-5}
    if kind == "altclip":
        both = {"text_config": roberta | {"project_dim": 11}, "vision_config": sizes["vision"]}
        return AltCLIPModel(AltCLIPConfig(**both, projection_dim=width)), tokenizer
    vision, inner = CLIPVisionConfig(**sizes["vision"]), XLMRobertaConfig(**roberta, type_vocab_size=1, **ends)
    if kind == "dual, bert":
        backend = word_pieces()
        tokenizer = BertTokenizer(vocab=backend.get_vocab(), model_max_length=length)
        small = {name: value for name, value in text.items() if not name.startswith(("hidden_act", "layer_norm"))}
        inner: Any = BertConfig(**small | {"vocab_size": len(backend.get_vocab())})  # type: ignore[no-redef]
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, inner, projection_dim=width)
    return VisionTextDualEncoderModel(config), tokenizer


def write(folder: Path, kind: str, shape: str = "small") -> Any:
    """A folder of transformers, of one of the kinds that `DUAL_ENCODER_TYPES` has, or "dual, bert"; its model.

    "siglip2" is one of one size, which is a SigLIP, and "siglip2 naflex" reads pictures of native size.
    """
    torch.manual_seed(0)
    sizes = SHAPES[shape]
    model: Any
    tokenizer: Any
    side = sizes["vision"]["image_size"]
    crop: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if kind == "clip":
        vocab, merges = clip_vocabulary()
        tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=sizes["text"]["max_position_embeddings"])
        start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
        text = sizes["text"] | {"vocab_size": len(vocab), "bos_token_id": start, "eos_token_id": end}
        config = CLIPConfig(text_config=text, vision_config=sizes["vision"], projection_dim=sizes["width"])
        model, processor = CLIPModel(config), CLIPImageProcessor(**crop)
    elif kind == "chinese_clip":
        backend = word_pieces()
        vocab = backend.get_vocab()
        text = {"vocab_size": len(vocab), **sizes["text"]} | {"layer_norm_eps": 1e-12, "hidden_act": "gelu"}
        config = ChineseCLIPConfig(text_config=text, vision_config=sizes["vision"], projection_dim=sizes["width"])
        model = ChineseCLIPModel(config)
        processor = ChineseCLIPImageProcessor(size={"height": side, "width": side}, do_center_crop=False)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = BertTokenizer(vocab=vocab, model_max_length=sizes["text"]["max_position_embeddings"])
    elif not kind.startswith("siglip"):
        model, tokenizer = many_lingual(kind, sizes)
        processor = CLIPImageProcessor(**crop)
    else:
        backend = unigram() if kind == "siglip" else gemma_like()
        eos = "</s>" if kind == "siglip" else "<eos>"
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token=eos, unk_token="<unk>", pad_token=eos if kind == "siglip" else "<pad>",
            model_max_length=sizes["text"]["max_position_embeddings"],
        )  # fmt: skip
        text = sizes["text"] | {
            "vocab_size": backend.get_vocab_size(),
            "projection_size": sizes["vision"]["hidden_size"],
        }
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=sizes["vision"]))
        processor = SiglipImageProcessor(size={"height": side, "width": side})
        if kind == "siglip2 naflex":
            patch = sizes["vision"]["patch_size"]
            vision = {name: value for name, value in sizes["vision"].items() if name != "image_size"}
            vision |= {"num_patches": (side // patch) ** 2}
            model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision))
            processor = Siglip2ImageProcessor(patch_size=patch, max_num_patches=(side // patch) ** 2 + 3)
    noisy(model, 0.15)
    if kind == "chinese_clip":  # transformers does so when it loads one
        model.text_model.embeddings.word_embeddings.weight.data[0] = 0
    for embedding in model.modules():  # as transformers keeps it, too
        if isinstance(embedding, torch.nn.Embedding) and embedding.padding_idx is not None:
            embedding.weight.data[embedding.padding_idx] = 0
    model.logit_scale.data.fill_(2.3)
    if hasattr(model, "logit_bias"):
        model.logit_bias.data.fill_(-4.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    if kind == "siglip2 naflex":  # as the published ones
        config = json.loads((folder / "tokenizer_config.json").read_text()) | {"padding_side": "right"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return model
