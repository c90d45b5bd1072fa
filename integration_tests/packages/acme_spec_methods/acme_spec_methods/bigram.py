"""A deterministic proposer: what followed the last token the last time."""

from __future__ import annotations

import numpy as np

from vllm_spec_plugins import Draft, DraftInput, Proposer


class Bigram(Proposer):
    """Continue as after the most recent earlier occurrence of the last token."""

    def propose(self, batch: DraftInput) -> Draft:
        width = int(batch.max_draft.max())
        token_ids = np.full((len(batch.request_ids), width), -1, dtype=np.int64)
        for i, (row, length) in enumerate(zip(batch.rows, batch.num_tokens)):
            history = batch.token_history[row, :length]
            [earlier] = np.nonzero(history[:-1] == history[-1])
            if len(earlier):
                start = earlier[-1] + 1
                follows = history[start : start + batch.max_draft[i]]
                token_ids[i, : len(follows)] = follows
        return Draft(token_ids)
