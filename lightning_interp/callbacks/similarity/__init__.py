"""`RepresentationSimilarity`."""
