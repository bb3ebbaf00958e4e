"""A small autoencoder of diffusers; what asks for it is skipped where diffusers is not installed."""

import warnings

import pytest
import torch

from mmtransformer import HFAutoencoder

SMALL = {
    "block_out_channels": [8, 8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.3,
    "shift_factor": 0.2,
}


def autoencoder() -> HFAutoencoder:
    """Random weights; sides are divided by 4."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("diffusers")
        torch.manual_seed(0)
        return HFAutoencoder(SMALL)
