"""Dual encoders of transformers and open_clip: ids, pixels and vectors equal, there and back, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
)

from mmtransformer import (
    CLIP,
    ImageCaptioner,
    ImageTextEmbedder,
    ImageTransform,
    TextTower,
    Tokenizer,
    ViT,
    ViTOutputConfig,
    ViTPatchConfig,
)
from mmtransformer.backbones.vit_blocks import ViTBlockConfig
from mmtransformer.weights import load_clip, load_vit, save_clip, save_open_clip
from mmtransformer.weights.processors.pixels import open_clip_pixels
from support import dual
from support.public import noisy, pictures

pytestmark = pytest.mark.filterwarnings("ignore:.*longer than the .* tokens that the model reads")

ALL = ("clip", "siglip", "siglip2", "siglip2 naflex", "chinese_clip", "metaclip_2", "altclip",
       "vision-text-dual-encoder", "dual, bert")  # fmt: skip
KINDS = [(kind, shape) for kind in ALL for shape in dual.SHAPES]


def theirs_of(folder: Path, model: Any, texts: list[str]) -> tuple[Any, Any, Any]:
    """Ids, pixels and outputs of transformers."""
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    siglip = model.config.model_type in ("siglip", "siglip2")
    found = tokenizer(texts, padding="max_length" if siglip else True, truncation=True, return_tensors="pt")
    found.pop("token_type_ids", None)
    if siglip:
        found.pop("attention_mask")
    pixels = processor(pictures(), return_tensors="pt")
    with torch.no_grad():
        return found["input_ids"], pixels, model(**found, **pixels)


def as_patches(ours: ImageTextEmbedder, pixels: Any) -> list[Any]:
    """Pixels of transformers as ours are: of SigLIP 2's native sizes each picture's own."""
    if "spatial_shapes" not in pixels:
        return list(pixels["pixel_values"])
    size, found = ours.model.vision.patch_size, []
    for patches, (rows, columns) in zip(pixels["pixel_values"], pixels["spatial_shapes"].tolist(), strict=True):
        pattern = "(gh gw) (y x c) -> c (gh y) (gw x)"
        found.append(rearrange(patches[: rows * columns], pattern, gh=rows, y=size, x=size))
    return found


@torch.no_grad()
@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_ids_pixels_and_vectors_are_those_of_transformers(kind: str, shape: str, tmp_path: Path) -> None:
    model = dual.write(tmp_path / "theirs", kind, shape)
    ours = ImageTextEmbedder.from_pretrained(tmp_path / "theirs", device="cpu")
    ids, pixels, out = theirs_of(tmp_path / "theirs", model, dual.TEXTS)
    rows = ours.tokenizer.pad([ours.ids(text) for text in dual.TEXTS])
    real = ids[:, : rows[0].shape[1]]
    assert torch.equal(rows[0][rows[1]], real[rows[1]])
    for image, wanted in zip(pictures(), as_patches(ours, pixels), strict=True):
        assert torch.equal(ours.transform(image), wanted)
    torch.testing.assert_close(ours.encode_images(pictures()), out.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.encode_texts(dual.TEXTS), out.text_embeds, atol=1e-5, rtol=1e-5)
    logits = ours.model.logits(ours.encode_images(pictures()), ours.encode_texts(dual.TEXTS))
    torch.testing.assert_close(logits, out.logits_per_image, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_written_back_transformers_reads_it_whole(kind: str, shape: str, tmp_path: Path) -> None:
    model = dual.write(tmp_path / "theirs", kind, shape)
    ours = ImageTextEmbedder.from_pretrained(tmp_path / "theirs", device="cpu")
    ours.save_transformers(tmp_path / "ours")
    again, info = AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert type(again) is type(model)
    ids, pixels, out = theirs_of(tmp_path / "theirs", model, dual.TEXTS)
    again_ids, again_pixels, written = theirs_of(tmp_path / "ours", again, dual.TEXTS)
    assert torch.equal(again_ids, ids)
    assert all(torch.equal(again_pixels[name], tensor) for name, tensor in pixels.items())
    torch.testing.assert_close(written.text_embeds, out.text_embeds, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(written.image_embeds, out.image_embeds, atol=1e-6, rtol=1e-6)
    for name, tensor in model.state_dict().items():
        if name.endswith("embeddings.position_embeddings.weight") and kind in ("altclip", "vision-text-dual-encoder"):
            rows = again.state_dict()[name]  # A RoBERTa's begin behind those that no token reads.
            assert torch.equal(rows[-tensor.shape[0] + 2 :], tensor[2:])
        elif not name.endswith(("class_embedding", "vision_model.embeddings.position_embedding.weight")):
            assert torch.equal(again.state_dict()[name], tensor), name
    back = ImageTextEmbedder.from_pretrained(tmp_path / "ours", device="cpu")
    torch.testing.assert_close(back.encode_texts(dual.TEXTS), ours.encode_texts(dual.TEXTS))
    torch.testing.assert_close(back.encode_images(pictures()), ours.encode_images(pictures()))
    for name, tensor in load_clip(tmp_path / "ours").state_dict().items():
        assert torch.equal(tensor, ours.model.state_dict()[name]), name


def test_a_clip_whose_texts_are_gathered_at_their_largest_id(tmp_path: Path) -> None:
    """Old CLIPs of other vocabularies, whose end is not the largest: there transformers looks for the largest."""
    sizes = dual.SHAPES["small"]
    tokenizer = dual.xlm_roberta(sizes["text"]["max_position_embeddings"])
    text = sizes["text"] | {"vocab_size": len(tokenizer), "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = noisy(CLIPModel(CLIPConfig(text_config=text, vision_config=sizes["vision"], projection_dim=13)), 0.15)
    side = {"height": 21, "width": 21}
    for part in (model, tokenizer, CLIPImageProcessor(size={"shortest_edge": 21}, crop_size=side)):
        part.save_pretrained(tmp_path / "theirs")
    ours = ImageTextEmbedder.from_pretrained(tmp_path / "theirs", device="cpu")
    assert isinstance(ours.model.text, TextTower)
    assert ours.model.text.pool == "argmax"
    found = tokenizer(dual.TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        wanted = F.normalize(model.get_text_features(**found).pooler_output, dim=-1)
    torch.testing.assert_close(ours.encode_texts(dual.TEXTS), wanted, atol=1e-5, rtol=1e-5)
    ours.save_transformers(tmp_path / "ours")
    again = AutoModel.from_pretrained(tmp_path / "ours")
    assert type(again) is CLIPModel
    with torch.no_grad():
        written = F.normalize(again.get_text_features(**found).pooler_output, dim=-1)
    torch.testing.assert_close(written, wanted, atol=1e-6, rtol=1e-6)


def test_parts_of_dual_models_that_are_not_here_are_refused(tmp_path: Path) -> None:
    dual.write(tmp_path / "dual", "vision-text-dual-encoder")
    config = json.loads((tmp_path / "dual" / "config.json").read_text())
    for key, kind, said in (
        ("text_config", "gpt2", "the text model is a 'gpt2', and bert, roberta, xlm-roberta are known"),
        ("vision_config", "vit", "the vision model is a 'vit', and clip_vision_model is known"),
    ):
        other = config | {key: config[key] | {"model_type": kind}}
        (tmp_path / "dual" / "config.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=said):
            load_clip(tmp_path / "dual")
    dual.write(tmp_path / "naflex", "siglip2 naflex")
    for name, key, value, said in (
        ("tokenizer_config.json", "padding_side", "left", "texts are filled up on the left there, and SigLIP reads"),
        ("tokenizer_config.json", "padding_side", None, "texts are filled up on the left there"),
        ("preprocessor_config.json", "patch_size", 16, "patches of 16 px, and the model reads those of 7"),
    ):
        file = tmp_path / "naflex" / name
        kept = file.read_text()
        values = {k: v for k, v in {**json.loads(kept), key: value}.items() if v is not None}
        file.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=said):
            ImageTextEmbedder.from_pretrained(tmp_path / "naflex")
        file.write_text(kept)
    ours = ImageTextEmbedder.from_pretrained(tmp_path / "naflex", device="cpu")
    ours.transform = ImageTransform(21)
    with pytest.raises(ValueError, match="SigLIP 2's image processor keeps pictures' shapes"):
        ours.save_transformers(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    clip = tmp_path / "clip"
    dual.write(clip, "clip")
    ours = ImageTextEmbedder.from_pretrained(clip, device="cpu")
    ours.transform = ImageTransform(resize="native")
    with pytest.raises(ValueError, match="of transformers' image processors SigLIP 2's alone"):
        ours.save_transformers(tmp_path / "no")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(kind: str, half: torch.dtype, tmp_path: Path) -> None:
    model = dual.write(tmp_path, kind)
    whole = ImageTextEmbedder.from_pretrained(tmp_path, device="cpu")
    model.to(half).save_pretrained(tmp_path)
    read = ImageTextEmbedder.from_pretrained(tmp_path, device="cpu")
    assert {p.dtype for p in read.model.parameters()} == {torch.float32}
    name = str(half).removeprefix("torch.")
    small = ImageTextEmbedder.from_pretrained(tmp_path, device="cpu", dtype=name)  # type: ignore[arg-type]
    assert {p.dtype for p in small.model.parameters()} == {half}
    for found in (read, small):
        for mine, other in ((found.encode_images(pictures()), whole.encode_images(pictures())),
                            (found.encode_texts(dual.TEXTS), whole.encode_texts(dual.TEXTS))):  # fmt: skip
            assert mine.dtype == torch.float32
            assert float((mine * other).sum(1).min()) > 0.999
    with pytest.raises(ValueError, match='dtype must be float32, bfloat16, float16, not "int8"'):
        ImageTextEmbedder.from_pretrained(tmp_path, dtype="int8")  # type: ignore[arg-type]


@torch.no_grad()
def test_open_clip_there_and_back(tmp_path: Path) -> None:
    """open_clip itself is compared by hand; its names are those of OpenAI's release, written out here."""
    vit = ViT(21, 7, 24, 2, 4, mlp_dim=36, patches=ViTPatchConfig(bias=False, pre_norm=True),
              block=ViTBlockConfig("quick_gelu", 1e-5), output=ViTOutputConfig("pooled"))  # fmt: skip
    ours = noisy(CLIP(vit, TextTower(53, 20, 3, 2, max_len=11, mlp_dim=60, activation="quick_gelu"), embed_dim=13))
    save_open_clip(ours, tmp_path)
    state = load_file(tmp_path / "open_clip_model.safetensors")
    assert {name: tuple(state[name].shape) for name in (
        "visual.class_embedding", "visual.positional_embedding", "visual.proj", "visual.conv1.weight",
        "visual.ln_pre.weight", "visual.transformer.resblocks.1.attn.in_proj_weight", "visual.ln_post.bias",
        "visual.transformer.resblocks.0.mlp.c_fc.weight", "positional_embedding", "text_projection", "logit_scale",
        "token_embedding.weight", "transformer.resblocks.2.mlp.c_proj.bias", "ln_final.weight",
    )} == {
        "visual.class_embedding": (24,), "visual.positional_embedding": (10, 24), "visual.proj": (24, 13),
        "visual.conv1.weight": (24, 3, 7, 7), "visual.ln_pre.weight": (24,), "visual.ln_post.bias": (24,),
        "visual.transformer.resblocks.1.attn.in_proj_weight": (72, 24), "logit_scale": (),
        "visual.transformer.resblocks.0.mlp.c_fc.weight": (36, 24), "positional_embedding": (11, 20),
        "text_projection": (20, 13), "token_embedding.weight": (53, 20), "ln_final.weight": (20,),
        "transformer.resblocks.2.mlp.c_proj.bias": (20,),
    }  # fmt: skip
    back = load_clip(tmp_path)
    pixels, tokens = torch.randn(2, 3, 21, 21), torch.randint(0, 53, (3, 11))
    torch.testing.assert_close(back.encode_image(pixels), ours.encode_image(pixels), atol=1e-6, rtol=1e-6)
    assert torch.equal(back.encode_text(tokens), ours.encode_text(tokens))
    Tokenizer.train(["a red star"] * 3, 300).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer has 2.. tokens, but the model scores 53"):
        ImageTextEmbedder.from_pretrained(tmp_path)
    assert open_clip_pixels(tmp_path, (21, 21)) == ImageTransform(
        21, "crop", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    )
    # A custom text model has the same tensors below "text.".
    custom = {n if n.startswith(("visual.", "logit")) else f"text.{n}": t for n, t in state.items()}
    save_file(custom, tmp_path / "open_clip_model.safetensors")
    assert torch.equal(load_clip(tmp_path).encode_text(tokens), ours.encode_text(tokens))
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    for path, value, said in ((("vision_cfg", "timm_model_name"), "vit_base", "timm_model_name is 'vit_base'"),
                              (("text_cfg", "hf_model_name"), "roberta-base", "hf_model_name is 'roberta-base'"),
                              (("multimodal_cfg",), {}, "is a CoCa")):  # fmt: skip
        changed = json.loads(json.dumps(config))
        place = changed["model_cfg"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (tmp_path / "open_clip_config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=said):
            load_clip(tmp_path)
    config["preprocess_cfg"]["resize_mode"] = "longest"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="resize_mode 'longest'"):
        open_clip_pixels(tmp_path, (21, 21))


# ------------------------------------------------------------------------------------------------- refusals


def test_other_models_are_refused_in_a_line(tmp_path: Path) -> None:
    dual.write(tmp_path / "clip", "clip")
    model = AutoModel.from_pretrained(tmp_path / "clip")
    model.vision_model.save_pretrained(tmp_path / "vision")
    model.text_model.save_pretrained(tmp_path / "text")
    BertModel(BertConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=9,
                         vocab_size=30)).save_pretrained(tmp_path / "bert")  # fmt: skip
    ViT(14, 7, 12, 1, 2).save_pretrained(tmp_path / "vit")
    for name, said in (
        ("vision", r'vision/config.json is one tower alone \("clip_vision_model"\)'),
        ("text", r'text/config.json is one tower alone \("clip_text_model"\)'),
        (
            "bert",
            "bert/config.json: model_type is 'bert', no dual encoder that is known here: clip, metaclip_2, siglip, sig",
        ),
        ("vit", "vit holds a ViT, not a CLIP"),
        ("nothing", "nothing: no such folder"),
    ):
        for load in (load_clip, ImageTextEmbedder.from_pretrained):
            with pytest.raises(ValueError, match=said) as caught:
                load(tmp_path / name)
            assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"a dual encoder \(clip\), which does not caption: use `mmt search`, or Imag"):
        ImageCaptioner.from_pretrained(tmp_path / "clip")
    assert load_vit(tmp_path / "clip").class_token  # The tower of a dual encoder alone.


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    dual.write(tmp_path, "siglip")
    state = load_file(tmp_path / "model.safetensors")
    lost = {name: t for name, t in state.items() if name != "text_model.head.weight"}
    save_file(lost, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: text_model\.head\.weight"):
        load_clip(tmp_path)
    save_file(state | {"extra.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unknown: extra\.weight"):
        load_clip(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        ImageTextEmbedder.from_pretrained(tmp_path)


def test_what_transformers_has_not_is_not_written(tmp_path: Path) -> None:
    vision = ViT(14, 7, 24, 1, 4)
    with pytest.raises(ValueError, match="transformers' SigLIP has nothing like embed_dim=False"):
        save_clip(CLIP(vision, TextTower(53, 20, 1, 2), loss="sigmoid"), tmp_path / "a")
    with pytest.raises(ValueError, match="CLIP's vision tower has nothing like"):
        save_clip(CLIP(vision, TextTower(53, 20, 1, 2)), tmp_path / "a")
    with pytest.raises(ValueError, match="a Linear is neither a CLIP nor a vision tower"):
        save_clip(torch.nn.Linear(2, 2), tmp_path / "a")
    with pytest.raises(ValueError, match="open_clip's CLIP has nothing like block"):
        save_open_clip(CLIP(vision, TextTower(53, 20, 1, 2)), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert CLIPVisionConfig().patch_size == 32  # what `dual` takes for granted
