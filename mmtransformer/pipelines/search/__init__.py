"""Pictures found again: an index of their vectors in one file, brought up to date, and what is near in it."""
