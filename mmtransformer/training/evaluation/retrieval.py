"""How well pictures find their captions and captions their pictures, by contrast and after matching the best again.

Shapes: c images and t captions of a split.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.blip2_qformer import Blip2QFormer
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.loading.rows import CaptionRow
from mmtransformer.data.loading.source import Pairs
from mmtransformer.data.scenes.facts import judge
from mmtransformer.data.scenes.scenes import SceneSplit
from mmtransformer.dual_encoders.clip import CLIP
from mmtransformer.images import ImageError
from mmtransformer.layers.modes import evaluation_mode
from mmtransformer.metrics.retrieval import recall_at_k
from mmtransformer.plots import save_image
from mmtransformer.plots.retrieval import FoundImages, FoundTexts, Mark, plot_searches
from mmtransformer.serialization.printable import counted
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.training.evaluation.evaluation import ANY

KS = (1, 5, 10)


@dataclass
class Scored:
    """The similarities of a split's captions in one language with its pictures.

    Attributes:
        images: places of the c pictures in their split.
        texts: the t captions.
        owner: for each caption, the row of its picture.
        similarity: (c t), larger = nearer.
        matched: (c t), what stands in its place where the best were matched again; None = they were not.
    """

    images: list[int]
    texts: list[str]
    owner: list[int]
    similarity: np.ndarray
    matched: np.ndarray | None = None

    def recalls(self) -> dict[str, dict[str, float]]:
        """Recall both ways: "itc", and "itm" where matching had the last word."""
        out = {"itc": recall_at_k(self.similarity, self.owner, KS)}
        if self.matched is not None:
            out["itm"] = recall_at_k(self.matched, self.owner, KS)
        return out


@dataclass
class Retrieval:
    """Retrieval of some splits, by split and then by language."""

    splits: dict[str, dict[str, Scored]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `metrics.json`: fractions of 1, with the sizes of the pools."""
        return {
            split: {code: s.recalls() | {"images": len(s.images), "captions": len(s.texts)} for code, s in by.items()}
            for split, by in self.splits.items()
        }

    def table(self) -> str:
        """Recall in percent as lines of text."""
        lines = [f"{'% found among the first':<44}" + "".join(f"{k:>8}" for k in KS) + f"{'median':>8}"]
        for split, by in self.splits.items():
            for code, s in by.items():
                name = split if code == ANY else f"{split} {code}"
                lines.append(f"{name}: {counted(len(s.images), 'picture')}, {counted(len(s.texts), 'caption')}")
                for kind, recalls in s.recalls().items():
                    for way, label in (("text", "picture -> caption"), ("image", "caption -> picture")):
                        cells = "".join(f"{100 * recalls[f'{way}_recall@{k}']:>8.1f}" for k in KS)
                        after = "" if kind == "itc" else ", matched again"
                        lines.append(f"{'  ' + label + after:<44}{cells}{recalls[f'{way}_median_rank']:>8.0f}")
        return "\n".join(lines)


def plot_retrieval(
    retrieval: Retrieval, data: CaptionData, path: str | Path, *, title: str = "", searches: int = 6, top: int = 5
) -> None:
    """Draws what some texts and some pictures found, evenly over splits and languages.

    Of drawn scenes it is known whether a caption of another picture is true as well.

    Args:
        retrieval: What was found.
        data: What it was found in.
        path: The picture to write.
        title: Its title.
        searches: Searches by text, and by picture.
        top: How many of the nearest are shown.
    """
    pools = [(split, code, s) for split, by in retrieval.splits.items() for code, s in by.items()]
    places = [(*pools[turn % len(pools)], (turn + 0.5) / searches) for turn in range(searches)]
    by_text: list[FoundImages] = []
    by_image: list[FoundTexts] = []
    for split, code, column in dict.fromkeys((split, code, int(x * len(s.texts))) for split, code, s, x in places):
        with contextlib.suppress(ImageError):  # it was found by its cached features, and has gone since
            by_text.append(_images_of(data.pairs(split), retrieval.splits[split][code], column, code, top))
    for split, code, row in dict.fromkeys((split, code, int(x * len(s.images))) for split, code, s, x in places):
        with contextlib.suppress(ImageError):
            by_image.append(_texts_of(data.pairs(split), retrieval.splits[split][code], row, code, top))
    if by_text or by_image:
        subtitle = "; ".join(
            f"{split}{'' if code == ANY else f' {code}'}: recall@1 "
            f"{100 * s.recalls()['itc']['text_recall@1']:.1f} % of captions, "
            f"{100 * s.recalls()['itc']['image_recall@1']:.1f} % of pictures"
            for split, code, s in pools
        )
        save_image(plot_searches(by_text, by_image, title=title, subtitle=subtitle), path)


def _images_of(pairs: Pairs, s: Scored, column: int, code: str, top: int) -> FoundImages:
    """What a text finds."""
    language, near = None if code == ANY else code, _scores(s)[:, column]
    best = np.argsort(-near, kind="stable")[:top].tolist()
    marks: list[Mark] = [_mark(pairs, s, i, column, language) for i in best]
    rank = int((near >= near[s.owner[column]]).sum())
    return FoundImages(s.texts[column], [pairs.image(s.images[i]) for i in best], marks, rank, language)


def _texts_of(pairs: Pairs, s: Scored, row: int, code: str, top: int) -> FoundTexts:
    """What a picture finds."""
    language, near = None if code == ANY else code, _scores(s)[row]
    best = np.argsort(-near, kind="stable")[:top].tolist()
    marks: list[Mark] = [_mark(pairs, s, row, j, language) for j in best]
    own = np.array(s.owner) == row
    rank = 1 + int((near[~own] >= near[own].max()).sum())
    return FoundTexts(pairs.image(s.images[row]), [s.texts[j] for j in best], marks, rank, language)


def _scores(s: Scored) -> np.ndarray:
    return s.similarity if s.matched is None else s.matched


def _mark(pairs: Pairs, s: Scored, row: int, column: int, language: str | None) -> Mark:
    if s.owner[column] == row:
        return "own"
    if isinstance(pairs, SceneSplit) and language:
        claims = judge(s.texts[column], pairs.scene(s.images[row]), language).claims
        return "true" if claims and all(right for _, right in claims) else "other"
    return "other"


@torch.inference_mode()
def evaluate_retrieval(
    model: Blip2QFormer | CLIP,
    data: CaptionData,
    splits: Sequence[str] | None = None,
    *,
    num_rerank: int = 0,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    limit_batches: int | None = None,
    text_batch: int = 256,
) -> Retrieval:
    """Compares every picture of a split with every caption, within each language.

    Args:
        model: The model; it is in evaluation mode for the call.
        data: The data, with the model's tokenizer and transform.
        splits: Which splits; those that the data validates on unless told.
        num_rerank: How many of the nearest are matched again, for each picture and each caption; 0 = none. As in
            BLIP-2's own code, the score is then the logit of a match plus the similarity. A CLIP matches nothing.
        device: Where to compute.
        autocast: The number format; None computes in that of the weights.
        limit_batches: Most batches of pictures of a split.
        text_batch: Captions, or pairs to be matched, at once.

    Raises:
        ValueError: If a CLIP is to match.
    """
    if num_rerank and isinstance(model, CLIP):
        raise ValueError(f"num_rerank ({num_rerank}) matches pictures and texts again, which a CLIP cannot: leave it 0")
    model.to(device)
    kind = torch.device(device).type
    result = Retrieval()
    for split in data.val_splits if splits is None else splits:
        with evaluation_mode(model), torch.autocast(kind, autocast, autocast is not None):
            result.splits[split] = _split(model, data, split, num_rerank, device, limit_batches, text_batch)
    return result


def _split(
    model: Blip2QFormer | CLIP,
    data: CaptionData,
    split: str,
    num_rerank: int,
    device: torch.device | str,
    limit: int | None,
    size: int,
) -> dict[str, Scored]:
    rows = data.rows(split)
    vectors: list[Tensor] = []
    images: list[int] = []
    for places, batch in _batches(data, split, limit):
        found = _image_vectors(model, batch.to(device))
        vectors.append(found[torch.tensor([at for at, _ in places], device=found.device)])
        images += [i for _, i in places]
    embeds = torch.cat(vectors)

    captions = [(row, int(j)) for row, i in enumerate(images) for j in range(rows.first[i], rows.first[i + 1])]
    tokens = [_read_by(model, rows.row(j)) for _, j in captions]
    said = [rows.captions[images[row]][j - int(rows.first[images[row]])] for row, j in captions]
    texts = torch.empty(len(captions), embeds.shape[2], device=embeds.device)
    for chosen in _by_length([len(t) for t in tokens], size):
        ids, attention_mask = _padded([tokens[j] for j in chosen], data.tokenizer, device)
        texts[torch.tensor(chosen, device=texts.device)] = _text_vectors(model, ids, attention_mask)
    with torch.autocast(embeds.device.type, enabled=False):
        near = torch.stack([(vector @ texts.T).amax(0) for vector in embeds]).cpu()

    tags = data.tokenizer.languages
    codes = [caption.language if tags else None for caption in said]
    scored: dict[str, Scored] = {}
    again = torch.zeros_like(near, dtype=torch.bool)
    parts: dict[str, tuple[list[int], list[int]]] = {}
    for code in dict.fromkeys(codes):
        columns = [j for j, other in enumerate(codes) if other == code]
        owners = sorted({captions[j][0] for j in columns})
        parts[code or ANY] = owners, columns
        if num_rerank:
            again[np.ix_(owners, columns)] |= _best(near[owners][:, columns], num_rerank)
    matched = None
    if num_rerank and isinstance(model, Blip2QFormer):
        matched = _matched(model, data, split, near, again, images, tokens, device, limit, size)
    for code, (owners, columns) in parts.items():
        row_of = {owner: row for row, owner in enumerate(owners)}
        scored[code] = Scored(
            [images[row] for row in owners],
            [said[j].text for j in columns],
            [row_of[captions[j][0]] for j in columns],
            near[owners][:, columns].numpy(),
            None if matched is None else matched[owners][:, columns].numpy(),
        )
    return scored


def _image_vectors(model: Blip2QFormer | CLIP, batch: CaptionBatch) -> Tensor:
    """A batch's images: (b l e)."""
    if isinstance(model, CLIP):
        return model.image_features(batch).float()[:, None]
    return model.project_queries(model.qformer.encode_queries(model.context(batch)).queries).float()


def _read_by(model: Blip2QFormer | CLIP, row: CaptionRow) -> np.ndarray:
    """What a model reads of a caption: a CLIP, of the prompt, only what opens a text."""
    if not isinstance(model, CLIP):
        return row.tokens
    return np.concatenate((row.tokens[: int(model.add_bos_token)], row.tokens[row.prompt :]))


def _text_vectors(model: Blip2QFormer | CLIP, tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """Texts: (n e)."""
    return model.encode_text(tokens, attention_mask).float()


def _batches(data: CaptionData, split: str, limit: int | None) -> Iterator[tuple[list[tuple[int, int]], CaptionBatch]]:
    """Batches, with (place in the batch, place in the split) of each picture; replacement samples are left out."""
    pairs, seen = data.pairs(split), set[str]()
    places = {pairs.name(i): i for i in range(len(pairs))}
    for batch in islice(data.loader(split), limit):
        new = [(at, places[name]) for at, name in enumerate(batch.names) if name not in seen]
        seen.update(batch.names)
        if new:
            yield new, batch


def _by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lambda j: lengths[j])
    yield from (order[start : start + size] for start in range(0, len(order), size))


def _padded(tokens: Sequence[np.ndarray], tokenizer: Tokenizer, device: torch.device | str) -> tuple[Tensor, Tensor]:
    ids, attention_mask = tokenizer.pad([t.tolist() for t in tokens], side="right")
    return ids.to(device), attention_mask.to(device)


def _best(near: Tensor, k: int) -> Tensor:
    """The k nearest captions of each picture, and the k nearest pictures of each caption: (c t) bool."""
    chosen = torch.zeros_like(near, dtype=torch.bool)
    chosen.scatter_(1, near.topk(min(k, near.shape[1]), 1).indices, True)
    return chosen.scatter_(0, near.topk(min(k, near.shape[0]), 0).indices, True)


def _matched(
    model: Blip2QFormer,
    data: CaptionData,
    split: str,
    near: Tensor,
    again: Tensor,
    images: list[int],
    tokens: list[np.ndarray],
    device: torch.device | str,
    limit: int | None,
    size: int,
) -> Tensor:
    """The similarities with the logit of a match added where `again`; what was not matched stands behind them all."""
    scores = near - 1000.0
    rows = {i: row for row, i in enumerate(images)}
    for places, batch in _batches(data, split, limit):
        visual = model.qformer.project_visual(model.context(batch.to(device)))
        pairs = [(at, rows[i], int(j)) for at, i in places for j in again[rows[i]].nonzero()[:, 0]]
        for chosen in _by_length([len(tokens[j]) for _, _, j in pairs], size):
            at, row, column = zip(*(pairs[p] for p in chosen), strict=True)
            ids, attention_mask = _padded([tokens[j] for j in column], data.tokenizer, device)
            of_pairs = [kv.select(torch.tensor(at, device=ids.device)) for kv in visual]
            logits = model.match(of_pairs, ids, attention_mask).float().cpu()
            place = torch.tensor(row), torch.tensor(column)
            scores[place] = near[place] + logits[:, 1]
    return scores
