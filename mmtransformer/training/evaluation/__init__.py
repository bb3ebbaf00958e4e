"""Scores of whole splits, and what is written down of them."""
