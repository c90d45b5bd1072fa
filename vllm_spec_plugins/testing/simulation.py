"""Generates many texts with `verify` itself, step after step, as an engine would.

Every text continues until it is long enough, through as many drafts as that takes, so what
one step does to the next (shared random numbers, a wrong bonus token) shows in the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_spec_plugins.draw_next import sample_weights
from vllm_spec_plugins.random_numbers import Purpose, uniforms
from vllm_spec_plugins.verifier import Verifier

from .toy_problems import DraftedStep, ToyProblem, verify_input

#: Texts generated side by side: bounds memory.
_TEXTS_AT_ONCE = 50_000


def generate(
    verifier: Verifier,
    problems: Sequence[ToyProblem],
    *,
    samples: int = 200_000,
    length: int = 4,
    ragged: bool = False,
    dtype: torch.dtype = torch.float32,
    vocabulary: Tensor | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """First tokens of many texts of each problem, all problems mixed in every batch.

    Args:
        verifier: Examined through `verify` only.
        problems: All over the same vocabulary.
        samples: Texts of each problem.
        length: Tokens of each text.
        ragged: Send 0 to K draft tokens, by turns, instead of K.
        dtype: Of logits and draft probabilities; float32 is what an engine serves.
        vocabulary: See `verify_input`.
        seed: Of everything drawn.

    Returns:
        `[samples, length]` int64 for each problem.
    """
    parts: list[list[Tensor]] = [[] for _ in problems]
    for first in range(0, samples, _TEXTS_AT_ONCE):
        count = min(_TEXTS_AT_ONCE, samples - first)
        texts = _Texts(problems, first, count, length, seed)
        while texts.unfinished():
            texts.advance(verifier, ragged, dtype, vocabulary)
        for part, tokens in zip(parts, texts.tokens, strict=True):
            part.append(tokens)
    return [torch.cat(part) for part in parts]


class _Texts:
    """Texts being generated: `count` of each problem."""

    def __init__(
        self, problems: Sequence[ToyProblem], first: int, count: int, length: int, seed: int
    ) -> None:
        self.problems = problems
        self.length = length
        number = torch.arange(first, first + count)
        # Streams are hashes in an engine; consecutive integers are the harder case.
        self.streams = [
            number + (i + len(problems) * seed) * (1 << 32) for i in range(len(problems))
        ]
        self.tokens = [torch.full((count, length), -1) for _ in problems]
        self.lengths = [torch.zeros(count, dtype=torch.int64) for _ in problems]
        self.contexts = [torch.full((count,), problem.start) for problem in problems]

    def unfinished(self) -> bool:
        return any(bool((lengths < self.length).any()) for lengths in self.lengths)

    def advance(
        self,
        verifier: Verifier,
        ragged: bool,
        dtype: torch.dtype,
        vocabulary: Tensor | None,
    ) -> None:
        """One step of every unfinished text, in one batch."""
        active = [(lengths < self.length).nonzero().squeeze(1) for lengths in self.lengths]
        steps = [self._draft(i, texts, ragged) for i, texts in enumerate(active)]
        streams = torch.cat([s[texts] for s, texts in zip(self.streams, active, strict=True)])
        positions = torch.cat([n[texts] for n, texts in zip(self.lengths, active, strict=True)])
        batch = verify_input(steps, streams, positions, dtype=dtype, vocabulary=vocabulary)
        emitted = verifier.verify(batch).token_ids
        for i, part in enumerate(emitted.split([len(texts) for texts in active])):
            self._append(i, active[i], part)

    def _draft(self, i: int, texts: Tensor, ragged: bool) -> DraftedStep:
        problem, streams, positions = self.problems[i], self.streams[i], self.lengths[i]
        context = self.contexts[i][texts]
        columns = []
        for j in range(problem.num_draft - problem.num_placeholders):
            if problem.draft_probabilities is not None:
                u = uniforms(streams[texts], positions[texts], j, Purpose.DRAFT)
                token_ids = sample_weights(problem.draft_probabilities[context], u)
            else:
                assert problem.choices is not None, "a proposer that chooses needs choices"
                token_ids = problem.choices[context]
            columns.append(token_ids)
            context = problem.after(context, token_ids)
        columns += [torch.full_like(texts, -1)] * problem.num_placeholders
        counts = torch.full_like(texts, problem.num_draft)
        if ragged:  # by turns, whatever the text says
            counts = (streams[texts] + positions[texts]) % (problem.num_draft + 1)
        token_ids = torch.stack(columns, 1) if columns else texts.new_zeros(len(texts), 0)
        return DraftedStep(problem, self.contexts[i][texts], token_ids, counts)

    def _append(self, i: int, texts: Tensor, emitted: Tensor) -> None:
        for token_ids in emitted.unbind(dim=1):
            room = (token_ids >= 0) & (self.lengths[i][texts] < self.length)
            here, token = texts[room], token_ids[room]
            self.tokens[i][here, self.lengths[i][here]] = token
            self.lengths[i][here] += 1
            self.contexts[i][here] = self.problems[i].after(self.contexts[i][here], token)
