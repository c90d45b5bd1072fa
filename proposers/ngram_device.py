"""`ngram_adaptive` with `matching: device`: drafts on the device, and never asks the host.

The longest match of the text's last tokens is looked up anew in every step (`suffix_match`); the
latest place it occurred at gives the draft. How far to trust it is estimated from four things: how
long the match is, how often it occurred, whether the place before the latest went on with the same
tokens, and the share of the request's recent tokens that were predicted. A draft ends where it is
no longer expected to be accepted, as on the host.

Against the host's index this knows no votes of all places, no trigrams, and does not search again
within a draft. Where places disagree it says so little that it drafts less precisely.

Shapes: R requests, S slots, K draft tokens, C = K + 1 predicted ones: a step emits up to C tokens,
and each is to be compared with what was predicted for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_spec_plugins.device_drafting import DeviceDraft, DeviceDraftInput

from ..triton_kernels.suffix_match import NO_TOKEN, suffix_match  # noqa: TID252

#: Weights of `describe`'s features. Fitted by `benchmarks/ngram_traces.py --fit` on the three
#: development traces, each with the same total weight.
PRIOR = (-0.44, 0.58, -0.14, 1.08, 0.9, -1.13)

#: Share of `recent` that each token replaces: about the last thirty count.
FORGETTING = 0.03
#: `recent` of a request that has only begun.
RECENT_AT_FIRST = 0.3


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the match of each request says comes next, and what is known of its trustworthiness.

    Attributes:
        token_ids: `[R, C]` int32, what followed at the latest place, read on in itself past the
            end of the text; -1 with no match.
        same: `[R, C]` bool, whether the place before the latest went on alike, up to and with
            this token.
        other: `[R, C]` bool, whether it went on otherwise. Neither, if there is no such place.
        length: `[R]` float32, tokens matched.
        count: `[R]` float32, how often they occurred.
    """

    token_ids: Tensor
    same: Tensor
    other: Tensor
    length: Tensor
    count: Tensor


def predict(
    token_ids: Tensor,
    slots: Tensor,
    num_tokens: Tensor,
    *,
    min_match: int,
    max_match: int,
    num_predicted: int,
) -> Prediction:
    """Look up what follows the text of each request.

    Args:
        token_ids: `[S, L]` int32.
        slots: `[R]` int64.
        num_tokens: `[R]` int64.
        min_match: Shortest match, in tokens.
        max_match: Longest match compared, in tokens.
        num_predicted: C.
    """
    match = suffix_match(
        token_ids,
        num_tokens,
        min_match=min_match,
        max_match=max_match,
        num_draft=num_predicted,
        rows=slots,
        repeat=True,
        # On the CPU the lengths are on the host.
        max_num_tokens=_longest(num_tokens) if num_tokens.device.type == "cpu" else None,
    )
    earlier = match.earlier_positions.long().unsqueeze(1)  # [R, 1]
    steps = torch.arange(num_predicted, device=token_ids.device)
    steps = steps % (num_tokens.unsqueeze(1) - earlier).clamp(min=1)  # [R, C]
    place = (earlier + steps).clamp(0, token_ids.shape[1] - 1)
    alike = token_ids[slots.unsqueeze(1), place] == match.token_ids
    alike = alike.cumprod(dim=1) > 0
    exists = earlier >= 0
    return Prediction(
        match.token_ids,
        alike & exists,
        ~alike & exists,
        match.lengths.float(),
        match.counts.float(),
    )


def describe(prediction: Prediction, recent: Tensor) -> Tensor:
    """`[R, C, 6]` float32 features of each predicted token, given that those before it are right.

    Args:
        prediction: Of the step.
        recent: `[R]` float32, share of each request's latest tokens that were predicted.
    """
    num_predicted = prediction.token_ids.shape[1]
    column = torch.arange(num_predicted, device=recent.device)
    # A match grows by each token that proves right; how often the longer one occurred is unknown.
    log_length = (prediction.length.unsqueeze(1) + column).clamp(min=1).log()  # [R, C]
    log_count = prediction.count.clamp(min=1).log().unsqueeze(1) * (column == 0)
    return torch.stack(
        [
            torch.ones_like(log_length),
            log_length,
            log_count,
            (recent - RECENT_AT_FIRST).unsqueeze(1) * log_length,
            prediction.same.float(),
            prediction.other.float(),
        ],
        dim=2,
    )


def cut(
    prediction: Prediction, acceptance: Tensor, threshold: float | Tensor, max_draft: Tensor
) -> Tensor:
    """`[R, K]` int32, the predicted tokens up to where they are no longer expected to be accepted.

    Args:
        prediction: Of the step.
        acceptance: `[R, C]` float32, of each token, given that those before it are accepted.
        threshold: Least expected acceptance of a token with all before it; a number or `[R, 1]`.
        max_draft: `[R]` integers.
    """
    num_draft = acceptance.shape[1] - 1
    column = torch.arange(num_draft, device=acceptance.device)
    keep = acceptance[:, :num_draft].cumprod(dim=1) >= threshold
    keep &= column < max_draft.unsqueeze(1)
    return torch.where(keep, prediction.token_ids[:, :num_draft], NO_TOKEN)


def updated_share(recent: Tensor, num_right: Tensor, has_wrong: Tensor) -> Tensor:
    """`recent` after some tokens that were predicted and, with `has_wrong`, one that was not.

    Args:
        recent: `[R]` float32.
        num_right: `[R]` integers.
        has_wrong: `[R]` bool.
    """
    recent = 1 - (1 - recent) * (1 - FORGETTING) ** num_right
    return torch.where(has_wrong, recent * (1 - FORGETTING), recent)


class NgramDevice:
    """Drafts for slots of texts on the device, and remembers by slot what it predicted.

    No operation here waits for the device, on one that is not the CPU; memory is given out once.

    Args:
        num_slots: S.
        num_speculative_tokens: K.
        min_match: Shortest match to draft from, in tokens.
        max_match: Longest match compared, in tokens.
        min_acceptance: Least expected acceptance of a drafted token, with all before it.
        device: Where the texts are.
    """

    def __init__(
        self,
        num_slots: int,
        num_speculative_tokens: int,
        *,
        min_match: int,
        max_match: int,
        min_acceptance: float,
        device: torch.device,
    ) -> None:
        self._num_predicted = num_speculative_tokens + 1
        self._min_match, self._max_match = min_match, max_match
        self._threshold = min_acceptance
        self._weights = torch.tensor(PRIOR, device=device)
        #: `[S]` share of the latest tokens that were predicted.
        self._recent = torch.zeros(num_slots, device=device)
        #: `[S, C]` what was predicted in the slot's last step, and `[S]` how long its text was.
        self._predicted = torch.full(
            (num_slots, self._num_predicted), NO_TOKEN, dtype=torch.int32, device=device
        )
        self._num_tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)

    def propose(self, batch: DeviceDraftInput) -> DeviceDraft:
        """Draft for every request of a step."""
        prediction, features = self.look(batch)
        acceptance = torch.sigmoid(features @ self._weights)  # [R, C]
        return DeviceDraft(cut(prediction, acceptance, self._threshold, batch.max_draft))

    def warm_up(self, max_model_len: int) -> None:
        """Compile what a step launches, for texts of this many columns."""
        one = torch.ones(1, dtype=torch.int64, device=self._recent.device)
        self.propose(
            DeviceDraftInput(
                token_ids=torch.zeros(
                    1, max_model_len, dtype=torch.int32, device=self._recent.device
                ),
                slots=0 * one,
                fresh=one > 0,
                num_tokens=min(4, max_model_len) * one,
                num_prompt_tokens=one,
                max_draft=one,
                temperatures=(0 * one).float(),
                streams=0 * one,
                num_speculative_tokens=self._num_predicted - 1,
                rows=np.zeros(1, dtype=np.int64),
                is_fresh=np.ones(1, dtype=np.bool_),
                most_tokens=np.array([min(4, max_model_len)]),
                temperatures_on_host=np.zeros(1, dtype=np.float32),
            )
        )

    def look(self, batch: DeviceDraftInput) -> tuple[Prediction, Tensor]:
        """Learn what came of the last prediction, and predict: with features `[R, C, 6]`."""
        recent = self._learn(batch)
        prediction = predict(
            batch.token_ids,
            batch.slots,
            batch.num_tokens,
            min_match=self._min_match,
            max_match=self._max_match,
            num_predicted=self._num_predicted,
        )
        self._recent.index_copy_(0, batch.slots, recent)
        self._predicted.index_copy_(0, batch.slots, prediction.token_ids.to(torch.int32))
        self._num_tokens.index_copy_(0, batch.slots, batch.num_tokens)
        return prediction, describe(prediction, recent)

    def _learn(self, batch: DeviceDraftInput) -> Tensor:
        """`[R]` the share of the requests' latest tokens that were predicted.

        Up to the first token that was not: nothing was predicted for those after it.
        """
        before = torch.where(batch.fresh, batch.num_tokens, self._num_tokens[batch.slots])
        recent = torch.where(batch.fresh, RECENT_AT_FIRST, self._recent[batch.slots])
        column = torch.arange(self._num_predicted, device=before.device)
        place = before.unsqueeze(1) + column  # [R, C]
        last = (batch.num_tokens - 1).clamp(min=0).unsqueeze(1)
        came = batch.token_ids[batch.slots.unsqueeze(1), torch.minimum(place, last)]
        is_new = place < batch.num_tokens.unsqueeze(1)
        right = (came == self._predicted[batch.slots]) & is_new
        num_right = right.cumprod(dim=1).sum(dim=1)
        return updated_share(recent, num_right, num_right < is_new.sum(dim=1))


def _longest(num_tokens: Tensor) -> int:
    return int(num_tokens.max()) if len(num_tokens) else 0
