"""Offline engines that calibration and tests start: seen to their end, and nothing left behind."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm import LLM


def shut_down(llm: LLM) -> None:
    """End an engine now, with the process it runs in."""
    llm.llm_engine.engine_core.shutdown()


@contextmanager
def hugging_face_classes_kept() -> Iterator[None]:
    """Hugging Face's model classes are again what they were when the engines within have ended.

    An engine in this process that serves a model through vLLM's Transformers backend gives
    that model's class in `transformers` another base, `__init__` and `__call__`, for good: the
    class then cannot be built outside an engine ("Current vLLM config is not set").
    """
    from vllm.model_executor.models.transformers import base

    found: dict[type, tuple[tuple[type, ...], dict[str, Any]]] = {}
    mark: Callable[..., Callable[[type], type]] = base.support_torch_compile

    def mark_and_remember(*args: Any, **options: Any) -> Callable[[type], type]:
        def marked(cls: type) -> type:
            found.setdefault(cls, (cls.__bases__, dict(vars(cls))))
            return mark(*args, **options)(cls)

        return marked

    base.support_torch_compile = mark_and_remember  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        base.support_torch_compile = mark  # pyright: ignore[reportAttributeAccessIssue]
        for cls, (bases, attributes) in found.items():
            for name in vars(cls).keys() - attributes.keys():
                delattr(cls, name)
            for name, value in attributes.items():
                if vars(cls)[name] is not value:
                    setattr(cls, name, value)
            cls.__bases__ = bases
