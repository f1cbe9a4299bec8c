"""`DataInfluence`."""
