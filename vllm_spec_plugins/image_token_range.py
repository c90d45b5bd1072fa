"""Which token ids of a model are codes of its image codebook, as far as its config says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from .context import ModelFacts

#: Letters of Chameleon's image token names stand for digits.
_CHAMELEON_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


def image_token_range(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """`[first, last + 1)`, where id `first + c` is code c; None where the config does not say.

    Read from the key `image_token_range`, or from the `vocabulary_map` of Chameleon (names
    `IMGIMG...Z`) and Emu3 (names `<|visual token ...|>`) where the numbers in the names follow
    the ids one by one.

    Args:
        config: Content of a `config.json`.
    """
    said = config.get("image_token_range")
    if (
        isinstance(said, (list, tuple))
        and len(said) == 2
        and all(isinstance(end, int) for end in said)
        and 0 <= said[0] < said[1]
    ):
        return said[0], said[1]
    named = config.get("vocabulary_map")
    if not isinstance(named, Mapping):
        return None
    ids = {code: id_ for name, id_ in named.items() if (code := _code_of(str(name))) is not None}
    first = ids.get(0)
    if first is None or any(id_ != first + ids_code for ids_code, id_ in ids.items()):
        return None
    return first, first + len(ids)


def chosen_image_tokens(
    plugin: str, chosen: tuple[int, int] | None, facts: ModelFacts
) -> tuple[int, int]:
    """`[first, last + 1)`, as the user says, or else the model's config.

    Args:
        plugin: Whose option `image_token_range` it is.
        chosen: The option.
        facts: Of the model.

    Raises:
        ConfigError: Nobody says so, or it does not lie within the vocabulary.
    """
    said_by = '"image_token_range"'
    if chosen is None:
        chosen, said_by = facts.image_token_range, "image_token_range in its config.json"
    if chosen is None:
        raise ConfigError(
            f"{plugin}: the config of {facts.model} does not say which of its token ids are "
            'image codes. Give "image_token_range": [first, last + 1].'
        )
    first, end = chosen
    if not 0 <= first < end <= facts.vocab_size:
        raise ConfigError(
            f"{plugin}: {said_by} is [{first}, {end}], and {facts.model} has token ids from "
            f"0 to {facts.vocab_size - 1}: it must be [first, last + 1] within them."
        )
    return first, end


def _code_of(name: str) -> int | None:
    """The code a token name stands for; None where it is not the name of one."""
    if name.startswith("IMGIMG") and name.endswith("Z"):
        number = name[len("IMGIMG") : -1].translate(_CHAMELEON_DIGITS)
    elif name.startswith("<|visual token ") and name.endswith("|>"):
        number = name[len("<|visual token ") : -len("|>")]
    else:
        return None
    return int(number) if number.isdecimal() else None
