"""Public captioners beside transformers: small folders as hubs have them, and what must be equal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from PIL import Image
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from mmtransformer import ImageCaptioner
from mmtransformer.batch import CaptionBatch
from mmtransformer.generation.loop import generate

WORDS = [
    "a photo of two dogs that run over the green grass",
    "a red star and a small blue circle in the picture",
    "question: what is this? answer: a short image description of a man",
    "describe the image in detail, please. user and assistant",
]


def pictures() -> list[Image.Image]:
    """Three pictures of several shapes, with edges and smooth parts."""
    found = []
    for i, (height, width) in enumerate(((37, 61), (53, 41), (64, 64))):
        y, x = np.mgrid[:height, :width]
        noise = np.random.default_rng(i).integers(0, 60, (height, width, 3))
        waves = np.stack([100 + 90 * np.sin(x / (3 + i)), 2.5 * y, 2 * x + y], -1) + noise
        found.append(Image.fromarray(waves.clip(0, 255).astype(np.uint8)))
    return found


def noisy(model: nn.Module, scale: float = 0.2, seed: int = 1) -> Any:
    """Random in every tensor: norms, gates, biases and queries too."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += scale * torch.randn_like(parameter)
    return model.eval()


def byte_level(specials: Sequence[str], size: int = 330) -> tokenizers.Tokenizer:
    """A byte-level BPE, as GPT-2, OPT and Qwen have it; specials get the first ids."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        WORDS * 3,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return backend


def word_pieces(specials: Sequence[str] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")) -> tokenizers.Tokenizer:
    """A WordPiece vocabulary, as BERT has it; specials get the first ids."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        WORDS * 3, trainers.WordPieceTrainer(vocab_size=120, special_tokens=list(specials), show_progress=False)
    )
    return backend


def ids(
    model: ImageCaptioner, images: Sequence[Image.Image], texts: Sequence[str | None], **changes: Any
) -> list[list[int]]:
    """New ids that we write for pictures and prompts, the end left out."""
    assert model.processor is not None
    batch = model.processor.with_prompts(model.batch(images), texts)
    config = model.generation.updated(**changes)
    return [best.tokens for best, *_ in generate(model.model, batch, config, eos_id=model.tokenizer.eos_ids)]


def until_end(rows: Tensor, ends: Sequence[int]) -> list[list[int]]:
    """transformers' new ids up to the first that ends a text."""
    return [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in rows.tolist()]


def first_logits(model: ImageCaptioner, images: Sequence[Image.Image], texts: Sequence[str | None]) -> Tensor:
    """Our logits of the first new token: (b v)."""
    assert model.processor is not None
    batch: CaptionBatch = model.processor.with_prompts(model.batch(images), texts)
    with torch.no_grad():
        return model.model.prefill(batch)[0]


def close(found: Tensor, want: Tensor) -> None:
    """Equal to 1e-5, relative to the largest."""
    assert found.shape == want.shape
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()


def load(folder: Path) -> ImageCaptioner:
    return ImageCaptioner.from_pretrained(folder, device="cpu")
