"""Idefics3 and SmolVLM: transformers' logits and ids, with unequal numbers of tiles, and there and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from mmtransformer import CaptionBatch, LinearProjector, Llava, MLPProjector, TextDecoder, ViT, generate
from mmtransformer.weights import load_idefics3, save_idefics3
from mmtransformer.weights.captioners.idefics3 import idefics3_from_state

VOCAB, IMAGE = 59, 57
TOWERS: list[dict[str, Any]] = [
    {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
     "patch_size": 7},
    {"hidden_size": 20, "intermediate_size": 43, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 30,
     "patch_size": 5, "hidden_act": "gelu", "layer_norm_eps": 1e-4},
]  # fmt: skip
TEXT = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 257, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def idefics3(shape: int, **options: Any) -> Any:
    config = Idefics3Config(
        vision_config=TOWERS[shape], text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, **options
    )
    return Idefics3ForConditionalGeneration(config)


def smolvlm(shape: int, **options: Any) -> Any:
    config = SmolVLMConfig(
        vision_config=TOWERS[shape], text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, **options
    )
    return SmolVLMForConditionalGeneration(config)


MODELS = {
    "idefics3": lambda: idefics3(0),
    "idefics3, tied": lambda: idefics3(1, tie_word_embeddings=True, scale_factor=3),
    "smolvlm": lambda: smolvlm(1, scale_factor=2),
    "smolvlm, tied": lambda: smolvlm(0, tie_word_embeddings=True, scale_factor=4),
}


def noisy(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=MODELS, name="theirs")
def any_model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return noisy(MODELS[request.param]())


def loaded(theirs: Any, folder: Path) -> Llava:
    theirs.save_pretrained(folder)
    return load_idefics3(folder)


def inputs(ours: Llava, *, left: bool) -> tuple[CaptionBatch, dict[str, Any]]:
    """Prompts of unequal lengths with 1, 3 and 2 tiles, each tile's placeholders behind a marker."""
    generator, side = torch.Generator().manual_seed(5), ours.vision.image_size[0]
    count, numbers = (
        ours.vision.grid_size[0] * ours.vision.grid_size[1] // ours.projector.pixel_shuffle**2,
        torch.tensor([1, 3, 2]),
    )
    texts = []
    for i, number in enumerate(numbers.tolist()):
        text = torch.randint(3, IMAGE, (4 + number + i,), generator=generator)
        parts = [text[:1]]
        for j in range(number):
            parts += [text[1 + j : 2 + j], torch.full((count,), IMAGE)]
        texts.append(torch.cat((*parts, text[1 + number :])))
    longest = max(map(len, texts))
    tokens, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.bool)
    for i, text in enumerate(texts):
        place = slice(longest - len(text), None) if left else slice(len(text))
        tokens[i, place], mask[i, place] = text, True
    real = torch.arange(3) < numbers[:, None]
    pixels = torch.randn(3, 3, 3, side, side, generator=generator) * real[:, :, None, None, None]
    given = {"input_ids": tokens, "attention_mask": mask.long(), "pixel_values": pixels}
    return CaptionBatch(tokens, mask, mask & False, pixels, image_mask=real), given


@torch.no_grad()
def test_logits(theirs: Any, tmp_path: Path) -> None:
    ours = loaded(theirs, tmp_path)
    batch, given = inputs(ours, left=False)
    want, found = theirs(**given).logits, ours.logits(batch)
    torch.testing.assert_close(found[batch.attention_mask], want[batch.attention_mask], atol=3e-5, rtol=1e-5)
    assert ours.decoder.tied == theirs.config.tie_word_embeddings


@pytest.mark.parametrize("ends", [2, [2, 11, 23, 31, 5]])
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_ids_in_a_batch_and_alone(theirs: Any, beams: int, ends: Any, tmp_path: Path) -> None:
    ours = loaded(theirs, tmp_path)
    batch, given = inputs(ours, left=True)
    search = {"max_new_tokens": 9, "num_beams": beams}
    want = theirs.generate(**given, **search, do_sample=False, eos_token_id=ends, pad_token_id=0)
    every = ends if isinstance(ends, list) else [ends]
    assert batch.pixels is not None
    for i, row in enumerate(generate(ours, batch, eos_id=ends, **search)):
        expected = want[i, batch.tokens.shape[1] :].tolist()
        expected = expected[: next((j for j, token in enumerate(expected) if token in every), len(expected))]
        assert row[0].tokens == expected
        real, tiles = batch.attention_mask[i], int(batch.image_mask[i].sum())  # type: ignore[index]
        fields = (getattr(batch, name)[i : i + 1, real] for name in ("tokens", "attention_mask", "loss_mask"))
        alone = CaptionBatch(*fields, batch.pixels[i : i + 1, :tiles])
        assert generate(ours, alone, eos_id=ends, **search)[0][0].tokens == expected


@torch.no_grad()
def test_written_back(theirs: Any, tmp_path: Path) -> None:
    ours = loaded(theirs, tmp_path / "theirs")
    save_idefics3(ours, tmp_path / "ours", theirs.config.model_type)
    read, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    _, given = inputs(ours, left=True)
    for beams in (1, 3):
        search: dict[str, Any] = {
            "max_new_tokens": 7,
            "num_beams": beams,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": 2,
        }
        assert torch.equal(read.generate(**given, **search), theirs.generate(**given, **search))
    for name, tensor in load_idefics3(tmp_path / "ours").state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def test_refused(tmp_path: Path) -> None:
    theirs: Any = MODELS["smolvlm"]()
    config, state = theirs.config.to_dict(), theirs.state_dict()
    for change, said in (
        ({"scale_factor": 4}, "squares of 4 x 4 patches do not tile a grid of 6 x 6|shapes"),
        ({"text_config": config["text_config"] | {"model_type": "phi"}}, 'the family "phi" is not one of'),
        ({"text_config": config["text_config"] | {"qk_layer_norms": True}}, "qk_layer_norms is True"),
    ):
        with pytest.raises(ValueError, match=said):
            idefics3_from_state(config | change, state, "here")
    (tmp_path / "config.json").write_text('{"model_type": "idefics2"}')
    with pytest.raises(ValueError, match='model_type is "idefics2", not "idefics3" or "smolvlm"'):
        load_idefics3(tmp_path)
    with pytest.raises(ValueError, match=r"belong nowhere: model\.strange"):
        idefics3_from_state(config, state | {"model.strange": torch.ones(2)}, "here")
    odd: Any = SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            vision_config=TOWERS[0] | {"image_size": 133}, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE
        )
    )
    with pytest.raises(ValueError, match="in a grid of 19 x 19 patches, some share their position"):
        idefics3_from_state(odd.config.to_dict(), odd.state_dict(), "here")

    decoder = TextDecoder(VOCAB, 24, 2, 4, max_len=61)
    tower, plain = ViT(16, 8, 12, 2, 2), ViT(16, 8, 12, 2, 2, class_token=False, pool="mean")
    linear, mlp = LinearProjector(12, 24, pixel_shuffle=2, bias=False), MLPProjector(12, 24, input_norm=False)
    for model, said in (
        (Llava(plain, mlp, decoder, IMAGE), "has a LinearProjector, not a MLPProjector"),
        (Llava(plain, linear, decoder, IMAGE, vision_feature_layers=(-1,)), r"vision_feature_layers=\(-1,\)"),
        (Llava(tower, linear, decoder, IMAGE, vision_feature_layers=None), "class_token=True"),
        (Llava(plain, linear, decoder, IMAGE, vision_feature_layers=None), "a decoder of Llama's kind=False"),
    ):
        with pytest.raises(ValueError, match=said):
            save_idefics3(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
