"""The error that always stops a run before its first batch."""

from __future__ import annotations


class ArgumentError(ValueError):
    """An argument, or the data that stands in for it, cannot be used; the message names it."""
