"""PaliGemma 1 and 2: transformers' models there and back, on small random ones: masks, logits, ids, folders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    AutoProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)
from transformers import PaliGemmaProcessor as TheirProcessor

from mmtransformer import CaptionBatch, GenerationConfig, PaliGemma, TextDecoder, ViT, generate
from mmtransformer.weights import load_paligemma, save_paligemma
from mmtransformer.weights.captioners.paligemma import paligemma_from_state, to_paligemma
from support.public import byte_level, close, first_logits, ids, load, noisy, pictures, until_end

VOCAB, IMAGE, END = 53, 52, 7
VISION = {"model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2,
          "num_attention_heads": 4, "image_size": 21, "patch_size": 7, "vision_use_head": False}  # fmt: skip
TEXT = {"vocab_size": VOCAB, "max_position_embeddings": 61, "num_hidden_layers": 3, "intermediate_size": 29,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": END}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "gemma": {"hidden_size": 20, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 6},
    "gemma2": {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
               "sliding_window": 7, "query_pre_attn_scalar": 13,
               "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
}  # fmt: skip
P = 9


def theirs_of(kind: str, vocab: int = VOCAB, image: int = IMAGE) -> Any:
    width = SHAPES[kind]["hidden_size"]
    config = PaliGemmaConfig(
        vision_config=VISION, text_config=TEXT | SHAPES[kind] | {"model_type": kind, "vocab_size": vocab},
        projection_dim=width, hidden_size=width, image_token_index=image,
    )  # fmt: skip
    torch.manual_seed(1)
    return noisy(PaliGemmaForConditionalGeneration(config), 0.35)


def ours_of(theirs: Any) -> PaliGemma:
    return paligemma_from_state(theirs.config.to_dict(), theirs.state_dict(), "it")


def rows(q: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels, tokens, which are real, and which are answered."""
    torch.manual_seed(3)
    places, lengths, prompts = torch.arange(q), torch.tensor([8, 4, 6]), torch.tensor([5, 3, 2])
    real = places < lengths[:, None]
    return torch.randn(3, 3, 21, 21), torch.randint(IMAGE, (3, q)), real, real & (places >= prompts[:, None])


def placed(tokens: Tensor) -> Tensor:
    return torch.cat((torch.full((len(tokens), P), IMAGE), tokens), 1)


@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_logits(kind: str) -> None:
    theirs = theirs_of(kind)
    ours = ours_of(theirs)
    pixels, tokens, real, answer = rows()
    found = ours.logits(CaptionBatch(tokens, real, answer, pixels=pixels))
    for n in range(3):
        length = int(real[n].sum())
        want = theirs(
            input_ids=placed(tokens[n : n + 1, :length]), pixel_values=pixels[n : n + 1],
            attention_mask=torch.ones(1, P + length, dtype=torch.long),
            token_type_ids=torch.cat((torch.zeros(1, P, dtype=torch.long), answer[n : n + 1, :length].long()), 1),
        ).logits[:, P:]  # fmt: skip
        close(found[n : n + 1, :length], want)
        assert want.std() > 0.1


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_ids(kind: str, beams: int) -> None:
    """One by one as transformers has them, and left-padded prompts of a batch as each alone."""
    theirs = theirs_of(kind)
    ours = ours_of(theirs)
    pixels, tokens, real, _ = rows()
    wanted = []
    for n, length in enumerate(real.sum(1).tolist()):
        prompt = placed(tokens[n : n + 1, :length])
        found = theirs.generate(
            input_ids=prompt, pixel_values=pixels[n : n + 1], attention_mask=torch.ones_like(prompt),
            token_type_ids=torch.zeros_like(prompt), num_beams=beams, max_new_tokens=9, do_sample=False,
            pad_token_id=0, eos_token_id=END,
        )  # fmt: skip
        wanted += until_end(found[:, prompt.shape[1] :], [END])
    order = real.long().argsort(dim=1, stable=True)
    left = tokens.gather(1, order), real.gather(1, order), torch.zeros_like(real)
    search = GenerationConfig(max_new_tokens=9, num_beams=beams)
    texts = generate(ours, CaptionBatch(*left, pixels=pixels), search, eos_id=END)
    assert [list(best.tokens) for best, *_ in texts] == wanted
    assert len({tuple(row) for row in wanted}) > 1


@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_transformers_reads_what_is_written(kind: str, tmp_path: Path) -> None:
    ours = ours_of(theirs_of(kind))
    save_paligemma(ours, tmp_path)
    theirs, report = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.lm_head.weight is theirs.model.language_model.embed_tokens.weight
    assert theirs.config.image_token_id == IMAGE
    for name, tensor in theirs_of(kind).state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
    again, state = load_paligemma(tmp_path), ours.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_paligemma(tmp_path / "theirs")
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    again.save_pretrained(tmp_path / "ours")
    PaliGemma.from_pretrained(tmp_path / "ours")


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of transformers' own processor
@torch.no_grad()
def test_a_folder_captions_as_transformers(tmp_path: Path) -> None:
    backend = byte_level(["<pad>", "<eos>", "<bos>"])
    backend.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )
    pixels = SiglipImageProcessor(size={"height": 21, "width": 21})
    pixels.image_seq_length = P
    TheirProcessor(pixels, tokenizer).save_pretrained(tmp_path)  # It adds 1,152 tokens of places and shapes.
    theirs = theirs_of("gemma", len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    theirs.generation_config.eos_token_id = 1
    theirs.save_pretrained(tmp_path)
    ours, images, text = load(tmp_path), pictures(), "caption en"
    given = AutoProcessor.from_pretrained(tmp_path)(images=images, text=[text] * 3, return_tensors="pt")
    batch = ours.batch(images)
    assert batch.pixels is not None
    assert torch.equal(batch.pixels[:, 0], given["pixel_values"])
    for beams in (1, 3):
        found = theirs.generate(**given, max_new_tokens=8, num_beams=beams, do_sample=False)
        want = until_end(found[:, given["input_ids"].shape[1] :], [1])
        assert ids(ours, images, [None] * 3, max_new_tokens=8, num_beams=beams) == want
    close(first_logits(ours, images, [text] * 3), theirs(**given).logits[:, -1])


def test_what_is_refused(tmp_path: Path) -> None:
    theirs = theirs_of("gemma2")
    config, state = theirs.config.to_dict(), theirs.state_dict()
    text = config["text_config"]
    for changed, message in (
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu', not 'gelu_pytorch_tanh'"),
        ({"layer_types": ["full_attention"] * 3}, "do not begin with a window and alternate"),
    ):
        with pytest.raises(ValueError, match=message):
            paligemma_from_state(config | {"text_config": text | changed}, state, "it")
    with pytest.raises(ValueError, match=r"belong nowhere: more \(1 in all\)"):
        paligemma_from_state(config, state | {"more": torch.ones(1)}, "it")
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ValueError, match='model_type is "llava", not "paligemma"'):
        load_paligemma(tmp_path)
    tower = ViT(16, 8, 12, 1, 2, class_token=False, pool="mean")
    with pytest.raises(ValueError, match="a decoder of Gemma's kind=False"):
        to_paligemma(PaliGemma(tower, TextDecoder(VOCAB, 12, 1, 2)))
    with pytest.raises(ValueError, match="room for text behind 4 patches in 4 positions"):
        PaliGemma(tower, TextDecoder(VOCAB, 12, 1, 2, max_len=4))
