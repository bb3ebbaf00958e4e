"""METEOR and SPICE by their authors' own Java programs, when they are on this machine.

Both come inside the Python package ``pycocoevalcap``. Nothing is ever downloaded, and there is no stand-in:
what cannot be computed is said to be not computed, with the reason. Programs run with a time limit
and are killed past it.

Shapes: n pictures.
"""

import importlib.util
import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmtransformer.serialization.printable import counted

# METEOR 1.5, English, the "rank" task: weights of exact, stem, synonym and paraphrase matches, and alpha to delta.
_MODULES = np.array([1.0, 0.6, 0.8, 0.6])
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75


class NotComputed(RuntimeError):
    """A score that this machine cannot compute; the message is the reason."""


def meteor_statistics(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, seconds: float | None = None
) -> np.ndarray:
    """Let METEOR 1.5 align captions with their references.

    Denkowski and Lavie, "Meteor Universal: Language Specific Translation Evaluation for Any Target
    Language", 2014; English resources.

    Args:
        candidates: One caption a picture, tokenised, words separated by spaces.
        references: The references of each picture, tokenised, one at least.
        seconds: Kill it after so long; by default 120 s and 0.2 s a picture.

    Returns:
        (n 23), what each picture adds to the sums that ``meteor`` turns into the score.

    Raises:
        NotComputed: If Java or the package is missing, the captions are not in Latin letters, or the program
            fails or takes too long.
    """
    jar = _package("meteor") / "meteor-1.5.jar"
    java = _java()
    if not jar.is_file():
        raise NotComputed(f"{jar.name} is not in the installed pycocoevalcap")
    _check_latin(candidates)
    lines = []
    for candidate, refs in zip(candidates, references, strict=True):
        fields = [" ".join(text.replace("|||", " ").split()) for text in (*refs, candidate)]
        lines.append(" ||| ".join(("SCORE", *fields)) + "\n")
    if seconds is None:
        seconds = 120 + 0.2 * len(candidates)
    # Other collectors spin for minutes where the cores are busy.
    machine = ["-XX:+UseSerialGC", "-Xmx2G", "-Dfile.encoding=UTF-8"]
    options = ["-", "-", "-stdio", "-l", "en", "-norm"]  # as the COCO evaluation calls it
    # Its own file, named: by itself it does not find it in a folder whose name has a space.
    options += ["-a", str(jar.parent / "data" / "paraphrase-en.gz")]
    command = [java, *machine, "-jar", str(jar), *options]
    answer = _run("METEOR", command, "".join(lines), seconds)
    rows = [[float(number) for number in line.split()] for line in answer.splitlines() if line.strip()]
    if len(rows) != len(candidates) or any(len(row) != 23 for row in rows):
        raise NotComputed(f"METEOR answered {len(rows)} lines for {counted(len(candidates), 'caption')}")
    numbers = np.array(rows).reshape(len(rows), 23)
    # In the sum over a set, a caption that matches its reference wholly has no chunk (no fragmentation).
    whole = (numbers[:, 21] == numbers[:, 0]) & (numbers[:, 22] == numbers[:, 1]) & (numbers[:, 20] == 1)
    numbers[whole, 20] = 0
    return numbers


def meteor(sums: np.ndarray) -> np.ndarray:
    """Turn sums of ``meteor_statistics`` (... 23) into the METEOR score (... 1), a fraction of 1."""
    sums = np.asarray(sums, dtype=np.float64)
    modules = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    matched = _DELTA * modules[..., 0:2] + (1 - _DELTA) * modules[..., 2:4]  # (... module, caption|reference)
    matched = (matched * _MODULES[:, None]).sum(-2)
    words, function_words = sums[..., 0:2], sums[..., 2:4]
    length = _DELTA * (words - function_words) + (1 - _DELTA) * function_words
    share = np.divide(matched, length, out=np.zeros_like(matched), where=length > 0)
    precision, recall = share[..., 0], share[..., 1]
    below = _ALPHA * precision + (1 - _ALPHA) * recall
    mean = np.divide(precision * recall, below, out=np.zeros_like(below), where=below > 0)
    matches = (sums[..., 21] + sums[..., 22]) / 2
    fragments = np.divide(sums[..., 20], matches, out=np.zeros_like(matches), where=matches > 0)
    return (mean * (1 - _GAMMA * fragments**_BETA))[..., None]


def spice(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, seconds: float | None = None
) -> np.ndarray:
    """Let SPICE compare the scene graphs of captions and references.

    Anderson et al., "SPICE: Semantic Propositional Image Caption Evaluation", ECCV 2016. It needs the
    Stanford CoreNLP 3.6.0 jars in the ``spice/lib`` folder of the installed pycocoevalcap and about 8 GB.

    Args:
        candidates: One caption a picture, tokenised.
        references: The references of each picture, tokenised, one at least.
        seconds: Kill it after so long; by default 300 s and 2 s a picture.

    Returns:
        (n) the F score of each picture; their mean is the score of the set.

    Raises:
        NotComputed: If something is missing, fails, or takes too long.
    """
    folder = _package("spice")
    java = _java()
    for name in ("spice-1.0.jar", "lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar"):
        if not (folder / name).is_file():
            raise NotComputed(f"{Path(name).name} is not in the installed pycocoevalcap, and nothing is downloaded")
    _check_latin(candidates)
    rows = [
        {"image_id": i, "test": candidate, "refs": list(refs)}
        for i, (candidate, refs) in enumerate(zip(candidates, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "in.json", Path(scratch) / "out.json"
        source.write_text(json.dumps(rows), encoding="utf-8")
        command = [java, "-Xmx8G", "-jar", str(folder / "spice-1.0.jar"), str(source), "-out", str(target), "-silent"]
        _run("SPICE", command, "", 300 + 2 * len(rows) if seconds is None else seconds)
        if not target.is_file():
            raise NotComputed("SPICE wrote no result")
        answer = json.loads(target.read_text(encoding="utf-8"))
    scores = {row["image_id"]: float(row["scores"]["All"]["f"]) for row in answer}
    if len(scores) != len(rows) or not all(math.isfinite(score) for score in scores.values()):
        raise NotComputed(f"SPICE scored {len(scores)} of {counted(len(rows), 'caption')}")
    return np.array([scores[i] for i in range(len(rows))])


def _java() -> str:
    java = shutil.which("java")
    if java is None:
        raise NotComputed("java is not on the PATH")
    return java


def _package(part: str) -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise NotComputed("the Python package pycocoevalcap is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / part


def _check_latin(captions: Sequence[str]) -> None:
    letters = [char for caption in captions for char in caption if char.isalpha()]
    latin = sum(char < "\u0250" or "\u1e00" <= char <= "\u1eff" for char in letters)
    if latin < len(letters) / 2:
        share = 100 * latin / len(letters)
        raise NotComputed(f"it knows English only, and {share:.0f} % of the captions' letters are Latin")


def _run(name: str, command: list[str], text: str, seconds: float) -> str:
    try:
        done = subprocess.run(command, input=text, encoding="utf-8", capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise NotComputed(f"{name} did not finish within {seconds:.0f} s") from None
    except OSError as error:
        raise NotComputed(f"{name} could not be started ({error})") from None
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotComputed(f"{name} ended with code {done.returncode}: {said[:200]}")
    return done.stdout
