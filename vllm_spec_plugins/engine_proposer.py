"""Proposers that let one of vLLM's own methods draft, and change what it drafts with."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NoReturn

from .proposer import DraftInput, Proposer

if TYPE_CHECKING:
    from .draft_head import DraftHead
    from .target_model import LanguageModelHead


class EngineProposer(Proposer):
    """One of vLLM's methods under a name and with options of its own.

    `Options` are the plugin's; every other key of `--speculative-config` goes to vLLM's method.
    vLLM loads the draft model, keeps its cache and runs it. `propose`, `load`, `follow` and
    `warm_up` are not called, and a length controller has nothing to say: vLLM drafts
    `num_speculative_tokens` every time.
    """

    #: vLLM's name of the method.
    engine_method: ClassVar[str]

    def draft_head(self, head: LanguageModelHead) -> DraftHead | None:
        """The head to draft through, once the drafter's weights are there; None: its own.

        Overriding it is how a config is recognised as one that needs the drafter's head.

        Args:
            head: The drafter's own.
        """
        del head

    def propose(self, batch: DraftInput) -> NoReturn:
        del batch
        raise RuntimeError(f"vLLM's {self.engine_method} drafts, not {type(self).__name__}")
