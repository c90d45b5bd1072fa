"""`confidence`: draft on until a token was drafted that the draft itself gave a low probability.

The second of Kangaroo's two exits (Liu et al. 2404.18911): the draft ends with the first token
whose own probability under the draft is below a threshold. That token is kept and verified.
Leaving it out because of its probability would bias the text: what is left would no longer
have been drawn from q.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from .context import EngineContext
from .length_control import LengthController, LengthControlOptions, RequestKeys, Signals


class ConfidenceThresholdOptions(LengthControlOptions):
    threshold: float = Field(
        0.6, ge=0, le=1, description="a token less probable than this is the draft's last"
    )
    target_acceptance: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="adapt the threshold, starting from `threshold`, so that this share of each "
        "draft is accepted (Draft & Verify uses 0.9); default: the threshold stays as it is",
    )


class ConfidenceThreshold(LengthController):
    """Drafts until a token is less probable under the draft than a threshold, and keeps it.

    With a target acceptance, the threshold follows the rule of Draft & Verify (Zhang et al.
    2309.08168). After each verification, with m the running acceptance (0 at first) and t the
    threshold,

        m <- beta1 m + (1 - beta1) accepted / drafted
        s  = t + epsilon    if m < target
             t              if m >= target and the draft had its full length
             t - epsilon    otherwise
        t <- beta2 t + (1 - beta2) s

    with beta1 = 0.5, beta2 = 0.9 and epsilon = 0.01. There it is one text's; here, a step's
    requests count as one draft, and what was learned serves the next requests.
    """

    Options = ConfidenceThresholdOptions
    options: ConfidenceThresholdOptions
    needs = Signals.CONFIDENCES

    _BETA_1, _BETA_2, _EPSILON = 0.5, 0.9, 0.01

    def __init__(self, options: ConfidenceThresholdOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        self.threshold = options.threshold
        self._running_acceptance = 0.0

    def limits(self, requests: RequestKeys) -> NDArray[np.int64]:
        return np.full(
            len(requests.request_ids), self.context.facts.num_speculative_tokens, dtype=np.int64
        )

    def stop_after(
        self, requests: RequestKeys, step: int, confidences: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        del requests, step
        return confidences < self.threshold

    def observe(
        self,
        request_ids: Sequence[str],
        drafted: NDArray[np.int64],
        accepted: NDArray[np.int64],
    ) -> None:
        del request_ids
        target = self.options.target_acceptance
        if target is None:
            return
        share = float(accepted.sum() / drafted.sum())
        self._running_acceptance += (1 - self._BETA_1) * (share - self._running_acceptance)
        if self._running_acceptance < target:
            change = self._EPSILON
        elif (drafted == self.context.facts.num_speculative_tokens).all():
            change = 0.0
        else:
            change = -self._EPSILON
        # beta2 t + (1 - beta2)(t + change)
        self.threshold = min(max(self.threshold + (1 - self._BETA_2) * change, 0.0), 1.0)
