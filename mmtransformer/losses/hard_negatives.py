"""Hard negatives: which image and which text are taken for another's, drawn from how alike they are.

Shapes: b images of this process with t texts each, B images and N texts of all processes, m rows, k columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmtransformer.losses.contrastive import Similarity
from mmtransformer.losses.distributed import all_gather_rows


def _scramble(x: Tensor) -> Tensor:
    """A round of SplitMix64 in wrapping int64."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def pair_noise(seed: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Uniform numbers in (0, 1) that depend on (seed, row, column) only, so not on how a batch is cut.

    Args:
        seed: another one gives other numbers.
        rows: keys (m) long.
        columns: keys (k) long.

    Returns:
        (m k) float32.
    """
    start = torch.tensor(seed, dtype=torch.long, device=rows.device)
    golden = -0x61C8864680B583EB
    mixed = _scramble((_scramble(start + golden) ^ rows) + golden)
    bits = _scramble((mixed[:, None] ^ columns) + golden)
    return (((bits >> 41) & 0x7FFFFF).float() + 0.5) * 2.0**-23


def hard_negatives(scores: Tensor, allowed: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draws one column for each row with the probabilities softmax(scores): what is confused most comes most often.

    The draw is that of `torch.multinomial`, by the Gumbel-max trick: no loop, and nothing waits for the device.

    Args:
        scores: (m k), similarities over temperature.
        allowed: (m k) bool, what is a negative: not what belongs to the row.
        noise: (m k), uniform in (0, 1): from `pair_noise`, or `torch.rand`.

    Returns:
        Columns (m) long, and whether the row has a negative at all (m) bool; where not, the column means nothing.
    """
    drawn = scores.detach().float() - (-noise.log()).log()
    return drawn.masked_fill(~allowed, -torch.inf).argmax(1), allowed.any(1)


class HardPairs(NamedTuple):
    """For each of m texts of this process, what it and its image are to be told from.

    Attributes:
        rows: (m) long, which texts these are.
        images: (m) long, of the B images one that is not the text's.
        texts: (m) long, of the N texts one that is not the image's.
        real: (m) bool, whether the text is one at all, rather than a padding sample.
        has_image: (m) bool, whether there is another image.
        has_text: (m) bool, whether there is another text.
    """

    rows: Tensor
    images: Tensor
    texts: Tensor
    real: Tensor
    has_image: Tensor
    has_text: Tensor


def hard_pairs(similarity: Similarity, temperature: Tensor, *, texts: int, seed: int) -> HardPairs:
    """Draws another image for each text, and for its image another text (BLIP-2's and ALBEF's matching).

    Args:
        similarity: of b images with t texts each, side by side.
        temperature: what similarities are divided by, a scalar.
        texts: of how many of an image's texts, the first ones: m is b times as many.
        seed: what is drawn depends on it and on the ids, not on how the global batch is cut.
    """
    s, temperature = similarity, temperature.detach()
    t = len(s.text_ids) // len(s.image_ids)
    number = torch.arange(len(s.text_ids), device=s.text_ids.device)
    keys = s.text_ids * 1_000_003 + number % t
    rows = number.unflatten(0, (-1, t))[:, :texts].flatten()
    ids = s.text_ids[rows]

    def draw(scores: Tensor, candidates: Tensor, columns: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        others = (ids[:, None] != candidates) & (candidates >= 0)
        return hard_negatives(scores / temperature, others, pair_noise(seed, keys[rows], columns))

    images, has_image = draw(s.of_texts[rows], s.all_image_ids, s.all_image_ids, seed)
    others, has_text = draw(s.of_images[rows // t], s.all_text_ids, all_gather_rows(keys), seed + 1)
    return HardPairs(rows, images, others, ids >= 0, has_image, has_text)
