"""Means well, and takes the process with it."""

raise SystemExit("acme needs a newer driver")
