"""What is trained on, summed over processes."""
