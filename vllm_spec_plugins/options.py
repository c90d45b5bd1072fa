"""Base of every options class: what a plugin accepts, with types, bounds and defaults.

An option is a pydantic field with a `description`. The descriptions are the
reference documentation (`vllm-spec list`), the bounds are the error messages.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class PluginOptions(BaseModel):
    """No unknown keys, no silent conversions, unchangeable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
