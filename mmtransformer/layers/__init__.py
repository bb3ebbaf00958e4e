"""The tensor core: one place where queries meet keys, and what surrounds it."""
