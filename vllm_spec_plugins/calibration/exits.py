"""How well each exit of a model predicts it, on text the model wrote itself.

One pass over prompt and continuation gives every exit's law at every position: the keys and
values that an exit reads while drafting are those of the full model's first layers, so
nothing about a draft that is accepted so far differs from the text itself.

Passes that skip layers below their exit are another matter: `layer_skips.py`.

Shapes: E draft passes, C tokens of the continuation, S rounds of K draft tokens, V vocabulary,
M entries of a draft vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.vocabulary_passes import first_argmax
from vllm_spec_plugins.zoo.cache import write_atomically

from .acceptance_walk import rounds_of
from .draft_pass import DraftPass
from .hugging_face import LocalModel

#: Turns hidden states after an exit, `[1, T, H]`, into what the head reads, `[1, T, H]`.
Adapter = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Continuation:
    """What the target wrote after a prompt.

    Attributes:
        token_ids: Prompt and continuation.
        num_prompt: Tokens of the prompt, at least 1.
        temperature: At which it was drawn, 0 = greedy.
    """

    token_ids: tuple[int, ...]
    num_prompt: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """Draft laws beside the target's, `[E, C]` each.

    Of passes that skip, `[E, S, K]`: draft token j of the round that begins at s.

    Attributes:
        overlap: float32 sum over x of min(p(x), q(x)), laws at temperature 1: the chance that
            a token drawn from q is accepted.
        agreement: bool, whether both laws have the same most likely token.
        chance: float32 a = min(1, q(y) / p(y)) of the text's token y.
        first_choice: bool, whether y is the draft's most likely token.
    """

    overlap: NDArray[np.float32]
    agreement: NDArray[np.bool_]
    chance: NDArray[np.float32]
    first_choice: NDArray[np.bool_]

    def rounds(self, temperature: float, method: str, most: int) -> NDArray[np.floating]:
        """`[E, S, most]` chance of acceptance of the text's tokens (`acceptance_walk.walk`).

        Args:
            temperature: Of the text.
            method: `"probabilistic"` or `"greedy"` drafts. At temperature 0 both are greedy.
            most: Draft tokens per round, at most C or K.
        """
        greedy = temperature == 0 or method == "greedy"
        accepted = self.first_choice.astype(np.float32) if greedy else self.chance
        return rounds_of(accepted, most) if accepted.ndim == 2 else accepted[..., :most]


@torch.no_grad()
def compare(
    target: Tensor, drafts: Sequence[Tensor], text: Tensor, vocabulary: Tensor | None
) -> Agreement:
    """Set draft logits beside the target's.

    Args:
        target: `[C, V]` float32.
        drafts: E times `[C, M]` float32.
        text: `[C]` int64, the tokens that stand there.
        vocabulary: `[M]` int64 ids of the drafts' columns, or None for all.
    """
    p = torch.softmax(target, dim=-1)
    p_text = p.gather(1, text[:, None]).squeeze(1)
    best = first_argmax(target)
    p_drafted = p if vocabulary is None else p[:, vocabulary]
    rows: list[tuple[Tensor, ...]] = []
    for logits in drafts:
        q = torch.softmax(logits, dim=-1)
        first = first_argmax(logits)
        if vocabulary is None:
            q_text = q.gather(1, text[:, None]).squeeze(1)
        else:
            first = vocabulary[first]
            q_text = (q * (vocabulary == text[:, None])).sum(dim=-1)
        # A greedy text may hold a token whose p underflowed elsewhere: 0 / 0 is not 1.
        chance = torch.where(q_text < p_text, q_text / p_text.clamp(min=1e-38), 1.0)
        overlap = torch.minimum(p_drafted, q).sum(dim=-1)
        rows.append((overlap, first == best, chance, first == text))
    return Agreement(*(torch.stack(part).cpu().numpy() for part in zip(*rows, strict=True)))


@torch.no_grad()
def measure(
    model: LocalModel,
    continuation: Continuation,
    passes: Sequence[DraftPass],
    vocabulary: Tensor | None = None,
    adapter: Adapter | None = None,
) -> Agreement:
    """Every exit's agreement on one continuation, but for its first token.

    That one follows from the prompt's pass; drafting begins after it.

    Args:
        model: The target.
        continuation: At least two tokens long.
        passes: Exits that skip nothing.
        vocabulary: `[M]` int64 tokens that can be drafted; None: all.
        adapter: What stands between exit and head, instead of the final norm, in passes with it.

    Returns:
        C is the continuation's length less one.
    """
    token_ids = torch.tensor(continuation.token_ids, device=model.device)
    after = sorted({*(p.exit_layer for p in passes), model.num_layers})
    states = model.layer_states(token_ids[None], after)
    # Row i predicts token i + 1.
    rows = slice(continuation.num_prompt, len(token_ids) - 1)
    target = model.logits(model.final_norm(states[model.num_layers])[0, rows])
    drafts: list[Tensor] = []
    for draft_pass in passes:
        state = states[draft_pass.exit_layer]
        if draft_pass.adapter:
            assert adapter is not None
            normed = adapter(state)[0, rows]
        else:
            normed = model.final_norm(state[:, rows])[0]
        logits = model.logits(normed)
        drafts.append(logits if vocabulary is None else logits[:, vocabulary])
    return compare(target, drafts, token_ids[continuation.num_prompt + 1 :], vocabulary)


class MeasurementStore:
    """One file for each measured continuation, kept under a name that says what was measured.

    Args:
        folder: Where; created when something is stored.
        inputs: All that decides the measurements beside the continuation itself.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, object]) -> None:
        self._folder = folder
        self._inputs = json.dumps(inputs, sort_keys=True)
        #: Measurements read back instead of made.
        self.reused = 0

    def get(
        self, what: str, continuation: Continuation, make: Callable[[], Agreement]
    ) -> Agreement:
        """The stored measurement, or a new one, stored.

        Args:
            what: Draft passes, in words.
            continuation: The text.
            make: Measures.
        """
        path = self._path(what, continuation)
        try:
            with np.load(path) as stored:
                found = Agreement(**{field.name: stored[field.name] for field in fields(Agreement)})
        except (OSError, ValueError, KeyError, BadZipFile):
            pass  # absent, or cut short
        else:
            self.reused += 1
            return found
        made = make()
        self._folder.mkdir(parents=True, exist_ok=True)
        arrays = {field.name: getattr(made, field.name) for field in fields(Agreement)}

        def write(neighbour: Path) -> None:
            with neighbour.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)

        write_atomically(path, write)
        return made

    def _path(self, what: str, continuation: Continuation) -> Path:
        key = hashlib.sha256(f"{self._inputs} {what} {continuation}".encode())
        return self._folder / f"{key.hexdigest()[:20]}.npz"


def exits_to_measure(num_layers: int, chosen: Sequence[int] | None) -> list[int]:
    """All exits, or those chosen, in rising order.

    Raises:
        SpecPluginsError: The model has no such layer.
    """
    if not chosen:
        return list(range(1, num_layers + 1))
    for number in chosen:
        if not 1 <= number <= num_layers:
            raise SpecPluginsError(
                f"no exit after {number} layers: the model has {num_layers}, choose 1 to "
                f"{num_layers}."
            )
    return sorted(set(chosen))
