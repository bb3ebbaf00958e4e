"""Attention to look at: heads x layers of a sentence, token by token, and what a ViT looks at in a picture.

with record_attention(encoder) as record:
    encoder(tokens)
save_image(plot_attention(record, tokenizer.pieces(ids), tokenizer.pieces(ids)), "attention.png")

Shapes: gh gw rows and columns of patches.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mmtransformer.backbones.vit import ViT
from mmtransformer.images import ImageTransform
from mmtransformer.layers.modes import evaluation_mode
from mmtransformer.layers.record import record_attention, rollout
from mmtransformer.plots.heatmap import (
    GAP,
    MARGIN,
    PAPER,
    TITLE,
    draw_scale,
    grid_box,
    heat_top,
    palette,
    plot_word_heatmaps,
)
from mmtransformer.plots.text import Style, draw, width, wrap

MAX_TOKENS = 200
LABEL = Style(12, (214, 217, 226))
HEAD = Style(14, (240, 241, 245), bold=True)


def plot_attention(
    weights: Mapping[str, Tensor],
    queries: Sequence[str],
    keys: Sequence[str],
    *,
    row: int = 0,
    cell: int = 16,
    title: str = "",
) -> Image.Image:
    """Draw the weights of every layer (a row of panels each) and head (a column each): who looks at whom.

    In a panel a line is a query, a column a key, bright where the query looks. All panels share one
    scale, written below the sheet.

    Args:
        weights: layer name -> weights (h q k) or (b h q k): what `record_attention` yields. Self-attention and
            cross-attention are drawn apart, since their keys differ.
        queries: the q tokens that look, as text.
        keys: the k tokens that are looked at.
        row: which row of a batch.
        cell: pixels of a token's side.
        title: a line above, such as the sentence.

    Returns:
        The sheet.

    Raises:
        ValueError: if there is no layer, tokens and weights differ in number, or there are too many to be seen.
    """
    panels = _panels(weights, len(queries), len(keys), row)
    if cell < 2:
        raise ValueError(f"cell must be at least 2 px, not {cell}")
    heads = max(len(panel) for panel in panels.values())
    labels_left, labels_top = [_label(text) for text in queries], [_label(text) for text in keys]
    gutter = MARGIN + round(max(width(text, LABEL) for text in labels_left)) + 10
    lid = round(max(width(text, LABEL) for text in labels_top)) + 8
    wide, high = len(keys) * cell, len(queries) * cell
    side = round(max(width(name, HEAD) for name in panels)) + GAP
    total = gutter + heads * (wide + GAP) + side + MARGIN
    titles = wrap(title, TITLE, total - 2 * MARGIN, 3) if title else []
    head = MARGIN + len(titles) * TITLE.line_height + HEAD.line_height + lid
    sheet = Image.new("RGB", (total, head + len(panels) * (high + GAP) + 48), PAPER)
    canvas = ImageDraw.Draw(sheet)
    for i, line in enumerate(titles):
        draw(canvas, (MARGIN, MARGIN - 8 + i * TITLE.line_height), line, TITLE)
    for number in range(heads):
        x = gutter + number * (wide + GAP)
        draw(canvas, (x, head - lid - HEAD.line_height), f"head {number}", HEAD)
        for k, text in enumerate(labels_top):
            _draw_upwards(sheet, (x + k * cell, head - 4), cell, text)
    top = heat_top(np.concatenate([panel.reshape(-1) for panel in panels.values()]))
    for i, (name, panel) in enumerate(panels.items()):
        y = head + i * (high + GAP)
        for q, text in enumerate(labels_left):
            at = (gutter - 6 - width(text, LABEL), y + q * cell + (cell - LABEL.line_height) / 2)
            draw(canvas, at, text, LABEL)
        for number, head_weights in enumerate(panel):
            level = np.round(np.clip(head_weights / top, 0, 1) * 255).astype(np.uint8)
            colours = palette()[level].repeat(cell, 0).repeat(cell, 1)
            sheet.paste(Image.fromarray(colours), (gutter + number * (wide + GAP), y))
        draw(canvas, (gutter + heads * (wide + GAP), y), name, HEAD)
    draw_scale(sheet, top, "of a token's attention", 120)
    return sheet


def _panels(weights: Mapping[str, Tensor], q: int, k: int, row: int) -> dict[str, np.ndarray]:
    if not weights:
        raise ValueError("there are 0 layers to draw: record some with record_attention")
    if max(q, k) > MAX_TOKENS:
        raise ValueError(f"{max(q, k)} tokens are too many to be seen; at most {MAX_TOKENS} can be drawn")
    found = {}
    for name, tensor in weights.items():
        tensor = tensor[row] if tensor.ndim == 4 else tensor
        if tensor.ndim != 3 or tensor.shape[1:] != (q, k):
            raise ValueError(
                f"{name} has weights {tuple(tensor.shape)}, which are not those of {q} tokens that look at {k}"
            )
        found[name] = tensor.detach().float().cpu().numpy()
    return found


def _label(text: str, most: int = 14) -> str:
    """A token's text, with a mark for spaces and line ends alone, cut if long."""
    shown = text.strip() or ("·" if text else "…")
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _draw_upwards(sheet: Image.Image, bottom: tuple[float, float], cell: int, text: str) -> None:
    """A text that reads from below to above, in the middle of a column `cell` wide."""
    line = Image.new("RGB", (round(width(text, LABEL)) + 4, LABEL.line_height), PAPER)
    draw(ImageDraw.Draw(line), (0, 0), text, LABEL)
    line = line.rotate(90, expand=True)
    if line.width > cell:
        line = line.crop(((line.width - cell) // 2, 0, (line.width - cell) // 2 + cell, line.height))
    sheet.paste(line, (round(bottom[0] + (cell - line.width) / 2), round(bottom[1] - line.height)))


@torch.no_grad()
def rollout_maps(vit: ViT, pixels: Tensor) -> Tensor:
    """What of a picture is in its pooled feature after each block, by attention rollout (arXiv:2005.00928).

    A class token is asked where there is one, else all patches alike; attention pooling is not looked into.

    Args:
        vit: the model; dropout is off meanwhile.
        pixels: (b 3 height width).

    Returns:
        (b blocks gh gw); what is on prefix tokens is left out, so a map sums to 1 at most.
    """
    with evaluation_mode(vit), record_attention(vit, keep=lambda name: name.startswith("blocks.")) as record:
        vit.forward_features(pixels)
    layers, first = list(record.values()), vit.num_prefix_tokens
    grid = vit.dynamic_feat_size(*pixels.shape[2:])
    maps = []
    for depth in range(1, len(layers) + 1):
        rolled = rollout(layers[:depth])
        asked = rolled[:, 0] if vit.class_token else rolled[:, first:].mean(1)
        maps.append(asked[:, first:].unflatten(1, grid))
    return torch.stack(maps, dim=1)


def plot_rollout(
    vit: ViT, image: Image.Image, transform: ImageTransform, *, columns: int = 6, title: str = ""
) -> Image.Image:
    """Draw a picture, and what a ViT has gathered of it after each block: `rollout_maps`, above the least patch.

    Args:
        vit: the model.
        image: the picture, RGB.
        transform: how it becomes pixels.
        columns: panels a row.
        title: a line above.

    Returns:
        The sheet.
    """
    device = next(vit.parameters()).device
    maps = rollout_maps(vit, transform(image)[None].to(device))[0].cpu()
    maps = maps - maps.amin((1, 2), keepdim=True)  # What residuals spread evenly over all patches says nothing.
    names = [f"block {i}" for i in range(len(maps))]
    box = grid_box(image.size, transform.size, transform.resize)
    scale = "of the feature from one patch, above the least"
    return plot_word_heatmaps(image, names, maps, box=box, columns=columns, title=title, scale=scale)
