"""When a batch that would draft takes a step without drafts, to learn what that takes."""

from __future__ import annotations


class PlainSteps:
    """Now and then, where drafting is expected to pay by little.

    What a step without drafts takes can only be extrapolated from steps that all draft, and a
    little too much makes drafting seem to pay where it does not. Where the expected speed-up is
    small, one step drafts nothing after 8 steps, then after 16, then after every 32: in the long
    run a 32nd of what drafting gains, at most a fifth.
    """

    #: Expected speed-up above which nothing is tried: it would have to be wrong by a quarter.
    _CLOSE = 1.25
    _FIRST_WAIT, _LONGEST_WAIT = 8, 32

    def __init__(self) -> None:
        self._steps, self._wait = 0, self._FIRST_WAIT

    def is_due(self, speed_up: float) -> bool:
        """Whether nobody drafts in this step. Asked once for each step that would draft.

        Args:
            speed_up: Expected speed of drafting over that of not drafting.
        """
        if speed_up > self._CLOSE:
            return False
        self._steps += 1
        if self._steps < self._wait:
            return False
        self._steps, self._wait = 0, min(2 * self._wait, self._LONGEST_WAIT)
        return True
