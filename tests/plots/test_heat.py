"""Where a trained model looks: the heat of a word lies on the thing that it names.

Two coloured squares stand somewhere in a grid of patches; the text says the colour of the upper one, then that of the
other. Each captioner learns this in seconds, and `look` is then asked.
"""

import pytest
import torch
from torch import Tensor

from mmtransformer import Blip2, CaptionBatch, Captioner, PositionConfig, QFormer, TextDecoder, ViT, ViTPatchConfig
from mmtransformer.training import OptimConfig
from mmtransformer.training.evaluation.ablation import Frozen, sized

COLOURS, GRID, PATCH = 6, 6, 4
BEGIN, END = COLOURS, COLOURS + 1
PALETTE = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]]) * 2.0 - 1


def images(n: int, generator: torch.Generator) -> tuple[CaptionBatch, Tensor]:
    """Pictures with their texts, and the cells (n 2) of the two squares in the order of the text."""
    cells = torch.rand(n, GRID * GRID, generator=generator).argsort(1)[:, :2].sort(1).values
    colours = torch.rand(n, COLOURS, generator=generator).argsort(1)[:, :2]
    grid = torch.zeros(n, 3, GRID * GRID)
    for k in range(2):
        grid.scatter_(2, cells[:, k].view(n, 1, 1).expand(n, 3, 1), PALETTE[colours[:, k]].unsqueeze(-1))
    pixels = grid.view(n, 3, GRID, GRID).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    tokens = torch.cat((torch.full((n, 1), BEGIN), colours, torch.full((n, 1), END)), 1)
    attention_mask = torch.ones_like(tokens, dtype=torch.bool)
    loss_mask = attention_mask & (tokens != BEGIN)
    return CaptionBatch(tokens, attention_mask, loss_mask, pixels=pixels[:, None]), cells


def trained(kind: str, steps: int) -> Captioner:
    torch.manual_seed(1)
    vision = ViT(
        GRID * PATCH, PATCH, 32, 1, 2, class_token=False, pool="mean", patches=ViTPatchConfig(positions="sinusoidal")
    )
    language = TextDecoder(COLOURS + 2, 32, 2, 2, max_len=64, positions=PositionConfig("rotary"))
    frozen = Frozen(freeze_vision=False, freeze_decoder=False)
    if kind == "qformer":  # With the one head that `sized` makes of 32, all queries look at the same place.
        queries = QFormer(8, 32, 2, 2, 32, cross_attention_frequency=1, dropout=0.0)
        model = Blip2(vision, queries, language, **frozen).train()
    else:
        model = sized(kind, vision, language, 60_000, frozen).train()
    optim, generator = OptimConfig(kind="muon", lr=1e-2, warmup_steps=20), torch.Generator().manual_seed(0)
    optimizer = optim.build(model)
    schedule = optim.schedule(optimizer, 5 * steps)
    for _ in range(steps):
        loss = model(images(64, generator)[0]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


# Through latents the way to a patch is longer, and learnt later: Flamingo has learnt it in part.
@pytest.mark.parametrize(
    ("kind", "steps", "right", "times"), [("cross", 300, 0.9, 6), ("flamingo", 250, 0.6, 3), ("qformer", 200, 0.8, 6)]
)
def test_the_heat_of_a_word_lies_on_its_object(kind: str, steps: int, right: float, times: float) -> None:
    model = trained(kind, steps)
    batch, cells = images(200, torch.Generator().manual_seed(9))
    with torch.no_grad():
        said = model.logits(batch)[:, :2].argmax(-1)
    assert (said == batch.tokens[:, 1:3]).float().mean() > right
    heat = model.attention_map(batch)[:, :2, 0].flatten(2)  # of the positions that predict the two colours
    own = heat.gather(2, cells.unsqueeze(-1))[..., 0]
    assert (own / heat.mean(-1)).median() > times
    assert (own > heat.mean(-1)).float().mean() > 0.85
    if kind == "cross":
        other = heat.gather(2, cells.flip(1).unsqueeze(-1))[..., 0]
        assert (own > other).float().mean() > 0.8
