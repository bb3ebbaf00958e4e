"""Captions of scenes: natural, different, and read back to exactly what they said."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransformer.data.scenes import english, korean
from mmtransformer.data.scenes.grammar import LANGUAGES, MAX_PHRASINGS, describe, parse
from mmtransformer.data.scenes.meaning import Facts, GroupFacts, canonical, chains, word_between
from mmtransformer.data.scenes.palette import COLORS
from mmtransformer.data.scenes.world import FILLS, SHAPES, SIZES, Group, Relation, Scene, SceneWorld

WIDE = SceneWorld(shapes=SHAPES, colors=tuple(COLORS))


def scenes(number: int) -> list[Scene]:
    return [WIDE.sample(random.Random(f"grammar/{i}"), i % 2 == 0) for i in range(number)]


def reordered(facts: Facts, scene: Scene) -> Facts:
    """The facts with the groups in the scene's order, told apart by shape and colour."""
    order = {(group.shape, group.color): i for i, group in enumerate(scene.groups)}
    place = [order[group.shape, group.color or ""] for group in facts.groups]
    groups = tuple(facts.groups[place.index(i)] for i in range(len(scene.groups)))
    return Facts(groups, frozenset(Relation(place[a], kind, place[b]) for a, kind, b in facts.relations))


def row(*words: str) -> Scene:
    """Groups made of "count size color fill shape", all in a row."""
    groups = []
    for text in words:
        count, size, color, fill, shape = text.split()
        groups.append(Group(shape, color, size, fill, int(count)))
    relations = tuple(Relation(i, "left", i + 1) for i in range(len(groups) - 1))
    return Scene(tuple(groups), relations, (), 0)


# Round trip


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_caption_is_read_back_to_its_scene(language):
    for i, scene in enumerate(scenes(2003)):
        captions = describe(scene, language, MAX_PHRASINGS, random.Random(i))
        assert len(set(captions)) == MAX_PHRASINGS
        for caption in captions:
            facts = parse(caption, language)
            assert len(facts.groups) == len(scene.groups), caption
            assert reordered(facts, scene) == Facts.of(scene), caption


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_pattern_is_read_back(language):
    """Each sentence pattern by itself, so that a rare one cannot hide."""
    patterns = set()
    for i, scene in enumerate(scenes(307)):
        for phrase in LANGUAGES[language].phrases(scene):
            patterns.add(phrase.__name__)
            caption = phrase(scene, random.Random(i))
            assert reordered(parse(caption, language), scene) == Facts.of(scene), caption
    assert len(patterns) >= 10


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_are_plain_text(language):
    for i, scene in enumerate(scenes(501)):
        for caption in describe(scene, language, 2, random.Random(i)):
            assert caption == " ".join(caption.split())
            letters = r"[a-z ,;:]" if language == "en" else r"[가-힣 ,]"
            assert re.fullmatch(f"{letters}+", caption), caption
            assert len(caption.split()) <= 45


def test_the_choice_of_words_follows_from_chance_alone():
    scene = scenes(3)[2]
    assert describe(scene, "ko", 3, random.Random(5)) == describe(scene, "ko", 3, random.Random(5))
    assert len({tuple(describe(scene, "ko", 1, random.Random(i))) for i in range(50)}) > 5


@pytest.mark.parametrize("number", [0, MAX_PHRASINGS + 1])
def test_a_wrong_number_of_phrasings_raises(number):
    with pytest.raises(ValueError, match=f"phrasings must be 1 to 4, got {number}"):
        describe(scenes(1)[0], "en", number, random.Random(0))


def test_an_unknown_language_raises():
    for call in (lambda: parse("un cercle", "fr"), lambda: describe(scenes(1)[0], "fr", 1, random.Random(0))):
        with pytest.raises(ValueError, match="no grammar for language 'fr'; there are en, ko"):
            call()


def test_relations_between_strangers_raise():
    scene = row("1 small red solid star", "1 small blue solid star", "1 small green solid star")
    assert word_between(scene, 0, 1) == "left"
    assert word_between(scene, 1, 0) == "right"
    assert chains(scene) == [(0, 1, 2), (2, 1, 0)]
    with pytest.raises(ValueError, match="groups 0 and 2 have no relation"):
        word_between(scene, 0, 2)


# English

RED, BLUE, GREEN = (GroupFacts("star", "red", "small", "solid", 3), GroupFacts("circle", "blue", "large", "striped", 1),
                    GroupFacts("cross", "green", "small", "outlined", 2))  # fmt: skip
A, B, C = "three small red stars", "a large blue striped circle", "two small outlined green crosses"


@pytest.mark.parametrize(
    ("caption", "relations"),
    [
        (f"{A} are to the left of {B}", {(0, "left", 1)}),
        (f"{A} are to the right of {B}.", {(1, "left", 0)}),
        (f"There are {A} right of {B}", {(1, "left", 0)}),
        (f"{A} above {B}", {(0, "above", 1)}),
        (f"{A} are under {B}", {(1, "above", 0)}),
        (f"{A} in front", set()),
        (f"{A} and {B}", set()),
        (f"{A} are inside {B}", {(0, "inside", 1)}),
        (f"{A} contain {B}", {(1, "inside", 0)}),
        (f"Above {A} is {B}.", {(1, "above", 0)}),
        (f"to the left of {A}, there is {B}", {(1, "left", 0)}),
        (f"{A} with {B} to their left", {(1, "left", 0)}),
        (f"{A} with {B} inside them", {(1, "inside", 0)}),
        (f"There are {A}; to their right is {B}", {(0, "left", 1)}),
        (f"there are {A}; to the right, {B}", {(0, "left", 1)}),
        (f"{A} on the right and {B} on the left", {(1, "left", 0)}),
        (f"on the left {A}, on the right {B}", {(0, "left", 1)}),
        (f"At the top are {A}. At the bottom is {B}.", {(0, "above", 1)}),
        (f"{A} are left of {B}, which is above {C}", {(0, "left", 1), (1, "above", 2)}),
        (f"there are {A}; below them is {B}; inside it are {C}", {(0, "above", 1), (2, "inside", 1)}),
        (f"from left to right: {A}, {B} and {C}", {(0, "left", 1), (1, "left", 2)}),
        (f"from bottom to top: {A}, {B}, {C}.", {(1, "above", 0), (2, "above", 1)}),
    ],
)
def test_english_relations(caption, relations):
    facts = parse(caption, "en")
    names = [name for name in (A, B, C) if name in caption]
    assert facts.groups == tuple({A: RED, B: BLUE, C: GREEN}[name] for name in names)
    assert facts.relations == {Relation(*r) for r in relations}


@pytest.mark.parametrize(
    ("caption", "group"),
    [
        ("a star", GroupFacts("star", None, None, "solid", 1)),
        ("stars", GroupFacts("star", None, None, "solid", None)),
        ("the TINY hollow Violet moon", GroupFacts("crescent", "purple", "small", "outlined", 1)),
        ("7 big spotted boxes and squares", GroupFacts("square", None, None, "solid", None)),
        ("four small, red and striped hearts", GroupFacts("heart", "red", "small", "striped", 4)),
        ("an orange pentagon", GroupFacts("pentagon", "orange", None, "solid", 1)),
        ("red in the middle, a blue arrow", GroupFacts("arrow", "blue", None, "solid", 1)),
    ],
)
def test_english_groups(caption, group):
    assert parse(caption, "en").groups == (group,)


def test_english_articles_and_plurals():
    assert [english.article(word) for word in ("red", "orange", "arrow", "star")] == ["a", "an", "an", "a"]
    assert [english.plural(word) for word in ("star", "cross", "box", "berry", "day")] == [
        "stars",
        "crosses",
        "boxes",
        "berries",
        "days",
    ]
    scene = row("2 small orange dotted cross", "1 large white solid arrow")
    captions = {c for i in range(300) for c in describe(scene, "en", 4, random.Random(i))}
    assert "two small orange dotted crosses are to the left of a large white arrow" in captions
    assert "two small dotted orange crosses with a large white arrow to their right" in captions
    assert "there is a large white arrow; to its left are two small orange dotted crosses" in captions


# Korean


@pytest.mark.parametrize(
    ("word", "final"),
    [
        ("별", "ㄹ"), ("원", "ㄴ"), ("하트", ""), ("값", "ㅄ"), ("사각형", "ㅇ"), ("가", ""), ("힣", "ㅎ"), ("까", ""),
        ("깎", "ㄲ"), ("하나", ""), ("셋", "ㅅ"), ("넷!", "ㅅ"), ("(원)", "ㄴ"), ("3", "ㅁ"), ("2", ""), ("10", "ㅇ"),
        ("8", "ㄹ"), ("URL", "ㄹ"), ("PC", ""), ("am", "ㅁ"), ("", ""), ("...", ""), ("漢", ""),
    ],
)  # fmt: skip
def test_final_consonants(word, final):
    assert korean.final_consonant(word) == final


def test_final_consonants_of_all_syllables():
    """Against Unicode's own decomposition."""
    import unicodedata

    for code in range(0xAC00, 0xD7A4):
        parts = unicodedata.normalize("NFD", chr(code))
        final = korean.final_consonant(chr(code))
        assert bool(final) == (len(parts) == 3)
        if final:
            assert unicodedata.name(parts[2]).startswith("HANGUL JONGSEONG")
            letter, jong = (
                unicodedata.name(final).split("LETTER ")[1],
                unicodedata.name(parts[2]).split("JONGSEONG ")[1],
            )
            assert letter.replace("SSANG", "") == jong.replace("SSANG", "")


@pytest.mark.parametrize(
    ("word", "forms"),
    [
        ("원", "원이 원은 원을 원과 원으로"),
        ("별", "별이 별은 별을 별과 별로"),
        ("하트", "하트가 하트는 하트를 하트와 하트로"),
        ("셋", "셋이 셋은 셋을 셋과 셋으로"),
        ("세 개", "세 개가 세 개는 세 개를 세 개와 세 개로"),
    ],
)
def test_particles(word, forms):
    particles = ("이/가", "은/는", "을/를", "과/와", "으로/로")
    got = [korean.with_particle(word, particle) for particle in particles]
    assert " ".join(got) == forms


@pytest.mark.parametrize("particle", ["이", "이/", "/가", ""])
def test_half_a_particle_raises(particle):
    with pytest.raises(ValueError, match="particle must be two forms"):
        korean.with_particle("별", particle)


def test_no_korean_caption_has_a_wrong_particle():
    """Told from Unicode's decomposition: every particle after a noun or a number fits its last syllable."""
    import unicodedata

    nouns = ["원", "사각형", "삼각형", "별", "하트", "마름모", "십자가", "초승달", "오각형", "화살표"]
    ends = re.compile(rf"({'|'.join([*nouns, '하나', '둘', '셋', '넷', '개'])})(이|가|은|는|을|를|과|와)(?= )")
    seen = set()
    for i, scene in enumerate(scenes(1009)):
        for caption in describe(scene, "ko", 3, random.Random(i)):
            for word, particle in ends.findall(caption):
                closed = len(unicodedata.normalize("NFD", word[-1])) == 3
                assert closed == (particle in "이은을과"), caption
                seen.add(particle)
    assert seen == set("이가은는을를과와")


RED_KO, BLUE_KO, GREEN_KO = RED, BLUE, GREEN
A_KO, B_KO, C_KO = "작은 빨간 별 세 개", "큰 파란 줄무늬 원", "속이 빈 작은 초록색 십자가 둘"


@pytest.mark.parametrize(
    ("caption", "relations"),
    [
        (f"{A_KO}가 {B_KO}의 왼쪽에 있다", {(0, "left", 1)}),
        (f"{A_KO}는 {B_KO} 오른쪽에 있다.", {(1, "left", 0)}),
        (f"{A_KO}의 위쪽에 {B_KO}이 있다", {(1, "above", 0)}),
        (f"{A_KO} 위에 {B_KO}이 있어요", {(1, "above", 0)}),
        (f"{A_KO} 밑에 {B_KO}이 있다", {(0, "above", 1)}),
        (f"{A_KO}가 {B_KO} 안에 있다", {(0, "inside", 1)}),
        (f"{A_KO} 안에 {B_KO}이 있다", {(1, "inside", 0)}),
        (f"{A_KO}가 {B_KO}을 둘러싸고 있다", {(1, "inside", 0)}),
        (f"{A_KO}를 둘러싼 {B_KO}", {(0, "inside", 1)}),
        (f"{A_KO}와 {B_KO}", set()),
        (f"{A_KO}와 그 왼쪽의 {B_KO}", {(1, "left", 0)}),
        (f"{A_KO}가 있고, 그 아래쪽에 {B_KO}이 있다", {(0, "above", 1)}),
        (f"왼쪽에는 {A_KO}가, 오른쪽에는 {B_KO}이 있다", {(0, "left", 1)}),
        (f"아래쪽에는 {A_KO}가, 위쪽에는 {B_KO}이 있다", {(1, "above", 0)}),
        (f"{A_KO}가 {B_KO}의 왼쪽에 있고, 그 위쪽에 {C_KO}이 있다", {(0, "left", 1), (2, "above", 1)}),
        (f"{A_KO}가 있고, 그 왼쪽에 {B_KO}이 있고, 그 안에 {C_KO}이 있다", {(1, "left", 0), (2, "inside", 1)}),
        (f"왼쪽부터 차례로 {A_KO}, {B_KO}, {C_KO}이 있다", {(0, "left", 1), (1, "left", 2)}),
        (f"위에서부터 {A_KO}, {B_KO}과 {C_KO}이 있다", {(0, "above", 1), (1, "above", 2)}),
    ],
)
def test_korean_relations(caption, relations):
    facts = parse(caption, "ko")
    names = [name for name in (A_KO, B_KO, C_KO) if name in caption]
    assert facts.groups == tuple({A_KO: RED, B_KO: BLUE, C_KO: GREEN}[name] for name in names)
    assert facts.relations == {Relation(*r) for r in relations}


@pytest.mark.parametrize(
    ("caption", "group"),
    [
        ("별", GroupFacts("star", None, None, "solid", 1)),
        ("빨간색 별이 셋 있다", GroupFacts("star", "red", None, "solid", 3)),
        ("작은 별이 두 개 있다", GroupFacts("star", None, "small", "solid", 2)),
        ("별 세개", GroupFacts("star", None, None, "solid", 3)),
        ("세 개의 작은 노란 물방울무늬 네모가 있다", GroupFacts("square", "yellow", "small", "dotted", 3)),
        ("속이 빈 큰 흰 초승달 하나", GroupFacts("crescent", "white", "large", "outlined", 1)),
        ("주황 정사각형 네 개를 그렸다", GroupFacts("square", "orange", None, "solid", 4)),
    ],
)
def test_korean_groups(caption, group):
    assert parse(caption, "ko").groups == (group,)


def test_korean_reads_well():
    scene = row("3 small red striped star", "1 large blue solid circle")
    captions = {c for i in range(80) for c in describe(scene, "ko", 4, random.Random(i))}
    for caption in (
        "작은 빨간 줄무늬 별 세 개가 큰 파란 원의 왼쪽에 있다",
        "작은 빨간 줄무늬 별 셋은 큰 파란 원의 왼쪽에 있다",
        "큰 파란 원 하나의 왼쪽에 작은 빨간 줄무늬 별 세 개가 있다",
        "작은 빨간 줄무늬 별 세 개와 그 오른쪽의 큰 파란 원",
        "왼쪽에는 작은 빨간 줄무늬 별 세 개가, 오른쪽에는 큰 파란 원이 있다",
    ):
        assert caption in captions


# Any text

WORDS = st.sampled_from(
    [
        "a",
        "the",
        "three",
        "red",
        "small",
        "striped",
        "star",
        "stars",
        "circle",
        "left",
        "of",
        "to",
        "above",
        "inside",
        "it",
        "which",
        "from",
        "right",
        ":",
        ";",
        ".",
        ",",
        "with",
        "on",
        "at",
        "top",
        "별",
        "원이",
        "하트의",
        "세",
        "개",
        "개가",
        "왼쪽에",
        "왼쪽부터",
        "그",
        "안에",
        "있고",
        "둘러싸고",
        "둘러싼",
        "를",
        "빨간",
        "속이",
        "빈",
        "둘",
        "셋은",
        "위에는",
        "오른쪽의",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=80), st.lists(WORDS, max_size=30).map(" ".join)))
def test_no_text_makes_the_reader_fail(text):
    for language in LANGUAGES:
        facts = parse(text, language)
        for relation in facts.relations:
            assert 0 <= relation.subject < len(facts.groups)
            assert 0 <= relation.object < len(facts.groups)
            assert relation == canonical(*relation)
        for group in facts.groups:
            assert group.shape in SHAPES
            assert group.color in {None, *COLORS}
            assert group.size in {None, *SIZES}
            assert group.fill in FILLS


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("text", ["", " ", "\x00", "가" * 10000, "star " * 2000, "nan", "\ud800"])
def test_odd_texts_are_read(language, text):
    parse(text, language)
