"""Plugins with one mistake each."""
