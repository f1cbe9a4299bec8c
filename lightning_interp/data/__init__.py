"""Reading samples: batches, datasets, the fixed probe, and the `Task` that calls the model."""
