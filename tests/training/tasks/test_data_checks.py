"""Texts that a model cannot read or write are refused before anything is computed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from mmtransformer.data.loading.module import DataModule
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.training.tasks.data_checks import check_texts


@dataclass
class Model:
    vocab_size: int
    max_len: int


class Texts(DataModule):
    def dataset(self, split: str, *, training: bool = False) -> Any:
        return []

    def collate(self, split: str, *, training: bool = False) -> Callable[[list[Any]], Any]:
        return list


def test_a_model_must_be_as_large_as_the_texts() -> None:
    tokenizer = Tokenizer.train(["one two three"], 263)
    data = Texts(batch_size=1, tokenizer=tokenizer)
    size = tokenizer.vocab_size
    check_texts(data, 7, Model(vocab_size=size, max_len=7), "decoder")
    message = rf"has {size} tokens, .*scores {size - 1}; set the encoder's vocab_size to at least {size}, or data\."
    with pytest.raises(ValueError, match=message + rf"vocab_size to {size - 1}"):
        check_texts(data, 7, Model(vocab_size=size - 1, max_len=7), "encoder")
    with pytest.raises(
        ValueError, match=r"data\.max_len \(7\) is more than the 6 tokens .* raise the decoder's max_len"
    ):
        check_texts(data, 7, Model(vocab_size=size, max_len=6), "decoder")
    with pytest.raises(ValueError, match=r"data\.row_len \(7\) is more"):
        check_texts(data, 7, Model(vocab_size=size, max_len=6), "decoder", "row_len")
