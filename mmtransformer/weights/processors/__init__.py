"""What stands around a public model in its folder: pixels, prompts, how texts are searched for."""
