"""Korean captions of scenes: written with the right particles, and read back."""

import random
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

from mmtransformer.data.scenes.meaning import (
    Facts,
    GroupFacts,
    Phrase,
    between_sides,
    canonical,
    chains,
    reading_order,
    said_group,
    word_between,
)
from mmtransformer.data.scenes.palette import COLORS
from mmtransformer.data.scenes.world import SHAPES, Group, Relation, Scene

_SHAPES = ("원", "사각형", "삼각형", "별", "하트", "마름모", "십자가", "초승달", "오각형", "화살표")
SHAPE_WORDS: dict[str, str] = dict(zip(SHAPES, _SHAPES, strict=True))
_COLORS = ("빨간", "주황색", "노란", "초록색", "파란", "보라색", "하얀", "검은", "분홍색", "갈색")
COLOR_WORDS = dict(zip(COLORS, _COLORS, strict=True))
_SIZES = {"small": "작은", "large": "큰"}
_PATTERNS = {"striped": "줄무늬", "dotted": "점무늬"}
_COUNTERS = ("", "한", "두", "세", "네")
NUMBERS = ("", "하나", "둘", "셋", "넷")
_PLACES = {"left": "왼쪽", "right": "오른쪽", "above": "위쪽", "below": "아래쪽", "inside": "안"}

_DIGIT_FINALS = dict(zip("0123456789", "ㅇㄹ ㅁ  ㄱㄹㄹ ", strict=True))  # 영 일 이 삼 사 오 육 칠 팔 구
_LETTER_FINALS = {"l": "ㄹ", "m": "ㅁ", "n": "ㄴ", "r": "ㄹ"}  # 엘 엠 엔 알; every other letter's name ends open
_FINALS = " ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ"


def final_consonant(word: str) -> str:
    """The final consonant (jongseong) of the last syllable as it is spoken, or "" where it ends in a vowel.

    Digits and Latin letters count by their Korean names ("3" is 삼, "L" is 엘); marks after the word are passed over.
    """
    for char in reversed(word):
        if "가" <= char <= "힣":
            return _FINALS[(ord(char) - ord("가")) % 28].strip()
        if char in _DIGIT_FINALS:
            return _DIGIT_FINALS[char].strip()
        if char.isascii() and char.isalpha():
            return _LETTER_FINALS.get(char.lower(), "")
        if char.isalnum():
            return ""
    return ""


def with_particle(word: str, particle: str) -> str:
    """The word with the form of a particle that its final consonant asks for.

    Args:
        word: any word.
        particle: both forms, the one after a consonant first: "이/가", "은/는", "을/를", "과/와", "으로/로".

    Raises:
        ValueError: `particle` is not two forms with a stroke between.
    """
    closed, stroke, opened = particle.partition("/")
    if not (closed and stroke and opened):
        raise ValueError(f"particle must be two forms such as '이/가', got {particle!r}")
    final = final_consonant(word)
    if final == "ㄹ" and opened == "로":  # 별로, 서울로
        return word + opened
    return word + (closed if final else opened)


# Writing


def noun_phrase(group: Group, rng: random.Random) -> str:
    """Adjectives, noun, and number with its counter: "작은 빨간 줄무늬 별 세 개"."""
    words = [_adjectives_and_noun(group)]
    if group.count > 1 or rng.random() < 0.5:
        words.append(_number(group, rng))
    return " ".join(words)


def _adjectives_and_noun(group: Group) -> str:
    words = [_SIZES[group.size], COLOR_WORDS[group.color]]
    if group.fill == "outlined":
        words.insert(0, "속이 빈")
    elif group.fill != "solid":
        words.append(_PATTERNS[group.fill])
    return " ".join([*words, SHAPE_WORDS[group.shape]])


def _number(group: Group, rng: random.Random) -> str:
    """Like "세 개" or "셋"; one is 하나."""
    return f"{_COUNTERS[group.count]} 개" if group.count > 1 and rng.random() < 0.75 else NUMBERS[group.count]


def _subject(group: Group, rng: random.Random, particle: str = "이/가") -> str:
    return with_particle(noun_phrase(group, rng), particle)


def phrases(scene: Scene) -> list[Phrase]:
    """All sentence patterns that fit a scene; each writes one caption."""
    if len(scene.groups) == 1:
        return [_bare, _there, _there_are, _image, _in_image]
    kinds = {kind for _, kind, _ in scene.relations}
    if len(scene.groups) == 2:
        if kinds == {"inside"}:
            return [_states, _fronted, _walks, _surrounds]
        return [_states, _fronted, _walks, _sides, _pair, _row]
    if len(kinds) == 1:
        return [_states, _walks, _row]
    return [_states, _walks]


def _bare(scene: Scene, rng: random.Random) -> str:
    return noun_phrase(scene.groups[0], rng)


def _there(scene: Scene, rng: random.Random) -> str:
    return f"{_subject(scene.groups[0], rng)} 있다"


def _there_are(scene: Scene, rng: random.Random) -> str:
    """Like "작은 빨간 별이 세 개 있다"."""
    group = scene.groups[0]
    return f"{with_particle(_adjectives_and_noun(group), '이/가')} {_number(group, rng)} 있다"


def _image(scene: Scene, rng: random.Random) -> str:
    return f"{_subject(scene.groups[0], rng)} 있는 그림"


def _in_image(scene: Scene, rng: random.Random) -> str:
    return f"그림에 {_subject(scene.groups[0], rng)} 있다"


def _sayable(scene: Scene, rng: random.Random, back: bool = False) -> tuple[int, ...]:
    """An order of the groups in which no relation is "around", for which there is no Korean place word.

    Args:
        scene: the scene to describe.
        rng: the source of chance.
        back: the caption will relate each group to the one before it, not to the one after it.
    """
    orders = [
        order
        for order in chains(scene)
        if all(
            word_between(scene, *((b, a) if back else (a, b))) != "around"
            for a, b in pairwise(order if back else order[:2])
        )
    ]
    wanted = reading_order(scene, rng)
    return wanted if wanted in orders else orders[0]


def _then(scene: Scene, order: tuple[int, ...], rng: random.Random) -> str:
    """The end of a sentence: "고, 그 아래쪽에 C가 있다" for each further group, or "다"."""
    text = ""
    for a, b in pairwise(order):
        text += f"고, 그 {_PLACES[word_between(scene, b, a)]}에 {_subject(scene.groups[b], rng)} 있"
    return text + "다"


def _states(scene: Scene, rng: random.Random) -> str:
    """Like "A가 B의 왼쪽에 있고, 그 오른쪽에 C가 있다"."""
    order = _sayable(scene, rng)
    a, b = order[:2]
    word = word_between(scene, a, b)
    subject = _subject(scene.groups[a], rng, rng.choice(("이/가", "이/가", "은/는")))
    of = noun_phrase(scene.groups[b], rng) + (" " if word == "inside" else "의 ")
    return f"{subject} {of}{_PLACES[word]}에 있{_then(scene, order[1:], rng)}"


def _walks(scene: Scene, rng: random.Random) -> str:
    """Like "A가 있고, 그 오른쪽에 B가 있고, 그 오른쪽에 C가 있다"."""
    order = _sayable(scene, rng, back=True)
    return f"{_subject(scene.groups[order[0]], rng)} 있{_then(scene, order, rng)}"


def _fronted(scene: Scene, rng: random.Random) -> str:
    """Like "B의 왼쪽에 A가 있다"."""
    a, b = _sayable(scene, rng)
    if word_between(scene, a, b) != "inside":
        a, b = b, a  # B is named first.
    word = word_between(scene, a, b)
    of = noun_phrase(scene.groups[b], rng) + (" " if word == "inside" else "의 ")
    return f"{of}{_PLACES[word]}에 {_subject(scene.groups[a], rng)} 있다"


def _surrounds(scene: Scene, rng: random.Random) -> str:
    """Like "B가 A를 둘러싸고 있다"."""
    inner, outer = scene.groups
    return f"{_subject(outer, rng)} {_subject(inner, rng, '을/를')} 둘러싸고 있다"


def _sides(scene: Scene, rng: random.Random) -> str:
    """Like "왼쪽에는 A가, 오른쪽에는 B가 있다"."""
    a, b = reading_order(scene, rng)
    here, there = _PLACES[word_between(scene, a, b)], _PLACES[word_between(scene, b, a)]
    return f"{here}에는 {_subject(scene.groups[a], rng)}, {there}에는 {_subject(scene.groups[b], rng)} 있다"


def _pair(scene: Scene, rng: random.Random) -> str:
    """Like "A와 그 오른쪽의 B"."""
    a, b = reading_order(scene, rng)
    first, second = _subject(scene.groups[a], rng, "과/와"), noun_phrase(scene.groups[b], rng)
    return f"{first} 그 {_PLACES[word_between(scene, b, a)]}의 {second}"


def _row(scene: Scene, rng: random.Random) -> str:
    """Like "왼쪽부터 A, B, C가 있다"."""
    *first, last = scene.groups
    names = ", ".join([*(noun_phrase(group, rng) for group in first), _subject(last, rng)])
    return f"{_PLACES[word_between(scene, 0, 1)]}부터 차례로 {names} 있다"


# Reading

_COLOR_OF = {word: color for color, word in COLOR_WORDS.items()}
_MEANINGS = {
    "size": {word: size for size, word in _SIZES.items()},
    "color": _COLOR_OF
    | {word + "색": color for word, color in _COLOR_OF.items() if not word.endswith("색")}
    | {word[:-1]: color for word, color in _COLOR_OF.items() if word.endswith("색") and len(word) > 2}
    | {
        "붉은": "red",
        "푸른": "blue",
        "녹색": "green",
        "흰": "white",
        "흰색": "white",
        "검정": "black",
        "검정색": "black",
    },
    "fill": {word: fill for fill, word in _PATTERNS.items()}
    | {"물방울무늬": "dotted", "빈": "outlined", "찬": "solid"},
}
_ATTRIBUTES = {word: (kind, value) for kind, words in _MEANINGS.items() for word, value in words.items()}
_MORE = ("다섯", "여섯", "일곱", "여덟", "아홉")
_COUNTS = {word: n for n, word in enumerate((*NUMBERS, *_MORE)) if word}
_COUNTS |= {f"{word}개": n for n, word in enumerate((*_COUNTERS, *_MORE)) if word}
_COUNTER = re.compile(rf"(?<!\w)({'|'.join((*_COUNTERS[1:], *_MORE))}) 개")  # read as one word
_NOUNS = {word: shape for shape, word in SHAPE_WORDS.items()}
_NOUNS |= {"정사각형": "square", "네모": "square", "달": "crescent"}
_PLACE_WORDS = {word: place for place, word in _PLACES.items()}
_PLACE_WORDS |= {"위": "above", "아래": "below", "밑": "below", "안쪽": "inside", "속": "inside"}
_STEMS = _NOUNS.keys() | _PLACE_WORDS.keys() | _COUNTS.keys() | _ATTRIBUTES.keys() | {"그", "그것", "그것들"}
_PARTICLES = ("에서부터", "에서", "부터", "에는", "으로", *"이가은는을를과와의에로도")
_SUBJECT = tuple("이가은는도")


def _split(token: str) -> tuple[str, str]:
    """A word as (stem, particle), or ("", "") if it is not known."""
    if token in _STEMS:
        return token, ""
    for particle in _PARTICLES:
        if token.endswith(particle) and token[: -len(particle)] in _STEMS:
            return token[: -len(particle)], particle
    return "", ""


def parse(caption: str) -> Facts:
    """What a Korean caption says; groups are the noun phrases around a known shape. No number means one."""
    groups: list[GroupFacts] = []
    cases: list[str] = []  # the particle after each group
    relations: set[Relation] = set()
    sides: dict[int, str] = {}
    adjectives: dict[str, Any] = {}
    clause = 0  # index of the first group of this clause
    waiting: tuple[str, int] | None = None  # (word, object): the next group is the subject
    waiting_side: str | None = None
    row: str | None = None
    last = ""  # what came just before: "group", "number" (still the group's), "pronoun" or ""

    def marked(particles: tuple[str, ...]) -> int | None:
        """The last group of this clause that carries one of the particles."""
        return next((i for i in range(len(groups) - 1, clause - 1, -1) if cases[i] in particles), None)

    for token in re.findall(r"[^\W_]+|[,.;!?]", _COUNTER.sub(r"\1개", " ".join(caption.split()))):
        stem, particle = _split(token)
        if stem in _NOUNS:
            groups.append(said_group(_NOUNS[stem], adjectives, adjectives.get("count", 1)))
            cases.append(particle)
            new, adjectives, last = len(groups) - 1, {}, "group"
            if waiting is not None:
                relations.add(canonical(new, *waiting))
                waiting = None
            if row is not None and new > clause:
                relations.add(canonical(new - 1, row, new))
            if waiting_side is not None:
                sides[new], waiting_side = waiting_side, None
        elif stem in _COUNTS:
            if last == "group" and (cases[-1] == "" or (cases[-1] in _SUBJECT and particle == "")):
                groups[-1] = replace(groups[-1], count=_COUNTS[stem])  # 별 세 개가, 별 셋이; 별이 세 개 있다
                cases[-1], last = cases[-1] or particle, "number"
            else:  # 세 개의 별
                adjectives = {"count": _COUNTS[stem]}
                last = ""
        elif stem in _ATTRIBUTES:
            name, value = _ATTRIBUTES[stem]
            adjectives[name], last = value, ""
        elif stem in _PLACE_WORDS and not (stem == "속" and particle == "이"):  # 속이 빈
            word = _PLACE_WORDS[stem]
            if particle in ("부터", "에서부터", "에서"):
                row, clause = word, len(groups)
            elif last == "pronoun" and groups:
                waiting = (word, len(groups) - 1)
            elif last in ("group", "number") and cases[-1] in ("", "의"):
                object, cases[-1] = len(groups) - 1, "의"
                subject = marked(_SUBJECT)
                if subject is None:
                    waiting = (word, object)
                else:
                    relations.add(canonical(subject, word, object))
            elif word != "inside":
                waiting_side = word
            adjectives, last = {}, ""
        elif token.startswith(("둘러싸", "둘러싼")):
            subject, object = marked(_SUBJECT), marked(("을", "를"))
            if subject is not None and object is not None:
                relations.add(canonical(subject, "around", object))
            elif object is not None:
                waiting = ("around", object)
            last = ""
        elif stem.startswith("그"):
            last = "pronoun"
        else:
            if token in (".", ";", "!", "?") or token.startswith(("있고", "있으며")):
                clause, row = len(groups), None
            if token != "속이":
                adjectives = {}
            last = ""
    return Facts(tuple(groups), frozenset(relations | between_sides(sides)))
