"""Batches: all of their tensors move, and nothing else changes."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mmtransformer.backbones.base import PromptBatch
from mmtransformer.batch import Batch, CaptionBatch, Seq2SeqBatch
from mmtransformer.batch.base import num_targets
from mmtransformer.captioners.tiles import TiledBatch
from mmtransformer.data.classes import ClassBatch
from mmtransformer.data.text_only.masked_rows import MaskedBatch
from mmtransformer.data.text_only.texts import TextBatch


@dataclass
class Sounds(Batch):
    waves: Tensor
    labels: Tensor
    rate: Tensor | None = None
    names: tuple[str, ...] = ()


def test_tensors_move_and_the_rest_stays() -> None:
    batch = Sounds(torch.ones(2, 3), torch.arange(2), names=("a", "b"))
    moved = batch.to("meta")
    assert type(moved) is Sounds
    assert [moved.waves.device.type, moved.labels.device.type, moved.rate] == ["meta", "meta", None]
    assert moved.names == ("a", "b")
    assert [batch.waves.device.type, batch.labels.device.type] == ["cpu", "cpu"]


def test_a_printed_batch_is_a_line_of_shapes() -> None:
    batch = Sounds(torch.ones(2, 3), torch.arange(2), names=tuple(f"소리 {i}" for i in range(99)))
    assert (
        str(batch)
        == repr(batch)
        == (
            "Sounds(waves=float32 (2, 3) cpu, labels=int64 (2,) cpu, "
            "names=('소리 0', '소리 1', '소리 2', '소리 3', '소리 4', '소리 5', ...))"
        )
    )
    assert "waves=float32 (2, 3) meta" in str(batch.to("meta"))
    real = torch.ones(2, 3, dtype=torch.bool)
    for kind in (CaptionBatch, TiledBatch):
        said = str(kind(real.long(), real, real, pixels=torch.zeros(2, 3, 8, 8)))
        masks = "attention_mask=bool (2, 3) cpu, loss_mask=bool (2, 3) cpu"
        assert said == f"{kind.__name__}(tokens=int64 (2, 3) cpu, {masks}, pixels=float32 (2, 1, 3, 8, 8) cpu)"


def test_masks_of_zeros_and_ones_become_bool_and_others_are_refused() -> None:
    tokens, real = torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = CaptionBatch(tokens, attention_mask=real, loss_mask=real.int())
    pair = Seq2SeqBatch(tokens, real, tokens, real, real)
    for mask in (
        batch.attention_mask,
        batch.loss_mask,
        pair.source_attention_mask,
        pair.attention_mask,
        pair.loss_mask,
    ):
        assert mask.dtype == torch.bool
        assert mask.tolist() == [[True, True, False], [True] * 3]
    with pytest.raises(
        ValueError, match=r"loss_mask must be bool .* whole numbers 0 or 1; got torch.int64 with others"
    ):
        CaptionBatch(tokens, attention_mask=real, loss_mask=~real)  # -1 and -2, which are both true
    with pytest.raises(ValueError, match=r"attention_mask must be bool .*; got torch.float32$"):
        CaptionBatch(tokens, attention_mask=real.float(), loss_mask=real)
    assert PromptBatch(tokens, real).attention_mask.dtype == torch.bool
    with pytest.raises(ValueError, match="source_attention_mask must be bool"):
        Seq2SeqBatch(tokens, 2 * real, tokens, real, real)


def test_what_is_no_field_does_not_stop_a_batch() -> None:
    batch = Sounds(torch.ones(2, 3), torch.arange(2))
    vars(batch)["note"] = torch.zeros(1)
    assert batch.to("meta").waves.device.type == "meta"


@pytest.mark.parametrize("kind", [CaptionBatch, Seq2SeqBatch, ClassBatch, MaskedBatch, TextBatch])
def test_every_tensor_of_every_batch_moves(kind: type[Batch]) -> None:
    tensors = [field.name for field in dataclasses.fields(kind) if "Tensor" in str(field.type)]
    given = {name: torch.zeros(1, 1, 3, 2, 2) if name == "pixels" else torch.zeros(2) for name in tensors}
    given |= {name: torch.zeros(2, dtype=torch.bool) for name in tensors if name.endswith("_mask")}
    moved = kind(**given, names=("a", "b")).to("meta")  # type: ignore[call-arg]
    assert len(given) >= 3
    assert {name: getattr(moved, name).device.type for name in given} == dict.fromkeys(given, "meta")


def test_every_tensor_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[tuple[int, ...]] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: pinned.append(tuple(x.shape)) or x + 1)
    batch = Sounds(torch.ones(2, 3), torch.arange(2), names=("a", "b")).pin_memory()
    assert pinned == [(2, 3), (2,)]
    assert (batch.waves == 2).all()
    assert (batch.rate, batch.names) == (None, ("a", "b"))


def test_how_many_targets_there_are_is_known_on_another_device() -> None:
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    batch = TextBatch(torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long), mask)
    moved = batch.to("meta")
    assert num_targets(moved.loss_mask) == 3
    assert num_targets(mask) is num_targets(moved.loss_mask[:, :3]) is num_targets(batch.to("cpu").loss_mask) is None
    assert num_targets(dataclasses.replace(moved, loss_mask=moved.loss_mask.clone()).loss_mask) is None
