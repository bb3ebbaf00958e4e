"""Masks: each predicate against its definition, and the properties that bridges rely on."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mmtransformer.layers import masks
from mmtransformer.layers.attention import attend


def test_each_predicate_is_its_definition() -> None:
    torch.manual_seed(0)
    b, q, k = 3, 5, 7
    attention_mask, ids = torch.rand(b, k) > 0.4, torch.randint(0, 3, (b, k))
    lengths, special = torch.tensor([0, 2, 6]), torch.rand(b, k) > 0.7
    cases = {
        "causal": (masks.causal(2), lambda r, i, j: j <= i + 2),
        "padding": (masks.padding(attention_mask), lambda r, i, j: bool(attention_mask[r, j])),
        "prefix": (masks.prefix(lengths, 1), lambda r, i, j: j < lengths[r] or j <= i + 1),
        "bidirectional": (masks.bidirectional(special), lambda r, i, j: bool(special[r, i] and special[r, j])),
        "window": (masks.window(3, 1), lambda r, i, j: -3 < i + 1 - j < 3),
        "document_ids": (masks.documents(ids), lambda r, i, j: bool(ids[r, i] == ids[r, j])),
        "global": (masks.global_tokens(special), lambda r, i, j: bool(special[r, i] or special[r, j])),
    }
    for name, (predicate, definition) in cases.items():
        want = [[[bool(definition(r, i, j)) for j in range(k)] for i in range(q)] for r in range(b)]
        assert masks.dense(predicate, b, q, k).tolist() == want, name


def test_media_never_shows_a_later_image() -> None:
    text_time = torch.tensor([[0, 0, 1, 1, 2, 2]])
    image_time = torch.tensor([[1, 1, 2, 2, 0]])  # Two tokens a picture, the last one padding.
    last = masks.dense(masks.images(text_time, image_time), 1, 6, 5)[0]
    assert masks.show(last) == "\n".join(("0 .....", "1 .....", "2 ##...", "3 ##...", "4 ..##.", "5 ..##."))
    every = masks.dense(masks.images(text_time, image_time, last_only=False), 1, 6, 5)[0]
    assert masks.show(every) == "\n".join(("0 .....", "1 .....", "2 ##...", "3 ##...", "4 ####.", "5 ####."))


def test_all_of_and_any_of() -> None:
    a, b = masks.causal(), masks.window(2)
    both, either = masks.dense(masks.all_of(a, b), 2, 5, 5), masks.dense(masks.any_of(a, b), 2, 5, 5)
    da, db = masks.dense(a, 2, 5, 5), masks.dense(b, 2, 5, 5)
    assert torch.equal(both, da & db)
    assert torch.equal(either, da | db)
    assert both.sum() < da.sum() < either.sum()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_block_mask_attends_as_the_dense_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mmtransformer.layers.kernels._compiled_flex", lambda device: flex_attention
    )  # Compiling takes a minute.
    attention_mask = torch.rand(2, 128) > 0.3
    predicate = masks.all_of(masks.causal(), masks.padding(attention_mask))
    block = masks.block(predicate, 2, 128, 128, device="cpu")
    assert isinstance(block, BlockMask)
    q, k, v = (torch.randn(2, 3, 128, 16) for _ in range(3))
    dense = masks.dense(predicate, 2, 128, 128)
    torch.testing.assert_close(attend(q, k, v, block), attend(q, k, v, dense), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"FlexAttention has no dropout \(0\.1\)"):
        attend(q, k, v, block, dropout=0.1)


@pytest.mark.slow
def test_longformers_block_mask_is_compiled_for_any_length_on_a_cpu() -> None:
    """A minute of compiling; torch's C++ for lengths that vary does not compile."""
    for length in (256, 384):
        q, k, v = (torch.randn(1, 2, length, 16) for _ in range(3))
        pattern = masks.any_of(masks.window(32), masks.global_tokens(torch.arange(length)[None] < 2))
        with torch.inference_mode():
            found = attend(q, k, v, masks.block(pattern, 1, length, length, "cpu"))
            want = attend(q, k, v, masks.dense(pattern, 1, length, length))
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


def test_show_labels_and_refuses_batches() -> None:
    text = masks.show(torch.tensor([[True, False]]), ["별"], ["ab", "c"])
    assert text.splitlines() == ["  ac", "  b ", "별 #."]
    with pytest.raises(ValueError, match="3 dimensions"):
        masks.show(torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="not 0"):
        masks.window(0)
