"""The Captioner contract: the batch, the loss by its definition, and towers that are frozen."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtransformer import (
    CaptionBatch,
    TextDecoder,
    TransformerConnector,
    VisionEncoderDecoder,
    ViT,
    ViTBlockConfig,
    caption_loss,
    freeze,
)
from mmtransformer.layers.modes import is_frozen

VOCAB, PAD = 53, 0


def captioner(**options: Any) -> VisionEncoderDecoder:
    torch.manual_seed(2)
    model = VisionEncoderDecoder(
        ViT((16, 24), 8, 20, 1, 4, block=ViTBlockConfig(drop_path=0.3, dropout=0.3)),
        TextDecoder(VOCAB, 24, 2, 4, max_len=13, context_dim=12, dropout=0.3),
        connector=TransformerConnector(20, 12, 1, 3, dropout=0.3, token_dropout=0.4),
        **options,
    )
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def batch(lengths: tuple[int, ...] = (7, 3, 11, 5, 8, 4), prompt: int = 2) -> CaptionBatch:
    """Rows of a prompt, a caption and an end, right-padded; two rows share a picture."""
    torch.manual_seed(3)
    q = max(lengths)
    attention_mask = torch.arange(q) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(1, VOCAB, (len(lengths), q)).masked_fill(~attention_mask, PAD)
    loss_mask = attention_mask & (torch.arange(q) >= prompt)
    return CaptionBatch(tokens, attention_mask, loss_mask, pixels=torch.randn(len(lengths) // 2, 1, 3, 16, 24))


def definition(model: VisionEncoderDecoder, given: CaptionBatch, smoothing: float = 0.0) -> tuple[Tensor, int]:
    """-log p of each target token, one unpadded row at a time, in float64."""
    assert given.pixels is not None
    model, total, count = model.double(), torch.zeros((), dtype=torch.float64), 0
    per_image = given.tokens.shape[0] // given.pixels.shape[0]
    for row, tokens in enumerate(given.tokens):
        length = int(given.attention_mask[row].sum())
        alone = tokens[None, :length]
        real = torch.ones_like(alone, dtype=torch.bool)
        image = given.pixels[row // per_image][None].double()
        log_probs = model.logits(CaptionBatch(alone, real, real, pixels=image))[0].log_softmax(-1)
        for i in range(1, length):
            if given.loss_mask[row, i]:
                chosen = log_probs[i - 1, tokens[i]]
                total = total - (1 - smoothing) * chosen - smoothing * log_probs[i - 1].mean()
                count += 1
    return total, count


@pytest.mark.parametrize("smoothing", [0.0, 0.13])
def test_the_loss_is_the_definition(smoothing: float) -> None:
    model, given = captioner(), batch()
    loss = caption_loss(model, given, label_smoothing=smoothing, reduction="sum")
    want, count = definition(model, given, smoothing)
    assert loss.count.item() == count == int(given.loss_mask.sum())
    assert loss.sum.dtype == torch.float32
    assert loss.sum.item() == pytest.approx(want.item(), rel=1e-5)


def test_the_gradient_is_that_of_the_definition() -> None:
    model, given = captioner(), batch()
    caption_loss(model, given, reduction="sum").sum.backward()
    ours = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    want, _ = definition(model, given)
    want.backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == set(theirs)
    assert any(name.startswith("vision.") for name in ours)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, atol=1e-4, rtol=1e-3, msg=name)


def test_what_stands_in_the_padding_changes_no_bit() -> None:
    model, given = captioner(), batch()
    noise = torch.randint(1, VOCAB, given.tokens.shape)
    other = replace(given, tokens=torch.where(given.attention_mask, given.tokens, noise))
    assert not torch.equal(other.tokens, given.tokens)
    assert torch.equal(caption_loss(model, other, reduction="sum").sum, caption_loss(model, given, reduction="sum").sum)


def test_more_padding_changes_nothing() -> None:
    model, given = captioner(), batch((7, 3))
    more = torch.zeros(2, 4, dtype=torch.long)
    longer = CaptionBatch(
        torch.cat((given.tokens, more), 1),
        torch.cat((given.attention_mask, more > 0), 1),
        torch.cat((given.loss_mask, more > 0), 1),
        pixels=given.pixels,
    )
    a, b = caption_loss(model, given, reduction="sum"), caption_loss(model, longer, reduction="sum")
    assert a.count == b.count
    torch.testing.assert_close(a.sum, b.sum)


def test_the_head_runs_on_target_positions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, seen = captioner(), batch(), []
    head, forward = model.head, model.decoder.forward

    def spy_head(hidden: Tensor) -> Tensor:
        seen.append(tuple(hidden.shape))
        return head(hidden)

    def spy_decoder(tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(tuple(tokens.shape))
        return forward(tokens, *args, **kwargs)

    monkeypatch.setattr(model, "head", spy_head)
    monkeypatch.setattr(model.decoder, "forward", spy_decoder)
    caption_loss(model, given)
    # The last token predicts nothing, so the decoder does not read it.
    assert seen == [(6, 10), (int(given.loss_mask.sum()), 24)]


def test_errors_of_the_loss_name_the_numbers() -> None:
    model, given = captioner(), batch((14, 3))
    with pytest.raises(ValueError, match=r"rows of 14 tokens.*13 at most"):
        caption_loss(model, given)
    with pytest.raises(ValueError, match="pixels or visual_tokens"):
        caption_loss(model, replace(batch((7, 3)), pixels=None))


def test_a_batch_without_targets_has_no_loss_but_a_gradient() -> None:
    """It keeps a process in step with the others, whose gradients are added to its own."""
    model, given = captioner(), batch((7, 3))
    loss = caption_loss(
        model, replace(given, loss_mask=torch.zeros_like(given.loss_mask)), label_smoothing=0.1, reduction="sum"
    )
    assert (float(loss.sum.detach()), int(loss.count)) == (0.0, 0)
    loss.sum.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_a_batch_moves_with_its_names() -> None:
    given = replace(batch(), names=("a", "b", "c"), references=((("a dog", "en"),), (), (("개", "ko"), ("x", None))))
    moved = given.to("meta")
    assert {
        t.device.type for t in (moved.tokens, moved.attention_mask, moved.loss_mask, moved.pixels) if t is not None
    } == {"meta"}
    assert moved.visual_tokens is None
    assert (moved.names, moved.references) == (given.names, given.references)
    assert given.tokens.device.type == "cpu"


def modes(model: torch.nn.Module) -> set[bool]:
    return {module.training for module in model.modules()}


def test_a_frozen_tower_stays_in_evaluation_and_learns_nothing() -> None:
    model, given = captioner(freeze_vision=True), batch()
    assert is_frozen(model.vision)
    model.train()
    assert modes(model.vision) == {False}
    assert model.training
    assert modes(model.decoder) == {True}
    assert model.connector is not None
    assert modes(model.connector) == {True}
    before = {name: tensor.clone() for name, tensor in model.vision.state_dict().items()}
    assert given.pixels is not None
    assert not model.forward_features(given.pixels).requires_grad
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    caption_loss(model, given, reduction="sum").sum.backward()
    optimizer.step()
    assert all(p.grad is None for p in model.vision.parameters())
    assert all(p.grad is not None for p in model.connector.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.vision.state_dict().items())
    model.eval()
    assert modes(model) == {False}


@pytest.mark.parametrize("tower", ["vision", "decoder", "connector"])
def test_any_tower_can_be_frozen_also_afterwards(tower: str) -> None:
    model, given = captioner(), batch()
    assert freeze(model.get_submodule(tower)) is model.get_submodule(tower)
    torch.nn.ModuleDict({"outer": model}).train()  # As a trainer does it, from outside.
    for name in ("vision", "decoder", "connector"):
        assert modes(model.get_submodule(name)) == {name != tower}
    caption_loss(model, given, reduction="sum").sum.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name.startswith(tower) or "head" in name), name


def test_a_tower_that_learns_in_part_is_not_frozen() -> None:
    model = captioner()
    freeze(model.vision)
    model.vision.norm.requires_grad_(True)
    assert not is_frozen(model.vision)
    assert modes(model.train().vision) == {True}
    assert not is_frozen(torch.nn.Identity())
