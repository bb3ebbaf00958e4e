"""Documents as rows of ids: tokenised once, cut where a document is longer than a row, packed where several fit.

    bos, language tag, text before the first picture, <image>, text, eos, <image>, text, eos, ...

The end-of-sequence token closes the text of every picture, as OpenFlamingo's <|endofchunk|> does: a caption written
after some examples ends where theirs end. Rows follow from (documents, seed) and stay the same in all epochs, so that a
row's place is all that a sampler has to remember; what shares a row never sees each other.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mmtransformer.data.documents.documents import Document, Documents
from mmtransformer.data.loading.hashing import hash64
from mmtransformer.data.loading.rows import image_token, names_a_side
from mmtransformer.serialization.printable import counted
from mmtransformer.text.tokenizer import Tokenizer

_WINDOW = 4096  # pieces that are packed together; more would fit hardly better and take longer


class Piece(NamedTuple):
    """A document in a row, or a part of one that is too long for a row.

    Attributes:
        document: Its place in the split.
        first: Its first picture's number in the document, from 0.
        images: How many of the document's pictures it holds.
        tokens: (q,) ids, one image token a picture.
    """

    document: int
    first: int
    images: int
    tokens: np.ndarray


class DocumentRows:
    """The documents of one split as rows of ids.

    A document that is longer than a row, or holds more pictures, is divided where a picture begins, and each part
    stands for itself. A text that is longer than a row is cut after a whole word and then does not teach that it ends
    there; of a text before the first picture, which is never a target, the end is kept. Pictures at the end of a
    document that no text follows are left out.

    Args:
        documents: The split.
        tokenizer: Turns texts into ids; it must have an image token.
        row_len: The most tokens of a row.
        max_images: The most pictures of a row.
        pack: Whether short documents share a row.
        seed: Which documents share one.
        parts: Documents of each part of a mixture; only those of one part share rows.

    Attributes:
        divided: Documents that were divided.
        cut: Texts that were cut.
        unread: Pictures at the end of a document, without a text.
        silent: Documents without any text after a picture; they teach nothing and are left out.

    Raises:
        ValueError: If the tokenizer has no image token, a language has no tag, `row_len` leaves no room, or no
            document has a text after a picture.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        *,
        row_len: int = 256,
        max_images: int = 6,
        pack: bool = True,
        seed: int = 0,
        parts: Sequence[int] | None = None,
    ):
        self.image_token_id = image_token(tokenizer)
        if row_len < 5:
            raise ValueError(f"row_len ({row_len}) must be at least 5 tokens: bos, language, image, text, eos")
        if max_images < 1:
            raise ValueError(f"max_images ({max_images}) must be at least 1")
        self.tokenizer, self.row_len, self.max_images = tokenizer, row_len, max_images
        self.divided = self.cut = self.unread = self.silent = 0
        self.longest = 0
        self.languages: tuple[str | None, ...] = ()
        tokens: list[np.ndarray] = []
        about: list[tuple[int, int, int]] = []
        part_of: list[int] = []
        mirrors: list[bool] = []
        ends = np.cumsum(parts if parts is not None else [len(documents)])
        for i in range(len(documents)):
            document = documents.document(i)
            if document.language not in self.languages:
                self.languages += (document.language,)
            mirrors.append(not any(map(names_a_side, document.texts)))
            for first, images, ids in self._pieces(document):
                tokens.append(np.asarray(ids, np.int32))
                about.append((i, first, images))
                part_of.append(int(np.searchsorted(ends, i, side="right")))
        if not tokens:
            raise ValueError(f"none of the {counted(len(documents), 'document')} has a text after a picture")
        self.mirrors = np.array(mirrors)
        """(documents,) bool: no text of the document speaks of left or right, so its pictures may be mirrored."""
        lengths = np.array([len(ids) for ids in tokens])
        self._tokens, self._starts = np.concatenate(tokens), np.concatenate([[0], np.cumsum(lengths)])
        self._about = np.array(about)
        rows: list[list[int]] = []
        self.parts: list[int] = []
        """Rows of each part of a mixture, in their order."""
        for part in range(len(ends)):
            mine = np.flatnonzero(np.array(part_of) == part)
            some = (
                _pack(lengths, self._about[:, 2], mine, row_len, max_images, seed)
                if pack
                else [[int(piece)] for piece in mine]
            )
            rows += some
            self.parts.append(len(some))
        self._pieces_of = np.concatenate([np.array(row) for row in rows])
        self._rows = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        self.lengths = np.add.reduceat(lengths[self._pieces_of], self._rows[:-1])
        """(rows,) tokens of every row."""
        self.images = np.add.reduceat(self._about[self._pieces_of, 2], self._rows[:-1])
        """(rows,) pictures of every row."""

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._rows) - 1

    def row(self, i: int) -> list[Piece]:
        """The pieces of row i, from left to right."""
        pieces = self._pieces_of[self._rows[i] : self._rows[i + 1]]
        found: list[Piece] = []
        for piece in pieces.tolist():
            document, first, images = self._about[piece].tolist()
            tokens = self._tokens[self._starts[piece] : self._starts[piece + 1]]
            found.append(Piece(document, first, images, tokens))
        return found

    def fill(self) -> float:
        """The share of the rows' token places that is filled."""
        return float(self.lengths.sum()) / (len(self) * self.row_len)

    def _pieces(self, document: Document) -> Iterator[tuple[int, int, list[int]]]:
        """(first picture, pictures, ids) of each part of a document."""
        tok = self.tokenizer
        head = tok.prompt(document.language if tok.languages else None)
        texts = [tok.encode(text) if text else [] for text in document.texts]
        while len(texts) > 1 and not texts[-1]:
            texts.pop()
            self.unread += 1
        if len(texts) < 2:
            self.silent += 1
            return
        room = self.row_len - len(head)
        chunks = [self._chunk(ids, room) for ids in texts[1:]]
        self.longest = max(self.longest, len(head) + len(texts[0]) + sum(map(len, chunks)))
        lead = texts[0]
        if len(lead) > (least := room - len(chunks[0])):
            self.cut += 1
            lead = self._last_words(lead, least)
        ids, first, parts = head + lead, 0, 0
        for k, chunk in enumerate(chunks):
            if k > first and (len(ids) + len(chunk) > self.row_len or k - first == self.max_images):
                parts += 1
                yield from self._part(ids, first, k)
                ids, first = list(head), k
            ids = ids + chunk
        yield from self._part(ids, first, len(chunks))
        self.divided += parts > 0

    def _part(self, ids: list[int], first: int, end: int) -> Iterator[tuple[int, int, list[int]]]:
        """A part of a document, without pictures at its end that no text follows."""
        while ids[-1] == self.image_token_id:
            ids, end = ids[:-1], end - 1
            self.unread += 1
        if end > first:
            yield first, end - first, ids

    def _chunk(self, ids: list[int], room: int) -> list[int]:
        """A picture and its text, closed where there is a text and it is whole."""
        if not ids:
            return [self.image_token_id]
        if len(ids) + 2 <= room:
            return [self.image_token_id, *ids, self.tokenizer.eos_id]
        self.cut += 1
        return [self.image_token_id, *self._first_words(ids, room - 1)]

    def _first_words(self, ids: list[int], room: int) -> list[int]:
        ends = [max(places) + 1 for _, places in self.tokenizer.words(ids)]
        return ids[: max((end for end in ends if end <= room), default=room)]

    def _last_words(self, ids: list[int], room: int) -> list[int]:
        starts = [min(places) for _, places in self.tokenizer.words(ids)]
        return ids[min((start for start in starts if len(ids) - start <= room), default=len(ids)) :]


def _pack(
    lengths: np.ndarray, images: np.ndarray, mine: np.ndarray, row_len: int, max_images: int, seed: int
) -> list[list[int]]:
    """Puts pieces into rows: the longest first, each into the fullest row that still has room for it.

    Done window by window of the pieces in a random order, so that a row mixes documents from everywhere.
    """
    order = mine[np.argsort(hash64(seed, np.arange(len(mine)), 5), kind="stable")]
    rows: list[list[int]] = []
    for start in range(0, len(order), _WINDOW):
        window = order[start : start + _WINDOW]
        window = window[np.argsort(-lengths[window], kind="stable")]
        space = np.zeros(len(window), np.int64)  # tokens that are left in each row
        frames = np.zeros(len(window), np.int64)  # pictures that are left
        opened: list[list[int]] = []
        for piece in window.tolist():
            left = space[: len(opened)]
            fits = (left >= lengths[piece]) & (frames[: len(opened)] >= images[piece])
            if fits.any():
                at = int(np.where(fits, left, row_len + 1).argmin())
                opened[at].append(piece)
            else:
                at = len(opened)
                opened.append([piece])
                space[at], frames[at] = row_len, max_images
            space[at] -= lengths[piece]
            frames[at] -= images[piece]
        rows += opened
    return rows
