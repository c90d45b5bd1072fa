"""Which part of the target a draft runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, order=True)
class DraftPass:
    """The first layers of the target, perhaps without some of their sublayers.

    Attributes:
        exit_layer: Layers run, 1 to all.
        skip_attention: Layers (from 0, below the exit) whose attention is left out, sorted.
        skip_ffn: Layers whose feed-forward network is left out, sorted.
    """

    exit_layer: int
    skip_attention: tuple[int, ...] = ()
    skip_ffn: tuple[int, ...] = ()

    @property
    def num_skipped(self) -> int:
        """Sublayers left out."""
        return len(self.skip_attention) + len(self.skip_ffn)

    def without(self, sublayer: tuple[str, int]) -> DraftPass:
        """The same with one more sublayer left out, `("attention" or "ffn", layer)`."""
        kind, layer = sublayer
        attention, ffn = set(self.skip_attention), set(self.skip_ffn)
        (attention if kind == "attention" else ffn).add(layer)
        return DraftPass(self.exit_layer, tuple(sorted(attention)), tuple(sorted(ffn)))

    def options(self) -> dict[str, Any]:
        """The options of `early_exit` that ask for it; whole layers as `skip_layers`."""
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
        return str(self.exit_layer) + (f" without {'; '.join(left_out)}" if left_out else "")
