"""`InputAttribution`."""
