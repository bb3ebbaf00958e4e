"""What a task checks before anything is computed: that model and texts fit."""

from typing import Protocol

from mmtransformer.data.captions import CaptionData
from mmtransformer.data.loading.module import Data


class _Reader(Protocol):
    @property
    def vocab_size(self) -> int: ...

    @property
    def max_len(self) -> int: ...


def check_texts(data: Data, max_len: int, model: _Reader, part: str) -> None:
    """Checks that a model knows all tokens of the data, and reads texts as long as its.

    Args:
        data: The data.
        max_len: The most tokens of one of its texts.
        model: The model.
        part: What the part of the recipe's model is called that is too small: "decoder".

    Raises:
        ValueError: If the vocabulary or the texts are larger than the model.
    """
    tokens = data.tokenizer.vocab_size
    if tokens > model.vocab_size:
        raise ValueError(
            f"wrong vocabulary: the tokenizer has {tokens} tokens, but the model scores {model.vocab_size}; set the "
            f"{part}'s vocab_size to at least {tokens}, or data.vocab_size to {model.vocab_size}"
        )
    if max_len > model.max_len:
        raise ValueError(
            f"data.max_len ({max_len}) is more than the {model.max_len} tokens that the model reads; lower it, or "
            f"raise the {part}'s max_len"
        )


def refuse_empty_captions(data: CaptionData, *, testing: bool) -> None:
    """Refuses captions without words, where pictures and captions are compared.

    Args:
        data: The data.
        testing: Whether the test splits are asked about, or those of training and validation.

    Raises:
        ValueError: With their number, and the picture of the first.
    """
    for split in data.test_splits if testing else (data.train_split, *data.val_splits):
        rows, pairs = data.rows(split), data.pairs(split)
        words = rows.starts[1:] - rows.starts[:-1] - rows.prompt
        empty = (words <= 1).nonzero()[0]  # nothing, or the end alone
        if len(empty):
            first = pairs.name(int((rows.first <= empty[0]).sum()) - 1)
            raise ValueError(
                f"{split}: {len(empty)} of {len(words)} captions are empty, the first is one of {first}; in a "
                f"contrastive batch an empty caption fits every picture: leave it out"
            )
