"""Proposers: one file per method. Registered as entry points in `pyproject.toml`."""
