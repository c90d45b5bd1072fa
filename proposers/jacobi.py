"""`jacobi`: drafts are the target's own guesses, made while it verified the draft before.

Speculative Jacobi decoding (Teng et al. 2410.01699, SJD). A verification reads the target's law
at every draft token. Past the first rejection those laws follow a token that was not to be, but
they are good guesses: the next draft is drawn from them, token by token, at their positions, and
the law each token was drawn from is kept as q. Places past the last known law are filled
(`jacobi_filler`). No second model, no training, no pass of its own.

Drawn anew in every step, a draft never settles. `coupling` draws from the new law so that most
tokens stay what they were (`jacobi_coupling`; MC-SJD, So et al. 2510.24211).

**Why the text keeps the target's law.** Let F(i) be all noise of positions before i: of drafting,
accepting and resampling there, in all steps. Position i is drafted in one step after another,
until the step that decides it; call x_t and q_t its draft token and law in step t.

1. q_t is known from F(i): it is the target's law given tokens at positions before i, in the draft
   of the step before.
2. Given F(i), x_t has the law q_t. A fresh draw: by its fresh noise. Maximal coupling: by
   induction; x_{t-1} has the law q_{t-1} given F(i), both laws are known from F(i), and whether
   x_{t-1} is kept and what replaces it is decided by noise of this position: what results has the
   law q_t, and q_t, not q_{t-1}, is what it is verified with. One race (gumbel): its noise belongs
   to position i alone, so it is independent of F(i), whatever x_{t-1} came of it.
3. Whether step t decides position i is known from F(i): it does if everything before i in its draft
   was accepted.
4. So in the step that decides it, given F(i), the token is accepted with min(1, p/q_t) or replaced
   from norm([p - q_t]+), by noise not used for anything else, and has the law p given F(i). F(i)
   contains all tokens before i: that is the target's law of the text.

Step 3 is where a verifier that looks ahead breaks it: block verification rejects *because of*
tokens behind the rejection, which then no longer have the law q_t. Coupling is refused beside
such a verifier. Without coupling it is exact there too: past tokens are not used. What is cut off
a draft is cut for reasons that do not depend on what the cut tokens are; after a preemption
nothing is remembered and drafting starts afresh.

Random numbers are keyed by stream, position of the draft's first token (no two steps share it)
and place in the draft; those of a race by stream, position and token id, under a purpose of their
own. None is shared with verification, none is shared by two positions.

Memory: the laws of one draft for each request, `num_speculative_tokens` x `draft_top_k` x 12
bytes (or 4 bytes for each token of a vocabulary not larger than `draft_top_k`), twice with maximal
coupling while the next one is made. Drafting from the `draft_top_k` most likely tokens is another
law than the target's, and the one verified with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field

from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.errors import ConfigError
from vllm_spec_plugins.image_token_range import chosen_image_tokens
from vllm_spec_plugins.proposer import Draft, DraftInput, Needs, Proposer, ProposerOptions
from vllm_spec_plugins.random_numbers import Purpose, uniforms
from vllm_spec_plugins.vocabulary_passes import first_argmax

from .jacobi_coupling import draw_fresh, draw_maximal, draw_race, law_of
from .jacobi_device import JacobiOnDevice
from .jacobi_drafts import Drafts, Places
from .jacobi_filler import Filler, copy_from_above, tokens_above, uniform_law

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from vllm_spec_plugins.context import EngineContext, ModelFacts
    from vllm_spec_plugins.device_drafting import DeviceDraft, DeviceDraftInput


class JacobiOptions(ProposerOptions):
    coupling: Literal["none", "maximal", "gumbel"] = Field(
        "maximal",
        description="How draft tokens that were not verified are drawn again. none: "
        "independently. maximal: each is kept as often as its new law allows. gumbel: by noise "
        "that belongs to its position.",
    )
    filler: Filler = Field(
        "repeat_left",
        description="Draft tokens where no law is known yet: random, repeat_left, or above (the "
        "image code a row higher).",
    )
    image_row_length: int | None = Field(
        None,
        ge=1,
        description="Tokens from an image code to the one below it, line ends included; for "
        "filler above.",
    )
    image_token_range: tuple[int, int] | None = Field(
        None,
        description="[first, last + 1] ids that are image codes, for fillers random and above. "
        "Default: what the model's config.json says.",
    )
    draft_top_k: int = Field(
        1024,
        ge=1,
        description="Draft from so many of the most likely tokens: bounds the memory for their "
        "laws, 12 bytes each per draft token.",
    )


class Jacobi(Proposer):
    """Drafts from the target's laws of the last verification."""

    Options = JacobiOptions
    options: JacobiOptions
    needs = Needs.TARGET_LOGITS

    def __init__(self, options: JacobiOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        facts = context.facts
        self._codes = _codes(options, facts)
        self._random, self._uniform = uniform_law(
            self._codes, facts.vocab_size, options.draft_top_k, context.device
        )
        #: Drafts of the last step, and the row of each request in them, for maximal coupling.
        self._last: Drafts | None = None
        self._row_in_last: dict[str, int] = {}
        self._on_device = JacobiOnDevice(
            coupling=options.coupling,
            filler=options.filler,
            row_length=options.image_row_length,
            codes=self._codes,
            random=self._random,
            uniform=self._uniform,
            num_slots=context.max_num_requests,
        )

    @classmethod
    def check(cls, options: ProposerOptions, facts: ModelFacts) -> None:
        assert isinstance(options, JacobiOptions)
        if (options.image_row_length is None) == (options.filler == "above"):
            raise ConfigError(
                'jacobi: "filler": "above" and "image_row_length" (tokens from an image code to '
                "the one below it) are given together or not at all."
            )
        if options.filler == "repeat_left" and options.image_token_range is not None:
            raise ConfigError(
                'jacobi: "image_token_range" says nothing to "filler": "repeat_left". Remove it, '
                'or choose "random" or "above".'
            )
        _codes(options, facts)

    @classmethod
    def keeps_rejected_drafts(cls, options: ProposerOptions) -> bool:
        assert isinstance(options, JacobiOptions)
        return options.coupling != "none"

    @classmethod
    def drafts_on_device(cls, options: ProposerOptions) -> bool:
        del options
        return True

    @torch.inference_mode()
    def propose_on_device(self, batch: DeviceDraftInput) -> DeviceDraft:
        return self._on_device.propose(batch)

    @torch.inference_mode()
    def propose(self, batch: DraftInput) -> Draft:
        draws = batch.temperatures > 0
        like = self._uniform if draws.any() else None
        drafts = Drafts.empty(batch.num_tokens, batch.max_draft, self.context.device, like)
        known = np.zeros_like(batch.max_draft)
        if batch.target_rows is not None:
            known = np.minimum(batch.target_rows.counts, batch.max_draft)
        if known.any():
            self._draw(batch, drafts, Places.between(0 * known, known))
        if (known < batch.max_draft).any():
            self._fill(batch, drafts, known)
        if self.options.coupling == "maximal":
            self._last = drafts
            self._row_in_last = {name: i for i, name in enumerate(batch.request_ids)}
        return Draft(drafts.token_ids, drafts.law)

    def finish(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._row_in_last.pop(request_id, None)
        if not self._row_in_last:
            self._last = None

    def _draw(self, batch: DraftInput, drafts: Drafts, places: Places) -> None:
        """Draft tokens at places of which the last verification computed a law."""
        assert batch.target_rows is not None
        logits = batch.target_rows.take(places.requests, places.columns)
        draws = batch.temperatures[places.requests] > 0
        sampled = torch.from_numpy(draws).to(logits.device)
        if not draws.any():
            drafts.put(places, first_argmax(logits), None, sampled)
            return
        law = law_of(logits, self._uniform.values.shape[-1])
        token_ids = self._tokens_from(law, batch, places)
        if not draws.all():
            chosen = torch.from_numpy(np.flatnonzero(~draws)).to(logits.device)
            token_ids[chosen] = first_argmax(logits.index_select(0, chosen))
        drafts.put(places, token_ids, law, sampled)

    def _tokens_from(self, law: DraftProbabilities, batch: DraftInput, places: Places) -> Tensor:
        """`[n]` int64 drawn from `[n, M]`, coupled to what stood there."""
        if self.options.coupling == "gumbel":
            return draw_race(law, self._race(law, batch, places))
        u = self._fresh(batch, places)
        past = None
        if self._last is not None:
            rows = [self._row_in_last.get(name, -1) for name in batch.request_ids]
            positions = batch.num_tokens[places.requests] + places.columns
            past = self._last.at(np.array(rows)[places.requests], positions)
        if past is None:
            return draw_fresh(law, u)
        others = self.context.facts.num_speculative_tokens
        return draw_maximal(law, past, keep=self._fresh(batch, places, others), others=u)

    def _fresh(self, batch: DraftInput, places: Places, first_index: int = 0) -> Tensor:
        """`[n]` float64 uniforms that no other step looks at."""
        device = self.context.device
        streams = torch.from_numpy(batch.streams[places.requests]).to(device)
        first = torch.from_numpy(batch.num_tokens[places.requests]).to(device)
        index = torch.from_numpy(places.columns + first_index).to(device)
        return uniforms(streams, first, index, Purpose.DRAFT)

    def _race(self, law: DraftProbabilities, batch: DraftInput, places: Places) -> Tensor:
        """`[n, M]` float64 uniforms of each position and token, the same in every step."""
        device = self.context.device
        streams = torch.from_numpy(batch.streams[places.requests]).to(device)
        positions = batch.num_tokens[places.requests] + places.columns
        ids = law.vocabulary
        if ids is None:
            ids = torch.arange(law.values.shape[1], device=device)
        return uniforms(
            streams.unsqueeze(1),
            torch.from_numpy(positions).to(device).unsqueeze(1),
            ids,
            Purpose.COUPLED_DRAFT,
        )

    def _fill(self, batch: DraftInput, drafts: Drafts, known: NDArray[np.int64]) -> None:
        """Draft tokens at the places of which no law is known, from column `known` on, `[R]`."""
        device, options = self.context.device, self.options
        places = Places.between(known, batch.max_draft)
        u = self._fresh(batch, places)
        random = self._random[(u * len(self._random)).long()]
        draws = torch.from_numpy(batch.temperatures[places.requests] > 0).to(device)
        if options.filler == "random":
            drafts.put(places, random, self._uniform, draws)
            return
        last = torch.from_numpy(batch.last_token_ids).to(device, torch.int64)
        text = torch.cat([last.unsqueeze(1), drafts.token_ids], dim=1)
        if options.filler == "repeat_left":
            left = text[Places(places.requests, known[places.requests]).index(device)]
            drafts.put(places, left, None, torch.zeros_like(draws))
            return
        assert options.image_row_length is not None
        verified = tokens_above(
            torch.from_numpy(batch.token_history),
            torch.from_numpy(batch.rows),
            torch.from_numpy(batch.num_tokens),
            options.image_row_length,
            drafts.token_ids.shape[1],
        )
        index = places.index(device)
        empty = torch.zeros_like(drafts.token_ids, dtype=torch.bool)
        empty[index] = True
        chance = torch.zeros_like(drafts.token_ids)
        chance[index] = random
        token_ids, is_random = copy_from_above(
            text, empty, verified.to(device), options.image_row_length, chance, self._codes
        )
        drafts.put(places, token_ids[index], self._uniform, is_random[index] & draws)


def _codes(options: JacobiOptions, facts: ModelFacts) -> tuple[int, int]:
    """`[first, last + 1)` ids that fillers are about: the image codes, or the vocabulary."""
    said = options.image_token_range is not None or facts.image_token_range is not None
    if said or options.filler == "above":
        return chosen_image_tokens("jacobi", options.image_token_range, facts)
    return 0, facts.vocab_size
