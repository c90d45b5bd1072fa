"""Verifiers: one file per rule. Registered as entry points in `pyproject.toml`."""
