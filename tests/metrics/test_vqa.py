"""VQA accuracy beside its definition, and the texts that it takes for one answer."""

import numpy as np
import pytest

from mmtransformer.metrics import score_captions
from mmtransformer.metrics.vqa import normalize_answer, vqa_accuracy


def by_definition(answer: str, references: list[str]) -> float:
    shares = []
    for left_out in range(len(references)):
        others = references[:left_out] + references[left_out + 1 :]
        shares.append(min(1.0, sum(other == answer for other in others) / 3))
    return float(np.mean(shares))


@pytest.mark.parametrize("count", [4, 7, 10])
@pytest.mark.parametrize("same", range(5))
def test_it_is_the_mean_over_leaving_each_person_out(count: int, same: int) -> None:
    references = ["yes"] * same + [f"no {i}" for i in range(count - same)]
    assert vqa_accuracy("Yes.", references) == pytest.approx(by_definition("yes", references))


def test_of_few_references_it_is_whether_the_answer_is_one_of_them() -> None:
    assert [vqa_accuracy(said, ["A red dog", "개 두 마리"]) for said in ("red dog!", "개 두 마리", "red", "")] == [
        1,
        1,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Two dogs.", "2 dogs"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5 m", "3.5 m"),
        ("don't", "dont"),
        ("red/blue", "red blue"),
        ("yes, sir", "yes sir"),
        ("t-shirt", "t shirt"),
        ("네.", "네"),
    ],
)
def test_answers_that_are_the_same(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


def test_answers_are_scored_where_captions_are_answers() -> None:
    said, references = {"a": "Yes", "b": "two", "c": "no"}, {"a": ["yes"], "b": ["2"], "c": ["yes"]}
    scores = score_captions(said, references, meteor=False, spice=False, answers=True)
    assert scores.values["vqa_accuracy"] == pytest.approx(2 / 3)
    assert "vqa_accuracy" in scores.intervals
    assert scores.table().splitlines()[0].startswith("3 questions, 1.0 references each")
    assert scores.table().splitlines()[1].startswith("VQA accuracy    66.7   [")
    plain = score_captions(said, references, meteor=False, spice=False)
    assert "vqa_accuracy" not in plain.values
    assert plain.table().startswith("3 pictures")
