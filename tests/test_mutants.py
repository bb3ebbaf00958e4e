"""The faults of `tests/mutants.py` can still be put where they belong; the script itself is run by hand."""

from collections import Counter

import mutants


def test_every_mutant_still_has_its_place() -> None:
    texts = {m.file: (mutants.ROOT / "mmtransformer" / m.file).read_text("utf-8") for m in mutants.MUTANTS}
    lost = [f"{m.file}: {m.old!r} stands there {texts[m.file].count(m.old)} times" for m in mutants.MUTANTS]
    assert not [line for line in lost if not line.endswith("there 1 times")]


def test_mutants_are_many_different_and_have_tests() -> None:
    assert len(mutants.MUTANTS) >= 60
    assert max(Counter((m.file, m.old, m.new) for m in mutants.MUTANTS).values()) == 1
    assert all(m.old != m.new for m in mutants.MUTANTS)
    missing = {t for m in mutants.MUTANTS for t in m.tests.split() if not (mutants.ROOT / "tests" / t).exists()}
    assert not missing
    assert set(mutants.EQUIVALENT) <= {m.new for m in mutants.MUTANTS}
