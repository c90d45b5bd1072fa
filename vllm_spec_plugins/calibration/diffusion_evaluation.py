"""What a diffusion drafter is worth: its drafts against text the target wrote, token by token.

At every place of a text the drafter drafts the next K tokens in one pass. How many would be
accepted follows exactly from the text (`acceptance_walk.py`): no drafts are drawn.

Shapes: T tokens of a text, P of them its prompt; C = T - P; S places from which K draft tokens
fit, S = C - K + 1; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vllm_spec_plugins.diffusion.drafter import DiffusionDrafter

from .acceptance_walk import ratio_with_error, rounds_of, walk
from .diffusion_training import added_to_texts, layers_read
from .hugging_face import LocalModel
from .masked_blocks import Blocks, masked_pass

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Places of a text taken at once.
_PLACES = 32


@dataclass(frozen=True, slots=True)
class Written:
    """Texts the target wrote, each after a prompt.

    Attributes:
        texts: `[T]` token ids of each, prompt included.
        prompt_length: P.
        greedy: At temperature 0; otherwise at temperature 1.
    """

    texts: Sequence[NDArray[np.int64]]
    prompt_length: int
    greedy: bool


@dataclass(frozen=True, slots=True)
class BlockQuality:
    """Drafts of K tokens on such texts.

    Attributes:
        cross_entropy: `[K]` nats per token, of the text's tokens under the drafter's laws.
        overlap: `[K]` mean over places of the sum over tokens of min(p, q): what a draft token is
            accepted with at temperature 1, once those before it were.
        agreement: `[K]` share of places where draft and target have the same first choice.
        acceptance_length: `[K]` tokens per round of 1 to K draft tokens, the one after the
            accepted ones included; at the texts' temperature.
        acceptance_length_error: `[K]` standard errors, from text to text.
    """

    cross_entropy: list[float]
    overlap: list[float]
    agreement: list[float]
    acceptance_length: list[float]
    acceptance_length_error: list[float]

    def rounded(self) -> dict[str, Any]:
        """For people and JSON."""
        return {
            name: [None if np.isnan(value) else round(value, 4) for value in getattr(self, name)]
            for name in self.__dataclass_fields__
        }


@torch.no_grad()
def write_texts(
    target: LocalModel,
    prompts: NDArray[np.int64],
    num_tokens: int,
    *,
    greedy: bool,
    seed: int = 0,
) -> Written:
    """Have the target go on after some prompts.

    Args:
        target: The target.
        prompts: `[W, P]`.
        num_tokens: New tokens of each; a text that ends earlier is cut after its end.
        greedy: Take the most likely token; otherwise draw from the target's law.
        seed: Of the draws.
    """
    generator = torch.Generator(target.device).manual_seed(seed)
    token_ids = torch.from_numpy(prompts).to(target.device)
    written: list[Tensor] = [token_ids]
    past: Any = None
    for _ in range(num_tokens):
        output = target.module(input_ids=written[-1], past_key_values=past, use_cache=True)
        past, logits = output.past_key_values, output.logits[:, -1].float()
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        written.append(logits.argmax(-1, keepdim=True) if greedy else drawn)
    texts = torch.cat(written, dim=1).cpu().numpy()
    ends = np.atleast_1d(np.asarray(getattr(target.config, "eos_token_id", None) or -1))
    prompt_length = prompts.shape[1]
    return Written([_cut(text, prompt_length, ends) for text in texts], prompt_length, greedy)


@torch.no_grad()
def evaluate(
    target: LocalModel,
    drafter: DiffusionDrafter,
    written: Written,
    most: int,
    *,
    withheld: bool = False,
) -> BlockQuality:
    """Drafts of `most` tokens from every place of the texts.

    Args:
        target: Who wrote them.
        drafter: On its device.
        written: Texts; those with fewer than `most` new tokens are left out.
        most: K.
        withheld: Give a conditioned drafter none of the target's states, as if all of the text
            had come from vLLM's prefix cache.

    Raises:
        ValueError: No text is long enough.
    """
    sums, counts, chances = [], [], []
    for text in written.texts:
        if len(text) - written.prompt_length < most:
            continue
        states = target.layer_states(
            torch.from_numpy(text[None, :-1]), [*layers_read(drafter), target.num_layers]
        )
        p = _laws_of(target, states[target.num_layers], written.prompt_length)
        known = np.zeros((1, len(text) - 1), dtype=np.bool_) if withheld else None
        added = added_to_texts(drafter, states, known)
        anchors = np.arange(written.prompt_length - 1, len(text) - most)
        parts = [
            _compare(
                drafter, text, part, most, p[part[0] - anchors[0] :], added, greedy=written.greedy
            )
            for part in np.array_split(anchors, -(-len(anchors) // _PLACES))
        ]
        measured = np.concatenate(parts)
        sums.append(measured[..., :3].sum(axis=0))
        counts.append(len(anchors))
        chances.append(measured[..., 3])
    if not sums:
        raise ValueError(f"no text has {most} new tokens")
    means = np.sum(sums, axis=0) / np.sum(counts)
    lengths, errors = _acceptance_lengths(chances, most)
    return _quality(means, lengths, errors)


@torch.no_grad()
def evaluate_causal(
    target: LocalModel, draft_model: LocalModel, written: Written, most: int
) -> BlockQuality:
    """The same for a draft model that writes token by token, as vLLM's `draft_model`.

    Its law of a token depends on the text alone, so every draft position has the same.
    """
    rows, chances = [], []
    for text in written.texts:
        if len(text) - written.prompt_length < most:
            continue
        p = _target_laws(target, text, written.prompt_length)
        q = _target_laws(draft_model, text, written.prompt_length)
        following = torch.from_numpy(text[written.prompt_length :]).to(p.device)
        measured = _measures(q.log(), p, following, greedy=written.greedy)
        rows.append(measured[:, :3])
        chances.append(rounds_of(measured[:, 3], most))
    means = np.concatenate(rows).mean(axis=0)
    lengths, errors = _acceptance_lengths(chances, most)
    return _quality(np.tile(means, (most, 1)), lengths, errors)


def _quality(
    means: NDArray[np.float64], lengths: NDArray[np.float64], errors: NDArray[np.float64]
) -> BlockQuality:
    """From `[K, 3]` means, `[K]` acceptance lengths and `[K]` errors."""
    cross_entropy, overlap, agreement = means.T.tolist()
    return BlockQuality(cross_entropy, overlap, agreement, lengths.tolist(), errors.tolist())


def _acceptance_lengths(
    chances: Sequence[NDArray[np.float64]], most: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`[K]` tokens per round of 1..K draft tokens, and errors; `chances`: `[S, K]` per text."""
    walks = [[walk(chance, length) for length in range(1, most + 1)] for chance in chances]
    emitted = np.array([[w.emitted for w in text] for text in walks])
    rounds = np.array([[w.rounds for w in text] for text in walks])
    return ratio_with_error(emitted, rounds)


def _target_laws(model: LocalModel, text: NDArray[np.int64], prompt_length: int) -> Tensor:
    """`[C, V]` law of every token after the prompt."""
    token_ids = torch.from_numpy(text[None, :-1])
    states = model.layer_states(token_ids, [model.num_layers])[model.num_layers]
    return _laws_of(model, states, prompt_length)


def _laws_of(model: LocalModel, last: Tensor, prompt_length: int) -> Tensor:
    """`[C, V]` from the last layer's states of a text, `[1, T - 1, G]`."""
    return model.logits(model.final_norm(last[0, prompt_length - 1 :])).softmax(-1)


def _compare(
    drafter: DiffusionDrafter,
    text: NDArray[np.int64],
    anchors: NDArray[np.int64],
    most: int,
    p: Tensor,
    added: Tensor | None,
    *,
    greedy: bool,
) -> NDArray[np.float64]:
    """`[S, K, 4]`: cross entropy, overlap, agreement, chance of acceptance.

    Args:
        drafter: The drafter.
        text: `[T]`.
        anchors: `[S]` consecutive.
        most: K.
        p: `[C', V]` the target's laws of the tokens after the first anchor.
        added: `[1, T - 1, H]` what conditioning adds to the text.
        greedy: Whether the text is.
    """
    blocks = Blocks(anchors[None], np.full((1, len(anchors)), most))
    known = text[: anchors[-1] + 1]
    layout = masked_pass(known[None], blocks, drafter.config.mask_token_id)
    device = drafter.embedding.device
    states = drafter(
        layout.token_ids.to(device),
        layout.positions.to(device),
        layout.visible.to(device),
        None if added is None else added[:, : len(known)],
    )[0]
    before = layout.before
    # Anchors first, then masks block by block: back to [S, K].
    order = np.lexsort((layout.number, before - layout.number))
    log_q = drafter.logits(states[torch.from_numpy(layout.place[order]).to(device)]).log_softmax(-1)
    before = torch.from_numpy(before[order]).to(device)
    following = torch.from_numpy(text).to(device)[before + 1]
    return _measures(log_q, p[before - anchors[0]], following, greedy=greedy).reshape(
        len(anchors), most, 4
    )


def _measures(log_q: Tensor, p: Tensor, following: Tensor, *, greedy: bool) -> NDArray[np.float64]:
    """`[N, 4]` of draft laws `[N, V]`, target laws `[N, V]` and the tokens that follow."""
    q = log_q.exp()
    same = log_q.argmax(-1) == p.argmax(-1)
    log_q_own, p_own = (x.gather(1, following[:, None])[:, 0] for x in (log_q, p))
    taken = log_q.argmax(-1) == following if greedy else (log_q_own.exp() / p_own).clamp(max=1)
    columns = (-log_q_own, torch.minimum(q, p).sum(-1), same, taken)
    return torch.stack([column.double() for column in columns], dim=1).cpu().numpy()


def _cut(text: NDArray[np.int64], prompt_length: int, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Up to the first token after the prompt that ends a text, included."""
    found = np.nonzero(np.isin(text[prompt_length:], ends))[0]
    return text[: prompt_length + found[0] + 1] if len(found) else text
