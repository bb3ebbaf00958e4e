"""Two towers, one of images and one of texts, whose vectors are compared."""
