"""Backbones that transformers and diffusers run, behind the contracts of our own: any model that a hub has."""
