"""Caption metrics against the official tool (pycocoevalcap, no Java needed), by definition, and by property."""

import contextlib
import io
import itertools
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mmtransformer.metrics import bootstrap as bootstrap_module
from mmtransformer.metrics import compare, java, recall_at_k, score_captions, tokenize
from mmtransformer.metrics.bleu import bleu, bleu_statistics
from mmtransformer.metrics.bootstrap import bootstrap_intervals, paired_test
from mmtransformer.metrics.cider import cider_d
from mmtransformer.metrics.diversity import distinct, diversity, repeated
from mmtransformer.metrics.java import NotComputed, meteor, meteor_statistics, spice
from mmtransformer.metrics.rouge import longest_common, rouge_l
from mmtransformer.metrics.scores import TABLE, CaptionScores

WORDS = tokenize("a dog cat red blue runs sits on the near big small tree house man woman 별 원")
FROZEN = json.loads((Path(__file__).parent / "meteor_official.json").read_text("utf-8"))


def captions(images: int, seed: int, *, most: int = 5) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Random captions with ragged references: one to `most` of them, some captions and references empty."""
    rng = random.Random(seed)

    def caption(empty: float) -> str:
        return "" if rng.random() < empty else " ".join(rng.choices(WORDS, k=rng.randint(1, 13)))

    references = {f"p{i}": [caption(0.02) for _ in range(rng.randint(1, most))] for i in range(images)}
    candidates = {}
    for name, refs in references.items():
        words = rng.choice(refs).split()
        for i in range(len(words)):
            if rng.random() < 0.3:
                words[i] = rng.choice(WORDS)
        candidates[name] = " ".join(words) if rng.random() < 0.9 else caption(0.5)
    return candidates, references


def official(candidates: dict[str, str], references: dict[str, list[str]]) -> tuple[dict, dict]:
    """Scores of the set and of each picture by pycocoevalcap, given our tokens."""
    pytest.importorskip("pycocoevalcap", reason="the oracle pycocoevalcap is not installed")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truth = {name: [" ".join(tokenize(text)) for text in texts] for name, texts in references.items()}
    mine = {name: [" ".join(tokenize(text))] for name, text in candidates.items()}
    with contextlib.redirect_stdout(io.StringIO()):
        bleus, each = Bleu().compute_score(truth, mine)
        cider, cider_each = Cider().compute_score(truth, mine)
        rouge, rouge_each = Rouge().compute_score(truth, mine)
    values = {f"bleu_{n}": value for n, value in enumerate(bleus, 1)} | {"cider_d": cider, "rouge_l": rouge}
    per = {f"bleu_{n}": row for n, row in enumerate(each, 1)} | {"cider_d": cider_each, "rouge_l": rouge_each}
    return values, per


# ---- equal to the official tool ----


@pytest.mark.parametrize(("images", "seed", "most"), [(211, 0, 5), (97, 1, 1), (2, 2, 3), (53, 3, 7)])
def test_bleu_rouge_and_cider_equal_the_official_tool(images: int, seed: int, most: int) -> None:
    candidates, references = captions(images, seed, most=most)
    values, per = official(candidates, references)
    scores = score_captions(candidates, references, n_resamples=0, meteor=False, spice=False)
    for name, value in values.items():
        assert abs(scores.numbers[name] - float(value)) < 1e-12, name
        ours = [scores.per_image[image][name] for image in candidates]
        np.testing.assert_allclose(ours, per[name], rtol=0, atol=1e-12, err_msg=name)


def test_fractions_are_counted_as_the_official_tool_does() -> None:
    """The token "2 1/2" is two words for BLEU and CIDEr-D, and one for ROUGE-L."""
    candidates = {"x": "a 2 1/2 foot dog", "y": "the 3 1/4 cat", "z": "one dog"}
    references = {"x": ["a 2 1/2 inch dog"], "y": ["a 3 1/4 cat", "the 2 1/2 cat"], "z": ["a 2 1/2 dog"]}
    values, _ = official(candidates, references)
    ours = score_captions(candidates, references, n_resamples=0, meteor=False, spice=False).numbers
    for name, value in values.items():
        assert abs(ours[name] - float(value)) < 1e-12, name


def test_scores_of_perfect_and_of_foreign_captions() -> None:
    references = {"x": ["a red dog runs home"], "y": ["two cats sit on grass"], "z": ["the tall man sings loudly"]}
    perfect = score_captions({k: v[0] for k, v in references.items()}, references, meteor=False, spice=False)
    assert perfect.numbers["bleu_4"] == pytest.approx(1, abs=1e-8)
    assert perfect.numbers["rouge_l"] == 1
    assert perfect.numbers["cider_d"] == pytest.approx(10)
    foreign = score_captions(dict.fromkeys(references, "xx yy zz ww vv"), references, meteor=False, spice=False)
    assert foreign.numbers["bleu_1"] < 1e-8
    assert foreign.numbers["cider_d"] == foreign.numbers["rouge_l"] == 0


def test_no_hash_of_a_text_changes_cider(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python orders sets by hashes that differ from process to process; sums must not go by them."""
    code = (
        "import random; from mmtransformer.metrics.cider import cider_d; draw = random.Random(5);"
        "text = lambda: draw.choices('abcdefgh', k=9);"
        "print([score.hex() for score in cider_d([text() for _ in range(60)], [[text()] for _ in range(60)])])"
    )
    said = []
    for seed in "123":
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        said.append(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert said[0] == said[1] == said[2] != b""


def test_one_image_has_no_cider() -> None:
    scores = score_captions({"x": "a dog"}, {"x": ["a dog"]}, meteor=False, spice=False)
    assert scores.numbers["cider_d"] == 0
    assert scores.numbers["bleu_2"] == pytest.approx(1, abs=1e-8)


def test_references_without_words_do_not_stop_the_scores() -> None:
    scores = score_captions({"x": "", "y": "."}, {"x": [""], "y": ["!"]}, meteor=False, spice=False)
    assert scores.numbers["cider_d"] == 0
    assert np.isfinite(list(scores.numbers.values())).all()


# ---- by definition ----


def test_bleu_counts_by_hand() -> None:
    row = bleu_statistics(["the", "the", "the", "cat"], [["the", "cat", "sat"], ["the", "the", "mat", "on", "it"]])
    #              length, closest (3 and 5 are as near: the shorter), 4 guesses, 4 hits
    assert row == [4, 3, 4, 3, 2, 1, 3, 2, 0, 0]
    assert bleu(np.array(row))[0] == pytest.approx(3 / 4)
    assert bleu(np.array(row))[1] == pytest.approx((3 / 4 * 2 / 3) ** 0.5)


def test_bleu_punishes_short_captions() -> None:
    row = bleu_statistics(["a", "dog"], [["a", "dog", "runs", "home"]])
    assert bleu(np.array(row))[0] == pytest.approx(np.exp(1 - 4 / 2))


def test_longest_common_equals_the_table() -> None:
    rng = random.Random(0)
    for _ in range(200):
        a = rng.choices("abcd", k=rng.randint(0, 17))
        b = rng.choices("abcde", k=rng.randint(0, 13))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, j in itertools.product(range(len(a)), range(len(b))):
            table[i + 1][j + 1] = table[i][j] + 1 if a[i] == b[j] else max(table[i][j + 1], table[i + 1][j])
        assert longest_common(a, b) == longest_common(b, a) == table[-1][-1]


def test_rouge_takes_the_best_precision_and_the_best_recall() -> None:
    # precision 2/3 from the first reference, recall 1 from the second
    score = rouge_l(["a", "b", "c"], [["a", "b", "x", "y"], ["c"]])
    assert score == pytest.approx((1 + 1.44) * (2 / 3) * 1 / (1 + 1.44 * (2 / 3)))


def test_cider_does_not_depend_on_the_order_of_references() -> None:
    candidates, references = captions(31, 5)
    mine = [text.split() for text in candidates.values()]
    theirs = [[text.split() for text in texts] for texts in references.values()]
    np.testing.assert_allclose(cider_d(mine, theirs), cider_d(mine, [refs[::-1] for refs in theirs]), atol=1e-12)


def test_diversity_by_hand() -> None:
    rows = [["a", "dog", "runs"], ["a", "dog", "runs"], ["a", "cat"], []]
    assert distinct(rows, 1) == 4 / 8
    assert distinct(rows, 2) == 3 / 5
    assert repeated(rows) == 2 / 4
    assert diversity(rows)["vocabulary"] == 4
    assert diversity(rows)["mean_length"] == 2
    assert diversity([[]]) == {"distinct_1": 0, "distinct_2": 0, "repeated": 0, "vocabulary": 0, "mean_length": 0}


def test_characters_forgive_a_wrong_particle_in_korean() -> None:
    candidates = {"x": "빨간 별이 있다", "y": "파란 원이 있다"}
    references = {"x": ["빨간 별은 있다."], "y": ["파란 원은 있다."]}
    words = score_captions(candidates, references, meteor=False, spice=False)
    letters = score_captions(candidates, references, meteor=False, spice=False, unit="character")
    assert words.numbers["bleu_1"] == pytest.approx(2 / 3)
    assert letters.numbers["bleu_1"] == pytest.approx(5 / 6)
    assert letters.numbers["mean_length"] == 6
    assert letters.unit == "character"


# ---- intervals and the paired test ----


def test_intervals_of_a_mean_are_those_of_theory() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 2.0, size=503)
    numbers = np.stack([values, np.ones(503)], axis=1)
    low, high = bootstrap_intervals(numbers, lambda sums: sums[..., :1] / sums[..., 1:], n_resamples=4000, seed=1)
    half = 1.96 * values.std() / 503**0.5
    assert low[0] == pytest.approx(values.mean() - half, abs=0.02)
    assert high[0] == pytest.approx(values.mean() + half, abs=0.02)


def test_intervals_do_not_depend_on_how_many_draws_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.random.default_rng(0).normal(size=(37, 3))
    whole = bootstrap_intervals(numbers, lambda sums: sums, n_resamples=101, seed=7)
    monkeypatch.setattr(bootstrap_module, "_BLOCK", 37 * 13)
    np.testing.assert_allclose(whole, bootstrap_intervals(numbers, lambda sums: sums, n_resamples=101, seed=7))
    assert not np.allclose(whole, bootstrap_intervals(numbers, lambda sums: sums, n_resamples=101, seed=8))


def test_every_score_is_described() -> None:
    described = re.findall(r"``([a-z_]+?)(?:_\d)?``", CaptionScores.__doc__ or "")
    assert {re.sub(r"_\d$", "", name) for name in TABLE} <= {*described}


def test_scores_lie_within_their_intervals_and_repeat() -> None:
    candidates, references = captions(101, 4)
    scores = score_captions(candidates, references, meteor=False, spice=False)
    again = score_captions(candidates, references, meteor=False, spice=False)
    means = {name for name, score in TABLE.items() if score.each is not None}
    assert "rouge_l" in means
    assert set(scores.intervals) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider_d"} | means
    for name, (low, high) in scores.intervals.items():
        assert low < scores.numbers[name] < high
        assert again.intervals[name] == (low, high)
    assert score_captions(candidates, references, n_resamples=0, meteor=False, spice=False).intervals == {}


def test_the_paired_test_is_fair_and_sees_a_difference() -> None:
    mean = lambda sums: sums[..., :1] / sums[..., 1:]  # noqa: E731
    rng = np.random.default_rng(0)
    small = 0
    for seed in range(100):
        first, second = rng.normal(size=(2, 41, 1))
        row = paired_test(*(np.hstack([x, np.ones_like(x)]) for x in (first, second)), mean, n_resamples=200, seed=seed)
        small += row[0].p_value <= 0.1
    assert 3 <= small <= 19  # 10 expected of 100 equal runs
    first = rng.normal(size=(41, 1))
    second = first + 0.3 + 0.2 * rng.normal(size=(41, 1))  # far less than the spread of either
    row = paired_test(*(np.hstack([x, np.ones_like(x)]) for x in (first, second)), mean)[0]
    assert row.difference == pytest.approx(0.3, abs=0.1)
    assert 0 < row.low < row.difference < row.high
    assert row.p_value < 0.01


def test_compare_two_runs_in_any_order_of_images() -> None:
    good, references = captions(61, 6)
    bad = dict.fromkeys(good, "a dog")
    first = score_captions(bad, references, meteor=False, spice=False)
    second = score_captions(dict(reversed(good.items())), references, meteor=False, spice=False)
    found = compare(first, second)
    assert set(found) == set(first.intervals)
    in_order = score_captions(good, references, meteor=False, spice=False)
    assert found["cider_d"].low == pytest.approx(compare(first, in_order)["cider_d"].low)
    for name, row in found.items():
        assert row.difference == pytest.approx(second.numbers[name] - first.numbers[name])
        assert row.low > 0
        assert row.p_value == pytest.approx(1 / 1001)
    same = compare(first, first)["bleu_4"]
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_runs_that_were_scored_against_other_references_are_not_compared() -> None:
    candidates, references = captions(23, 6)
    first = score_captions(candidates, references, meteor=False, spice=False)
    turned = {name: texts[::-1] for name, texts in references.items()}
    assert compare(first, score_captions(candidates, turned, meteor=False, spice=False))["bleu_4"].difference == 0
    name = list(references)[3]
    others = score_captions(candidates, turned | {name: ["a dog"]}, meteor=False, spice=False)
    with pytest.raises(ValueError, match=f"against different references of 1 picture, such as '{name}'"):
        compare(first, others)


def test_a_thousand_images_take_less_than_two_seconds() -> None:
    candidates, references = captions(1000, 8, most=1)
    references = {name: texts * 5 for name, texts in references.items()}
    start = time.perf_counter()
    score_captions(candidates, references, n_resamples=1000, meteor=False, spice=False)
    assert time.perf_counter() - start < 6  # about 0.4 s alone; this machine may be busy


# ---- what users see ----


def test_scores_are_json_and_a_table() -> None:
    candidates, references = captions(11, 9)
    scores = score_captions(candidates, references, meteor=False, spice=False)
    plain = json.loads(json.dumps(scores.to_dict(per_image=True), allow_nan=False))
    assert plain["images"] == 11
    assert plain["values"]["bleu_4"] == scores.numbers["bleu_4"]
    assert plain["values"]["meteor"] == "not computed: not asked for"
    assert plain["per_image"]["p3"]["rouge_l"] == scores.per_image["p3"]["rouge_l"]
    assert "per_image" not in scores.to_dict()
    table = scores.table()
    assert f"{100 * scores.numbers['bleu_4']:.1f}" in table
    assert "CIDEr-D" in table
    assert "METEOR       not computed: not asked for" in table


@pytest.mark.parametrize(
    ("candidates", "references", "said"),
    [
        ({}, {}, "no caption"),
        ({"a": "x", "b": "y"}, {"a": ["x"]}, "references lack 1 of 2 pictures of candidates: 'b'"),
        (
            {"a": "x"},
            {"a": ["x"]} | {f"n{i}": ["y"] for i in range(7)},
            "candidates lack 7 of 8 pictures of references: 'n0', 'n1', 'n2', 'n3', 'n4', ...",
        ),
        ({"a": "x"}, {"a": []}, "'a' has no reference"),
        ({"a": "x"}, {"a": "a dog"}, "references of 'a' must be a list"),
        ({"a": ["x"]}, {"a": ["x"]}, "candidate of 'a' is list"),
        ({"a": None}, {"a": ["x"]}, "candidate of 'a' is NoneType"),
    ],
)
def test_wrong_captions_are_named(candidates: dict, references: dict, said: str) -> None:
    with pytest.raises(ValueError) as error:
        score_captions(candidates, references, meteor=False, spice=False)
    assert said in str(error.value)


def test_wrong_settings_are_named() -> None:
    one = ({"a": "x"}, {"a": ["x"]})
    with pytest.raises(ValueError, match=r"n_resamples \(1\)"):
        score_captions(*one, n_resamples=1)
    with pytest.raises(ValueError, match="unit 'letter'"):
        score_captions(*one, unit="letter")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"n_resamples \(1\)"):
        bootstrap_intervals(np.ones((3, 1)), lambda sums: sums, n_resamples=1)
    with pytest.raises(ValueError, match=r"confidence \(95\)"):
        bootstrap_intervals(np.ones((3, 1)), lambda sums: sums, confidence=95)
    with pytest.raises(ValueError, match="no picture"):
        bootstrap_intervals(np.ones((0, 1)), lambda sums: sums)
    with pytest.raises(ValueError, match=r"\(3, 1\) and \(5, 1\)"):
        paired_test(np.ones((3, 1)), np.ones((5, 1)), lambda sums: sums)
    with pytest.raises(ValueError, match="the second run lack 1 of 2 pictures of the first run: 'b'"):
        compare(
            score_captions({"a": "x", "b": "y"}, {"a": ["x"], "b": ["y"]}, meteor=False, spice=False),
            score_captions(*one, meteor=False, spice=False),
        )


# ---- retrieval ----


def test_recall_equals_sorting() -> None:
    rng = np.random.default_rng(0)
    owner = np.concatenate([np.arange(13), rng.integers(0, 13, 16)])
    similarity = rng.normal(size=(13, 29)) + 1.2 * (owner[None] == np.arange(13)[:, None])
    found = recall_at_k(similarity, owner.tolist(), ks=(1, 3, 7))
    for k in (1, 3, 7):
        text = [(owner[np.argsort(-row)[:k]] == i).any() for i, row in enumerate(similarity)]
        image = [owner[j] in np.argsort(-similarity[:, j])[:k] for j in range(29)]
        assert found[f"text_recall@{k}"] == pytest.approx(np.mean(text))
        assert found[f"image_recall@{k}"] == pytest.approx(np.mean(image))
    assert 1 <= found["text_median_rank"] <= 29


def test_a_model_that_gives_all_pairs_one_score_finds_nothing() -> None:
    found = recall_at_k(np.zeros((7, 7)), range(7), ks=(1, 6, 7))
    assert found["text_recall@6"] == found["image_recall@6"] == 0
    assert found["text_recall@7"] == found["image_recall@7"] == 1
    assert recall_at_k(np.eye(7), range(7))["image_median_rank"] == 1


def test_wrong_similarities_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(3, 5\), but image_of_caption names 4"):
        recall_at_k(np.ones((3, 5)), [0, 1, 2, 2])
    with pytest.raises(ValueError, match="holds 0 to 3, but the pictures are 0 to 2"):
        recall_at_k(np.ones((3, 4)), [0, 1, 2, 3])
    with pytest.raises(ValueError, match="no caption belongs to 1 picture, the first is row 1"):
        recall_at_k(np.ones((3, 4)), [0, 2, 2, 2])
    with pytest.raises(ValueError, match="1 numbers that are not finite"):
        recall_at_k(np.array([[1.0, np.nan]]), [0, 0])
    with pytest.raises(ValueError, match=r"ks \(0,\)"):
        recall_at_k(np.ones((1, 1)), [0], ks=(0,))


# ---- METEOR and SPICE ----


def test_meteor_from_its_counts_equals_its_own_score() -> None:
    numbers = np.array([[float(number) for number in line.split()] for line in FROZEN["lines"]])
    np.testing.assert_allclose(meteor(_without_whole(numbers))[:, 0], FROZEN["each"], rtol=0, atol=1e-12)
    assert meteor(_without_whole(numbers).sum(0))[0] == pytest.approx(FROZEN["score"], abs=1e-12)


def _without_whole(numbers: np.ndarray) -> np.ndarray:
    numbers = numbers.copy()
    whole = (numbers[:, 21] == numbers[:, 0]) & (numbers[:, 22] == numbers[:, 1]) & (numbers[:, 20] == 1)
    assert whole.sum() == 2
    numbers[whole, 20] = 0
    return numbers


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java")
def test_meteor_by_java_equals_its_frozen_answers() -> None:
    pytest.importorskip("pycocoevalcap", reason="METEOR comes with pycocoevalcap")
    names = [f"p{i}" for i in range(len(FROZEN["candidates"]))]
    scores = score_captions(
        dict(zip(names, FROZEN["candidates"], strict=True)),
        dict(zip(names, FROZEN["references"], strict=True)),
        meteor=True,
        spice=False,
    )
    assert scores.numbers["meteor"] == pytest.approx(FROZEN["score"], abs=1e-12)
    each = [row["meteor"] for row in scores.per_image.values()]
    np.testing.assert_allclose(each, FROZEN["each"], rtol=0, atol=1e-12)
    low, high = scores.intervals["meteor"]
    assert low < FROZEN["score"] < high


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a Python program named java on the PATH, and a package with all its jars in place."""
    package = tmp_path / "package"
    for name in ("meteor/meteor-1.5.jar", "spice/spice-1.0.jar"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    (package / "spice/lib").mkdir()
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (package / "spice/lib" / name).touch()
    monkeypatch.setattr(java, "_package", lambda part: package / part)

    def write(program: str) -> Path:
        script = tmp_path / "bin" / "java"
        script.parent.mkdir(exist_ok=True)
        script.with_suffix(".py").write_text(program)
        # Not "#!python": that line may hold no space, but the folder of .venv may.
        words = shlex.join([sys.executable, "-S", str(script.with_suffix(".py"))])
        script.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(script.parent))
        return package

    return write


def test_meteor_is_killed_when_it_hangs(fake_java) -> None:
    fake_java("import time; time.sleep(600)")
    start = time.perf_counter()
    with pytest.raises(NotComputed, match="METEOR did not finish within 1 s"):
        meteor_statistics(["a dog"], [["a dog"]], seconds=1)
    assert time.perf_counter() - start < 30


def test_meteor_says_why_it_failed(fake_java) -> None:
    fake_java("import sys; print('first', file=sys.stderr); sys.exit('out of memory')")
    one = ({"x": "a dog"}, {"x": ["a dog"]})
    scores = score_captions(*one, spice=False)
    assert scores.values["meteor"] == "not computed: METEOR ended with code 1: out of memory"
    assert "meteor" not in scores.numbers
    with pytest.raises(ValueError, match=r"meteor cannot be computed: METEOR ended .* pass meteor='auto'"):
        score_captions(*one, meteor=True, spice=False)
    fake_java("print('1 2 3')")
    with pytest.raises(NotComputed, match="answered 1 lines for 2 captions"):
        meteor_statistics(["a", "b"], [["a"], ["b"]])


def test_meteor_gets_one_clean_line_a_image(fake_java, tmp_path: Path) -> None:
    seen = tmp_path / "seen.txt"
    fake_java(f"import sys\nopen({str(seen)!r}, 'w').write(sys.stdin.read()); print(' '.join(['1'] * 23))")
    meteor_statistics(["a ||| dog\nruns"], [["one\r\ntwo", "three"]])
    assert seen.read_text() == "SCORE ||| one two ||| three ||| a dog runs\n"


def test_spice_speaks_with_its_program(fake_java) -> None:
    fake_java(
        "import json, sys\n"
        "rows = json.load(open(sys.argv[4]))\n"
        "assert sys.argv[5] == '-out' and rows[1]['refs'] == ['two cats', 'cats'], sys.argv\n"
        "out = [{'image_id': r['image_id'], 'scores': {'All': {'f': len(r['test']) / 10}}} for r in rows]\n"
        "json.dump(out[::-1], open(sys.argv[6], 'w'))\n"
    )
    np.testing.assert_allclose(spice(["a", "cats"], [["a dog"], ["two cats", "cats"]]), [0.1, 0.4])


def test_spice_is_never_downloaded(fake_java) -> None:
    package = fake_java("raise SystemExit('must not run')")
    (package / "spice/lib/stanford-corenlp-3.6.0-models.jar").unlink()
    said = score_captions({"x": "a"}, {"x": ["a"]}, meteor=False).values["spice"]
    assert said == (
        "not computed: stanford-corenlp-3.6.0-models.jar is not in the installed pycocoevalcap, "
        "and nothing is downloaded"
    )


def test_without_java_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap", reason="the reason would be the missing package")
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = score_captions({"x": "a dog"}, {"x": ["a dog"]})
    assert scores.values["meteor"] == scores.values["spice"] == "not computed: java is not on the PATH"
    assert isinstance(scores.values["bleu_4"], float)


def test_without_the_package_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    said = score_captions({"x": "a dog"}, {"x": ["a dog"]}).values["meteor"]
    assert said == "not computed: the Python package pycocoevalcap is not installed"


def test_meteor_is_not_computed_for_korean_or_for_characters(fake_java) -> None:
    fake_java("raise SystemExit('must not run')")
    korean = score_captions({"x": "빨간 별 AB"}, {"x": ["빨간 별"]})
    assert korean.values["meteor"] == "not computed: it knows English only, and 40 % of the captions' letters are Latin"
    letters = score_captions({"x": "a dog"}, {"x": ["a dog"]}, unit="character")
    assert letters.values["meteor"] == "not computed: it counts words, and unit is 'character'"


def test_a_caption_of_a_megabyte_is_named_and_no_end() -> None:
    candidates = {"a": "a red dog", "b": "two cats", "c\x1b": "a,b " * 250_000}
    references = {"a": ["a red dog"], "b": ["two cats", "고양이 " * 200_000], "c\x1b": ["a,b " * 250_000]}
    start = time.perf_counter()
    scores = score_captions(candidates, references, n_resamples=0, meteor=False, spice=False)
    assert time.perf_counter() - start < 5
    assert scores.cut == ("b", "c\x1b")
    assert scores.to_dict()["cut"] == ["b", "c\x1b"]
    assert "only the first 10,000 characters are scored of 2 pictures: 'b', 'c\\x1b'" in scores.table()
    assert scores.numbers["rouge_l"] == pytest.approx(1)
    short = score_captions({"a": "a red dog"}, {"a": ["a red dog"]}, n_resamples=0, meteor=False, spice=False)
    assert (short.cut, "cut" in short.to_dict(), "only the first" in short.table()) == ((), False, False)
