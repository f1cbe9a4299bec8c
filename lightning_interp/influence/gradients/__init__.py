"""Gradients of each sample."""
