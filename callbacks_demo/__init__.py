"""Runnable examples; `python -m callbacks_demo` is the main one."""
