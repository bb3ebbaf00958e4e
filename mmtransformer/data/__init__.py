"""Image-text data: embedded scenes, the user's own pairs, and the loaders that batch them."""
