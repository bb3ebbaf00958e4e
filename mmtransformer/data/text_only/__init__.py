"""Text without pictures: rows for language models, and masked ones."""
