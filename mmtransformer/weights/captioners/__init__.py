"""Captioners of other projects, in both directions."""
