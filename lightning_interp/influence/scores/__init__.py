"""Which scores are kept."""
