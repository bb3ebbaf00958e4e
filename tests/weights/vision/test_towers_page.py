"""docs/towers.md is what its script writes, and says what is true."""

import random

import pytest

import list_towers


def test_the_page_is_what_the_script_writes() -> None:
    text = list_towers.PAGE.read_text("utf-8")
    found = list_towers.read(text)
    assert sorted(found) == sorted(list_towers.names()), "stale: run python tests/list_towers.py"
    assert list_towers.page(found) == text, "stale: run python tests/list_towers.py"
    loaded = [name for name, value in found.items() if value is not None]
    assert len(loaded) >= 220
    assert max(found[name] or 0.0 for name in loaded) <= 1e-5
    assert {list_towers.group_of(name) for name in found if name not in loaded} == set(list_towers.REFUSED)


def test_a_name_of_each_group_is_measured_again() -> None:
    """Another one each day would be another test: the numbers are drawn from the page itself."""
    found = list_towers.read(list_towers.PAGE.read_text("utf-8"))
    pick = random.Random(len(found))
    for group in list_towers.GROUPS:
        inside = sorted(name for name in found if list_towers.group_of(name) == group)
        name = pick.choice(inside)
        if found[name] is None:
            with pytest.raises(ValueError, match=r"timm's|ViT has nothing like"):
                list_towers.difference(name)
        else:
            assert list_towers.difference(name) <= 1e-5, name
