"""Runs the command line: `python -m lightning_interp.cli`."""

from __future__ import annotations

import sys

from lightning_interp.cli import main

if __name__ == "__main__":
    sys.exit(main())
