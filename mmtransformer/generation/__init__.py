"""Texts from any model with prefill and step: greedy search, sampling, beams."""
