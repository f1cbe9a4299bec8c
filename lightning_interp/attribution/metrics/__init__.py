"""Metrics of attribution maps: faithfulness, localisation, sanity checks, and trivial maps to compare with."""
