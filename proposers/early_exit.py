"""`early_exit`: the target drafts for itself with its first layers and its own head.

LayerSkip (Elhoushi et al. 2404.16710) on a paged cache: a draft pass runs the first layers of
the target over the target's own keys and values, which it extends by lookahead slots, then its
final norm and head. No second model, no second cache. Verification runs all layers on the
drafted tokens and writes the same slots again.

Tokens are chosen (one-hot) or drawn with their law kept; both are exact, and drawn ones are
accepted as often as min(p, q) allows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field

from vllm_spec_plugins.errors import ConfigError
from vllm_spec_plugins.length_control import Signals
from vllm_spec_plugins.proposer import Draft, DraftInput, Needs, Proposer, ProposerOptions
from vllm_spec_plugins.random_numbers import Purpose, uniforms

from .draft_sampling import DraftLaws, draw, token_ids_of
from .exit_passes import DeepeningExits, DraftStep, ExitPass, SingleExit

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from vllm_spec_plugins.context import EngineContext, ModelFacts
    from vllm_spec_plugins.target_model import TargetModel


class EarlyExitOptions(ProposerOptions):
    exit_layer: int | float | None = Field(
        None,
        description="Draft with so many of the target's first layers; a number between 0 and 1 "
        "is a share of them.",
    )
    exit_layers: tuple[int, ...] | None = Field(
        None,
        description="Several exits instead of one, from shallow to deep: a token leaves at the "
        "first that is sure enough of it.",
    )
    exit_confidence: float = Field(
        0.6,
        gt=0,
        le=1,
        description="With exit_layers: probability of the most likely token from which an exit "
        "is sure enough.",
    )
    draft_sample_method: Literal["probabilistic", "greedy"] = Field(
        "probabilistic",
        description="For requests with a temperature: draw draft tokens and keep their law, or "
        "take the most likely ones.",
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
    signals = Signals.CONFIDENCES

    def __init__(self, options: EarlyExitOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        self._draws = options.draft_sample_method == "probabilistic"
        self._laws = DraftLaws()

    @classmethod
    def check(cls, options: ProposerOptions, facts: ModelFacts) -> None:
        assert isinstance(options, EarlyExitOptions)
        exits = exits_of(options, facts.num_layers)
        for key in ("skip_layers", "skip_attention", "skip_ffn"):
            for layer in getattr(options, key):
                if not 0 <= layer < exits[-1]:
                    raise ConfigError(
                        f"early_exit: {key} names layer {layer}, but a draft runs the layers 0 to "
                        f"{exits[-1] - 1}."
                    )
        if len(set(options.skip_layers)) == exits[-1]:
            raise ConfigError("early_exit: skip_layers leaves no layer to draft with.")

    def load(self, target: TargetModel) -> None:
        self._target = target
        skips = {
            "skip_layers": self.options.skip_layers,
            "skip_attention": self.options.skip_attention,
            "skip_ffn": self.options.skip_ffn,
        }
        exits = exits_of(self.options, target.num_layers)
        bounds = zip((0, *exits[:-1]), exits, strict=True)
        stacks = [target.layers(start, stop, **skips) for start, stop in bounds]
        if len(exits) == 1:
            self._pass: ExitPass = SingleExit(target, stacks[0], self._read)
        else:
            sure = [self.options.exit_confidence] * (len(exits) - 1)
            self._pass = DeepeningExits(target, stacks, sure, self._read)

    def _read(self, hidden: Tensor, requests: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """The head, whole."""
        del requests
        return self._target.head.logits(hidden), None

    def warm_up(self) -> None:
        """Run every batch size's draft step once: kernels compile by shape."""
        sizes = {1 << i for i in range(self.context.max_num_requests.bit_length())}
        for size in sorted({*sizes, self.context.max_num_requests}):
            if size > self.context.max_num_requests:
                continue
            sequences = self._target.warm_up_sequences(size)
            token_ids = torch.zeros(size, dtype=torch.int64, device=self.context.device)
            with torch.inference_mode():
                self._pass.begin(size)
                step = DraftStep(token_ids, token_ids, sequences, np.arange(size))
                logits, vocabulary = self._pass(step)
                temperatures = torch.ones(size, device=self.context.device)
                drawn = draw(logits, temperatures, temperatures.double() / 2, True)
                token_ids_of(drawn.columns, vocabulary)

    @torch.inference_mode()
    def propose(self, batch: DraftInput) -> Draft:
        device = self.context.device
        requests = np.flatnonzero(batch.max_draft)
        most = batch.max_draft[requests]
        width = int(most.max())
        keys = batch.keys.select(requests)
        control = batch.length_control
        asks = Signals.CONFIDENCES in control.needs
        temperatures, random = self._randomness(batch, requests, width)

        table = torch.full((len(batch.request_ids), width), -1, dtype=torch.int64, device=device)
        self._laws.begin(len(batch.request_ids), width)
        token_ids = torch.from_numpy(batch.last_token_ids[requests]).to(device, torch.int64)
        positions = torch.from_numpy(batch.num_tokens[requests] - 1).to(device)
        sequences = self._target.sequences(batch.rows[requests])
        drafting = np.arange(len(requests))
        rows = torch.from_numpy(requests).to(device)

        self._pass.begin(len(requests))
        for index in range(width):
            step = DraftStep(token_ids, positions, sequences, drafting)
            logits, vocabulary = self._pass(step)
            uniform = None if random is None else random[:, index]
            drawn = draw(logits, temperatures, uniform, asks)
            token_ids = token_ids_of(drawn.columns, vocabulary)
            table[rows, index] = token_ids
            self._laws.put(rows, index, drawn, vocabulary)
            going = most[drafting] > index + 1
            if asks and going.any():
                assert drawn.confidences is not None
                going &= ~control.stop_after(
                    keys.select(drafting), index, drawn.confidences.cpu().numpy()
                )
            if not going.any():
                break
            positions = positions + 1
            if not going.all():
                on = torch.from_numpy(np.flatnonzero(going)).to(device)
                drafting, rows = drafting[going], rows[on]
                token_ids, positions = token_ids[on], positions[on]
                sequences = sequences.select(on)
                if random is not None and temperatures is not None:
                    random, temperatures = random[on], temperatures[on]
        return Draft(table, self._laws.result())

    def _randomness(
        self, batch: DraftInput, requests: NDArray[np.int64], width: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Temperatures `[R]` and uniforms `[R, K]`; None where every token is a choice."""
        temperatures = batch.temperatures[requests]
        if not self._draws or not temperatures.any():
            return None, None
        streams = torch.from_numpy(batch.streams[requests]).unsqueeze(1)
        first = torch.from_numpy(batch.num_tokens[requests]).unsqueeze(1)
        drawn = uniforms(streams, first, torch.arange(width).unsqueeze(0), Purpose.DRAFT)
        device = self.context.device
        return torch.from_numpy(temperatures).to(device), drawn.to(device)


def exits_of(options: EarlyExitOptions, num_layers: int) -> tuple[int, ...]:
    """The numbers of layers after which a draft may leave, from shallow to deep.

    Raises:
        ConfigError: There is no such exit in a model of `num_layers`.
    """
    if options.exit_layers is not None:
        exits = options.exit_layers
        if options.exit_layer is not None:
            raise ConfigError("early_exit: give exit_layer or exit_layers, not both.")
        if len(exits) < 2 or list(exits) != sorted(set(exits)):
            raise ConfigError(
                f"early_exit: exit_layers must be two or more, rising; got {list(exits)}."
            )
    else:
        exits = (_exit_of(options.exit_layer, num_layers),)
    if not 1 <= exits[0] <= exits[-1] <= num_layers:
        raise ConfigError(
            f"early_exit: an exit must lie between 1 and {num_layers}, the target's layers; "
            f"got {', '.join(map(str, exits))}."
        )
    return exits


def _exit_of(exit_layer: float | None, num_layers: int) -> int:
    if exit_layer is None:
        raise ConfigError("early_exit: exit_layer is missing.")
    if isinstance(exit_layer, float):
        if not 0 < exit_layer <= 1:
            raise ConfigError(
                f"early_exit: a share of layers lies between 0 and 1, got {exit_layer}."
            )
        return max(1, round(exit_layer * num_layers))
    return exit_layer
