"""vLLM's general-plugin entry point: hangs one wrapper on the config, nothing else.

Called in every process vLLM starts, possibly more than once. Everything further is
installed only where a speculative config of ours turns up.
"""

from __future__ import annotations


def register() -> None:
    """Idempotent and light."""
    from .engine.install import install_config_seam

    install_config_seam()
