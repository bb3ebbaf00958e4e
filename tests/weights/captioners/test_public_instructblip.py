"""InstructBLIP by its folder: pixels, both tokenizers' ids, logits and ids are transformers'."""

from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, processors
from transformers import (
    AutoProcessor,
    BlipImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from support.public import byte_level, close, first_logits, ids, load, noisy, pictures, until_end, word_pieces

L = 3
SHAPES = [
    {"hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
     "patch_size": 7},
    {"hidden_size": 20, "intermediate_size": 43, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 45,
     "patch_size": 9},
]  # fmt: skip


def folder(path: Path, shape: int) -> Path:
    backend = byte_level(["<s>", "<pad>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>"
    )
    reader = word_pieces()
    reader.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    questions = PreTrainedTokenizerFast(
        tokenizer_object=reader, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
    vision = SHAPES[shape]
    config = InstructBlipConfig(
        vision_config=vision,
        qformer_config={
            "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 29,
            "vocab_size": len(questions) + 2, "max_position_embeddings": 37,
            "encoder_hidden_size": vision["hidden_size"],
        },
        text_config=OPTConfig(
            vocab_size=len(tokenizer) + 3, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, ffn_dim=37,
            max_position_embeddings=61, word_embed_proj_dim=12, bos_token_id=0, eos_token_id=2, pad_token_id=1,
        ),
        num_query_tokens=L, image_token_index=backend.token_to_id("<image>"),
    )  # fmt: skip
    noisy(InstructBlipForConditionalGeneration(config), 0.5, seed=shape + 7).save_pretrained(path)
    side = vision["image_size"]
    pixels = BlipImageProcessor(size={"height": side, "width": side})
    InstructBlipProcessor(pixels, tokenizer, questions, num_query_tokens=L).save_pretrained(path)
    return path


@pytest.mark.parametrize("shape", [0, 1])
def test_it_is_transformers(shape: int, tmp_path: Path) -> None:
    path = folder(tmp_path, shape)
    theirs = InstructBlipForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    processor.tokenizer.padding_side = "left"
    ours = load(path)
    images, texts = pictures(), ["question: what is this? answer:", "a photo of", "a red star and"]
    given = processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert ours.processor is not None
    batch = ours.processor.with_prompts(ours.batch(images), texts)
    assert batch.pixels is not None
    assert torch.equal(batch.pixels[:, 0], given["pixel_values"])
    assert [r[m].tolist() for r, m in zip(batch.tokens, batch.attention_mask, strict=True)] == [
        [i for i in r[m.bool()].tolist() if i != theirs.config.image_token_index]
        for r, m in zip(given["input_ids"], given["attention_mask"], strict=True)
    ]
    rows, real = batch.instruction, batch.instruction_attention_mask  # type: ignore[attr-defined]
    assert [r[m].tolist() for r, m in zip(rows, real, strict=True)] == [
        r[m.bool()].tolist() for r, m in zip(given["qformer_input_ids"], given["qformer_attention_mask"], strict=True)
    ]
    with torch.no_grad():
        close(first_logits(ours, images, texts), theirs(**given).logits[:, -1])
        for beams in (1, 3):
            new = theirs.generate(**given, max_new_tokens=9, num_beams=beams)[:, given["input_ids"].shape[1] :]
            want = until_end(new, ours.tokenizer.eos_ids)
            assert ids(ours, images, texts, max_new_tokens=9, num_beams=beams) == want
            assert len({tuple(row) for row in want}) > 1
