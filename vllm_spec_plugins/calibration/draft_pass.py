"""Which part of the target a draft runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True, order=True)
class DraftPass:
    """The first layers of the target, perhaps without some of their sublayers.

    Attributes:
        exit_layer: Layers run, 1 to all.
        skip_attention: Layers (from 0, below the exit) whose attention is left out, sorted.
        skip_ffn: Layers whose feed-forward network is left out, sorted.
        adapter: Whether a trained adapter stands between exit and head.
    """

    exit_layer: int
    skip_attention: tuple[int, ...] = ()
    skip_ffn: tuple[int, ...] = ()
    adapter: bool = False

    @property
    def num_skipped(self) -> int:
        """Sublayers left out."""
        return len(self.skip_attention) + len(self.skip_ffn)

    def without(self, attention: Iterable[int] = (), ffn: Iterable[int] = ()) -> DraftPass:
        """The same with more sublayers left out."""
        return replace(
            self,
            skip_attention=tuple(sorted({*self.skip_attention, *attention})),
            skip_ffn=tuple(sorted({*self.skip_ffn, *ffn})),
        )

    def options(self) -> dict[str, Any]:
        """The options of `early_exit` that ask for it, but for the adapter's file.

        Layers left out whole are `skip_layers`.
        """
        whole = set(self.skip_attention) & set(self.skip_ffn)
        skips = {
            "skip_layers": sorted(whole),
            "skip_attention": sorted(set(self.skip_attention) - whole),
            "skip_ffn": sorted(set(self.skip_ffn) - whole),
        }
        return {"exit_layer": self.exit_layer, **{k: v for k, v in skips.items() if v}}

    def __str__(self) -> str:
        names = {"skip_layers": "layers", "skip_attention": "attention", "skip_ffn": "ffn"}
        left_out = [
            f"{name} {','.join(map(str, layers))}"
            for key, name in names.items()
            if (layers := self.options().get(key))
        ]
        name = f"{self.exit_layer} + adapter" if self.adapter else str(self.exit_layer)
        return name + (f" without {'; '.join(left_out)}" if left_out else "")
