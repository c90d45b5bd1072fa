"""A relaxed verifier."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from vllm_spec_plugins import AcceptanceRule, Guarantee, VerifierOptions, VerifyInput
from vllm_spec_plugins.acceptance_rule import token_acceptance


class LenientOptions(VerifierOptions):
    """Options of `Lenient`."""

    floor: float = Field(0.5, ge=0, le=1, description="Accept at least this often.")


class Lenient(AcceptanceRule):
    """Accept every draft token at least with the probability `floor`."""

    Options = LenientOptions
    guarantee = Guarantee.HEURISTIC

    def acceptance(self, batch: VerifyInput) -> Tensor:
        exact = token_acceptance(batch)
        return torch.clamp(exact, min=self.options.floor)
