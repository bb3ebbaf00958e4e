"""Words that stand apart as people write them."""

import pytest

from mmtransformer.text.detokenize import detokenize


@pytest.mark.parametrize(
    ("apart", "plain"),
    [
        ("a boy in a red shirt is jumping .", "a boy in a red shirt is jumping."),
        ("a man 's dog , which is n't big , runs !", "a man's dog, which isn't big, runs!"),
        ("they 're ( both ) wet ; it 's 50 % rain", "they're (both) wet; it's 50% rain"),
        ("a sign says `` stop here '' .", 'a sign says "stop here".'),
        ("-lrb- two -rrb- dogs", "(two) dogs"),
        ("개 두 마리가 뛴다 .", "개 두 마리가 뛴다."),
        ('a "red" dog, at 5:30 (or so).', 'a "red" dog, at 5:30 (or so).'),
        ("", ""),
    ],
)
def test_detokenize(apart: str, plain: str) -> None:
    assert detokenize(apart) == plain
    assert detokenize(plain) == plain
