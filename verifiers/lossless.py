"""`lossless`: the target's law exactly, by the token rule or by block verification.

Token rule (Leviathan et al. 2211.17192, Chen et al. 2302.01318): accept x with probability
min(1, p(x)/q(x)); after the first rejection draw from norm([p - q]+); if all stand, draw a
bonus token from p.

Block verification (Sun et al. 2403.10444): the same law, never fewer accepted tokens in
expectation; see `block_verification`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from vllm_spec_plugins.acceptance_rule import AcceptanceRule, token_acceptance
from vllm_spec_plugins.nobodys_step import verify_nobodys_steps
from vllm_spec_plugins.verifier import Guarantee, Verification, VerifierOptions, VerifyInput

from ..triton_kernels.verify_fused import can_verify_fused, verify_fused  # noqa: TID252
from .block_verification import block_accepted_law, block_residual, capped_ratio, verify_block


class LosslessOptions(VerifierOptions):
    rule: Literal["token", "block"] = Field(
        "token",
        description="token: each draft token on its own. block: the draft as a whole, which "
        "accepts as many tokens or more, for one pass over the vocabulary per draft token.",
    )


class Lossless(AcceptanceRule):
    """Reproduces the target's law under every sampling option. The default of our proposers."""

    Options = LosslessOptions
    guarantee = Guarantee.LOSSLESS
    options: LosslessOptions

    @classmethod
    def looks_ahead(cls, options: VerifierOptions) -> bool:
        assert isinstance(options, LosslessOptions)
        return options.rule == "block"

    @classmethod
    def verifies_on_device(cls, options: VerifierOptions) -> bool:
        del options
        return True

    def warm_up(self) -> None:
        verify_nobodys_steps(self)

    def acceptance(self, batch: VerifyInput) -> Tensor:
        return token_acceptance(batch)

    def verify(self, batch: VerifyInput) -> Verification:
        if self.options.rule == "block":
            return verify_block(batch)
        if can_verify_fused(batch):
            return verify_fused(batch)
        return super().verify(batch)

    def accepted_law(self, batch: VerifyInput) -> Tensor:
        if self.options.rule == "block":
            return block_accepted_law(batch)
        return super().accepted_law(batch)

    def residual(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        if self.options.rule == "block":
            return block_residual(batch, rows, capped_ratio(batch))
        return super().residual(batch, rows)
