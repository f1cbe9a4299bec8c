"""Running a network, reading its layers, and restoring its state afterwards."""
