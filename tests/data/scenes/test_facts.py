"""Captions against scenes: what is right, what is wrong, and what is made up."""

import json
import random
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransformer.data.scenes import facts
from mmtransformer.data.scenes.facts import Rates, judge, score
from mmtransformer.data.scenes.grammar import LANGUAGES, MAX_PHRASINGS, describe
from mmtransformer.data.scenes.meaning import Facts
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.data.scenes.world import FILLS, SIZES, Group, Relation, Scene, SceneWorld

STARS = Group("star", "red", "small", "striped", 3)
CIRCLE = Group("circle", "blue", "large", "solid", 1)
HEARTS = Group("heart", "blue", "small", "outlined", 2)
PAIR = Scene((STARS, CIRCLE), (Relation(0, "left", 1),), (), 0)
ROW = Scene((STARS, CIRCLE, HEARTS), (Relation(0, "left", 1), Relation(1, "left", 2)), (), 0)
TRUE = "three small red striped stars are to the left of a large blue circle"


def scenes(number: int) -> list[Scene]:
    return [SceneWorld().sample(random.Random(f"facts/{i}"), i % 3 == 0) for i in range(number)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_true_captions_score_one_in_any_phrasing(language):
    worlds = scenes(1009)
    for k in range(MAX_PHRASINGS):
        captions = [describe(scene, language, MAX_PHRASINGS, random.Random(i))[k] for i, scene in enumerate(worlds)]
        scores = score(captions, worlds, language)
        assert (scores.facts, scores.exact, scores.captions, scores.hallucinated) == (1.0, 1.0, 1009, 0)
        for rates in (scores.objects, scores.attributes, scores.relations):
            assert rates.right == rates.said == rates.true > 0
            assert (rates.precision, rates.recall, rates.f1) == (1.0, 1.0, 1.0)
        assert set(scores.parts) == {"shape", "color", "count", "size", "fill", "left", "above", "inside"}
        assert set(scores.parts.values()) == {1.0}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("split", ["val", "compositional"])
def test_references_of_the_embedded_data_score_one(language, split):
    pairs = Scenes(val_size=31, compositional_size=31).split(split)
    captions = [next(c.text for c in pairs.captions(i) if c.language == language) for i in range(31)]
    assert score(captions, [pairs.scene(i) for i in range(31)], language).exact == 1.0


@pytest.mark.parametrize(
    ("caption", "right", "objects", "attributes", "relations"),
    [  # right facts of 9; (right, said) of 2 objects, 6 attributes, 1 relation
        (TRUE, 9, (2, 2), (6, 6), (1, 1)),
        ("a large blue circle to the right of three small striped red stars", 9, (2, 2), (6, 6), (1, 1)),
        (TRUE.replace("left", "right"), 8, (2, 2), (6, 6), (0, 1)),
        (TRUE.replace("to the left of", "above"), 8, (2, 2), (6, 6), (0, 1)),
        (TRUE.replace("to the left of", "and"), 8, (2, 2), (6, 6), (0, 0)),
        (TRUE.replace("three", "two"), 8, (2, 2), (5, 6), (1, 1)),
        (TRUE.replace("three ", ""), 8, (2, 2), (5, 5), (1, 1)),
        (TRUE.replace("small red", "large red").replace("striped ", ""), 7, (2, 2), (4, 6), (1, 1)),
        (TRUE.replace("red", "green"), 8, (1, 2), (6, 6), (1, 1)),
        (TRUE.replace("stars", "hearts"), 8, (1, 2), (6, 6), (1, 1)),
        (TRUE.replace("red striped stars", "green striped hearts"), 4, (1, 2), (3, 6), (0, 1)),
        ("three small red striped stars", 4, (1, 1), (3, 3), (0, 0)),
        (TRUE + "; two small red crosses", 9, (2, 3), (6, 9), (1, 1)),
        (TRUE + ", which is above a large blue circle", 9, (2, 3), (6, 9), (1, 2)),
        ("three small red striped stars and three small red striped stars", 4, (1, 2), (3, 6), (0, 0)),
        ("a star", 0, (0, 1), (0, 2), (0, 0)),
        ("a circle", 2, (0, 1), (2, 2), (0, 0)),
        ("a dog runs over the snow", 0, (0, 0), (0, 0), (0, 0)),
        ("", 0, (0, 0), (0, 0), (0, 0)),
    ],
)
def test_english_facts_by_hand(caption, right, objects, attributes, relations):
    judgement = judge(caption, PAIR, "en")
    assert judgement.objects == Rates(*objects, 2)
    assert judgement.attributes == Rates(*attributes, 6)
    assert judgement.relations == Rates(*relations, 1)
    assert judgement.facts == pytest.approx(right / 9)
    assert judgement.exact == ((objects, attributes, relations) == ((2, 2), (6, 6), (1, 1)))


def test_korean_facts_by_hand():
    true = "작은 빨간 줄무늬 별 세 개가 큰 파란 원의 왼쪽에 있다"
    assert judge(true, PAIR, "ko").exact
    assert judge("큰 파란 원의 왼쪽에 작은 빨간 줄무늬 별이 세 개 있다", PAIR, "ko").exact
    assert judge(true.replace("왼쪽", "오른쪽"), PAIR, "ko").facts == pytest.approx(8 / 9)
    assert judge(true.replace("세 개가", "네 개가"), PAIR, "ko").facts == pytest.approx(8 / 9)
    assert judge(true.replace("파란 원", "파란 점무늬 별"), PAIR, "ko").facts == pytest.approx(7 / 9)
    assert judge(true, PAIR, "en").facts == 0
    assert judge(TRUE, PAIR, "ko").facts == 0


def test_a_true_relation_that_is_not_asked_for_is_neither_right_nor_wrong():
    caption = "three small red striped stars are left of two small blue outlined hearts; a large blue circle"
    judgement = judge(caption, ROW, "en")
    assert judgement.relations == Rates(0, 0, 2)
    assert judge(caption.replace("left", "right"), ROW, "en").relations == Rates(0, 1, 2)


def test_groups_are_matched_for_the_most_facts():
    """Two groups that share a colour, named in the wrong order and with one wrong shape each."""
    caption = "two small blue outlined stars are to the right of a large blue square"
    scene = replace(PAIR, groups=(CIRCLE, HEARTS))
    judgement = judge(caption, scene, "en")
    assert judgement.attributes == Rates(6, 6, 6)
    assert judgement.relations == Rates(1, 1, 1)
    assert judgement.objects == Rates(0, 2, 2)
    assert {name: rates.right for name, rates in judgement.parts.items()} == {
        "shape": 0, "color": 2, "count": 2, "size": 2, "fill": 2, "left": 1,
    }  # fmt: skip


def test_matching_is_the_best_of_all():
    """Against trying everything: facts right under the best way to pair said and true groups."""
    rng = random.Random(3)

    def count(said: Facts, scene: Scene, place: tuple[int, ...]) -> int:
        """Facts right where said group s is compared with true group place[s]; a pair that shares neither shape
        nor colour counts for nothing."""
        right, known = 0, set()
        for group, t in zip(said.groups, place, strict=True):
            true = scene.groups[t] if t < len(scene.groups) else None
            if true and (group.shape == true.shape or group.color == true.color):
                known.add(t)
                right += (group.shape, group.color) == (true.shape, true.color)
                right += (group.count == true.count) + (group.size == true.size) + (group.fill == true.fill)
        for a, kind, b in said.relations:
            if {place[a], place[b]} <= known:
                right += Relation(place[a], kind, place[b]) in scene.relations
        return right

    for i, scene in enumerate(scenes(400)):
        words = [(SceneWorld().shapes, "shape"), (SceneWorld().colors, "color"), (SIZES, "size"), (FILLS, "fill")]
        groups = []
        for group in scene.groups:
            values, name = rng.choice(words)
            groups.append(replace(group, **{name: rng.choice(values)}))
        wrong = replace(scene, groups=tuple(groups))
        (caption,) = describe(wrong, "en", 1, random.Random(i))
        said = facts.parse(caption, "en")
        places = range(len(scene.groups) + len(said.groups))
        best = max(count(said, scene, place) for place in permutations(places, len(said.groups)))
        judgement = judge(caption, scene, "en")
        right = judgement.objects.right + judgement.attributes.right + judgement.relations.right
        assert right == best, (caption, scene)


def test_claims_say_what_is_wrong():
    claims = judge("two small red striped stars above a large green square", PAIR, "en").claims
    assert claims == (
        ("red star", True), ("red star: 2", False), ("red star: small", True), ("red star: striped", True),
        ("green square", False), ("green square: 1", False), ("green square: large", False),
        ("green square: solid", False), ("blue circle is missing", False), ("red star above green square", False),
        ("red star left of blue circle is missing", False),
    )  # fmt: skip
    assert all(ok for _, ok in judge(TRUE, PAIR, "en").claims)


def test_scores_add_up_facts_and_not_captions():
    """9 of 9 and 0 of 4 facts make 9 / 13."""
    alone = Scene((HEARTS,), (), (), 0)
    scores = score([TRUE, "a small black cross"], [PAIR, alone], "en")
    assert scores.facts == pytest.approx(9 / 13)
    assert scores.exact == 0.5
    assert scores.hallucinated == 1
    assert scores.objects == Rates(2, 3, 3)
    assert scores.objects.precision == pytest.approx(2 / 3)
    assert scores.attributes == Rates(6, 9, 9)
    assert scores.parts["left"] == 1.0
    assert scores.parts["shape"] == pytest.approx(2 / 3)
    plain = json.loads(json.dumps(scores.to_dict()))
    assert plain["facts"] == scores.facts
    assert plain["objects"]["precision"] == pytest.approx(2 / 3)
    assert plain["hallucinated"] == 1


def test_rates_where_there_is_nothing():
    assert (Rates(0, 0, 0).precision, Rates(0, 0, 0).recall, Rates(0, 0, 0).f1) == (1.0, 1.0, 1.0)
    assert (Rates(0, 0, 3).precision, Rates(0, 0, 3).recall, Rates(0, 0, 3).f1) == (0.0, 0.0, 0.0)
    assert (Rates(0, 3, 0).precision, Rates(0, 3, 0).recall) == (0.0, 1.0)
    assert Rates(2, 4, 8).f1 == pytest.approx(1 / 3)


@pytest.mark.parametrize(("captions", "worlds"), [([], []), ([TRUE], []), ([TRUE, TRUE], [PAIR])])
def test_captions_without_scenes_raise(captions, worlds):
    with pytest.raises(ValueError, match=f"{len(captions)} captions for {len(worlds)} scenes"):
        score(captions, worlds, "en")


def test_an_unknown_language_raises():
    with pytest.raises(ValueError, match="no grammar for language 'de'; there are en, ko"):
        score([TRUE], [PAIR], "de")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.sampled_from(sorted(LANGUAGES)))
def test_any_text_is_scored(text, language):
    scores = score([text], [ROW], language)
    assert 0 <= scores.facts <= 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_nonsense_scores_nothing(language):
    nonsense = ["", "zxq", "!!!", "나무가 많은 풍경", "a man on a horse", "\x00\ud800", "?" * 5000]
    scores = score(nonsense, [ROW] * len(nonsense), language)
    assert (scores.facts, scores.exact, scores.hallucinated) == (0.0, 0.0, 0)


def test_endless_repetition_is_scored_in_no_time():
    """A model stuck in a loop: the second, third, ... object of a kind is made up."""
    scores = score([f"{TRUE} and " * 300], [ROW], "en")
    assert scores.objects.right == 2
    assert scores.objects.said == 600
    assert scores.facts < 1
