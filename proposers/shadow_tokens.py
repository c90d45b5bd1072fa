"""How each exit would have drafted at the positions just verified (DEL, 2504.05598, section 3).

The layers of a verified position give, through norm and head, the law each exit would have
drafted from there, and the target's own. One pass of the head over all of them tells how often
each exit would have been accepted, whichever of them drafted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_spec_plugins.draft_sampling import Draws, draw
from vllm_spec_plugins.random_numbers import Purpose, uniforms
from vllm_spec_plugins.target_model import LayerState

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from vllm_spec_plugins.proposer import StepStates
    from vllm_spec_plugins.target_model import TargetModel


@dataclass(frozen=True, slots=True)
class ShadowTokens:
    """N verified positions seen from E exits.

    Attributes:
        of_request: `[N]` int64, index into the step's requests.
        acceptance: `[N, E]` float32, chance that a draft of the exit is accepted there.
        agreement: `[N, E]` float32, the same chance of the one token drafted.
        confidences: `[N, E]` float32, probability of that token under the exit.
    """

    of_request: NDArray[np.int64]
    acceptance: NDArray[np.float32]
    agreement: NDArray[np.float32]
    confidences: NDArray[np.float32]


def shadow_tokens(
    target: TargetModel,
    states: StepStates,
    exits: Sequence[int],
    draws: bool,
    allowed: Tensor | None = None,
) -> ShadowTokens | None:
    """Draft at every verified position of a step after each exit, and judge it by the target.

    Temperature is the only sampling option looked at; top-k, top-p and the like shift the
    rates, which are estimates, a little.

    Args:
        target: The target.
        states: With `layer_states` after each exit and after all layers.
        exits: `[E]` numbers of layers.
        draws: Whether requests with a temperature draw their drafts or take the most likely.
        allowed: `[R, V]` bool, the tokens each request can be drafted; None = all.

    Returns:
        None when no request emitted a token.
    """
    emitted = np.array([len(tokens) for tokens in states.emitted], dtype=np.int64)
    if not emitted.any():
        return None
    of_request = np.repeat(np.arange(len(emitted)), emitted)
    starts = states.num_scheduled.cumsum() - states.num_scheduled
    first = starts + states.num_verified - emitted
    offset = np.arange(len(of_request)) - np.repeat(emitted.cumsum() - emitted, emitted)
    device = states.positions.device
    rows = torch.from_numpy(first[of_request] + offset).to(device)

    layers = (*exits, target.num_layers)
    hidden = torch.cat([states.layer_states[layer][rows] for layer in layers])
    logits = target.head.logits(target.final_norm(LayerState(hidden)))
    count = len(rows)
    own = logits[-count:]
    temperatures = torch.from_numpy(states.temperatures[of_request]).to(device)
    sampled = temperatures > 0
    scale = torch.where(sampled, temperatures, torch.ones_like(temperatures)).unsqueeze(1)
    p = torch.softmax(own / scale, dim=-1)
    best = own.argmax(dim=-1)
    drafts = logits[:-count]  # exit by exit
    if allowed is not None:
        ways = drafts.view(len(exits), count, -1)
        ways.masked_fill_(~allowed[torch.from_numpy(of_request).to(device)], -torch.inf)
    how = None
    draws = draws and bool((states.temperatures[of_request] > 0).any())
    if draws:
        streams = torch.from_numpy(states.streams[of_request]).to(device)
        random = uniforms(streams, states.positions[rows] + 1, 0, Purpose.LENGTH)
        of_all = np.tile(states.temperatures[of_request], len(exits))
        how = Draws.of(of_all, random.repeat(len(exits)).unsqueeze(1))

    drawn = draw(drafts, how, 0, wants_confidences=True)
    assert drawn.confidences is not None
    x = drawn.columns.view(len(exits), count).t()  # [N, E]
    q = drawn.confidences.view(len(exits), count).t()
    at_target = p.gather(1, x)
    # A draw is accepted with min(1, p/q), all draws with their overlap; a choice with p.
    accepted = (at_target / q).clamp(max=1) if draws else at_target
    overlap = accepted
    if drawn.probabilities is not None:
        laws = drawn.probabilities.view(len(exits), count, -1)
        # Exit by exit: with all at once, another table of all laws.
        overlap = torch.stack([torch.minimum(law, p).sum(dim=-1) for law in laws], dim=1)
    sampled, same = sampled.unsqueeze(1), (x == best.unsqueeze(1)).float()
    told = [torch.where(sampled, chance, same) for chance in (overlap, accepted)]
    return ShadowTokens(of_request, *torch.stack([*told, q]).cpu().numpy())
