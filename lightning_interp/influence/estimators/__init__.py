"""Estimators of influence: gradients and curvature, combined to scores of training samples."""
