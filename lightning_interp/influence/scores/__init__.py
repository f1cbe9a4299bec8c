"""Scores batch by batch: the strongest of them, sums over checkpoints, leverage, duplicates."""
