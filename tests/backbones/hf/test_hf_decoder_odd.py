"""HFDecoder and families that are unlike the others: what of them works, and what is refused by name."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mmtransformer import CaptionBatch, HFDecoder, PrefixCaptioner, ViT, generate

VOCAB, LENGTH = 53, 9
IDS: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL: dict[str, Any] = IDS | {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32, "head_dim": 6,
    "max_position_embeddings": 37, "num_key_value_heads": 2,
}  # fmt: skip
ODD: dict[str, dict[str, Any]] = {
    "llama4_text": SMALL | {"intermediate_size_mlp": 32, "num_local_experts": 2, "interleave_moe_layer_step": 2},
    "minimax": SMALL | {"num_local_experts": 2, "block_size": 8,
                        "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "mamba": IDS | {"hidden_size": 24, "num_hidden_layers": 3, "state_size": 4},
    "mamba2": IDS | {"hidden_size": 24, "num_hidden_layers": 3, "state_size": 4, "num_heads": 6, "head_dim": 8,
                     "n_groups": 1},
    "gemma4_text": SMALL | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB,
                            "num_kv_shared_layers": 0, "sliding_window": 16, "global_head_dim": 6},
}  # fmt: skip


def tokens(rows: int = 4) -> Tensor:
    torch.manual_seed(2)
    return torch.randint(3, VOCAB, (rows, LENGTH))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


def odd(family: str) -> HFDecoder:
    torch.manual_seed(1)
    return HFDecoder(ODD[family] | {"model_type": family}).eval()


@pytest.mark.parametrize("family", ODD)
@torch.no_grad()
def test_odd_families_have_the_models_logits(family: str) -> None:
    decoder, asked = odd(family), tokens()
    close(decoder.head(decoder(asked)), decoder.model(asked, use_cache=False).logits)


@pytest.mark.parametrize("family", ["llama4_text", "gemma4_text"])
@torch.no_grad()
def test_odd_families_with_a_cache(family: str) -> None:
    decoder, asked = odd(family), tokens()
    whole, state = decoder(asked), decoder.new_state(LENGTH)
    decoder(asked[:, :5], state=state)
    parts = [decoder(asked[:, i : i + 1], state=state) for i in range(5, LENGTH)]
    close(torch.cat(parts, 1), whole[:, 5:])


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("minimax", r"the minimax family keeps a cache of its own \(MiniMaxCache\)"),
        ("mamba", "the mamba family keeps a state instead of a cache"),
        ("mamba2", "the mamba2 family keeps a state instead of a cache"),
    ],
)
def test_families_that_cannot_be_decoded_step_by_step_are_refused_by_name(family: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        odd(family).new_state(9)


@torch.no_grad()
def test_behind_a_prefix() -> None:
    batch = CaptionBatch(
        *(tokens(2)[:, :5], *[torch.ones(2, 5, dtype=torch.bool)] * 2), pixels=torch.randn(2, 1, 3, 16, 16)
    )
    captioner = PrefixCaptioner(ViT(16, 8, 16, 1, 2), odd("llama4_text")).eval()
    texts = generate(captioner, batch, eos_id=2, max_new_tokens=4, num_beams=2)
    assert len(texts) == 2
    refused = PrefixCaptioner(ViT(16, 8, 16, 1, 2), odd("gemma4_text")).eval()
    with pytest.raises(ValueError, match="the gemma4_text family reads token ids in every layer"):
        refused.logits(batch)
