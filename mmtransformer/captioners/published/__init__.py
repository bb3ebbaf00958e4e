"""Captioners that published models are, each as its makers built it: BLIP's, GIT, PaliGemma, open_clip's CoCa."""
