"""Backbones that transformers and diffusers run, behind the contracts of our own: any model of theirs."""
