"""Toy problems: a target and a draft over a few tokens, whose laws are known exactly.

Both are Markov chains of some order: the law of a token is a row of a table, chosen by the
last `order` tokens. With `order` at least the length looked at, they are as general as any
model; with order 1 they are small enough to sample millions of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_spec_plugins.context import EngineContext, ModelFacts
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.verifier import VerifyInput


@dataclass(frozen=True)
class ToyProblem:
    """A target, a proposer, and how the request is sampled.

    Contexts are numbered by their last `order` tokens as digits to base V; C = V^order.

    Attributes:
        target_logits: `[C, V]` after every sampling constraint; -inf excludes a token.
        draft_probabilities: `[C, V]` law the draft tokens are drawn from, or None for a
            proposer that chooses: then `choices` names its token.
        num_draft: K, tokens of each draft.
        choices: `[C]` int64 token drafted in each context when nothing is drawn.
        num_placeholders: How many of the K, the last ones, are -1.
        greedy: Whether the request has temperature 0.
    """

    target_logits: Tensor
    draft_probabilities: Tensor | None
    num_draft: int
    choices: Tensor | None = None
    num_placeholders: int = 0
    greedy: bool = False

    @property
    def vocab_size(self) -> int:
        return self.target_logits.shape[1]

    @property
    def num_contexts(self) -> int:
        return len(self.target_logits)

    @property
    def start(self) -> int:
        """The context every text starts from."""
        return self.num_contexts - 1

    @property
    def target(self) -> Tensor:
        """`[C, V]` p, float64; one-hot when greedy."""
        logits = self.target_logits.double()
        if self.greedy:
            return torch.nn.functional.one_hot(logits.argmax(dim=1), self.vocab_size).double()
        return torch.softmax(logits, dim=1)

    def after(self, contexts: Tensor, token_ids: Tensor) -> Tensor:
        """Contexts after one more token; placeholders lead nowhere and change nothing."""
        moved = (contexts * self.vocab_size + token_ids) % self.num_contexts
        return torch.where(token_ids >= 0, moved, contexts)

    def laws_of_text(self, length: int) -> Tensor:
        """`[V^length]` the target's law of a text's first tokens, float64."""
        contexts = torch.tensor([self.start])
        law = torch.ones(1, dtype=torch.float64)
        tokens = torch.arange(self.vocab_size)
        for _ in range(length):
            law = (law.unsqueeze(1) * self.target[contexts]).flatten()
            contexts = self.after(contexts.unsqueeze(1), tokens).flatten()
        return law

    def with_temperature(self, temperature: float) -> ToyProblem:
        """The same model sampled at another temperature; 0 is greedy."""
        if temperature == 0:
            return replace(self, greedy=True)
        return replace(self, target_logits=self.target_logits / temperature)


@dataclass(frozen=True)
class DraftedStep:
    """Drafts of many requests, each of one toy problem, before they become a `VerifyInput`.

    Attributes:
        problem: The model all these requests share.
        contexts: `[R]` where each draft starts.
        token_ids: `[R, K]`, -1 for placeholders.
        counts: `[R]` how many columns of `token_ids` are sent (K unless ragged).
    """

    problem: ToyProblem
    contexts: Tensor
    token_ids: Tensor
    counts: Tensor

    @property
    def contexts_of_drafts(self) -> Tensor:
        """`[R, K+1]` context before each draft token and after the last."""
        columns = [self.contexts]
        for token_ids in self.token_ids.unbind(dim=1):
            columns.append(self.problem.after(columns[-1], token_ids))
        return torch.stack(columns, dim=1)


def verify_input(
    steps: Sequence[DraftedStep],
    streams: Tensor,
    positions: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    vocabulary: Tensor | None = None,
) -> VerifyInput:
    """One batch of all the steps' requests, in order.

    Args:
        steps: At least one; all over the same vocabulary.
        streams: `[R]` over all steps.
        positions: `[R]` over all steps.
        dtype: Of logits and draft probabilities.
        vocabulary: `[M]` sorted ids that cover every draft law: draft probabilities are
            then compact. None: dense.
    """
    counts = torch.cat([step.counts for step in steps])
    width = max(step.token_ids.shape[1] for step in steps)
    target, bonus, token_ids, draft, sampled = [], [], [], [], []
    for step in steps:
        sent = torch.arange(step.token_ids.shape[1]) < step.counts.unsqueeze(1)
        contexts = step.contexts_of_drafts
        rows = contexts[:, :-1][sent]
        last = contexts.gather(1, step.counts.unsqueeze(1)).squeeze(1)
        problem = step.problem
        target.append(problem.target_logits[rows])
        bonus.append(problem.target_logits[last])
        token_ids.append(step.token_ids[sent])
        drawn = problem.draft_probabilities is not None
        sampled.append(torch.full((len(rows),), drawn))
        draft.append(
            problem.draft_probabilities[rows]
            if problem.draft_probabilities is not None
            # Values of rows that were not drawn are ignored: make a use of them show.
            else torch.full((len(rows), problem.vocab_size), torch.nan)
        )
    any_drawn = any(step.problem.draft_probabilities is not None for step in steps)
    all_drawn = all(step.problem.draft_probabilities is not None for step in steps)
    probabilities = None
    if any_drawn:
        values = torch.cat(draft).to(dtype)
        probabilities = DraftProbabilities(
            values if vocabulary is None else values[:, vocabulary],
            vocabulary,
            None if all_drawn else torch.cat(sampled),
        )
    greedy = torch.cat([torch.full((len(step.counts),), step.problem.greedy) for step in steps])
    return VerifyInput(
        [str(i) for i in range(len(counts))],
        torch.cat(target).to(dtype),
        torch.cat(bonus).to(dtype),
        torch.cat(token_ids),
        counts,
        probabilities,
        torch.where(greedy, 0.0, 1.0),
        streams,
        positions,
        max_num_draft=width,
        all_greedy=bool(greedy.all()),
        any_greedy=bool(greedy.any()),
    )


def toy_context(vocab_size: int = 16, num_speculative_tokens: int = 8) -> EngineContext:
    """An engine that is not there, for building plugins in tests."""
    facts = ModelFacts(
        model="toy",
        vocab_size=vocab_size,
        hidden_size=8,
        num_layers=2,
        max_model_len=1024,
        num_speculative_tokens=num_speculative_tokens,
    )
    return EngineContext(facts, torch.device("cpu"), max_num_requests=1 << 20, seed=0)


def random_problem(
    seed: int,
    *,
    vocab_size: int = 4,
    num_draft: int = 2,
    order: int = 2,
    sharpness: float = 1.5,
) -> ToyProblem:
    """Target and draft drawn apart from each other: they disagree often."""
    generator = torch.Generator().manual_seed(seed)
    shape = (vocab_size**order, vocab_size)
    target = torch.randn(shape, generator=generator, dtype=torch.float64) * sharpness
    draft = torch.randn(shape, generator=generator, dtype=torch.float64) * sharpness
    return ToyProblem(target, torch.softmax(draft, dim=1), num_draft)


def adversarial(problem: ToyProblem) -> ToyProblem:
    """The draft prefers what the target does not: q = softmax(-logits)."""
    return replace(problem, draft_probabilities=torch.softmax(-problem.target_logits, dim=1))


def one_hot(problem: ToyProblem) -> ToyProblem:
    """The draft is a choice: the target's second most likely token."""
    choices = problem.target_logits.topk(2, dim=1).indices[:, 1]
    return replace(problem, draft_probabilities=None, choices=choices)


def near_equal(problem: ToyProblem, distance: float = 1e-3) -> ToyProblem:
    """The draft is almost the target: rejections are rare and small."""
    wobble = torch.linspace(-1, 1, problem.vocab_size, dtype=torch.float64) * distance
    return replace(problem, draft_probabilities=torch.softmax(problem.target_logits + wobble, 1))


def truncated_target(problem: ToyProblem, top_k: int) -> ToyProblem:
    """The request samples with top-k: the target's other tokens are excluded."""
    kept = problem.target_logits.topk(top_k, dim=1).indices
    logits = torch.full_like(problem.target_logits, -torch.inf)
    return replace(
        problem, target_logits=logits.scatter(1, kept, problem.target_logits.gather(1, kept))
    )


def truncated_draft(problem: ToyProblem, top_p: float) -> ToyProblem:
    """The draft samples with top-p: tokens outside its nucleus have q = 0."""
    assert problem.draft_probabilities is not None
    law, order = problem.draft_probabilities.sort(dim=1, descending=True)
    law = torch.where(law.cumsum(dim=1) - law < top_p, law, 0.0)
    law = law / law.sum(dim=1, keepdim=True)
    return replace(problem, draft_probabilities=torch.zeros_like(law).scatter(1, order, law))


def within_vocabulary(problem: ToyProblem, vocabulary: Tensor) -> ToyProblem:
    """The draft knows only some of the target's tokens."""
    assert problem.draft_probabilities is not None
    law = torch.zeros_like(problem.draft_probabilities)
    law[:, vocabulary] = problem.draft_probabilities[:, vocabulary]
    return replace(problem, draft_probabilities=law / law.sum(dim=1, keepdim=True))
