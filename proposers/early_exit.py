"""`early_exit`: the target drafts for itself with its first layers and its own head.

LayerSkip (Elhoushi et al. 2404.16710) on a paged cache: a draft pass runs the first layers of
the target over the target's own keys and values, which it extends by lookahead slots, then its
final norm and head. No second model, no second cache. Verification runs all layers on the
drafted tokens and writes the same slots again.

Tokens are chosen (one-hot) or drawn with their law kept; both are exact, and drawn ones are
accepted as often as min(p, q) allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field

from vllm_spec_plugins import draft_vocabulary
from vllm_spec_plugins.device_drafting import DeviceDraft
from vllm_spec_plugins.draft_head import DraftHead
from vllm_spec_plugins.draft_sampling import DraftLaws, Draws, draw, token_ids_of
from vllm_spec_plugins.draft_vocabulary import DraftVocabularyOptions
from vllm_spec_plugins.errors import ConfigError
from vllm_spec_plugins.exit_selection import ExitController, ExitCosts, ExitSelection
from vllm_spec_plugins.length_control import Signals
from vllm_spec_plugins.proposer import Draft, DraftInput, Needs, Proposer, ProposerOptions
from vllm_spec_plugins.random_numbers import Purpose, uniforms

from .exit_adapter import ExitAdapter
from .exit_passes import AdaptedExit, DeepeningExits, DraftStep, ExitPass, SingleExit
from .exit_timing import measure_costs
from .shadow_tokens import shadow_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from vllm_spec_plugins.context import EngineContext, ModelFacts
    from vllm_spec_plugins.device_drafting import DeviceDraftInput, DeviceStepStates
    from vllm_spec_plugins.draft_sampling import MostLikely
    from vllm_spec_plugins.proposer import StepStates
    from vllm_spec_plugins.target_model import LayerStack, PagedSequences, TargetModel


class EarlyExitOptions(ProposerOptions):
    exit_layer: int | float | Literal["auto"] = Field(
        "auto",
        description="Draft with so many of the target's first layers; a number between 0 and 1 "
        'is a share of them. "auto" measures on the text being served which exit pays most.',
    )
    exit_candidates: tuple[int, ...] | None = Field(
        None,
        description="What auto chooses from, numbers of layers; default: up to 8, from a sixteenth "
        "to three quarters of the layers, the denser the shallower.",
    )
    exit_layers: tuple[int, ...] | None = Field(
        None,
        description="Several exits instead of one, from shallow to deep: each token leaves at "
        "the first that is sure enough of it.",
    )
    exit_confidence: float = Field(
        0.6,
        gt=0,
        le=1,
        description="With exit_layers: probability of the most likely token from which an exit "
        "is sure enough.",
    )
    adapter: str | None = Field(
        None,
        description="Trained block between exit and head, written by `vllm-spec calibrate "
        "adapter`. It says after which layer it belongs.",
    )
    draft_sample_method: Literal["probabilistic", "greedy"] = Field(
        "probabilistic",
        description="For requests with a temperature: draw draft tokens and keep their law, or "
        "take the most likely ones.",
    )
    draft_vocabulary: DraftVocabularyOptions | None = Field(
        None,
        description="Draft only tokens of a ranked list: a file written by `vllm-spec calibrate "
        'vocab`, or {"file": ..., "size": ..., "dynamic_tokens": ...}.',
    )
    skip_layers: tuple[int, ...] = Field(
        (), description="Layers, counted from 0, that a draft pass leaves out."
    )
    skip_attention: tuple[int, ...] = Field(
        (), description="Layers of which a draft pass leaves out the attention."
    )
    skip_ffn: tuple[int, ...] = Field(
        (), description="Layers of which a draft pass leaves out the feed-forward network."
    )


class EarlyExit(Proposer):
    """Drafts with the target's first layers, its head and its own paged cache."""

    Options = EarlyExitOptions
    options: EarlyExitOptions
    needs = Needs.TARGET_LAYERS
    signals = Signals.CONFIDENCES | Signals.EXITS

    #: With auto and a length controller that does not choose exits itself, the exits are
    #: compared in one of so many steps, after the first few.
    COMPARE_EVERY = 8

    def __init__(self, options: EarlyExitOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        self._exits = plan(options, context.facts.num_layers)
        self._draws = options.draft_sample_method == "probabilistic"
        #: Whether every token of the round is the most likely one.
        self._all_chosen = False
        self._laws = DraftLaws()
        #: One for each exit that can be chosen; tokens choose among `exit_layers` themselves.
        self._passes: dict[int, ExitPass] = {}
        self._adapter: ExitAdapter | None = None
        self._draft_head: DraftHead | None = None
        self._selection: ExitSelection | None = None
        self._controller: ExitController | None = None

    @classmethod
    def check(cls, options: ProposerOptions, facts: ModelFacts) -> None:
        assert isinstance(options, EarlyExitOptions)
        exits = plan(options, facts.num_layers)
        for key in ("skip_layers", "skip_attention", "skip_ffn"):
            for layer in getattr(options, key):
                if not 0 <= layer < exits.layers[-1]:
                    raise ConfigError(
                        f"early_exit: {key} names layer {layer}, but a draft runs the layers 0 to "
                        f"{exits.layers[-1] - 1}."
                    )
        if set(range(exits.layers[0])) <= set(options.skip_layers):
            raise ConfigError("early_exit: skip_layers leaves no layer to draft with.")
        if options.adapter is not None:
            from .exit_adapter import AdapterCard

            AdapterCard.read(options.adapter).check(facts, exits.layers[0])
        if options.draft_vocabulary is not None:
            draft_vocabulary.check(options.draft_vocabulary, facts)

    @classmethod
    def needs_for(cls, options: ProposerOptions) -> Needs:
        assert isinstance(options, EarlyExitOptions)
        follows = options.adapter is not None or chooses(options)
        return cls.needs | Needs.LAYER_STATES if follows else cls.needs

    @classmethod
    def signals_for(cls, options: ProposerOptions) -> Signals:
        assert isinstance(options, EarlyExitOptions)
        if options.adapter is not None or options.exit_layers is not None:
            return Signals.CONFIDENCES
        return cls.signals

    @classmethod
    def drafts_on_device(cls, options: ProposerOptions) -> bool:
        assert isinstance(options, EarlyExitOptions)
        fixed = not chooses(options) and options.exit_layers is None
        vocabulary = options.draft_vocabulary
        return fixed and (vocabulary is None or not draft_vocabulary.depends_on_text(vocabulary))

    @classmethod
    def layers(cls, options: ProposerOptions, facts: ModelFacts) -> Sequence[int]:
        assert isinstance(options, EarlyExitOptions)
        return (*plan(options, facts.num_layers).layers, facts.num_layers)

    def load(self, target: TargetModel) -> None:
        self._target = target
        options, exits = self.options, self._exits
        if options.draft_vocabulary is not None:
            self._draft_head = DraftHead(
                target.head,
                options.draft_vocabulary,
                self.context.device,
                self.context.max_num_requests,
            )
        if exits.per_token:
            bounds = zip((0, *exits.layers[:-1]), exits.layers, strict=True)
            stacks = [self._stack(start, stop) for start, stop in bounds]
            sure = [options.exit_confidence] * (len(stacks) - 1)
            self._passes = {exits.layers[0]: DeepeningExits(target, stacks, sure, self._logits)}
        elif options.adapter is not None:
            self._adapter = ExitAdapter(options.adapter, target)
            stack = self._stack(0, exits.layers[0])
            self._passes = {exits.layers[0]: AdaptedExit(target, stack, self._adapter, self._read)}
        else:
            self._passes = {
                layer: SingleExit(target, self._stack(0, layer), self._read)
                for layer in exits.layers
            }

    def _stack(self, start: int, stop: int) -> LayerStack:
        options = self.options
        return self._target.layers(
            start,
            stop,
            skip_layers=options.skip_layers,
            skip_attention=options.skip_attention,
            skip_ffn=options.skip_ffn,
        )

    def _logits(self, hidden: Tensor, requests: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """The head: whole, or the rows of the draft vocabulary."""
        if self._draft_head is None:
            return self._target.head.logits(hidden), None
        return self._draft_head.logits(hidden, requests)

    def _read(
        self, hidden: Tensor, requests: NDArray[np.int64]
    ) -> tuple[Tensor | MostLikely, Tensor | None]:
        """The same, or what of it is needed where the round's tokens are all choices."""
        if self._draft_head is None:
            return self._target.head.logits(hidden), None
        return self._draft_head.read(hidden, requests, all_chosen=self._all_chosen)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run a draft step of every batch size once (kernels compile by shape), time the exits."""
        facts, device = self.context.facts, self.context.device
        most = self.context.max_num_requests
        powers = [1 << i for i in range(most.bit_length()) if 1 << i <= most]
        for size in sorted({*powers, most}):
            self._begin_warm_up(size)
            token_ids = torch.zeros(size, dtype=torch.int64, device=device)
            step = DraftStep(
                token_ids, token_ids, self._target.warm_up_sequences(size), np.arange(size)
            )
            half = torch.full((size, 1), 0.5, dtype=torch.float64, device=device)
            draws = Draws.of(np.full(size, 0.5, dtype=np.float32), half)
            # A draft head is read in another way where all tokens are choices.
            ways = [draws] if self._draft_head is None else [None, draws]
            for run, way in product(self._passes.values(), ways):
                self._all_chosen = way is None
                run.begin(size)
                logits, vocabulary = run(step)
                drawn = draw(logits, way, 0, wants_confidences=True)
                token_ids_of(drawn.columns, vocabulary)
        if chooses(self.options) or self.context.chooses_exits:
            layers, passes = list(self._passes), list(self._passes.values())
            most_draft = facts.num_speculative_tokens
            if facts.tensor_parallel_size > 1:  # ranks must agree
                costs = ExitCosts.from_layers(
                    layers, facts.num_layers, self._target.head_in_layers, most_draft
                )
            else:
                self._begin_warm_up(most)
                costs = measure_costs(self._target, passes, most_draft, most, device)
            self._selection = ExitSelection(layers, costs, most_draft, most)

    def _begin_warm_up(self, size: int) -> None:
        """A round of requests that nobody sent."""
        if self._draft_head is not None:
            names = [f"warm-up {i}" for i in range(size)]
            history, one = np.zeros((1, 1), dtype=np.int32), np.ones(size, dtype=np.int64)
            self._draft_head.begin(names, history, one - 1, one, one)
            self._draft_head.finish(names)

    @torch.inference_mode()
    def follow(self, states: StepStates) -> None:
        if self._adapter is not None:
            self._write_adapter(states, self._target.sequences(states.rows))
        elif self._selection is not None:
            self._compare_exits(states)

    @torch.inference_mode()
    def follow_on_device(self, states: DeviceStepStates) -> None:
        self._write_adapter(states, self._target.sequences(states.rows, states.most_tokens))

    def _write_adapter(
        self, states: StepStates | DeviceStepStates, sequences: PagedSequences
    ) -> None:
        """The adapter's own keys and values of a step."""
        assert self._adapter is not None
        hidden = states.layer_states[self._exits.layers[0]]
        with sequences.step(states.positions, states.num_scheduled.tolist()):
            self._adapter.write(hidden, states.positions)

    def _compare_exits(self, states: StepStates) -> None:
        """Learn how each exit would have done, in one of some steps."""
        every = self.COMPARE_EVERY
        if self._controller is not None:
            every = self._controller.sample_every
        assert self._selection is not None
        if not (any(states.emitted) and self._selection.is_sampled(every)):
            return
        allowed = None
        if self._draft_head is not None:
            allowed = self._draft_head.can_draft(states.request_ids)
        seen = shadow_tokens(self._target, states, list(self._passes), self._draws, allowed)
        if seen is not None:
            self._selection.observe(
                states.request_ids,
                seen.of_request,
                seen.acceptance,
                seen.agreement,
                seen.confidences,
            )

    def finish(self, request_ids: Sequence[str]) -> None:
        if self._draft_head is not None:
            self._draft_head.finish(request_ids)
        if self._selection is not None:
            self._selection.finish(request_ids)

    def _choose_pass(self, batch: DraftInput) -> ExitPass:
        """The way all requests of this round are drafted."""
        control = batch.length_control
        if isinstance(control, ExitController):
            if self._controller is not control:
                assert self._selection is not None
                self._controller = control
                control.set_exits(self._selection)
            return self._passes[control.layer]
        if self._selection is None or len(self._passes) == 1:
            return next(iter(self._passes.values()))
        return self._passes[self._selection.choose(batch.request_ids).layer]

    @torch.inference_mode()
    def propose(self, batch: DraftInput) -> Draft:
        device = self.context.device
        requests = np.flatnonzero(batch.max_draft)
        most = batch.max_draft[requests]
        width, shortest = int(most.max()), int(most.min())
        keys = batch.keys.select(requests)
        control = batch.length_control
        asks = Signals.CONFIDENCES in control.needs
        streams, num_tokens = (
            torch.from_numpy(values[requests]) for values in (batch.streams, batch.num_tokens)
        )
        draws = self._begin(batch.temperatures[requests], streams, num_tokens, width)

        table = torch.full((len(batch.request_ids), width), -1, dtype=torch.int64, device=device)
        self._laws.begin(len(batch.request_ids), width)
        token_ids = torch.from_numpy(batch.last_token_ids[requests]).to(device, torch.int64)
        first = torch.from_numpy(batch.num_tokens[requests] - 1).to(device)
        sequences = self._target.sequences(batch.rows[requests])
        positions = sequences.prepare(first, width)
        drafting = np.arange(len(requests))
        # None = every request of the batch.
        rows = None
        if len(requests) < len(batch.request_ids):
            rows = torch.from_numpy(requests).to(device)

        run = self._choose_pass(batch)
        run.begin(len(requests))
        if self._draft_head is not None:
            self._draft_head.begin(
                keys.request_ids,
                batch.token_history,
                batch.rows[requests],
                batch.num_tokens[requests],
                batch.num_prompt_tokens[requests],
            )
        for index in range(width):
            step = DraftStep(token_ids, positions[index], sequences, drafting)
            token_ids, confidences = self._draft_token(run, step, draws, rows, index, asks)
            if rows is None:
                table[:, index] = token_ids
            else:
                table[rows, index] = token_ids
            if index + 1 == width:
                break
            if not asks and index + 1 < shortest:
                continue
            going = most[drafting] > index + 1
            if asks:
                assert confidences is not None
                going &= ~control.stop_after(
                    keys.select(drafting), index, confidences.cpu().numpy()
                )
            if not going.all():
                if not going.any():
                    break
                draws = None if draws is None else draws.select(np.flatnonzero(going))
                on = torch.from_numpy(np.flatnonzero(going)).to(device)
                drafting, rows = drafting[going], on if rows is None else rows[on]
                token_ids, first = token_ids[on], first[on]
                sequences = sequences.select(on)
                ahead = index + 1
                positions[ahead:] = sequences.prepare(first + ahead, width - ahead)
        return Draft(table, self._laws.result())

    @torch.inference_mode()
    def propose_on_device(self, batch: DeviceDraftInput) -> DeviceDraft:
        """The same tokens. All requests draft for as long as one might; what is too much goes."""
        count, width = len(batch.slots), batch.num_speculative_tokens
        drafts, last = batch.max_draft > 0, batch.num_tokens - 1
        draws = self._begin(batch.temperatures_on_host, batch.streams, batch.num_tokens, width)
        self._laws.begin(count, width)
        # Who drafts nothing stays at its first position, where attention costs least.
        token_ids = torch.where(drafts, batch.token_ids[batch.slots, last], 0).long()
        ends = torch.where(drafts, last + batch.max_draft, 0)
        sequences = self._target.sequences(batch.rows, batch.most_tokens, ends)
        everyone, drafted = np.arange(count), []
        [run] = self._passes.values()
        run.begin(count)
        for index, positions in enumerate(sequences.prepare(last, width)):
            step = DraftStep(token_ids, positions, sequences, everyone)
            token_ids, _ = self._draft_token(run, step, draws, None, index)
            drafted.append(token_ids)
        table = torch.stack(drafted, dim=1)
        too_many = torch.arange(width, device=table.device) >= batch.max_draft.unsqueeze(1)
        return DeviceDraft(table.masked_fill(too_many, -1), self._laws.result())

    def _begin(
        self, temperatures: NDArray[np.float32], streams: Tensor, num_tokens: Tensor, width: int
    ) -> Draws | None:
        """How the tokens of a round are drawn; None where every token is a choice.

        Args:
            temperatures: `[R]`.
            streams: `[R]` int64, on the host or the device.
            num_tokens: `[R]` int64, there too.
            width: Most tokens of a request.
        """
        self._all_chosen = not (self._draws and temperatures.any())
        if self._all_chosen:
            return None
        index = torch.arange(width, device=streams.device)
        drawn = uniforms(streams.unsqueeze(1), num_tokens.unsqueeze(1), index, Purpose.DRAFT)
        return Draws.of(temperatures, drawn.to(self.context.device))

    def _draft_token(
        self,
        run: ExitPass,
        step: DraftStep,
        draws: Draws | None,
        rows: Tensor | None,
        index: int,
        wants_confidences: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Draft the `index`-th token of some requests, and keep the law it was drawn from.

        Args:
            run: The way there.
            step: Their last tokens.
            draws: How tokens are drawn; None = they are chosen.
            rows: `[n]` which requests of the batch they are; None = all.
            index: 0 for the first of the round.
            wants_confidences: Whether to return them.

        Returns:
            `[n]` int64 token ids, and `[n]` float32 confidences.
        """
        logits, vocabulary = run(step)
        room = None
        if rows is None and draws is not None and isinstance(logits, torch.Tensor):
            room = self._laws.room(index, logits)
        drawn = draw(logits, draws, index, wants_confidences, room)
        self._laws.put(rows, index, drawn, vocabulary)
        return token_ids_of(drawn.columns, vocabulary), drawn.confidences


@dataclass(frozen=True, slots=True)
class Exits:
    """Where a draft may leave the target.

    Attributes:
        layers: Numbers of layers run, rising.
        per_token: Whether each token chooses among them, or each round.
    """

    layers: tuple[int, ...]
    per_token: bool


def chooses(options: EarlyExitOptions) -> bool:
    """Whether the exit is chosen while serving."""
    return options.exit_layer == "auto" and options.exit_layers is None and options.adapter is None


def plan(options: EarlyExitOptions, num_layers: int) -> Exits:
    """The exits that some options mean in a model of `num_layers`.

    Raises:
        ConfigError: There is no such exit, or the options contradict each other.
    """
    named = [key for key in ("exit_layers", "exit_candidates") if getattr(options, key) is not None]
    if named and (options.exit_layer != "auto" or options.adapter is not None or len(named) > 1):
        others = [*named[1:], *(["adapter"] if options.adapter is not None else [])]
        if options.exit_layer != "auto":
            others.append("exit_layer")
        raise ConfigError(
            f"early_exit: {named[0]} and {others[0]} exclude each other: one exit, several that "
            "auto chooses from (exit_candidates), or several that each token chooses from "
            "(exit_layers)."
        )
    if "exit_confidence" in options.model_fields_set and options.exit_layers is None:
        raise ConfigError(
            "early_exit: exit_confidence says when a token leaves at one of several exits, and "
            "would be ignored without exit_layers. Remove it, or give exit_layers."
        )
    if options.exit_layers is not None:
        layers, per_token = options.exit_layers, True
        if len(layers) < 2:
            raise ConfigError("early_exit: exit_layers must be two or more; else use exit_layer.")
    elif options.adapter is not None and options.exit_layer == "auto":
        from .exit_adapter import AdapterCard

        layers, per_token = (AdapterCard.read(options.adapter).exit_layer,), False
    elif options.exit_layer == "auto":
        layers, per_token = options.exit_candidates or candidates(num_layers), False
    else:
        layers, per_token = (_exit_of(options.exit_layer, num_layers),), False
    if list(layers) != sorted(set(layers)) or not layers:
        raise ConfigError(f"early_exit: exits must be rising; got {list(layers)}.")
    if not 1 <= layers[0] <= layers[-1] <= num_layers:
        raise ConfigError(
            f"early_exit: an exit must lie between 1 and {num_layers}, the target's layers; "
            f"got {', '.join(map(str, layers))}."
        )
    return Exits(layers, per_token)


def candidates(num_layers: int, most: int = 8) -> tuple[int, ...]:
    """Up to `most` exits from a sixteenth to three quarters of the layers, in equal ratios.

    What a draft token costs goes with its layers, so an exit one layer from the best costs much
    at the shallow end, where the exits that pay are, and little at the deep one.
    """
    first, last = 1 / 16, 3 / 4
    layers = (round(num_layers * first * (last / first) ** (i / (most - 1))) for i in range(most))
    return tuple(sorted({max(1, min(layer, num_layers - 1)) for layer in layers}))


def _exit_of(exit_layer: float, num_layers: int) -> int:
    if isinstance(exit_layer, int):
        return exit_layer
    if not 0 < exit_layer <= 1:
        raise ConfigError(
            f"early_exit: a share of the layers lies between 0 and 1, got {exit_layer}."
        )
    return max(1, round(exit_layer * num_layers))
