"""A ranked draft vocabulary: the tokens a draft head is cut down to, by falling frequency.

A draft that only knows frequent tokens reads a fraction of the output head in every draft step
and loses little: most of a large vocabulary is rarely written (FR-Spec, arXiv 2502.14856;
VocabTrim, arXiv 2506.22694). Verification stays exact: tokens outside have draft probability 0
and come from the residual distribution. A file may hold several lists, one per language for
instance (FastMTP, arXiv 2509.18362); each request is then drafted for from one of them.

`vllm-spec calibrate vocab` writes the file. Neither torch nor vLLM is imported here.

Shapes: V tokens of the target's vocabulary; N ranked tokens of a list; A tokens that are part
of every list; M tokens of a draft vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from .errors import SpecPluginsError
from .options import PluginOptions

if TYPE_CHECKING:
    from .context import ModelFacts

_FORMAT = "vllm-spec-plugins draft vocabulary, version 1"
_MAKE = "Make one: vllm-spec calibrate vocab MODEL --texts FILE --output vocab.safetensors."

#: A draft ends at the first token outside: below this share of text a draft head is no use.
LEAST_COVERAGE = 0.5


class DraftVocabularyOptions(PluginOptions):
    """The draft vocabulary of a proposer: a file's name, or an object with these options."""

    file: str = Field(
        min_length=1, description="Ranked vocabulary, written by `vllm-spec calibrate vocab`."
    )
    size: int | None = Field(
        None,
        ge=1,
        description="How many tokens of each list to draft from; null: the file's recommendation.",
    )
    dynamic_tokens: int = Field(
        0,
        ge=0,
        le=4096,
        description="So many of a request's own most recent tokens outside the list are added "
        "for that request.",
    )

    @model_validator(mode="before")
    @classmethod
    def _file_alone(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value


@dataclass(frozen=True, slots=True)
class RankedList:
    """Tokens of one kind of text, by falling frequency.

    Attributes:
        name: Of the list, the language for instance.
        token_ids: `[N]` int64, most frequent first; none of those that are always in.
        counts: `[N]` int64, at least 1, how often each was counted.
        num_tokens: All tokens counted, those always in included.
        recommended_size: M where the user asks for none.
    """

    name: str
    token_ids: NDArray[np.int64]
    counts: NDArray[np.int64]
    num_tokens: int
    recommended_size: int


@dataclass(frozen=True, slots=True)
class RankedVocabulary:
    """What a file of `vllm-spec calibrate vocab` holds.

    Attributes:
        vocab_size: V.
        always: `[A]` int64, sorted: end-of-text and every control token, part of any size.
        lists: At least one.
        tokenizer: `tokenizer_fingerprint` of the model it was counted with, "" if it had none.
        description: One line for people: model, texts, number of tokens.
    """

    vocab_size: int
    always: NDArray[np.int64]
    lists: tuple[RankedList, ...]
    tokenizer: str
    description: str

    def size_of(self, ranked: RankedList, size: int | None = None) -> int:
        """M of one list: what is asked for or recommended, at most what the list has."""
        return min(size or ranked.recommended_size, len(self.always) + len(ranked.token_ids))

    def token_ids(self, ranked: RankedList, size: int | None = None) -> NDArray[np.int64]:
        """`[M]` sorted: those always in, and the most frequent of one list up to its size."""
        most_frequent = ranked.token_ids[: self._num_ranked(ranked, size)]
        return np.sort(np.concatenate([self.always, most_frequent]))

    def coverage(self, ranked: RankedList, size: int | None = None) -> float:
        """Share of the counted text that consists of `token_ids`."""
        outside = ranked.counts[self._num_ranked(ranked, size) :].sum()
        return 1.0 - int(outside) / max(ranked.num_tokens, 1)

    def _num_ranked(self, ranked: RankedList, size: int | None) -> int:
        return max(self.size_of(ranked, size) - len(self.always), 0)

    def write(self, path: Path) -> None:
        """Write the file; it appears complete or not at all."""
        from safetensors.numpy import save

        tensors = {"always": self.always}
        for ranked in self.lists:
            tensors[f"{ranked.name}.token_ids"] = ranked.token_ids
            tensors[f"{ranked.name}.counts"] = ranked.counts
        facts = [
            {
                "name": ranked.name,
                "num_tokens": ranked.num_tokens,
                "recommended_size": ranked.recommended_size,
            }
            for ranked in self.lists
        ]
        metadata = {
            "format": _FORMAT,
            "vocab_size": str(self.vocab_size),
            "tokenizer": self.tokenizer,
            "description": self.description,
            "lists": json.dumps(facts),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        content = save({name: np.ascontiguousarray(t) for name, t in tensors.items()}, metadata)
        neighbour = path.with_name(path.name + ".new")
        neighbour.write_bytes(content)
        neighbour.replace(path)

    @classmethod
    def read(cls, path: str | Path) -> RankedVocabulary:
        """Read a file.

        Raises:
            SpecPluginsError: There is none, or it is something else.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path).expanduser()
        if not path.is_file():
            raise SpecPluginsError(f'"draft_vocabulary": there is no file {path}. {_MAKE}')
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise SpecPluginsError(
                f'"draft_vocabulary": {path} cannot be read as safetensors: {error}. {_MAKE}'
            ) from None
        if metadata.get("format") != _FORMAT:
            raise SpecPluginsError(f'"draft_vocabulary": {path} holds something else. {_MAKE}')
        try:
            found = cls(
                int(metadata["vocab_size"]),
                tensors["always"],
                tuple(
                    RankedList(
                        facts["name"],
                        tensors[f"{facts['name']}.token_ids"],
                        tensors[f"{facts['name']}.counts"],
                        facts["num_tokens"],
                        facts["recommended_size"],
                    )
                    for facts in json.loads(metadata["lists"])
                ),
                metadata["tokenizer"],
                metadata["description"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SpecPluginsError(
                f'"draft_vocabulary": {path} is incomplete ({error!r}). {_MAKE}'
            ) from None
        if problem := found.problem():
            raise SpecPluginsError(f'"draft_vocabulary": {path} is damaged: {problem}. {_MAKE}')
        return found

    def problem(self) -> str | None:
        """What is wrong with the lists; None when all is well."""
        if not self.lists:
            return "it holds no list"
        for ranked in self.lists:
            together = np.concatenate([self.always, ranked.token_ids])
            if len(together) == 0 or together.min() < 0 or together.max() >= self.vocab_size:
                return f'list "{ranked.name}" names tokens outside the vocabulary'
            if len(np.unique(together)) < len(together):
                return f'list "{ranked.name}" names a token twice'
            if len(ranked.counts) != len(ranked.token_ids) or np.any(np.diff(ranked.counts) > 0):
                return f'the counts of list "{ranked.name}" do not fall'
        return None


def rank(
    name: str, counts: NDArray[np.int64], always: NDArray[np.int64], recommended_size: int
) -> RankedList:
    """A list from counts; what never occurred is left out, equal counts go by id.

    Args:
        name: Of the list.
        counts: `[V]` how often each token occurred.
        always: `[A]` tokens not to rank.
        recommended_size: See `RankedList`.
    """
    rankable = counts.copy()
    rankable[always] = 0
    order = np.argsort(-rankable, kind="stable")[: np.count_nonzero(rankable)]
    return RankedList(name, order, rankable[order], int(counts.sum()), recommended_size)


def tokenizer_fingerprint(folder: str | Path) -> str | None:
    """A hash of which text each token id stands for; None where there is no `tokenizer.json`.

    The order and layout of the file do not matter, nor how text is split: libraries rewrite both.
    """
    path = Path(folder).expanduser() / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            pairs = {(token_id, text) for text, token_id in vocabulary.items()}
        else:  # Unigram: text and score in the order of the ids
            pairs = {(token_id, entry[0]) for token_id, entry in enumerate(vocabulary)}
        pairs |= {(token["id"], token["content"]) for token in content.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    canonical = json.dumps(sorted(pairs), separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def depends_on_text(options: DraftVocabularyOptions) -> bool:
    """Whether requests are drafted for from different tokens: dynamic ones, or several lists.

    A file that cannot be read is for `check` to refuse; it counts as several lists.
    """
    if options.dynamic_tokens:
        return True
    try:
        return len(RankedVocabulary.read(options.file).lists) > 1
    except SpecPluginsError:
        return True


def check(options: DraftVocabularyOptions, facts: ModelFacts) -> None:
    """For `Proposer.check`: refuse a file that does not fit the target, before anything loads.

    Where the target is no local folder with a `tokenizer.json`, its tokenizer is not compared.

    Raises:
        SpecPluginsError: No such file, made for another model, or of no use at that size.
    """
    found = RankedVocabulary.read(options.file)
    where = f'"draft_vocabulary": {options.file}'
    if found.vocab_size != facts.vocab_size:
        raise SpecPluginsError(
            f"{where} was made for a model of {found.vocab_size} tokens, {facts.model} has "
            f"{facts.vocab_size}. {_MAKE}"
        )
    fingerprint = tokenizer_fingerprint(facts.model)
    if fingerprint and found.tokenizer and fingerprint != found.tokenizer:
        raise SpecPluginsError(
            f"{where} was made with another tokenizer than that of {facts.model}: its token ids "
            f"stand for other text ({found.description}). {_MAKE}"
        )
    _check_size(where, found, options.size)
    widest = max(found.size_of(ranked, options.size) for ranked in found.lists)
    if widest + options.dynamic_tokens >= found.vocab_size:
        raise SpecPluginsError(
            f"{where}: {widest} tokens and {options.dynamic_tokens} dynamic ones are no fewer than "
            f"the whole vocabulary of {found.vocab_size}. Ask for fewer, or remove it."
        )


def _check_size(where: str, found: RankedVocabulary, size: int | None) -> None:
    longest = max(len(found.always) + len(ranked.token_ids) for ranked in found.lists)
    if size is not None and size > longest:
        raise SpecPluginsError(
            f'{where}: "size" is {size}, but only {longest} tokens occurred in the text it was '
            f"counted from. Ask for at most {longest}, or count more text."
        )
    for ranked in found.lists:
        asked = found.size_of(ranked, size)
        covered = found.coverage(ranked, size)
        if asked <= len(found.always) or covered < LEAST_COVERAGE:
            raise SpecPluginsError(
                f'{where}: {asked} tokens of list "{ranked.name}" are too few: with the '
                f"{len(found.always)} control tokens always among them they cover {covered:.0%} "
                f"of the text counted, and a draft ends at the first token outside. "
                f"Recommended: {ranked.recommended_size}."
            )
