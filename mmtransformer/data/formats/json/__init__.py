"""Pairs in JSON: as people lay it out, in a file or line by line, and talks about pictures."""
