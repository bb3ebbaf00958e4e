"""MLPProjector: squares of patches -> tokens of a language model."""

import pytest
import torch
import torch.nn.functional as F

from mmtransformer import MLPProjector


def test_by_definition() -> None:
    torch.manual_seed(0)
    model, patches = MLPProjector(5, 11, 7, pixel_shuffle=2).double(), torch.randn(2, 3, 4 * 6, 5).double()
    grid = patches.reshape(2, 3, 4, 6, 5)
    squares = [
        torch.cat([grid[:, :, 2 * y + a, 2 * x + b] for a in range(2) for b in range(2)], dim=-1)
        for y in range(2)
        for x in range(3)
    ]
    x = torch.stack(squares, dim=2)
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    want = F.gelu(x @ model.fc1.weight.T + model.fc1.bias) @ model.fc2.weight.T + model.fc2.bias
    torch.testing.assert_close(model(patches, (4, 6)), want)


def test_squares_of_no_side_are_refused() -> None:
    with pytest.raises(ValueError, match="pixel_shuffle must be at least 1, not 0"):
        MLPProjector(5, 11, pixel_shuffle=0)
