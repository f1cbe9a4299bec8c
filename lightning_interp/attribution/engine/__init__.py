"""One forward and one backward, which methods share."""
