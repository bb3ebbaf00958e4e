"""CLIPScore and RefCLIPScore of a model's captions, by language."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mmtransformer.data.loading.source import Pairs
from mmtransformer.metrics.clipscore import clip_score, ref_clip_score
from mmtransformer.pipelines.image_text_embedder import ImageTextEmbedder
from mmtransformer.serialization.printable import counted
from mmtransformer.training.evaluation.evaluation import ANY, Prediction


def clip_scores(
    encoder: ImageTextEmbedder,
    by: Mapping[str, Sequence[Prediction]],
    pairs: Pairs,
    *,
    prefix: str = "",
    batch_size: int = 64,
) -> dict[str, dict[str, Any]]:
    """Scores predictions against their pictures, and against pictures and references.

    An empty caption fits no picture: it scores 0.

    Args:
        encoder: the model that compares.
        by: the predictions of each language.
        pairs: the pictures.
        prefix: what is put before captions and references; the paper's is "A photo depicts".
        batch_size: pictures at once.

    Returns:
        By language "clip_score", "ref_clip_score" and "images"; nothing of a language without predictions.
    """
    wanted = sorted({p.index for some in by.values() for p in some})
    rows = {index: row for row, index in enumerate(wanted)}
    parts = [
        encoder.encode_images([encoder.transform(pairs.image(i)) for i in wanted[start : start + batch_size]])
        for start in range(0, len(wanted), batch_size)
    ]
    images = torch.cat(parts).numpy() if parts else np.zeros((0, encoder.dim))
    lead = f"{prefix.strip()} " if prefix.strip() else ""
    found: dict[str, dict[str, Any]] = {}
    for code, predictions in by.items():
        if not predictions:
            continue
        said = [i for i, p in enumerate(predictions) if p.said.text.strip()]
        seen, both = np.zeros(len(predictions)), np.zeros(len(predictions))
        if said:
            some = [predictions[i] for i in said]
            captions = encoder.encode_texts([lead + p.said.text for p in some]).numpy()
            references = [lead + text for p in some for text in p.references]
            ends = np.cumsum([len(p.references) for p in some])[:-1]
            told = np.split(encoder.encode_texts(references).numpy(), ends)
            views = images[[rows[p.index] for p in some]]
            seen[said], both[said] = clip_score(views, captions), ref_clip_score(views, captions, told)
        found[code] = {
            "clip_score": float(seen.mean()),
            "ref_clip_score": float(both.mean()),
            "images": len(predictions),
        }
    return found


def clip_table(name: str, split: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """The same as lines of text."""
    lines = [f"by {name}:"]
    for code, scores in found.items():
        where = split if code == ANY else f"{split} {code}"
        lines.append(
            f"  {where}: CLIPScore {scores['clip_score']:.3f}, RefCLIPScore {scores['ref_clip_score']:.3f} "
            f"({counted(scores['images'], 'picture')})"
        )
    return "\n".join(lines)
