"""What every data module is made of: samples, their order, workers, batches, errors."""
