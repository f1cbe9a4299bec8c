"""How samples come in."""
