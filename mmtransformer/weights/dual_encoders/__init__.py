"""Dual towers of transformers and open_clip: one key table a family, in both directions."""
