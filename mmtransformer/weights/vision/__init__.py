"""Vision towers of other projects, in both directions."""
