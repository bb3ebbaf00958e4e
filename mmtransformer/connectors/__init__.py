"""From visual tokens to what a language model reads."""
