"""A small BLIP and a small ViT-GPT2, trained here on real photos, and written as transformers has them.

transformers reads the folder and captions photos that training never saw; we read the same folder and caption them,
too: the same captions and ids, greedily and with beams, and so the same scores. The vision encoder is a frozen
DeiT-tiny, its features kept; the training is short, and the scores show only that photos are looked at.

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
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertTokenizer,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderModel,
    ViTImageProcessor,
)

from mmtransformer import (
    CaptionBatch,
    ImageCaptioner,
    ImageTransform,
    LinearConnector,
    MLPConfig,
    NormConfig,
    TextDecoder,
    VisionEncoderDecoder,
    ViT,
    caption_loss,
)
from mmtransformer.metrics.scores import score_captions
from mmtransformer.weights import ViTSettings, load_vit, save_blip, save_vision_encoder_decoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_LEN, NEW = 40, 16
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


def blip(vision: ViT, texts: Texts) -> VisionEncoderDecoder:
    decoder = TextDecoder(
        texts.vocab_size, 192, 3, 4, max_len=MAX_LEN, cross_dim=vision.dim, mlp=MLPConfig("gelu"),
        norm=NormConfig(eps=1e-12, pre=False, embed=True), word_head=True, dropout=0.1,
    )  # fmt: skip
    return VisionEncoderDecoder(vision, decoder, freeze_vision=True)


def vit_gpt2(vision: ViT, texts: Texts) -> VisionEncoderDecoder:
    decoder = TextDecoder(texts.vocab_size, 256, 3, 4, max_len=MAX_LEN, cross_dim=256)
    return VisionEncoderDecoder(vision, decoder, adapter=LinearConnector(vision.dim, 256), freeze_vision=True)


def train(model: VisionEncoderDecoder, texts: Texts, photos: list[Photo], features: Tensor, steps: int) -> None:
    chance = random.Random(0)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    began = time.perf_counter()
    model.train()
    for step in range(steps):
        chosen = chance.sample(range(len(photos)), min(32, len(photos)))
        said = [chance.choice(photos[i].captions) for i in chosen]
        ids = [texts.tokenizer(text, add_special_tokens=False).input_ids[: NEW - 1] for text in said]
        rows = [torch.tensor([texts.start, *row, texts.end]) for row in ids]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=texts.pad)
        real = torch.arange(tokens.shape[1]) < torch.tensor([[len(row)] for row in rows])
        loss = caption_loss(model, CaptionBatch(tokens, real, real, visual_tokens=features[chosen][:, None]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"  step {step}: loss {loss.item():.2f}, {time.perf_counter() - began:.0f} s", flush=True)
    model.eval()


def write(model: VisionEncoderDecoder, texts: Texts, folder: Path) -> None:
    """The folder as transformers has it."""
    pixels = {"size": SIDE, "image_mean": list(MEAN), "image_std": list(STD)}
    if model.adapter is None:
        save_blip(model, folder, bos_token_id=texts.start, sep_token_id=texts.end, pad_token_id=texts.pad)
        BlipProcessor(BlipImageProcessor(**pixels), texts.tokenizer).save_pretrained(folder)
    else:
        ids = {"decoder_start_token_id": texts.start, "eos_token_id": texts.end, "pad_token_id": texts.pad}
        save_vision_encoder_decoder(model, folder, **ids)
        ViTImageProcessor(**pixels).save_pretrained(folder)
        texts.tokenizer.save_pretrained(folder)


def theirs(folder: Path, photos: list[Photo], texts: Texts, *, blip: bool, beams: int) -> list[tuple[list[int], str]]:
    """Ids and captions of transformers."""
    kind: Any = BlipForConditionalGeneration if blip else VisionEncoderDecoderModel
    model, tokenizer = kind.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder)
    found = []
    for i in range(0, len(photos), 16):
        images = pixels([photo.image for photo in photos[i : i + 16]], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            rows = model.generate(images, max_new_tokens=NEW, num_beams=beams)[:, 1:].tolist()
        rows = [row[: row.index(texts.end)] if texts.end in row else row for row in rows]
        found += [(row, tokenizer.decode(row, skip_special_tokens=True).strip()) for row in rows]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos_folder", type=Path, metavar="PHOTOS")
    parser.add_argument("weights", type=Path, metavar="WEIGHTS")
    for name, number in (("photos", 1000), ("val", 200), ("steps", 300)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--only", choices=("blip", "vit-gpt2"))
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "prove_public")
    args = parser.parse_args()
    torch.manual_seed(0)
    photos, val = (read_photos(args.photos_folder, *of) for of in (("train", args.photos), ("val", args.val)))
    settings = ViTSettings(3, (14, 14), "gelu", 1e-6, "class")
    transform = ImageTransform(224, "squash", MEAN, STD)
    vision = load_vit(args.weights, settings=settings, freeze=True)
    with torch.no_grad():
        parts = torch.stack([transform(photo.image) for photo in photos]).split(50)
        features = torch.cat([vision.forward_features(part) for part in parts])
    sentences = [text for photo in photos for text in photo.captions]
    print(f"{len(photos)} photos to train on, {len(val)} others to caption")
    for name, words, make in (("blip", words_of_bert, blip), ("vit-gpt2", bytes_of_gpt2, vit_gpt2)):
        if args.only not in (None, name):
            continue
        texts, folder = words(sentences), args.out / name
        model = make(load_vit(args.weights, settings=settings), texts)
        train(model, texts, photos, features, args.steps)
        write(model, texts, folder)
        ours = ImageCaptioner.from_pretrained(folder, device="cpu")
        for beams in (1, 4):
            there = theirs(folder, val, texts, blip=name == "blip", beams=beams)
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
        scores = score_captions(said, references, bootstrap=0, meteor=False, spice=False).values
        figures = ", ".join(f"{key} {scores[key]:.4f}" for key in ("bleu_1", "bleu_4", "cider_d"))
        print(f"  {side}: {figures}, {len(set(said.values()))} different captions", flush=True)
    print(f"  such as {there[0][1]!r}, {there[-1][1]!r}")


if __name__ == "__main__":
    main()
