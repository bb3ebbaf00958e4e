"""Attention rollout against its definition, and the sheets: every panel, cell and letter where it belongs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmtransformer import ImageTransform, TextEncoder, Tokenizer, ViT, record_attention
from mmtransformer.backbones.vit_blocks import ViTBlockConfig
from mmtransformer.images import load
from mmtransformer.layers.record import rollout
from mmtransformer.plots import plot_attention, plot_rollout, rollout_maps, save_image
from mmtransformer.plots.heatmap import PAPER, palette


def shares(*shape: int) -> torch.Tensor:
    return torch.rand(shape).softmax(-1)


# --- rollout


def test_rollout_is_its_definition() -> None:
    layers = [shares(2, 3, 5, 5) for _ in range(4)]
    found = rollout(layers)
    for row in range(2):
        want = torch.eye(5, dtype=torch.float64)
        for layer in layers:  # a token is half itself, half what it looks at
            mean = sum(layer[row, h].double() for h in range(3)) / 3
            want = (0.5 * torch.eye(5) + 0.5 * mean) @ want
        torch.testing.assert_close(found[row].double(), want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 5))


def test_rollout_refuses_what_is_no_stack_of_self_attention() -> None:
    with pytest.raises(ValueError, match="of 1 layer at least, not of 0"):
        rollout([])
    with pytest.raises(ValueError, match=r"not \(2, 3, 5, 7\)"):
        rollout([shares(2, 3, 5, 7)])
    with pytest.raises(ValueError, match=r"not \(2, 3, 7, 7\)"):
        rollout([shares(2, 3, 5, 5), shares(2, 3, 7, 7)])


@pytest.mark.parametrize("class_token", [True, False])
def test_maps_of_a_vit(class_token: bool) -> None:
    vit = ViT(
        (16, 24), 8, 20, 3, 4, class_token=class_token, num_registers=2, pool="class" if class_token else "mean",
        block=ViTBlockConfig(dropout=0.3),
    ).train()  # fmt: skip
    for parameter in vit.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    pixels = torch.randn(2, 3, 16, 24)
    maps = rollout_maps(vit, pixels)
    assert vit.training
    assert maps.shape == (2, 3, 2, 3)
    assert torch.equal(maps, rollout_maps(vit, pixels))  # no dropout meanwhile
    with record_attention(vit.eval(), keep="blocks") as record:
        vit(pixels)
    whole = rollout(record.values())
    asked = whole[:, 0] if class_token else whole[:, 2:].mean(1)
    torch.testing.assert_close(maps[:, -1].flatten(1), asked[:, vit.num_prefix_tokens :])
    first = rollout([record["blocks.0.attn"]])
    asked = first[:, 0] if class_token else first[:, 2:].mean(1)
    torch.testing.assert_close(maps[:, 0].flatten(1), asked[:, vit.num_prefix_tokens :])
    assert (maps.sum((2, 3)) < 1).all()


# --- sheets


def colours(image: Image.Image) -> np.ndarray:
    return np.asarray(image).reshape(-1, 3)


def test_each_cell_has_the_colour_of_its_weight() -> None:
    weights = {"first": torch.zeros(2, 3, 4), "second": torch.zeros(2, 3, 4)}
    weights["second"][1, 2, 0] = 1.0  # head 1, token 2 looks at token 0
    sheet = np.asarray(plot_attention(weights, ["a", "b", "c"], ["d", "e", "f", "g"], cell=10))
    lit = np.argwhere((sheet == palette()[255]).all(-1))
    lit = lit[lit[:, 0] < sheet.shape[0] - 48]  # not the scale
    (top, left), (bottom, right) = lit.min(0), lit.max(0)
    assert (bottom - top, right - left, len(lit)) == (9, 9, 100)
    dark = (sheet == palette()[0]).all(-1)[:-48]
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    # Two panels a row of 4 cells of 10 px, and two rows of 3 cells; the lit cell is in the right lower one.
    assert columns[-1] - columns[0] + 1 == 2 * 40 + 14
    assert rows[-1] - rows[0] + 1 == 2 * 30 + 14
    assert (top - rows[0], left - columns[0]) == (30 + 14 + 20, 40 + 14)


def test_batches_give_the_row_that_is_asked_for() -> None:
    weights = shares(3, 2, 4, 4)
    alone = plot_attention({"x": weights[1]}, list("abcd"), list("abcd"))
    asked = plot_attention({"x": weights}, list("abcd"), list("abcd"), row=1)
    assert alone.tobytes() == asked.tobytes()
    assert alone.tobytes() != plot_attention({"x": weights}, list("abcd"), list("abcd")).tobytes()


def test_korean_tokens_are_written_out() -> None:
    """Real shapes of syllables, not one empty box for all of them."""
    weights = torch.zeros(1, 1, 1)
    sheets = [plot_attention({"층": weights}, [word], ["a"], title=word) for word in ("별", "달", "별")]
    assert sheets[0].size == sheets[1].size
    assert sheets[0].tobytes() == sheets[2].tobytes()
    assert sheets[0].tobytes() != sheets[1].tobytes()
    assert len(set(map(bytes, colours(sheets[0])))) > 20


def test_a_bert_sentence_in_korean() -> None:
    text = "작은 빨간 별이 있다"
    tokenizer = Tokenizer.train([text, text], 300)
    ids = tokenizer.encode(text)
    encoder = TextEncoder(300, 16, 2, 4, max_len=32).eval()
    with record_attention(encoder) as record:
        encoder(torch.tensor([ids]))
    pieces = tokenizer.pieces(ids)
    sheet = plot_attention(record, pieces, pieces, title=text)
    assert sheet.width > 4 * len(ids) * 16
    assert sheet.height > 2 * len(ids) * 16


def test_sheets_name_what_is_wrong() -> None:
    one = {"x": torch.zeros(1, 2, 3)}
    with pytest.raises(ValueError, match="0 layers"):
        plot_attention({}, ["a"], ["b"])
    with pytest.raises(ValueError, match=r"x has weights \(1, 2, 3\).*3 tokens that look at 2"):
        plot_attention(one, ["a", "b", "c"], ["d", "e"])
    with pytest.raises(ValueError, match=r"201 tokens are too many.*200"):
        plot_attention(one, ["a"] * 201, ["b"])
    with pytest.raises(ValueError, match="at least 2 px, not 1"):
        plot_attention(one, ["a", "b"], ["c", "d", "e"], cell=1)


def test_the_rollout_of_a_image_has_a_panel_a_block(tmp_path: Path) -> None:
    vit = ViT(32, 8, 16, 2, 2, class_token=False, pool="mean")
    image = Image.new("RGB", (64, 48), (90, 90, 90))
    sheet = plot_rollout(vit, image, ImageTransform(32), title="작은 별")
    assert load(save_image(sheet, tmp_path / "deep" / "r.png")).tobytes() == sheet.tobytes()
    assert tuple(colours(sheet)[0]) == PAPER
    grey = (np.asarray(sheet) == 90).all(-1).any(0)  # the bare picture is the first of three panels
    assert (grey.argmax(), grey.sum()) == (24, 240)
    assert sheet.width == 2 * 24 + 3 * 240 + 2 * 14
