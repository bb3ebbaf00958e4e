"""Saved models in one call: captions, translations, classes, few-shot prompts. No Lightning."""
