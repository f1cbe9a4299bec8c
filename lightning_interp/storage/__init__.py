"""A run's record on disk."""
