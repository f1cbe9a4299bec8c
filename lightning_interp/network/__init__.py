"""A network, watched, and left as it was."""
