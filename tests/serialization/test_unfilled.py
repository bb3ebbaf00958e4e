"""What no file fills has random numbers, and no memory that was never written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtransformer import ViT
from mmtransformer.weights import load_qformer_from_bert, load_vit, save_timm


@pytest.fixture(autouse=True)
def nan_in_new_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what `torch.empty` gives with NaN
    yield
    torch.use_deterministic_algorithms(before)


def test_a_qformer_from_bert_has_cross_attention(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 31}
    transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path)
    qformer = load_qformer_from_bert(tmp_path, num_queries=4, visual_dim=16)
    assert all(x.isfinite().all() for x in qformer.state_dict().values())
    assert qformer.blocks[0].cross_attn.v_proj.weight.std() > 0  # type: ignore[union-attr]


def test_a_vit_with_other_classes(tmp_path: Path) -> None:
    save_timm(ViT(32, 8, 24, 1, 3, num_classes=5), tmp_path)
    vit = load_vit(tmp_path)
    assert all(x.isfinite().all() for x in vit.state_dict().values())
