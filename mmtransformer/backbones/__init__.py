"""Towers that read pictures or text: ViT, decoders, encoders."""
