"""What vLLM's `custom_class` method builds before the runner adapter takes its place."""

from __future__ import annotations

from typing import Any, NoReturn


class PlaceholderProposer:
    """Exists between the runner's construction and the adapter's; never drafts."""

    def __init__(self, vllm_config: object) -> None:
        del vllm_config

    def load_model(self, target: object) -> None:
        """vLLM's CPU runner calls it unconditionally."""
        del target

    def propose(self, *args: Any, **kwargs: Any) -> NoReturn:
        del args, kwargs
        raise RuntimeError(
            "vllm-spec-plugins is not attached to this model runner: the worker was started by a "
            "route that does not call WorkerWrapperBase.init_device. `vllm-spec doctor` says which "
            "seams hold."
        )
