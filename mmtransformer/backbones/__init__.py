"""Backbones that read images or text: ViT, decoders, encoders."""
