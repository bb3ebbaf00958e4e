"""The reader of drawn scenes: what it reads off true renderings, and that it can be wrong."""

import pytest
from PIL import Image

from mmtransformer.data.scenes.facts import Rates, judge_facts
from mmtransformer.data.scenes.facts_from_image import find_objects, read
from mmtransformer.data.scenes.meaning import Facts
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.data.scenes.world import Relation, SceneWorld

WORLD = SceneWorld(group_shares=(0.5, 0.5))


@pytest.mark.parametrize("split", ["val", "compositional"])
def test_true_renderings_are_read_right(split: str) -> None:
    """Measured over 500 of each: see docs; here 20 pictures, of which a fact in fifty may be misread."""
    scenes, total = Scenes(world=WORLD).split(split), Rates()
    for i in range(20):
        judged = judge_facts(read(scenes.image(i), WORLD), scenes.scene(i))
        total += judged.objects + judged.attributes + judged.relations
    assert total.recall > 0.98
    assert total.precision > 0.97


def test_another_picture_is_not_read_as_this_scene() -> None:
    scenes = Scenes(world=WORLD).split("val")
    total = Rates()
    for i in range(12):
        judged = judge_facts(read(scenes.image(i + 1), WORLD), scenes.scene(i))
        total += judged.objects + judged.attributes + judged.relations
    assert total.recall < 0.5


def test_objects_are_found_where_they_lie() -> None:
    scenes = Scenes(world=WORLD).split("val")
    for i in range(6):
        boxes = [box for boxes in scenes.boxes(i) for box in boxes]
        middles = [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in boxes]
        found = find_objects(scenes.image(i), WORLD)
        assert len(found) == len(middles)
        assert all(min(abs(f.x - x) + abs(f.y - y) for f in found) < 4 for x, y in middles)


def test_nothing_is_read_off_nothing() -> None:
    for colour in ((120, 130, 125), (250, 250, 250), (0, 0, 0)):
        assert read(Image.new("RGB", (64, 64), colour)) == Facts()


def test_other_sizes_are_read_too() -> None:
    scenes = Scenes(image_size=96, world=WORLD).split("val")
    judged = [judge_facts(read(scenes.image(i), WORLD), scenes.scene(i)) for i in range(5)]
    assert sum(j.facts for j in judged) / 5 > 0.95


def test_relations_that_follow_are_said_too() -> None:
    scenes = Scenes(world=SceneWorld(group_shares=(0, 0, 1.0), relations=("left",))).split("val")
    facts = read(scenes.image(0), scenes.world)
    assert len(facts.groups) == 3
    assert len(facts.relations) == 3
    assert all(isinstance(relation, Relation) and relation.kind == "left" for relation in facts.relations)
