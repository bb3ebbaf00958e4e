"""The training loop around Lightning: steps, checkpoints, resume, guards."""
