"""safetensors files with a card: one JSON text in the metadata that says what the tensors are for.

A card is read and checked before any tensor is, and before any model loads. Trained parts of a
model (exit adapters, judge heads) are kept so, each with the sizes of the model it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import SpecPluginsError

if TYPE_CHECKING:
    from torch import Tensor

    from .context import ModelFacts


@dataclass(frozen=True, slots=True)
class CardFormat:
    """One kind of file.

    Attributes:
        noun: What it holds, such as "exit adapter".
        key: Of the card in the metadata.
        version: That this release reads and writes.
        command: That writes such files.
    """

    noun: str
    key: str
    version: int
    command: str

    @property
    def with_article(self) -> str:
        return f"{'an' if self.noun[0] in 'aeiou' else 'a'} {self.noun}"

    def read(self, path: str | Path) -> dict[str, Any]:
        """The card of a file, without its format version.

        Raises:
            SpecPluginsError: No such file, not of this kind, or of another format version.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            noun = self.noun.rsplit(" ", 1)[-1]
            raise SpecPluginsError(f"no {noun} file {path}: `{self.command}` trains one.")
        try:
            with safe_open(str(path), framework="pt") as file:
                text = (file.metadata() or {}).get(self.key)
        except (SafetensorError, OSError) as error:
            raise self.not_one(path, str(error)) from error
        if text is None:
            raise self.not_one(path, f"it has no card. Files that `{self.command}` writes have one")
        try:
            values: dict[str, Any] = json.loads(text)
            version = values.pop("format_version")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self.bad_card(path, error) from error
        if version == self.version:
            return values
        raise SpecPluginsError(
            f"{path} is {self.with_article} of format version {version}; this release reads "
            f"version {self.version}: train it again, or use the release that wrote it."
        )

    def not_one(self, path: str | Path, why: str) -> SpecPluginsError:
        """The error about a file that is not of this kind."""
        return SpecPluginsError(f"{path} is not {self.with_article}: {why}.")

    def bad_card(self, path: str | Path, error: Exception) -> SpecPluginsError:
        """The error about a card whose values are not what they should be."""
        return self.not_one(path, f"bad card ({error!r})")

    def write(
        self, path: str | Path, card: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """Write a file; one that exists is overwritten."""
        from safetensors.torch import save

        data = save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            metadata={self.key: json.dumps({"format_version": self.version, **card})},
        )
        # `save_file` would leave it unreadable to a server that runs as another user.
        Path(path).write_bytes(data)


def check_sizes(noun: str, trained_for: str, sizes: Mapping[str, int], facts: ModelFacts) -> None:
    """Whether something trained for one model has the sizes of the model about to be served.

    Args:
        noun: What was trained, for the message.
        trained_for: Name of its model.
        sizes: By their names in `ModelFacts`.
        facts: Of the model to be served.

    Raises:
        SpecPluginsError: They differ.
    """
    for name, there in sizes.items():
        here = getattr(facts, name)
        if there != here:
            raise SpecPluginsError(
                f'the {noun} was trained for another model ("{trained_for}"): '
                f"its {name} is {there}, that of {facts.model} is {here}."
            )
