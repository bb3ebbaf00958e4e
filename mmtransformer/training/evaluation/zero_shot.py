"""Zero-shot classes of drawn scenes: shapes and colours told by words alone, in each language of the data."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtransformer.data.captions import CaptionData
from mmtransformer.data.scenes.grammar import describe
from mmtransformer.data.scenes.scenes import SceneSplit
from mmtransformer.data.scenes.world import SIZES, Group, Scene, SceneWorld
from mmtransformer.pipelines.image_text_embedder import ImageTextEmbedder
from mmtransformer.serialization.printable import counted

KINDS = ("shape", "color")


def sentences(world: SceneWorld, kind: str, label: str, language: str) -> list[str]:
    """What a class is told by: captions of scenes with one group that has it, and anything else.

    Args:
        world: which shapes, colours and fills there are.
        kind: "shape" or "color".
        label: the class, such as "star".
        language: "en" or "ko".
    """
    chance = random.Random(f"{kind} {label} {language}")
    others = world.colors if kind == "shape" else world.shapes
    found = []
    for other in others:
        shape, color = (label, other) if kind == "shape" else (other, label)
        for count in range(1, world.max_count + 1):
            group = Group(shape, color, chance.choice(SIZES), chance.choice(tuple(world.fills)), count)
            found += describe(Scene((group,), (), ((),), 0), language, 1, chance)
    return found


def class_vectors(encoder: ImageTextEmbedder, world: SceneWorld, kind: str, language: str) -> Tensor:
    """A vector a class: the mean of its sentences' vectors, of length 1 again: (m d)."""
    labels = world.shapes if kind == "shape" else world.colors
    means = [encoder.encode_texts(sentences(world, kind, label, language)).mean(0) for label in labels]
    return F.normalize(torch.stack(means), dim=-1)


def zero_shot(encoder: ImageTextEmbedder, data: CaptionData, *, limit: int | None = None) -> dict[str, Any]:
    """The shares of pictures with one group of objects whose shape, and whose colour, is told right.

    Args:
        encoder: the model.
        data: the data; nothing is found where its validation splits are no drawn scenes.
        limit: most pictures of a split.

    Returns:
        By split, then by language: "shape" and "color" as fractions of 1; "pictures" by split.
    """
    result: dict[str, Any] = {}
    for split in data.val_splits:
        pairs = data.pairs(split)
        if not isinstance(pairs, SceneSplit):
            continue
        scenes = {i: pairs.scene(i) for i in range(len(pairs))}
        chosen = [i for i, scene in scenes.items() if len(scene.groups) == 1][:limit]
        if not chosen:
            continue
        vectors = encoder.encode_images([encoder.transform(pairs.image(i)) for i in chosen])
        found: dict[str, Any] = {"pictures": len(chosen)}
        for language in pairs.languages:
            found[language] = {}
            for kind in KINDS:
                labels: Sequence[str] = pairs.world.shapes if kind == "shape" else pairs.world.colors
                said = (vectors @ class_vectors(encoder, pairs.world, kind, language).T).argmax(1).tolist()
                true = [getattr(scenes[i].groups[0], kind) for i in chosen]
                right = sum(labels[number] == name for number, name in zip(said, true, strict=True))
                found[language][kind] = right / len(chosen)
        result[split] = found
    return result


def zero_shot_table(found: Mapping[str, Any]) -> str:
    """The same in percent, as lines of text."""
    lines = []
    for split, by in found.items():
        lines.append(f"{split}: {counted(by['pictures'], 'picture')} of one group, told by words alone")
        for language, values in by.items():
            if language != "pictures":
                lines.append(f"  {language}: shape {values['shape']:.1%}, colour {values['color']:.1%}")
    return "\n".join(lines)
