"""evaluation_mode: every module's own flag comes back."""

import pytest
import torch
from torch import nn

from mmtransformer.layers.modes import evaluation_mode


def test_each_modules_own_flag_comes_back() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3)), nn.Dropout(0.5))
    model[1].eval()
    model[1][0].train()
    flags = [module.training for module in model.modules()]
    x = torch.randn(2, 3)
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(x), model[1][1](x))
    assert [module.training for module in model.modules()] == flags
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert [module.training for module in model.modules()] == flags
