"""Proposers draft tokens. Subclass `Proposer`, register an entry point, serve.

Shapes: R requests in the step, K the most tokens drafted for any of them,
V the vocabulary, H the hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Flag, auto
from typing import TYPE_CHECKING, ClassVar

from .length_control import RequestKeys, Signals
from .options import PluginOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from .context import EngineContext, ModelFacts
    from .device_drafting import DeviceDraft, DeviceDraftInput, DeviceStepStates
    from .draft_probabilities import DraftProbabilities
    from .length_control import LengthController
    from .target_model import TargetModel
    from .target_rows import TargetRows


class ProposerOptions(PluginOptions):
    """Options of one proposer: the keys it accepts beside `method` and `num_speculative_tokens`."""


class Needs(Flag):
    """What a proposer must be given. Only what is named here is collected.

    The token history always comes along.
    """

    HISTORY = 0
    #: Final hidden state at the last verified position of each request, `[R, H]`.
    HIDDEN_STATES = auto()
    #: Key/value slots for `num_speculative_tokens` positions past the verified tokens,
    #: in the target's own cache. Writing there without this corrupts other requests.
    LOOKAHEAD_SLOTS = auto()
    #: The `cache_salt` each request came with, so that state shared between
    #: requests can be kept apart as vLLM keeps its prefix cache apart.
    CACHE_SALT = auto()
    #: `Proposer.follow` (where drafts are made on the device `follow_on_device`) is called in
    #: every step, with hidden states after `Proposer.layers`.
    LAYER_STATES = auto()
    #: The target's logits of the last verification, past the token it ended with.
    TARGET_LOGITS = auto()
    #: The target's own layers, run over its own cache (`TargetModel`). Engines whose layers
    #: cannot be run apart are refused at start. Drafts go to lookahead slots.
    TARGET_LAYERS = 32 | LOOKAHEAD_SLOTS


@dataclass(frozen=True, slots=True)
class StepStates:
    """What one engine step computed, drafting or not: every prompt part and every verification.

    The T tokens of the step lie end to end, request by request; rejected draft tokens are
    among them, and what is kept of those is overwritten when their positions come again.

    Attributes:
        request_ids: `[R]` requests of the step, in row order.
        rows: `[R]` int64, for `TargetModel.sequences`.
        num_scheduled: `[R]` int64, tokens of each; sums to T.
        num_verified: `[R]` int64, how many of them stand: all but the rejected draft tokens.
        num_draft: `[R]` int64, draft tokens among them, its last ones.
        emitted: `[R]` tokens each request emitted; empty where a prompt is not read yet.
        token_ids: `[T]` int64 on the device.
        positions: `[T]` int64 on the device.
        layer_states: By number of layers run, `[T, H]` hidden states after that many layers,
            before any norm. `num_layers` itself: what the final norm reads.
        temperatures: `[R]` float32 on the host, 0 = greedy.
        streams: `[R]` int64 on the host, random stream of each request.
    """

    request_ids: Sequence[str]
    rows: NDArray[np.int64]
    num_scheduled: NDArray[np.int64]
    num_verified: NDArray[np.int64]
    num_draft: NDArray[np.int64]
    emitted: Sequence[Sequence[int]]
    token_ids: Tensor
    positions: Tensor
    layer_states: Mapping[int, Tensor]
    temperatures: NDArray[np.float32]
    streams: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DraftInput:
    """One drafting step, for the R requests that have just sampled a token.

    Attributes:
        request_ids: Names, stable over a request's life; the key for any state kept.
        token_history: `[rows, max_model_len]` int32 on the host, a view of the engine's
            own table. Row `rows[i]`, columns below `num_tokens[i]`, are request i's
            prompt and verified output. Everything else in it is stale: do not read it.
        rows: `[R]` int64, row of each request in `token_history`. Rows move between steps.
        num_tokens: `[R]` int64, prompt plus verified output tokens.
        num_prompt_tokens: `[R]` int64.
        max_draft: `[R]` int64, most tokens this request may draft now; 0 means none. Already
            the minimum of the configured, the requested, the length controller's and what
            the model length and `max_tokens` leave room for.
        temperatures: `[R]` float32 on the host, 0 = greedy.
        streams: `[R]` int64 on the host, random stream of each request
            (see `random_numbers`; use `Purpose.DRAFT`).
        hidden_states: `[R, H]` on the device with `Needs.HIDDEN_STATES`, else None.
        cache_salts: `[R]` with `Needs.CACHE_SALT`, else None. No salt is "".
        length_control: Asked after each token by proposers that draft one by one.
        target_rows: With `Needs.TARGET_LOGITS`: the target's laws at the positions to be drafted,
            as far as the last verification computed them. None: it computed none for anybody.
            Valid during `propose`.
    """

    request_ids: Sequence[str]
    token_history: NDArray[np.int32]
    rows: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    num_prompt_tokens: NDArray[np.int64]
    max_draft: NDArray[np.int64]
    temperatures: NDArray[np.float32]
    streams: NDArray[np.int64]
    hidden_states: Tensor | None
    cache_salts: Sequence[str] | None
    length_control: LengthController
    target_rows: TargetRows | None = None

    @property
    def last_token_ids(self) -> NDArray[np.int32]:
        """`[R]` the token each draft continues from."""
        return self.token_history[self.rows, self.num_tokens - 1]

    @property
    def keys(self) -> RequestKeys:
        """What length controllers are asked with."""
        return RequestKeys(self.request_ids, self.streams, self.num_tokens)


@dataclass(frozen=True, slots=True)
class Draft:
    """What a proposer returns.

    Attributes:
        token_ids: `[R, K]` integers, numpy on the host or a tensor. -1 = none. A row's
            tokens come first and its -1s last; at most `max_draft[i]` tokens. Never
            pad with a guess: every token costs verification.
        probabilities: The law each token was drawn from, `values` `[R, K, M]`. None means
            the draft was a choice, not a draw (one-hot): exact whatever chose it.
        sources: Names of who may have drafted, for proposers that combine several.
        source_of: `[R, K]` int8, index into `sources`. None: the proposer itself.
    """

    token_ids: NDArray[np.integer] | Tensor
    probabilities: DraftProbabilities | None = None
    sources: tuple[str, ...] = ()
    source_of: NDArray[np.int8] | None = None


class Proposer(ABC):
    """Drafts tokens for every request of a step.

    The life of one: `check` in the front end, before anything loads; the constructor in each
    worker; `load` when the target's weights are there; `warm_up` before the first request;
    then `follow`, `propose` and `finish` as requests come and go.
    """

    Options: ClassVar[type[ProposerOptions]] = ProposerOptions
    needs: ClassVar[Needs] = Needs.HISTORY
    #: What it tells a length controller while it drafts.
    signals: ClassVar[Signals] = Signals.NONE

    def __init__(self, options: ProposerOptions, context: EngineContext) -> None:
        self.options = options
        self.context = context

    @classmethod
    def check(cls, options: ProposerOptions, facts: ModelFacts) -> None:
        """Refuse what the options' types cannot: layers that do not exist, missing files.

        Raises:
            SpecPluginsError: With one message that says what to do.
        """

    @classmethod
    def needs_for(cls, options: ProposerOptions) -> Needs:
        """What this proposer needs with these options; `needs` unless overridden."""
        del options
        return cls.needs

    @classmethod
    def signals_for(cls, options: ProposerOptions) -> Signals:
        """What it tells a length controller with these options; `signals` unless overridden."""
        del options
        return cls.signals

    @classmethod
    def keeps_rejected_drafts(cls, options: ProposerOptions) -> bool:
        """Whether later drafts depend on draft tokens behind a rejection, as drawn.

        Such a proposer is refused beside verifiers that look at those tokens
        (`Verifier.looks_ahead`): what they decide would make the tokens unlike their law.
        """
        del options
        return False

    @classmethod
    def drafts_on_device(cls, options: ProposerOptions) -> bool:
        """Whether `propose_on_device` works with these options: asked where nothing may wait."""
        del options
        return False

    @classmethod
    def drafts_on_host(cls, options: ProposerOptions) -> bool:
        """Whether `propose` works with these options; else `propose_on_device` is asked always."""
        del options
        return True

    @classmethod
    def layers(cls, options: ProposerOptions, facts: ModelFacts) -> Sequence[int]:
        """With `Needs.LAYER_STATES`: the numbers of layers after which states are wanted."""
        del options, facts
        return ()

    def load(self, target: TargetModel) -> None:
        """Take references to the target, load own weights. No cache exists yet."""

    def follow(self, states: StepStates) -> None:
        """With `Needs.LAYER_STATES`: what a step computed, before `propose` is asked."""

    def follow_on_device(self, states: DeviceStepStates) -> None:
        """The same where `propose_on_device` is asked, without looking at a tensor's values."""
        raise NotImplementedError(f"{type(self).__name__} does not follow on the device.")

    def warm_up(self) -> None:
        """Compile and touch everything the first real step would otherwise wait for."""

    @abstractmethod
    def propose(self, batch: DraftInput) -> Draft:
        """Draft for every request with `max_draft > 0`."""

    def propose_on_device(self, batch: DeviceDraftInput) -> DeviceDraft:
        """Draft for every request with `max_draft > 0`, without looking at a tensor's values.

        Called instead of `propose` under asynchronous scheduling, where `drafts_on_device` says so,
        and everywhere where `drafts_on_host` denies.
        """
        raise NotImplementedError(f"{type(self).__name__} does not draft on the device.")

    def finish(self, request_ids: Sequence[str]) -> None:
        """Forget requests that finished, were aborted or preempted. A preempted one may return."""
