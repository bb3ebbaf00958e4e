"""Dual encoders of transformers and open_clip, in both directions."""
