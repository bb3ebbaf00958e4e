"""Hiding words: which tokens a model must fill in, and what it sees in their place (Devlin et al., arXiv:1810.04805).

Every choice is a hash of who asks: the same masks in any process, other ones every epoch.
"""

import string

import numpy as np

from mmtransformer.data.loading.hashing import hash64
from mmtransformer.text.tokenizer import Tokenizer

MASKS = ("[MASK]", "<mask>", "<|mask|>")
"""What tokenizers call the token that stands for a hidden word."""

_MARKS = frozenset((string.punctuation + string.whitespace).encode())


def with_mask(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, with a mask token if it had none."""
    known = any(tokenizer.backend.token_to_id(mask) is not None for mask in MASKS)
    return tokenizer if known else tokenizer.with_special_tokens(tokens=[MASKS[-1]])


class Masking:
    """Hides tokens of a tokenizer's texts.

    Args:
        tokenizer: It must have a mask token, see `with_mask`.
        mlm_probability: Share of a row's tokens that are to be filled in; one at least.
        whole_word_mask: Hide words with all of their tokens; else single tokens.
        mask_replace_prob: Share of these that the mask token stands for.
        random_replace_prob: Share of these that another token stands for; the rest stay as they are, but are asked
            for too.

    Raises:
        ValueError: If a share is out of range, or there is no mask token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        mlm_probability: float = 0.15,
        whole_word_mask: bool = True,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
    ) -> None:
        if not 0 < mlm_probability < 1:
            raise ValueError(f"mlm_probability ({mlm_probability}) must be above 0 and below 1")
        if min(mask_replace_prob, random_replace_prob) < 0 or mask_replace_prob + random_replace_prob > 1:
            raise ValueError(
                f"mask_replace_prob ({mask_replace_prob}) and random_replace_prob ({random_replace_prob}) must not be "
                f"below 0, nor above 1 together"
            )
        found = (tokenizer.backend.token_to_id(mask) for mask in MASKS)
        mask_id = next((i for i in found if i is not None), None)
        if mask_id is None:
            raise ValueError(
                f"none of the tokenizer's {tokenizer.vocab_size} tokens is {', '.join(MASKS)}: "
                f"add one (Tokenizer.with_special_tokens)"
            )
        self.mask_id, self.mlm_probability, self.whole_word_mask = mask_id, mlm_probability, whole_word_mask
        self.mask_replace_prob, self.random_replace_prob = mask_replace_prob, random_replace_prob
        spelt = tokenizer.token_bytes()
        self.ordinary = np.array([i for i, data in enumerate(spelt) if data])
        """The ids that text is made of: what a token may be changed into."""
        self._opens = np.array([not data or data[0] in _MARKS for data in spelt])
        self._closes = np.array([not data or (data[-1] in _MARKS and not data.isspace()) for data in spelt])
        self._blank = np.array([data.isspace() for data in spelt])

    def words(self, ids: np.ndarray) -> np.ndarray:
        """The number of each token's word, (q,) from 0, in one text: white space and marks divide words."""
        if not len(ids):
            return np.zeros(0, np.int64)
        begins = self._opens[ids]
        begins[1:] &= ~self._blank[ids[:-1]]  # a space that is a token of its own belongs to the word behind it
        begins[1:] |= self._closes[ids[:-1]]
        begins[0] = False
        return np.cumsum(begins)

    def hide(self, tokens: np.ndarray, words: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hides tokens of rows.

        Args:
            tokens: (b q) ids.
            words: (b q) number of each token's word in its row; below 0 = not to be hidden (special tokens, padding).
            keys: (b, any) integers that say which rows these are: seed, epoch, index.

        Returns:
            What the model sees (b q), and which tokens it must fill in (b q) bool.
        """
        place = np.arange(tokens.shape[1])
        asked = [column[:, None] for column in keys.T]
        units = words if self.whole_word_mask else np.where(words >= 0, place, -1)
        order = np.argsort(hash64(*asked, place, 11), axis=1, kind="stable")
        loss_mask = np.zeros(tokens.shape, bool)
        for row, (unit, first) in enumerate(zip(units, order, strict=True)):
            sizes = np.bincount(unit[unit >= 0])
            room = max(1, round(self.mlm_probability * int(sizes.sum())))
            chosen: list[int] = []
            for number in dict.fromkeys(unit[first].tolist()):  # words by their first token in a random order
                if number >= 0 and sizes[number] <= room:
                    chosen.append(number)
                    room -= int(sizes[number])
                    if not room:
                        break
            if not chosen and len(sizes):  # every word is longer than the share: the first one, then
                chosen = [next(number for number in unit[first].tolist() if number >= 0)]
            loss_mask[row] = np.isin(unit, chosen)
        draw = hash64(*asked, place, 12) / 2.0**64
        other = self.ordinary[(hash64(*asked, place, 13) % np.uint64(len(self.ordinary))).astype(np.int64)]
        kept = draw >= self.mask_replace_prob + self.random_replace_prob
        seen = np.where(draw < self.mask_replace_prob, self.mask_id, np.where(kept, tokens, other))
        return np.where(loss_mask, seen, tokens), loss_mask
