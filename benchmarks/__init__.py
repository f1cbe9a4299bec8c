"""Measurements beside other packages, and checks that take too long for a test."""
