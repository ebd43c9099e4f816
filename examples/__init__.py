"""Runnable examples: each works as a script and as a module (`python -m examples.quickstart`)."""
