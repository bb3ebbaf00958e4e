"""Captioners that published models are, each as its makers built it: GIT, PaliGemma, open_clip's CoCa."""
