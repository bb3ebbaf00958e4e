"""The embedded world: drawn scenes, and what is said of them in English and Korean."""
