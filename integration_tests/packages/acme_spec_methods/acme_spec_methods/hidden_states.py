"""A proposer that looks at the target's hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_spec_plugins import Draft, DraftInput, Needs, Proposer, ProposerOptions, EngineContext


class HiddenStates(Proposer):
    """Draft the token that came when the hidden state was most like now."""

    needs = Needs.HIDDEN_STATES

    def __init__(self, options: ProposerOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        # Of each request, what was seen in each step: the state, and the token it led to.
        self.seen: dict[str, list[tuple[torch.Tensor, int]]] = {}

    def load(self, target) -> None:
        self.logits = target.module.compute_logits

    def propose(self, batch: DraftInput) -> Draft:
        assert batch.hidden_states is not None
        self.check_states(batch, batch.hidden_states)
        token_ids = np.full((len(batch.request_ids), 1), -1, dtype=np.int64)
        for i, name in enumerate(batch.request_ids):
            seen = self.seen.setdefault(name, [])
            state, last = batch.hidden_states[i].clone(), int(batch.last_token_ids[i])
            seen.append((state, last))
            # After an earlier token like the last one came the one seen next.
            following = [
                (torch.cosine_similarity(before, state, dim=0), token)
                for (before, was), (_, token) in zip(seen, seen[1:])
                if was == last
            ]
            if following and batch.max_draft[i]:
                token_ids[i, 0] = max(following)[1]
        return Draft(token_ids)

    def check_states(self, batch: DraftInput, hidden_states: torch.Tensor) -> None:
        """The state at the last verified position is the one that led to the last token."""
        likeliest = self.logits(hidden_states).argmax(dim=-1).cpu().numpy()
        greedy = batch.temperatures == 0
        if (likeliest != batch.last_token_ids)[greedy].any():
            raise ValueError("the hidden states are not those that led to the last tokens")

    def finish(self, request_ids: Sequence[str]) -> None:
        for name in request_ids:
            self.seen.pop(name, None)
