"""A small BLIP, ViT-GPT2 and LLaVA, trained here on real photos, and written as transformers has them.

transformers reads the folder and captions photos that training never saw; we read the same folder and caption them,
too: the same captions and ids, greedily and with beams, and so the same scores. The vision encoder is a frozen
DeiT-tiny, its features kept (in LLaVA without the class token and at 112 x 112, as a SigLIP); the training is short,
and the scores show only that photos are looked at.

python tests/benchmarks/prove_public.py PHOTOS WEIGHTS [--photos N] [--val N] [--steps N] [--only NAME] [--out FOLDER]

PHOTOS is a folder with zips of photos of 224 x 224 and captions.jsonl, of rows with image, captions and split; WEIGHTS
the DeiT-tiny's model.safetensors by timm's names.
"""

import argparse
import io
import json
import random
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertTokenizer,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    VisionEncoderDecoderModel,
    ViTImageProcessor,
)

from mmtransformer import (
    AttentionConfig,
    CaptionBatch,
    ImageCaptioner,
    ImageTransform,
    LinearConnector,
    Llava,
    MLPConfig,
    MLPProjector,
    NormConfig,
    PositionConfig,
    TextDecoder,
    VisionEncoderDecoder,
    ViT,
    ViTBlockConfig,
    caption_loss,
)
from mmtransformer.metrics.scores import score_captions
from mmtransformer.serialization.pretrained import load_strictly
from mmtransformer.weights import ViTSettings, load_vit, save_blip, save_llava, save_vision_encoder_decoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_LEN, NEW = 40, 16
KINDS = {
    "blip": BlipForConditionalGeneration,
    "vit-gpt2": VisionEncoderDecoderModel,
    "llava": LlavaForConditionalGeneration,
}
TEMPLATE = "{% for m in messages %}<image>{% endfor %}"
SIDE = {"height": 224, "width": 224}


class Photo(NamedTuple):
    name: str
    image: Image.Image
    captions: list[str]


class Texts(NamedTuple):
    """A tokenizer of transformers, and the ids that captions begin and end with."""

    tokenizer: Any
    vocab_size: int
    start: int
    end: int
    pad: int
    placeholders: list[int] = []  # noqa: RUF012 (never changed): what stands for the photo


def read_photos(folder: Path, split: str, count: int) -> list[Photo]:
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text("utf-8").splitlines()]
    rows = {row["image"]: row["captions"] for row in rows if row["split"] == split}
    found: list[Photo] = []
    for path in sorted(folder.glob("*.zip")):
        with zipfile.ZipFile(path) as file:
            for name in sorted(set(file.namelist()) & set(rows))[: count - len(found)]:
                image = Image.open(io.BytesIO(file.read(name))).convert("RGB")
                found.append(Photo(name, image, [text.lower().removesuffix(" .") for text in rows[name]]))
    return found


def words_of_bert(texts: list[str]) -> Texts:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=2000, special_tokens=specials))
    tokenizer = BertTokenizer(vocab=backend.get_vocab())
    size = len(tokenizer)
    return Texts(tokenizer, size + 1, start=size, end=3, pad=0)  # The start is the model's alone, as BLIP's [DEC].


def bytes_of_gpt2(texts: list[str]) -> Texts:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=[end], initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end)
    return Texts(tokenizer, len(tokenizer), start=0, end=0, pad=0)


def words_of_llama(texts: list[str]) -> Texts:
    """The same, with a mark for photos; a caption stands after the photo alone."""
    tokenizer = bytes_of_gpt2(texts).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left",
    )  # fmt: skip
    image: Any = made.convert_tokens_to_ids("<image>")
    return Texts(made, len(made), start=0, end=0, pad=0, placeholders=[image] * 49)


def blip(vision: ViT, texts: Texts) -> VisionEncoderDecoder:
    decoder = TextDecoder(
        texts.vocab_size, 192, 3, 4, max_len=MAX_LEN, context_dim=vision.dim, mlp=MLPConfig("gelu"),
        norm=NormConfig(eps=1e-12, pre=False, embed=True), mlm_head=True, dropout=0.1,
    )  # fmt: skip
    return VisionEncoderDecoder(vision, decoder, freeze_vision=True)


def vit_gpt2(vision: ViT, texts: Texts) -> VisionEncoderDecoder:
    decoder = TextDecoder(texts.vocab_size, 256, 3, 4, max_len=MAX_LEN, context_dim=256)
    return VisionEncoderDecoder(vision, decoder, connector=LinearConnector(vision.dim, 256), freeze_vision=True)


def llava(vision: ViT, texts: Texts) -> Llava:
    """The tower as a SigLIP: no class token, 49 patches."""
    vision.set_input_size(112)
    tower = ViT(112, 16, 192, 12, 3, class_token=False, pool="mean", block=ViTBlockConfig("gelu", 1e-6))
    load_strictly(tower, {name: x for name, x in vision.state_dict().items() if name in tower.state_dict()}, "DeiT")
    decoder = TextDecoder(
        texts.vocab_size, 192, 3, 4, max_len=128, attention=AttentionConfig(bias=False), tied=False,
        mlp=MLPConfig("swiglu", bias=False), norm=NormConfig("rms"), positions=PositionConfig("rotary"),
    )  # fmt: skip
    projector, image = MLPProjector(192, 192, input_norm=False), texts.tokenizer.convert_tokens_to_ids("<image>")
    return Llava(
        tower, projector, decoder, image, vision_feature_layers=(-1,), keep_prefix_tokens=False, freeze_decoder=False
    )


@torch.no_grad()
def seen(model: VisionEncoderDecoder | Llava, photos: list[Photo]) -> Tensor:
    """What the frozen tower sees in each photo, once for all steps."""
    transform = ImageTransform(model.vision.image_size[0], "squash", MEAN, STD)
    parts = torch.stack([transform(photo.image) for photo in photos]).split(50)
    return torch.cat([model.forward_features(part)[:, 0] for part in parts])


def train(model: VisionEncoderDecoder | Llava, texts: Texts, photos: list[Photo], features: Tensor, steps: int) -> None:
    chance = random.Random(0)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=max(0.1, 2 / steps))
    began = time.perf_counter()
    model.train()
    for step in range(steps):
        chosen = chance.sample(range(len(photos)), min(32, len(photos)))
        said = [chance.choice(photos[i].captions) for i in chosen]
        ids = [texts.tokenizer(text, add_special_tokens=False).input_ids[: NEW - 1] for text in said]
        rows = [torch.tensor([texts.start, *texts.placeholders, *row, texts.end]) for row in ids]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=texts.pad)
        real = torch.arange(tokens.shape[1]) < torch.tensor([[len(row)] for row in rows])
        told = real & (torch.arange(tokens.shape[1]) > len(texts.placeholders))
        loss = caption_loss(model, CaptionBatch(tokens, real, told, visual_tokens=features[chosen][:, None]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"  step {step}: loss {loss.item():.2f}, {time.perf_counter() - began:.0f} s", flush=True)
    model.eval()


def write(model: VisionEncoderDecoder | Llava, texts: Texts, folder: Path) -> None:
    """The folder as transformers has it."""
    pixels: dict[str, Any] = {"size": SIDE, "image_mean": list(MEAN), "image_std": list(STD)}
    if isinstance(model, Llava):
        save_llava(model, folder)
        pixels["size"] = {"height": 112, "width": 112}
        made = SiglipImageProcessor(**pixels)
        LlavaProcessor(
            made, texts.tokenizer, patch_size=16, vision_feature_select_strategy="full", chat_template=TEMPLATE
        ).save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0}), "utf-8")
    elif model.adapter is None:
        save_blip(model, folder, bos_token_id=texts.start, sep_token_id=texts.end, pad_token_id=texts.pad)
        BlipProcessor(BlipImageProcessor(**pixels), texts.tokenizer).save_pretrained(folder)
    else:
        ids = {"decoder_start_token_id": texts.start, "eos_token_id": texts.end, "pad_token_id": texts.pad}
        save_vision_encoder_decoder(model, folder, **ids)
        ViTImageProcessor(**pixels).save_pretrained(folder)
        texts.tokenizer.save_pretrained(folder)


def theirs(folder: Path, photos: list[Photo], texts: Texts, *, name: str, beams: int) -> list[tuple[list[int], str]]:
    """Ids and captions of transformers."""
    kind: Any = KINDS[name]
    model, tokenizer = kind.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder)
    found = []
    for i in range(0, len(photos), 16):
        images = pixels([photo.image for photo in photos[i : i + 16]], return_tensors="pt")["pixel_values"]
        row = torch.tensor([[texts.start, *texts.placeholders]] * len(images))
        asked = {"input_ids": row, "attention_mask": torch.ones_like(row)} if texts.placeholders else {}
        with torch.inference_mode():
            rows = model.generate(pixel_values=images, **asked, max_new_tokens=NEW, num_beams=beams)
            rows = rows[:, 1 + len(texts.placeholders) :].tolist()
        rows = [row[: row.index(texts.end)] if texts.end in row else row for row in rows]
        found += [(row, tokenizer.decode(row, skip_special_tokens=True).strip()) for row in rows]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos_folder", type=Path, metavar="PHOTOS")
    parser.add_argument("weights", type=Path, metavar="WEIGHTS")
    for name, number in (("photos", 1000), ("val", 200), ("steps", 300)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--only", choices=tuple(KINDS))
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "prove_public")
    args = parser.parse_args()
    torch.manual_seed(0)
    photos, val = (read_photos(args.photos_folder, *of) for of in (("train", args.photos), ("val", args.val)))
    settings = ViTSettings(3, (14, 14), "gelu", 1e-6, "class")
    sentences = [text for photo in photos for text in photo.captions]
    print(f"{len(photos)} photos to train on, {len(val)} others to caption")
    makers = (("blip", words_of_bert, blip), ("vit-gpt2", bytes_of_gpt2, vit_gpt2), ("llava", words_of_llama, llava))
    for name, words, make in makers:
        if args.only not in (None, name):
            continue
        texts, folder = words(sentences), args.out / name
        model = make(load_vit(args.weights, settings=settings), texts)
        train(model, texts, photos, seen(model, photos), args.steps)
        write(model, texts, folder)
        ours = ImageCaptioner.from_pretrained(folder, device="cpu")
        for beams in (1, 4):
            there = theirs(folder, val, texts, name=name, beams=beams)
            here = [found[0] for found in ours([photo.image for photo in val], num_beams=beams, max_new_tokens=NEW)]
            report(f"{name}, {beams} beams", val, [(best.tokens, best.text) for best in here], there)


def report(
    name: str, photos: list[Photo], here: list[tuple[list[int], str]], there: list[tuple[list[int], str]]
) -> None:
    """How many captions are the same, and both sides' scores."""
    ids, texts = (sum(a[k] == b[k] for a, b in zip(here, there, strict=True)) for k in (0, 1))
    print(f"{name}: {ids} of {len(photos)} with the same ids, {texts} the same captions")
    references = {photo.name: photo.captions for photo in photos}
    for side, found in (("ours", here), ("theirs", there)):
        said = dict(zip(references, (text for _, text in found), strict=True))
        scores = score_captions(said, references, n_resamples=0, meteor=False, spice=False).values
        figures = ", ".join(f"{key} {scores[key]:.4f}" for key in ("bleu_1", "bleu_4", "cider_d"))
        print(f"  {side}: {figures}, {len(set(said.values()))} different captions", flush=True)
    print(f"  such as {there[0][1]!r}, {there[-1][1]!r}")


if __name__ == "__main__":
    main()
