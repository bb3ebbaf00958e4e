"""What several captioners of other projects have in common: language models, the Q-Former."""
