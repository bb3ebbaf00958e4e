"""Diffusion models of other projects, in both directions."""
