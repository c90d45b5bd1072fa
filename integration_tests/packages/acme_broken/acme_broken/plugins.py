"""Classes that are not what they are registered as."""

from __future__ import annotations

from pydantic import BaseModel

from vllm_spec_plugins import Draft, DraftInput, Proposer, VerifyInput, Verification, Verifier


class NotAProposer:
    def propose(self, batch: DraftInput) -> Draft:
        raise AssertionError("never asked")


class WithoutPropose(Proposer):
    pass


class Eagle3(Proposer):
    def propose(self, batch: DraftInput) -> Draft:
        raise AssertionError("never asked")


class WithOddOptions(Eagle3):
    class Options(BaseModel):
        pass


class WithoutGuarantee(Verifier):
    def verify(self, batch: VerifyInput) -> Verification:
        raise AssertionError("never asked")


an_instance = NotAProposer()
