"""Scores as they come in: the strongest, sums over checkpoints, leverage, duplicates."""
