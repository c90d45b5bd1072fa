"""Length controllers replayed: what each would have drafted, on recorded drafts and step times.

Comparing controllers on a running engine takes a quiet machine and many texts: another draft
length is another text, and times vary. Here every draft is known in advance. At each position
of each text an engine drafted the longest draft after each exit and verified it, so a shorter
draft from there, or one that stops at a token of low confidence, has a known outcome; and every
step takes what such a step took on average. What is compared is then decisions alone.

After a draft with n accepted tokens the replay goes on n + 1 positions further in the recorded
text. Where the target samples, the accepted tokens may be others than those of the text; they
follow the same law.

Shapes: P texts, N positions of each, E exits, K most draft tokens, B batch sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vllm_spec_plugins.exit_selection import ExitController, ExitCosts, ExitSelection
from vllm_spec_plugins.length_control import LengthController, RequestKeys, Signals
from vllm_spec_plugins.step_cost import StepTime

#: Quantile of a kind of step's times that it is taken to take.
_TYPICAL = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class DraftTraces:
    """What drafts at every position of some texts came to.

    Attributes:
        exits: `[E]` layers drafted after.
        accepted: `[P, N, E]` of a draft of K tokens that starts there, accepted.
        confidences: `[P, N, E, K-1]` probability of each of its tokens under the draft, but the
            last: nobody asks for that.
        acceptance: `[P, N, E]` chance that a draft of the text's token there is accepted
            (`ExitSelection.observe`).
        agreement: `[P, N, E]` the same chance of one such draft.
        shadow_confidences: `[P, N, E]` probability of that draft.
    """

    exits: NDArray[np.int64]
    accepted: NDArray[np.uint8]
    confidences: NDArray[np.float16]
    acceptance: NDArray[np.float16]
    agreement: NDArray[np.float16]
    shadow_confidences: NDArray[np.float16]

    @property
    def most(self) -> int:
        """K."""
        return self.confidences.shape[-1] + 1

    def save(self, path: Path) -> None:
        """Write a file of NumPy's."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> DraftTraces:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


@dataclass(frozen=True, slots=True, eq=False)
class StepTimes:
    """What steps of an engine take, and what it tells controllers before it serves. Seconds.

    Attributes:
        batch_sizes: `[B]` requests in the step, rising.
        verify: `[B, K+1]` of a step whose requests drafted so many tokens each, without drafting.
        draft: `[B, E, K+1]` of drafting as many; `[:, :, 0]` is 0.
        noise: `[S]` times of single steps over the average of their kind. Controllers are told
            disturbed times; results are counted in undisturbed ones.
        pass_tokens: `[T]` as for `LengthController.set_pass_times`.
        pass_seconds: `[T]`.
        exit_costs: As timed before serving, for `ExitSelection`.
    """

    batch_sizes: NDArray[np.int64]
    verify: NDArray[np.float64]
    draft: NDArray[np.float64]
    noise: NDArray[np.float64]
    pass_tokens: NDArray[np.int64]
    pass_seconds: NDArray[np.float64]
    exit_costs: ExitCosts

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> StepTimes:
        """From rows of `benchmarks/length_traces.py times`.

        A kind of step takes the lower quartile of its times: other work on the machine makes
        steps slower and nothing makes them faster. What is left of that is smoothed, or the best
        fixed length would be the one whose times were least disturbed: each draft token takes
        the same, and to verify more tokens never takes less.

        Args:
            rows: All of one engine, whose exits are those of the traces or take their places.
        """
        steps = [row for row in rows if row["kind"] == "step"]
        (passes,) = (row for row in rows if row["kind"] == "passes")
        (costs,) = (row for row in rows if row["kind"] == "exit_costs")
        sizes = sorted({row["batch"] for row in steps})
        exits = sorted({row["exit_layer"] for row in steps})
        most = max(row["length"] for row in steps)
        verify = np.empty((len(sizes), most + 1))
        draft = np.zeros((len(sizes), len(exits), most + 1))
        noise = []
        for b, size in enumerate(sizes):
            for length in range(most + 1):
                here = [r for r in steps if (r["batch"], r["length"]) == (size, length)]
                seconds = np.concatenate([r["seconds"] for r in here])
                verify[b, length] = np.quantile(seconds, _TYPICAL)
                noise.append(seconds / verify[b, length])
                if length:
                    of_exit = {r["exit_layer"]: r["drafting_seconds"] for r in here}
                    draft[b, :, length] = [np.quantile(of_exit[e], _TYPICAL) for e in exits]
            verify[b] = _rising(verify[b])
        for row in draft.reshape(-1, most + 1):
            row[1:] = _on_a_line(row[1:])
        return cls(
            np.array(sizes, dtype=np.int64),
            verify,
            draft,
            np.concatenate(noise),
            np.array(passes["num_tokens"], dtype=np.int64),
            np.array(passes["seconds"]),
            ExitCosts(
                np.array(costs["batch_sizes"], dtype=np.int64),
                *(np.array(costs[name]) for name in ("draft", "verify", "plain")),
            ),
        )

    def step(self, drafted: NDArray[np.int64], exit_: int) -> tuple[float, float]:
        """Verification and drafting of a step.

        Between batch sizes, and between numbers of draft tokens, times follow lines.

        Args:
            drafted: `[R]` tokens of each request.
            exit_: Index of the exit they were drafted after.
        """
        place = np.interp(len(drafted), self.batch_sizes, np.arange(len(self.batch_sizes)))
        low = int(place)
        share, high = place - low, min(low + 1, len(self.batch_sizes) - 1)
        lengths = np.arange(self.verify.shape[1])

        def at(table: NDArray[np.float64], length: float) -> float:
            below, above = (np.interp(length, lengths, table[row]) for row in (low, high))
            return float(below + share * (above - below))

        return (
            at(self.verify, float(drafted.mean())),
            at(self.draft[:, exit_], float(drafted.max())),
        )


def _rising(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest times that never fall (isotonic regression, by its min-max formula)."""
    count = len(seconds)
    return np.array(
        [
            max(min(seconds[a : b + 1].mean() for b in range(i, count)) for a in range(i + 1))
            for i in range(count)
        ]
    )


def _on_a_line(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest times that rise by the same each time."""
    x = np.arange(len(seconds))
    slope, start = np.polyfit(x, seconds, 1).tolist()
    return start + slope * x


@dataclass(slots=True)
class Replayed:
    """What a policy came to.

    Attributes:
        tokens: Emitted.
        seconds: All steps.
        drafted: Tokens drafted in each step, of one request on average.
    """

    tokens: int
    seconds: float
    drafted: list[float]

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """The requests of one step.

    Attributes:
        keys: `[R]` as for a length controller; a request's position is how many tokens it has.
        texts: `[R]` which recorded text each one writes.
        places: `[R]` index into the traces of the draft that starts now.
        room: `[R]` most tokens each may draft.
    """

    keys: RequestKeys
    texts: NDArray[np.int64]
    places: NDArray[np.int64]
    room: NDArray[np.int64]


class Policy(Protocol):
    """Decides what is drafted."""

    def draft(self, round_: Round) -> tuple[NDArray[np.int64], int]:
        """`[R]` tokens each request drafts, and after which exit, as an index."""
        ...

    def learn(self, round_: Round, drafted: NDArray[np.int64], accepted: NDArray[np.int64]) -> None:
        """Verdicts on drafts of a round."""
        ...

    def learn_time(self, step: StepTime, exit_: int) -> None:
        """What their step took; told when the next drafts are made."""
        ...

    def finish(self, request_ids: Sequence[str]) -> None:
        """Requests ended."""
        ...


def replay(
    policy: Policy,
    traces: DraftTraces,
    times: StepTimes,
    batch: int,
    passes: int = 1,
    seed: int = 0,
) -> Replayed:
    """Serve all texts, `batch` at a time; prompts cost nothing.

    Args:
        policy: Decides what is drafted.
        traces: The drafts.
        times: What steps take.
        batch: Requests at a time.
        passes: How often every text is served, by new requests each time.
        seed: Of the disturbance of times, and of the requests' random streams.
    """
    num_texts, length = traces.accepted.shape[:2]
    generator = np.random.default_rng(seed)
    waiting = list(range(num_texts * passes))[::-1]
    running: dict[int, int] = {}  # position of the last token of each request

    def next_round() -> Round:
        while waiting and len(running) < batch:
            running[waiting.pop()] = 0
        requests = np.array(list(running), dtype=np.int64)
        places = np.array(list(running.values()), dtype=np.int64)
        keys = RequestKeys([str(r) for r in running], requests + 1000 * seed, places + 1)
        # Every step emits one token beyond the accepted drafts, and all must fit.
        room = np.minimum(length - 2 - places, traces.most)
        return Round(keys, requests % num_texts, places, room)

    done = Replayed(0, 0.0, [])
    now = next_round()
    drafted, exit_ = policy.draft(now)
    while True:
        seconds, drafting = times.step(drafted, exit_)
        accepted = np.minimum(traces.accepted[now.texts, now.places, exit_], drafted)
        done.tokens += int(accepted.sum()) + len(drafted)
        done.seconds += seconds + drafting
        done.drafted.append(float(drafted.mean()))
        policy.learn(now, drafted, accepted)
        for request_id, place in zip(
            now.keys.request_ids, (now.places + accepted + 1).tolist(), strict=True
        ):
            running[int(request_id)] = place
        gone = [request for request, place in running.items() if place >= length - 1]
        for request in gone:
            del running[request]
        policy.finish([str(request) for request in gone])
        step = StepTime(
            len(drafted),
            len(drafted) + int(drafted.sum()),
            int(drafted.max()),
            seconds * float(generator.choice(times.noise)),
            drafting * float(generator.choice(times.noise)),
        )
        if not running and not waiting:
            return done
        now, made_after = next_round(), exit_
        drafted, exit_ = policy.draft(now)
        policy.learn_time(step, made_after)


@dataclass(frozen=True, slots=True)
class FixedPolicy:
    """The same exit and length always, as far as the text has room."""

    exit_: int
    length: int

    def draft(self, round_: Round) -> tuple[NDArray[np.int64], int]:
        return np.minimum(round_.room, self.length), self.exit_

    def learn(self, round_: Round, drafted: NDArray[np.int64], accepted: NDArray[np.int64]) -> None:
        pass

    def learn_time(self, step: StepTime, exit_: int) -> None:
        pass

    def finish(self, request_ids: Sequence[str]) -> None:
        pass


class ControllerPolicy:
    """A length controller, asked and told as `early_exit` and an engine do.

    Args:
        controller: New.
        traces: The drafts.
        times: What is told before serving.
        exit_: Index of the exit, where the controller does not choose it.
    """

    def __init__(
        self, controller: LengthController, traces: DraftTraces, times: StepTimes, exit_: int = 0
    ) -> None:
        self._controller, self._traces, self._exit = controller, traces, exit_
        self._exits = traces.exits.tolist()
        controller.set_pass_times(times.pass_tokens, times.pass_seconds)
        if isinstance(controller, ExitController):
            most = controller.context.facts.num_speculative_tokens
            capacity = controller.context.max_num_requests
            controller.set_exits(ExitSelection(self._exits, times.exit_costs, most, capacity))

    def draft(self, round_: Round) -> tuple[NDArray[np.int64], int]:
        control = self._controller
        limits = np.minimum(control.limits(round_.keys), round_.room)
        exit_ = self._exit
        if isinstance(control, ExitController):
            exit_ = self._exits.index(control.layer)
        drafted = np.zeros(len(limits), dtype=np.int64)
        going, width = np.flatnonzero(limits > 0), int(limits.max())
        for index in range(width):
            drafted[going] += 1
            if index + 1 == width:
                break
            on = limits[going] > index + 1
            if Signals.CONFIDENCES in control.needs:
                confidences = self._traces.confidences[
                    round_.texts[going], round_.places[going], exit_, index
                ]
                on &= ~control.stop_after(
                    round_.keys.select(going), index, confidences.astype(np.float32)
                )
            going = going[on]
            if not len(going):
                break
        return drafted, exit_

    def learn(self, round_: Round, drafted: NDArray[np.int64], accepted: NDArray[np.int64]) -> None:
        control, ids = self._controller, list(round_.keys.request_ids)
        had = np.flatnonzero(drafted)
        if len(had):
            control.observe([ids[i] for i in had.tolist()], drafted[had], accepted[had])
        if not isinstance(control, ExitController) or control.selection is None:
            return
        if control.selection.is_sampled(control.sample_every):
            of_request = np.repeat(np.arange(len(ids)), accepted + 1)
            offset = np.concatenate([np.arange(count + 1) for count in accepted.tolist()])
            where = round_.texts[of_request], round_.places[of_request] + 1 + offset
            control.selection.observe(
                ids,
                of_request,
                self._traces.acceptance[where].astype(np.float32),
                self._traces.agreement[where].astype(np.float32),
                self._traces.shadow_confidences[where].astype(np.float32),
            )

    def learn_time(self, step: StepTime, exit_: int) -> None:
        del exit_
        self._controller.observe_step_time(step)

    def finish(self, request_ids: Sequence[str]) -> None:
        self._controller.finish(request_ids)


@dataclass(frozen=True, slots=True)
class FixedChoice:
    """A fixed exit and length.

    Attributes:
        speed: Tokens per second.
        exit_: Index of the exit.
        length: Draft tokens.
    """

    speed: float
    exit_: int
    length: int


def best_fixed(
    traces: DraftTraces, times: StepTimes, batch: int, exits: Sequence[int], passes: int = 1
) -> FixedChoice:
    """The fastest in hindsight.

    Args:
        traces: The drafts.
        times: What steps take.
        batch: Requests at a time.
        exits: Indices of those to choose from.
        passes: As in `replay`.
    """
    found = [
        FixedChoice(
            replay(FixedPolicy(exit_, length), traces, times, batch, passes).speed, exit_, length
        )
        for exit_ in exits
        for length in range(times.verify.shape[1])
    ]
    return max(found, key=lambda choice: choice.speed)
