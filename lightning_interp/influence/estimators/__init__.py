"""Gradients and curvature, combined to scores."""
