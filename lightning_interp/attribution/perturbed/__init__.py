"""Answers to changed inputs."""
