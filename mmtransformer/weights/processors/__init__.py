"""What stands around a public captioner in its folder: pixels, prompts, how texts are searched for."""
