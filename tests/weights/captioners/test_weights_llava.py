"""LLaVA 1.5, NeXT and OneVision: transformers' logits and ids, in batches and alone, all layouts, there and back."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from mmtransformer import LinearProjector, Llava, MLPProjector, TextDecoder, TileConfig, TiledBatch, ViT, generate
from mmtransformer.weights import load_llava, save_llava
from mmtransformer.weights.captioners.llava import llava_from_state

VOCAB, IMAGE = 59, 57
SMALL = {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 21,
         "patch_size": 7}  # fmt: skip
OTHER = {"hidden_size": 20, "intermediate_size": 43, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 20,
         "patch_size": 5}  # fmt: skip
TEXT = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 257, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
POINTS = [[21, 42], [42, 21], [42, 42], [63, 21]]
SIDES = [[h, w] for h in (20, 40, 60) for w in (20, 40, 60)]


def clip(**options: Any) -> CLIPVisionConfig:
    return CLIPVisionConfig(**(SMALL | options))


def siglip(**options: Any) -> SiglipVisionConfig:
    return SiglipVisionConfig(**(OTHER | options))


def llava(vision: Any, text: Any, **options: Any) -> Any:
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, **options)
    )


def llava_next(vision: Any, text: Any, points: Any, **options: Any) -> Any:
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_grid_pinpoints=points, **options
    )
    return LlavaNextForConditionalGeneration(config)


def onevision(vision: Any, text: Any, points: Any, **options: Any) -> Any:
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, video_token_index=IMAGE + 1,
        image_grid_pinpoints=points, **options,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config)


MODELS = {
    "llava": lambda: llava(clip(), LlamaConfig(**TEXT)),
    "llava, SigLIP and Qwen2": lambda: llava(
        siglip(),
        Qwen2Config(**TEXT),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        multimodal_projector_bias=False,
    ),
    "llava, tied, two layers with the class": lambda: llava(
        clip(hidden_act="gelu"),
        LlamaConfig(**TEXT, tie_word_embeddings=True),
        vision_feature_select_strategy="full",
        vision_feature_layer=[1, -1],
    ),
    "next": lambda: llava_next(clip(), MistralConfig(**TEXT), POINTS),
    "next, SigLIP": lambda: llava_next(
        siglip(), LlamaConfig(**TEXT), SIDES, vision_feature_select_strategy="full", vision_feature_layer=-1
    ),
    "onevision": lambda: onevision(siglip(vision_use_head=False), Qwen2Config(**TEXT), SIDES),
    "onevision, shrunk": lambda: onevision(
        siglip(vision_use_head=False), Qwen2Config(**TEXT), SIDES, vision_aspect_ratio="anyres_max_2"
    ),
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
    return load_llava(folder)


SIZES = [(33, 70), (90, 40), (41, 42), (200, 30)]  # of pictures, px: a pinpoint each, and what is left is odd


def inputs(ours: Llava, rows: int = 3, answer: int = 0) -> tuple[TiledBatch, dict[str, Any]]:
    """Prompts of unequal lengths padded on the left, a picture amid each; with an answer behind, on the right."""
    generator = torch.Generator().manual_seed(5)
    side, grid = ours.vision.image_size[0], ours.vision.grid_size
    sizes = SIZES[:rows]
    tiles = [(0, 0)] * rows if not ours.tiles.pinpoints else [ours.tiles.tiles(size, (side, side)) for size in sizes]
    if not ours.tiles.pinpoints:
        counts = [grid[0] * grid[1] + int(ours.keep_prefix_tokens)] * rows
    else:
        counts = [ours.tiles.num_tokens(size, t, grid) for size, t in zip(sizes, tiles, strict=True)]
    texts = []
    for i, count in enumerate(counts):
        text = torch.randint(3, IMAGE, (5 + 2 * i + answer,), generator=generator)
        texts.append(torch.cat((text[: 1 + i], torch.full((count,), IMAGE), text[1 + i :])))
    longest = max(map(len, texts))
    pads = [torch.zeros(longest - len(text), dtype=torch.long) for text in texts]
    order = (lambda pad, text: (text, pad)) if answer else (lambda pad, text: (pad, text))
    tokens = torch.stack([torch.cat(order(p, t)) for p, t in zip(pads, texts, strict=True)])
    mask = torch.stack(
        [torch.cat(order(p.bool(), torch.ones_like(t).bool())) for p, t in zip(pads, texts, strict=True)]
    )
    numbers = [1 + r * c for r, c in tiles]
    pixels = torch.randn(rows, max(numbers), 3, side, side, generator=generator)
    real = torch.arange(max(numbers)) < torch.tensor(numbers)[:, None]
    given: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask.long()}
    if not ours.tiles.pinpoints:
        given["pixel_values"] = pixels[:, 0]
        batch = TiledBatch(tokens, mask, mask & False, pixels)
    else:
        pixels = pixels * real[:, :, None, None, None]
        given |= {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
        batch = TiledBatch(
            tokens, mask, mask & False, pixels, image_mask=real, image_sizes=torch.tensor(sizes)[:, None]
        )
    return batch, given


@torch.no_grad()
def test_logits(theirs: Any, tmp_path: Path) -> None:
    ours = loaded(theirs, tmp_path)
    batch, given = inputs(ours, answer=3)
    want, found = theirs(**given).logits, ours.logits(batch)
    torch.testing.assert_close(found[batch.attention_mask], want[batch.attention_mask], atol=3e-5, rtol=1e-5)
    maps = ours.attention_map(batch)
    assert maps.shape == (3, batch.tokens.shape[1], 1, *ours.vision.grid_size)
    seen = maps.sum((2, 3, 4))
    assert (seen[:, -1] > 0.01).all()
    assert (seen < 1 + 1e-5).all()


ENDS = {"one end": 2, "several ends": [2, 11, 23, 31, 5]}


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_ids_in_a_batch_and_alone(theirs: Any, beams: int, ends: str, tmp_path: Path) -> None:
    ours = loaded(theirs, tmp_path)
    batch, given = inputs(ours)
    eos: Any = ENDS[ends]
    search = {"max_new_tokens": 9, "num_beams": beams}
    want = theirs.generate(**given, **search, do_sample=False, eos_token_id=eos, pad_token_id=0)
    found = generate(ours, batch, eos_id=eos, **search)
    for i, row in enumerate(found):
        expected = want[i, batch.tokens.shape[1] :].tolist()
        assert row[0].tokens == ended(expected, eos)
        real = batch.attention_mask[i]
        assert batch.pixels is not None
        alone = TiledBatch(
            batch.tokens[i : i + 1, real], batch.attention_mask[i : i + 1, real], batch.loss_mask[i : i + 1, real],
            batch.pixels[i : i + 1],
            image_mask=None if batch.image_mask is None else batch.image_mask[i : i + 1],
            image_sizes=None if batch.image_sizes is None else batch.image_sizes[i : i + 1],
        )  # fmt: skip
        assert generate(ours, alone, eos_id=eos, **search)[0][0].tokens == row[0].tokens


def ended(tokens: list[int], eos: int | list[int]) -> list[int]:
    """What stands before the first end."""
    ends = [eos] if isinstance(eos, int) else eos
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


@torch.no_grad()
def test_written_back(theirs: Any, tmp_path: Path) -> None:
    ours = loaded(theirs, tmp_path / "theirs")
    save_llava(ours, tmp_path / "ours")
    read, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    folded = ("class_embedding", "position_embedding.weight")  # A class token's position is added into it.
    for name, tensor in theirs.state_dict().items():
        if not (ours.vision.class_token and name.endswith(folded)):
            assert torch.equal(read.state_dict()[name], tensor), name
    _, given = inputs(ours)
    for beams in (1, 3):
        search: dict[str, Any] = {
            "max_new_tokens": 7,
            "num_beams": beams,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": 2,
        }
        assert torch.equal(read.generate(**given, **search), theirs.generate(**given, **search))
    for name, tensor in load_llava(tmp_path / "ours").state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    ours.save_pretrained(tmp_path / "own")
    again = Llava.from_pretrained(tmp_path / "own")
    batch, _ = inputs(ours, answer=3)
    assert torch.equal(again.logits(batch), ours.logits(batch))


LAYOUTS = {
    "as first published": {r"^model\.language_model\.": "language_model.model.", r"^lm_head": "language_model.lm_head",
                           r"^model\.vision_tower\.": "vision_tower.vision_model.", r"^model\.": ""},
    "4.52": {r"^model\.vision_tower\.": "model.vision_tower.vision_model."},
    "in memory": {},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str) -> None:
    theirs = noisy(MODELS["next"]())
    state = theirs.state_dict()
    renamed = {}
    for name, tensor in state.items():
        for pattern, to in LAYOUTS[layout].items():
            name = re.sub(pattern, to, name)
        renamed[name] = tensor
    ours = llava_from_state(theirs.config.to_dict(), renamed, "here")
    for name, tensor in llava_from_state(theirs.config.to_dict(), state, "here").state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


def test_a_tower_without_the_head_that_nobody_reads() -> None:
    theirs = noisy(MODELS["llava, SigLIP and Qwen2"]())
    state = {name: tensor for name, tensor in theirs.state_dict().items() if ".head." not in name}
    ours = llava_from_state(theirs.config.to_dict(), state, "here")
    assert ours.vision.attn_pool is None
    batch, given = inputs(ours, answer=3)
    with torch.no_grad():
        found, want = ours.logits(batch), theirs(**given).logits
    torch.testing.assert_close(found[batch.attention_mask], want[batch.attention_mask], atol=3e-5, rtol=1e-5)


@torch.no_grad()
def test_a_head_of_its_own_stays_untied(tmp_path: Path) -> None:
    theirs = noisy(MODELS["llava, tied, two layers with the class"]())
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    assert load_llava(tmp_path).decoder.tied
    tensors["language_model.lm_head.weight"] = tensors[embedding] + 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = load_llava(tmp_path)
    assert not ours.decoder.tied
    read = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    batch, given = inputs(ours, answer=3)
    found, want = ours.logits(batch), read(**given).logits
    torch.testing.assert_close(found[batch.attention_mask], want[batch.attention_mask], atol=3e-5, rtol=1e-5)


@torch.no_grad()
def test_several_pictures_of_a_prompt_are_one_tile_each_in_onevision(tmp_path: Path) -> None:
    theirs = noisy(MODELS["onevision"]())
    ours = loaded(theirs, tmp_path)
    torch.manual_seed(6)
    tokens = torch.randint(3, IMAGE, (1, 44))
    tokens[:, 3:20] = tokens[:, 22:39] = IMAGE
    pixels, sizes, mask = torch.randn(1, 2, 3, 20, 20), torch.tensor([[33, 70], [90, 40]]), tokens > 0
    want = theirs(
        input_ids=tokens, pixel_values=pixels[0][:, None], image_sizes=sizes, batch_num_images=torch.tensor([2])
    ).logits
    batch = TiledBatch(tokens, mask, mask, pixels, image_sizes=sizes[None])
    torch.testing.assert_close(ours.logits(batch), want, atol=3e-5, rtol=1e-5)
    assert ours.attention_map(batch).shape == (1, 44, 2, 4, 4)


def small(**options: Any) -> Llava:
    vision = ViT(16, 8, 12, 2, 2)
    projector = options.pop("projector", None) or MLPProjector(12, 24, input_norm=False)
    return Llava(vision, projector, TextDecoder(VOCAB, 24, 2, 4, max_len=61), IMAGE, **options)


def test_refused(tmp_path: Path) -> None:
    theirs: Any = MODELS["next"]()
    config, state = theirs.config.to_dict(), theirs.state_dict()
    for change, said in (
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"vision_feature_layer": 0}, r"vision_feature_layer is \(0,\)"),
        ({"vision_feature_layer": -7}, r"vision_feature_layer is \(-7,\)"),
        ({"vision_feature_select_strategy": "full"}, "no place in squares of patches or in tiles"),
        ({"text_config": config["text_config"] | {"model_type": "phi"}}, 'the family "phi" is not one of'),
        ({"model_type": "llava"}, "unknown: newline"),
    ):
        with pytest.raises(ValueError, match=said):
            llava_from_state(config | change, state, "here")
    (tmp_path / "config.json").write_text('{"model_type": "vipllava"}')
    with pytest.raises(ValueError, match='model_type is "vipllava", not "llava" or "llava_next"'):
        load_llava(tmp_path)
    with pytest.raises(ValueError, match=r"belong nowhere: model\.strange"):
        llava_from_state(config, state | {"model.strange": torch.ones(2)}, "here")
    del state["model.image_newline"]
    with pytest.raises(ValueError, match="missing: newline"):
        llava_from_state(config, state, "here")
    for options, said in (
        ({"vision_feature_layers": None}, "reads tokens before the last norm"),
        ({"projector": LinearProjector(12, 24)}, "has an MLPProjector"),
        ({"projector": MLPProjector(12, 24)}, "projector.input_norm=True"),
        ({"projector": MLPProjector(12, 24, 25, input_norm=False)}, "projector.hidden_dim=25"),
    ):
        with pytest.raises(ValueError, match=said):
            save_llava(small(**options), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for options, said in (
        ({"vision_feature_layers": (-1, -2)}, "goes from 12 to 24, but the vision encoder's tokens have 24 channels"),
        ({"vision_feature_layers": (2,)}, r"behind blocks \(2,\) are to be read, but there are 2"),
        ({"tiles": TileConfig(((16, 32),)), "keep_prefix_tokens": True}, "keep_prefix_tokens must be False"),
    ):
        with pytest.raises(ValueError, match=said):
            small(**options)


def test_placeholders_and_sizes_that_do_not_fit(tmp_path: Path) -> None:
    ours = loaded(MODELS["next"](), tmp_path)
    batch, _ = inputs(ours)
    one: Tensor = batch.tokens.clone()
    one[1, -1] = IMAGE
    with pytest.raises(ValueError, match=r"row 1 has \d+ placeholders \(id 57\), but its images \d+ tokens"):
        ours.inputs_embeds(replace(batch, tokens=one))
    with pytest.raises(ValueError, match="need a TiledBatch with their image_sizes"):
        ours.inputs_embeds(replace(batch, image_sizes=None))
    assert batch.image_sizes is not None
    with pytest.raises(ValueError, match=r"samples have .* tiles, and pictures of these sizes"):
        ours.inputs_embeds(replace(batch, image_sizes=batch.image_sizes.flip(0)))
    with pytest.raises(ValueError, match="Llava does not support the batch field image_sizes"):
        small().inputs_embeds(batch)
