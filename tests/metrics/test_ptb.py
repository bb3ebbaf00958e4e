"""PTB tokenisation against the official tool: its frozen answers always, the tool itself where Java is."""

import json
import random
import shutil
import subprocess
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransformer.metrics import normalize_text, tokenize
from mmtransformer.metrics.ptb import PUNCTUATION, fold

# Made by running the official tool on sentences of our own, each followed by a line that begins with "A".
OFFICIAL = [json.loads(line) for line in (Path(__file__).parent / "ptb_official.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("row", OFFICIAL, ids=[f"{i}" for i in range(len(OFFICIAL))])
def test_tokens_equal_the_frozen_answers_of_the_official_tool(row: dict) -> None:
    assert tokenize(row["caption"]) == row["tokens"]


def test_there_are_enough_frozen_answers() -> None:
    assert len(OFFICIAL) >= 190
    assert sum(len(row["tokens"]) for row in OFFICIAL) > 1000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man isn't here.", "a man is n't here"),
        ("the (red) ball", "the -lrb- red -rrb- ball"),
        ("what?! no!! yes! ok..", "what ?! no !! yes ok"),
        ("cannot, gonna.", "can not gon na"),
        ("gimme's gonnan't", "gimme 's gonna n't"),
        ("at 5 p.m. on St. James St.", "at 5 p.m. on st. james st."),
        ("mass. mass., Mass. of", "mass mass. mass. of"),
        ("size A. The", "size a the"),
        ("J. Smith", "j. smith"),
        ("no. 5 and no.", "no. 5 and no"),
        ("", ""),
        (" . ! ' - ", ""),
    ],
)
def test_quirks(text: str, words: str) -> None:
    assert tokenize(text) == words.split()


def test_a_fraction_is_one_token_with_a_no_break_space() -> None:
    assert tokenize("a 2 1/2 foot fish") == ["a", "2\u00a01/2", "foot", "fish"]


def test_korean_words_are_what_stands_between_spaces() -> None:
    red = "빨간 별 세 개가 파란 원의 왼쪽에 있다"
    assert " ".join(tokenize("빨간 별 세 개가, 파란 원의 왼쪽에 있다.")) == red
    assert tokenize('고양이(흰색)가 "소파"에 있다!') == ["고양이", "-lrb-", "흰색", "-rrb-", "가", "소파", "에", "있다"]
    assert tokenize("강아지 3마리… 그리고 ‘공’") == ["강아지", "3마리", "그리고", "공"]


def test_korean_in_single_letters_equals_korean_in_syllables() -> None:
    text = "고양이가 소파 위에 있다."
    apart = unicodedata.normalize("NFD", text)
    assert apart != text
    assert tokenize(apart) == tokenize(text)


@pytest.mark.parametrize("space", ["\t", "\r", "\n", "\v", "\f", "\u0085", "\u2028", "\u00a0", "\u3000", "  "])
def test_white_space_of_any_kind_is_a_space(space: str) -> None:
    assert tokenize(f"{space}a dog{space}.{space}") == ["a", "dog"]
    assert tokenize(f"a dog{space}runs") == ["a", "dog", "runs"]


def test_emoji_and_control_characters_vanish() -> None:
    assert tokenize("a dog \U0001f600 runs \u2764\ufe0f \u0007 fast\u200b") == ["a", "dog", "runs", "\u2764", "fast"]


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_clean_tokens(text: str) -> None:
    tokens = tokenize(text)
    assert all(token and " " not in token and token not in PUNCTUATION for token in tokens)
    assert tokens == tokenize(fold(text))  # and folding twice changes nothing


@given(st.lists(st.sampled_from(["a", "dog", "red", "별이", "소파", "runs", "3", "can't"]), min_size=1, max_size=8))
def test_captions_in_a_row_are_cut_like_each_alone(words: list[str]) -> None:
    alone = [token for word in words for token in tokenize(word)]
    assert tokenize(" ".join(words) + " .") == alone


@pytest.mark.parametrize(
    "unit",
    ["a,", "a'", "a@", "<a ", "1,", "a-", "a.", "a!", "a/", "1 ", "<a@", "#a", "a=", "'a", ":-", "aa'n", "한'", "a&"],
)
def test_a_caption_of_50_000_marks_takes_no_time(unit: str) -> None:
    start = time.perf_counter()
    tokenize(unit * 10_000)
    assert time.perf_counter() - start < 5


def test_plain_is_lower_case_without_punctuation() -> None:
    assert normalize_text(" The dog's T-shirt, (red)! ") == "the dog's t-shirt red"
    assert normalize_text("빨간 별이 있다.") == "빨간 별이 있다"
    assert normalize_text("It\u2019s 5 o'clock -- now") == "it's 5 o'clock now"


def _jar() -> Path | None:
    package = pytest.importorskip("pycocoevalcap", reason="the oracle pycocoevalcap is not installed")
    return next(iter(Path(package.__path__[0]).glob("tokenizer/*.jar")), None)


@pytest.mark.skipif(shutil.which("java") is None, reason="the official tool needs Java")
def test_awkward_captions_agree_with_the_official_tool(tmp_path: Path) -> None:
    """2000 captions with marks strewn in; at most 1 in 1000 may differ (letters newer than the tool)."""
    jar = _jar()
    if jar is None:
        pytest.skip("the official tool's jar is not in pycocoevalcap")
    rng = random.Random(0)
    nouns = ["man", "woman", "dog", "bus", "pizza", "street", "boy's", "girls'", "O'Brien", "고양이", "강아지가"]
    others = (
        "a the red two 3 1/2 10:30 $5 50% isn't can't they're gonna cannot St. Mr. U.S. p.m. No. etc. T-shirt "
        "well-known and/or w/ AT&T #1 (blue) [x] \"big\" 'small' ... ?! !! -- <unk> :) 1980's '80s A. B A on in with "
        "of is rides sits. stands, next; to: who's let's \u201chi\u201d \u2018ho\u2019 \u2014 \u20ac \u00bd caf\u00e9 "
        "&amp; 별,"
    )
    captions = []
    for _ in range(2000):
        words = [rng.choice(nouns if rng.random() < 0.4 else others.split()) for _ in range(rng.randint(1, 12))]
        for _ in range(rng.randint(0, 2)):
            i = rng.randrange(len(words))
            words[i] += rng.choice([".", ",", "!", "?", "'s", '"', ")", "...", "-", "/", "'"])
        captions.append(" ".join(words))
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(line for caption in captions for line in (caption, "A x")) + "\n", encoding="utf-8")
    command = ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-cp", str(jar)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", str(file)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True)
    lines = done.stdout.split("\n")[: 2 * len(captions) : 2]
    # The list that the official wrapper takes out of the tool's answer.
    out = PUNCTUATION | {"-LRB-", "-RRB-", "-LCB-", "-RCB-", ""}
    official = [[word for word in line.rstrip().split(" ") if word not in out] for line in lines]
    misses = [
        (caption, theirs, tokenize(caption))
        for caption, theirs in zip(captions, official, strict=True)
        if theirs != tokenize(caption)
    ]
    assert len(misses) <= 0.001 * len(captions), misses[:5]
