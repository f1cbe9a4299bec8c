"""A run's folder on disk: whole files, snapshots of layers, attribution maps."""
