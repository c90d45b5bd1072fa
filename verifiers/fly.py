"""`fly`: mismatches are forgiven when what follows agrees (Li et al. 2511.22972).

A draft token that the exact rule rejects is forgiven when

- the target was undecided: the entropy of its `entropy_top_k` likeliest tokens (their
  probabilities as they are, not made to sum to 1) is at least `entropy_threshold`, and
- each of the `window_size` draft tokens after it is accepted by the exact rule.

A draft that ends inside the window gives no verdict: such tokens are rejected. The residual
is the ordinary one. Greedy requests are judged alike, by exact matching.

The price of a position is the probability that its token is forgiven: (1 - a) times the
product of a over its window, with a the exact rule's acceptance. Averaged over drafts it is
the total variation of that token's own law, and summed over positions it bounds that of the
text; the tokens in the window, accepted together, are not drawn from the target's law alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from vllm_spec_plugins.acceptance_rule import exact_acceptance
from vllm_spec_plugins.draw_next import draw_next
from vllm_spec_plugins.errors import ConfigError
from vllm_spec_plugins.greedy_on_host import decide, lay_out, mismatches
from vllm_spec_plugins.random_numbers import Purpose
from vllm_spec_plugins.relaxed_rule import RelaxedOptions, RelaxedRule
from vllm_spec_plugins.row_choice import replace_rows
from vllm_spec_plugins.token_tables import assemble, leading_run
from vllm_spec_plugins.verifier import Verification, VerifierOptions, VerifyInput
from vllm_spec_plugins.vocabulary_passes import is_compiled, largest_entries, undecided_rows

if TYPE_CHECKING:
    from vllm_spec_plugins.context import EngineContext, ModelFacts


class FlyOptions(RelaxedOptions):
    window_size: int = Field(
        5,
        ge=1,
        description="Draft tokens after a mismatch that must all be accepted. The paper counts "
        "the mismatch too and says 6.",
    )
    entropy_threshold: float = Field(
        0.3, ge=0, description="Least entropy (nats) of the target where a mismatch is forgiven."
    )
    entropy_top_k: int = Field(
        3, ge=1, description="How many of the target's likeliest tokens the entropy is taken over."
    )


class Fly(RelaxedRule):
    """Forgives a mismatch once the draft has returned to what the target says."""

    Options = FlyOptions
    options: FlyOptions

    def __init__(self, options: FlyOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        self.check(options, context.facts)  # by now the draft model has said how much it drafts

    @classmethod
    def check(cls, options: FlyOptions, facts: ModelFacts) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if 0 < facts.num_speculative_tokens <= options.window_size:
            raise ConfigError(
                f'fly: "window_size" is {options.window_size}, and drafts have at most '
                f"{facts.num_speculative_tokens} tokens: nothing could ever be forgiven. Raise "
                "num_speculative_tokens above it (the paper uses 15), or lower window_size."
            )

    @classmethod
    def looks_ahead(cls, options: VerifierOptions) -> bool:
        """True: at the window."""
        del options
        return True

    @classmethod
    def verifies_on_device(cls, options: VerifierOptions) -> bool:
        del options
        return True

    def relaxed_acceptance(self, batch: VerifyInput) -> Tensor:
        """`[N]` acceptance of each token given those drafted after it."""
        exact = exact_acceptance(batch)
        return exact + self._forgiveness(batch, exact)

    def verify(self, batch: VerifyInput) -> Verification:
        if batch.span_maxima is not None:
            verification = self._verify_greedy(batch)
            self.pay(batch, verification)
            return verification
        exact = exact_acceptance(batch)
        matches = exact > 0 if batch.all_greedy else batch.uniforms(Purpose.ACCEPT) < exact
        agrees = _of_tokens(batch, self._windows(batch, matches)[:, :, 1:].all(dim=2))
        # Behind a mismatch that disagreement follows nothing is looked at.
        reach = leading_run(batch, matches | agrees)
        forgiveness = self._forgiveness(
            batch, exact, batch.index_in_draft <= reach[batch.request_of]
        )
        forgiven = ~matches & (forgiveness > 0) & agrees
        accepted = leading_run(batch, matches | forgiven)
        # Tokens in a window were accepted with the mismatch before it: no price of their own.
        priced = batch.index_in_draft <= accepted[batch.request_of]
        priced &= ~self._follows_a_mismatch(batch, forgiven)
        extra = torch.where(priced, forgiveness, torch.zeros_like(forgiveness))
        verification = assemble(batch, accepted, draw_next(batch, accepted, self.residual), extra)
        self.pay(batch, verification)
        return verification

    def _verify_greedy(self, batch: VerifyInput) -> Verification:
        """Greedy requests on the host."""
        rows = mismatches(batch, self.exact_requests(batch), self.options.window_size)
        count = min(self.options.entropy_top_k, batch.target_logits.shape[1])
        stands = decide(batch, rows, "undecided", count, self.options.entropy_threshold)
        return lay_out(batch, rows, stands)

    def accepted_law(self, batch: VerifyInput) -> Tensor:
        """Walks the draft with the probability of each number of window tokens still owed."""
        size, width = self.options.window_size, batch.max_num_draft
        exact = exact_acceptance(batch)
        inside = batch.index_in_draft + size < batch.num_draft[batch.request_of]
        gate = self._forgivable(batch, inside).to(exact.dtype)
        law = exact.new_zeros(len(batch.num_draft), width + 1)
        owed = exact.new_zeros(len(batch.num_draft), size + 1)
        owed[:, 0] = 1
        accept, gate = (self._windows(batch, values)[:, :, 0] for values in (exact, gate))
        for column in range(width):
            a, forgivable = accept[:, column], gate[:, column]
            # Past the end of a draft nothing is owed, windows fit in it, and a is 0.
            law[:, column] += owed[:, 0] * (1 - a) * (1 - forgivable)
            for left in range(1, size + 1):  # a window fails: its mismatch was the end
                if column - 1 - (size - left) >= 0:
                    law[:, column - 1 - (size - left)] += owed[:, left] * (1 - a)
            moved = torch.zeros_like(owed)
            moved[:, 0] = owed[:, 0] * a
            moved[:, :-1] += owed[:, 1:] * a.unsqueeze(1)
            moved[:, size] += owed[:, 0] * (1 - a) * forgivable
            owed = moved
        law[:, width] += owed[:, 0]
        return law

    def _forgiveness(
        self, batch: VerifyInput, exact: Tensor, among: Tensor | None = None
    ) -> Tensor:
        """`[N]` probability that each token is a mismatch that is forgiven.

        Args:
            batch: The step.
            exact: `[N]` what the exact rule accepts with.
            among: `[N]` bool, tokens that it is asked about: 0 for others. None: about all.
        """
        agrees = self._windows(batch, exact)[:, :, 1:].prod(dim=2)
        forgiveness = (1 - exact) * _of_tokens(batch, agrees)
        asked = forgiveness > 0
        if among is not None:
            asked &= among
        forgivable = self._forgivable(batch, asked)
        return torch.where(forgivable, forgiveness, torch.zeros_like(forgiveness))

    def _forgivable(self, batch: VerifyInput, among: Tensor) -> Tensor:
        """`[N]` bool, those of some tokens whose mismatch may be forgiven at all."""
        among = among & batch.allowed
        exact = self.exact_requests(batch)
        if exact is not None:
            among &= ~exact[batch.request_of]
        count = min(self.options.entropy_top_k, batch.target_logits.shape[1])
        least = self.options.entropy_threshold
        if is_compiled(batch.target_logits) and not batch.all_greedy:
            ids, p = batch.draft_token_ids, batch.draft_token_probability
            return undecided_rows(batch.target_logits, ids, p, among, count, least)

        def undecided(rows: Tensor) -> Tensor:
            best = largest_entries(batch.target_logits, rows, count)
            p = (best - batch.target_log_normaliser_at(rows).unsqueeze(1)).exp()
            return torch.special.entr(p).sum(dim=1) >= least

        return replace_rows(among, among, undecided)

    def _windows(self, batch: VerifyInput, values: Tensor) -> Tensor:
        """`[R, K+1, 1 + window]` each token's value and those after it, 0 past the draft's end."""
        width = batch.max_num_draft + 1 + self.options.window_size
        table = values.new_zeros(len(batch.num_draft), width)
        table[batch.request_of, batch.index_in_draft] = values
        return table.unfold(1, self.options.window_size + 1, 1)

    def _follows_a_mismatch(self, batch: VerifyInput, forgiven: Tensor) -> Tensor:
        """`[N]` bool, tokens in the window after a forgiven one."""
        table = self._windows(batch, forgiven)[:, :, 0]
        before = torch.nn.functional.pad(table, (self.options.window_size, 0))
        return _of_tokens(batch, before.unfold(1, self.options.window_size, 1).any(dim=2))


def _of_tokens(batch: VerifyInput, table: Tensor) -> Tensor:
    """`[N]` entries of a `[R, K or wider]` table."""
    return table[batch.request_of, batch.index_in_draft]
