"""Fails for a reason of its own."""

raise RuntimeError("acme needs a licence file")
