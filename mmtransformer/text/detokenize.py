"""From words that stand apart, as tokenised corpora have them, to text as people write it."""

import re

_RULES = [
    (re.compile(r"``|''"), '"'),  # the Penn Treebank's quotes
    (re.compile(r" +([.,!?;:%)\]}…])"), r"\1"),
    (re.compile(r"([(\[{$]) +"), r"\1"),
    (re.compile(r" +(n't|'(?:s|re|ve|ll|d|m))\b", re.IGNORECASE), r"\1"),
    (re.compile(r'" ([^"]*?) "'), r'"\1"'),
]
_BRACKETS = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]"}


def detokenize(text: str) -> str:
    """A text without the spaces that a tokenizer of words has put in: "a man 's shirt ." becomes "a man's shirt.".

    Text that is written as people write it stays as it is, but for spaces before points and commas.
    """
    for name, bracket in _BRACKETS.items():
        text = text.replace(name, bracket).replace(name.lower(), bracket)
    for pattern, plain in _RULES:
        text = pattern.sub(plain, text)
    return text
