"""What watches a run: progress, samples, saving."""
