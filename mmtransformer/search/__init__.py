"""How the next token is chosen: rules on its scores, greedy search and sampling, beams, required words, guidance."""
