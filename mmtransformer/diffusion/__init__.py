"""From noise to images: the path between them, what a network predicts on it, and how it is walked back."""
