"""`diffusion`: a masked diffusion model beside the target writes the whole draft in one pass.

The drafter reads the last `context_window` tokens of a request's text, and behind them a block of
masks that see the text and each other: one pass, one law for each draft token, however long the
draft (DiffuSpec 2510.02358, DEER 2512.15176). What the text left behind in the drafter is kept
from step to step, one row of `PrefixCache` for each request; only verified tokens enter it, so a
rejection has nothing to undo.

A drafter that is conditioned on the target (`vllm_spec_plugins/diffusion/conditioning.py`) also
reads the target's hidden states. They come in with every step of the engine, whoever drafts, and
wait in `StateWindows` until the drafter reads their tokens. What vLLM took from its prefix cache
has none: there the drafter reads text alone. The states of a text follow from the text, so what is
drafted still does, and its law is what was drawn from.

From the laws come drawn tokens with their laws kept, the most likely tokens (greedy requests), or a
path (`path_search`); see `parallel` for why each is exact.

**More than one denoising step.** Each step settles its share of the block and looks again, with the
settled tokens in the place of their masks. *Chosen* tokens are settled where the drafter is surest,
as in LLaDA and Dream: a choice is exact in any order. *Drawn* tokens are settled left to right.
Then the law of a token was computed from tokens before it alone, and it is the law of that token
given the draft so far: the q verification needs. In order of confidence it would not be: had
position 5 been drawn first and position 2 from what it says, then accepting the token at 2 would
tell something of the one at 5, which would no longer have the law it was drawn from. (That bias is
what the control in `tests/test_parallel_law.py` measures.)

**On the device.** Where the engine plans a step before the last one is verified, how many tokens a
text has is known to the device alone: rows of the cache are then the engine's slots, and passes as
wide as there can be new tokens. Both ways read texts into the same cache and draw the same drafts.

Under tensor parallelism every rank has the drafter whole and computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field

from vllm_spec_plugins.diffusion.cache import NewText
from vllm_spec_plugins.diffusion.drafter import DiffusionDrafter
from vllm_spec_plugins.diffusion.folder import check_folder, read_config
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.errors import ConfigError
from vllm_spec_plugins.length_control import Fixed, LengthControlOptions
from vllm_spec_plugins.proposer import DraftInput, Needs, ProposerOptions, StepStates
from vllm_spec_plugins.transfers import to_device

from .parallel import Block, ParallelOptions, ParallelProposer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from vllm_spec_plugins.context import EngineContext, ModelFacts
    from vllm_spec_plugins.device_drafting import DeviceDraftInput
    from vllm_spec_plugins.diffusion.folder import DrafterConfig
    from vllm_spec_plugins.target_model import TargetModel

    from .block_draws import BlockDraws


class DiffusionOptions(ParallelOptions):
    model: str = Field(
        description="Folder of the drafter, written by `vllm-spec calibrate diffusion-drafter`."
    )
    context_window: int | None = Field(
        None,
        ge=1,
        description="Tokens of the text the drafter sees. Default: as many as it was made for, "
        "up to 512.",
    )
    block_size: int | None = Field(
        None,
        ge=1,
        description="Masks in a block; a drafter does best with as many as it was trained with. "
        "Default: num_speculative_tokens.",
    )
    denoising_steps: int = Field(
        1, ge=1, description="Passes over a block; each settles its share of the tokens."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="What the drafter computes in."
    )


class Diffusion(ParallelProposer):
    """Drafts with a masked diffusion model of its own, a whole block in one pass."""

    Options = DiffusionOptions
    options: DiffusionOptions

    #: Window of a drafter that was made for more.
    WINDOW = 512
    #: Tokens of prompts read in one pass.
    TOKENS_PER_PASS = 4096

    def __init__(self, options: DiffusionOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        #: Row of each request in the caches; given when it is first seen.
        self._row_of: dict[str, int] = {}
        self._free = list(range(context.max_num_requests))[::-1]
        #: `[rows]` tokens that each row of the cache has read, and the last of them.
        self._num_read = np.zeros(context.max_num_requests, dtype=np.int64)
        self._last_read = np.zeros_like(self._num_read)
        self._block_size = options.block_size or context.facts.num_speculative_tokens

    @classmethod
    def check(cls, options: ProposerOptions, facts: ModelFacts) -> None:
        assert isinstance(options, DiffusionOptions)
        super().check(options, facts)
        most = facts.num_speculative_tokens
        size = options.block_size or most
        if size < most:
            raise ConfigError(
                f"diffusion: a block of {size} masks cannot give num_speculative_tokens {most}. "
                "Raise block_size or lower num_speculative_tokens."
            )
        if options.denoising_steps > size:
            raise ConfigError(
                f"diffusion: {options.denoising_steps} denoising_steps cannot each settle a token "
                f"of a block of {size}. Lower denoising_steps."
            )
        config = check_folder(options.model, facts, options.context_window)
        if config.max_positions - size < (options.context_window or 1):
            raise ConfigError(
                f"diffusion: context_window {options.context_window or 1} and block_size {size} "
                f"are more than the {config.max_positions} positions of the drafter "
                f"{options.model}. Lower one of them."
            )

    @classmethod
    def needs_for(cls, options: ProposerOptions) -> Needs:
        assert isinstance(options, DiffusionOptions)
        conditioned = read_config(options.model).conditioned_on is not None
        return cls.needs | Needs.LAYER_STATES if conditioned else cls.needs

    @classmethod
    def drafts_on_device(cls, options: ProposerOptions) -> bool:
        assert isinstance(options, DiffusionOptions)
        if options.drafts == "path":  # searched through texts that are read on the host
            return False
        return read_config(options.model).conditioned_on is None

    @classmethod
    def layers(cls, options: ProposerOptions, facts: ModelFacts) -> Sequence[int]:
        del facts
        assert isinstance(options, DiffusionOptions)
        states = read_config(options.model).conditioned_on
        return () if states is None else states.layers

    def load(self, target: TargetModel) -> None:
        del target
        context, options = self.context, self.options
        dtype: torch.dtype = getattr(torch, options.dtype)
        self._drafter = DiffusionDrafter.load(options.model, context.device, dtype)
        window = options.context_window or self._default_window(self._drafter.config)
        self._cache = self._drafter.new_cache(context.max_num_requests, window)
        self._states = self._drafter.new_state_windows(context.max_num_requests, window)

    def _default_window(self, config: DrafterConfig) -> int:
        made_for = min(config.max_positions, self.context.facts.max_model_len) - self._block_size
        return max(min(made_for, self.WINDOW), 1)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Draft for one request and for two, with and without a temperature."""
        for temperatures in ([0.0], [0.5, 0.0][: self.context.max_num_requests]):
            batch = _nobodys_requests(temperatures, self.context)
            self.propose(batch)
            self.finish(batch.request_ids)

    @torch.inference_mode()
    def follow(self, states: StepStates) -> None:
        config = self._drafter.config.conditioned_on
        assert self._states is not None
        assert config is not None
        self._states.write(
            self._rows(states.request_ids),
            states.num_verified,
            states.num_scheduled.cumsum() - states.num_scheduled,
            states.positions,
            [states.layer_states[layer] for layer in config.layers],
        )

    @torch.inference_mode()
    def finish(self, request_ids: Sequence[str]) -> None:
        super().finish(request_ids)
        rows = [row for name in request_ids if (row := self._row_of.pop(name, None)) is not None]
        if rows:
            self._num_read[rows] = 0
            if self._states is not None:
                self._states.forget(rows)
            self._free.extend(rows)

    def _rows(self, request_ids: Sequence[str]) -> NDArray[np.int64]:
        """`[R]` row of each request in the caches."""
        for name in request_ids:
            if name not in self._row_of:
                self._row_of[name] = self._free.pop()
        return np.array([self._row_of[name] for name in request_ids], dtype=np.int64)

    def logits(self, batch: DraftInput, requests: NDArray[np.int64]) -> Tensor:
        """One pass over what is new of each text, and masks behind it: `[n, B, V]`."""
        rows, new, fresh = self._catch_up(batch, requests)
        ends = batch.num_tokens[requests]

        def read(group: NDArray[np.int64]) -> Tensor:
            begins = ends[group] - new[group]
            # [n, T], padded with whatever stands in the table behind the text.
            columns = begins[:, None] + np.arange(new[group].max())
            columns = np.minimum(columns, batch.token_history.shape[1] - 1)
            token_ids = batch.token_history[batch.rows[requests[group], None], columns]
            token_ids[columns >= ends[group, None]] = 0
            numbers = [rows[group, None], begins[:, None], new[group, None], token_ids]
            device_numbers = to_device(np.concatenate(numbers, axis=1), self.context.device)
            row, begin, count = device_numbers[:, :3].unbind(dim=1)
            if fresh[group].any():
                # Who goes on begins where it is.
                self._cache.begin(row, begin, to_device(fresh[group], self.context.device))
            longest = int(np.where(fresh[group], 0, begins).max())
            text = NewText(row, device_numbers[:, 3:], count, longest)
            added = None
            if self._states is not None:
                added = self._states.read(rows[group], begins, columns.shape[1])
            return self._drafter.draft(self._cache, text, self._block_size, added)

        return self._in_groups(new, read)

    def _logits_on_device(self, batch: DeviceDraftInput) -> Tensor:
        """The same of all requests, whose lengths the host knows as bounds only."""
        window, table, device = self._cache.window, batch.token_ids, batch.slots.device
        usual = batch.num_speculative_tokens + 1
        most_new = np.minimum(np.where(batch.is_fresh, batch.most_tokens, usual), window)
        most_read = np.where(batch.is_fresh, 0, batch.most_tokens)

        def read(group: NDArray[np.int64]) -> Tensor:
            rows, ends, fresh = batch.slots, batch.num_tokens, batch.fresh
            if len(group) < len(rows):
                index = to_device(group, device)
                rows, ends, fresh = rows[index], ends[index], fresh[index]
            counts = self._cache.catch_up(rows, ends, fresh)
            ahead = torch.arange(int(most_new[group].max()), device=device)
            columns = (ends - counts).unsqueeze(1) + ahead  # [n, T]
            token_ids = table[rows.unsqueeze(1), columns.clamp(max=table.shape[1] - 1)].long()
            token_ids = torch.where(columns < ends.unsqueeze(1), token_ids, 0)
            text = NewText(rows, token_ids, counts, int(most_read[group].max()))
            return self._drafter.draft(self._cache, text, self._block_size)

        return self._in_groups(most_new, read)

    def block(self, batch: DraftInput, requests: NDArray[np.int64], draws: BlockDraws) -> Block:
        if self.options.denoising_steps == 1:
            return super().block(batch, requests, draws)
        logits = self.logits(batch, requests)
        names = batch.keys.select(requests).request_ids
        rows = to_device(self._rows(names), self.context.device)
        return self._settle(logits, rows, int(batch.num_tokens[requests].max()), draws)

    def block_on_device(self, batch: DeviceDraftInput, draws: BlockDraws) -> Block:
        logits = self._logits_on_device(batch)
        if self.options.denoising_steps == 1:
            return Block.at_once(logits[:, : batch.num_speculative_tokens], draws)
        return self._settle(logits, batch.slots, int(batch.most_tokens.max()), draws)

    def _settle(self, logits: Tensor, rows: Tensor, longest: int, draws: BlockDraws) -> Block:
        """Settle blocks in several passes.

        Args:
            logits: `[n, B, V]` of the first pass.
            rows: `[n]` int64 of the cache.
            longest: At least the tokens of each text.
            draws: How tokens are drawn.
        """
        steps, mask = self.options.denoising_steps, self._drafter.config.mask_token_id
        block = logits.new_full(logits.shape[:2], mask, dtype=torch.int64)
        kept_logits, kept_law = torch.empty_like(logits), None
        left = block.shape[1]
        for step in range(steps):
            if step:
                logits = self._drafter.denoise(self._cache, rows, block, longest)
            count = -(-left // (steps - step))
            columns = columns_to_settle(logits, block == mask, draws.sampled, count)  # [n, count]
            own = logits.gather(1, _wide(columns, logits))
            token_ids, law = draws(own, columns)
            block.scatter_(1, columns, token_ids)
            kept_logits.scatter_(1, _wide(columns, own), own)
            kept_law = _keep(kept_law, law, columns, block.shape[1])
            left -= count
        return Block(block, kept_logits, kept_law)

    def _catch_up(
        self, batch: DraftInput, requests: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Rows of requests in the cache, how many tokens each has to read, and whether anew.

        Those are the last ones of its text. A request that did not draft for a while reads what
        it missed; of a text longer than the window only the window is read. A text that is not
        the one read so far, which `finish` should have told, begins anew.
        """
        rows = self._rows(batch.keys.select(requests).request_ids)
        ends, window = batch.num_tokens[requests], self._cache.window
        known = self._num_read[rows]
        last = batch.token_history[batch.rows[requests], np.maximum(known, 1) - 1]
        same = (known > 0) & (known < ends) & (last == self._last_read[rows])
        fresh = ~same | (ends - known > window)
        self._num_read[rows] = ends
        self._last_read[rows] = batch.last_token_ids[requests]
        return rows, np.where(fresh, np.minimum(ends, window), ends - known), fresh

    def _in_groups(
        self, new: NDArray[np.int64], read: Callable[[NDArray[np.int64]], Tensor]
    ) -> Tensor:
        """Laws of n requests, some read together.

        Args:
            new: `[n]` most tokens that each has to read.
            read: Laws `[m, B, V]` of those with these indices, `[m]`.
        """
        groups = list(self._groups(new))
        if len(groups) == 1:
            return read(np.arange(len(new)))
        whole = torch.cat([read(group) for group in groups])
        order = to_device(np.concatenate(groups), whole.device)
        return torch.empty_like(whole).index_copy_(0, order, whole)

    def _groups(self, new: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Indices of requests to be read together: steps of decoding, then prompts by length."""
        usual = new <= 1 + self.context.facts.num_speculative_tokens
        if usual.any():
            yield np.flatnonzero(usual)
        prompts = np.flatnonzero(~usual)
        prompts = prompts[np.argsort(-new[prompts], kind="stable")]
        while len(prompts):
            count = max(1, self.TOKENS_PER_PASS // int(new[prompts[0]]))
            yield prompts[:count]
            prompts = prompts[count:]


def columns_to_settle(
    logits: Tensor, masked: Tensor, sampled: NDArray[np.bool_], count: int
) -> Tensor:
    """Which tokens of each block a denoising step settles.

    Args:
        logits: `[n, B, V]`.
        masked: `[n, B]` bool, not settled yet: equally many in every row.
        sampled: `[n]` bool, blocks of drawn tokens: from left to right. The others: those the
            drafter is surest of.
        count: How many of each.

    Returns:
        `[n, count]` int64.
    """
    size = masked.shape[1]
    surest = (logits.amax(dim=-1) - logits.logsumexp(dim=-1)).exp()
    leftmost = torch.arange(size, 0, -1, device=logits.device, dtype=surest.dtype)
    draws = to_device(sampled, logits.device).unsqueeze(1)
    order = torch.where(draws, leftmost, surest).masked_fill(~masked, -1)
    return order.topk(count, dim=1).indices


def _keep(
    kept: DraftProbabilities | None,
    law: DraftProbabilities | None,
    columns: Tensor,
    size: int,
) -> DraftProbabilities | None:
    """Laws of some columns, `[n, m, M]`, put into those of a block, `[n, size, M]`."""
    if law is None:
        return None
    assert law.sampled is not None
    if kept is None:
        shape = (len(columns), size, law.values.shape[-1])
        kept = DraftProbabilities(
            law.values.new_zeros(shape),
            None if law.vocabulary is None else law.vocabulary.new_zeros(shape),
            law.sampled[:, :1].expand(-1, size),
        )
    kept.values.scatter_(1, _wide(columns, law.values), law.values)
    if kept.vocabulary is not None:
        assert law.vocabulary is not None
        kept.vocabulary.scatter_(1, _wide(columns, law.vocabulary), law.vocabulary)
    return kept


def _wide(columns: Tensor, like: Tensor) -> Tensor:
    """`[n, m]` columns as an index into the second dimension of three."""
    return columns.unsqueeze(-1).expand(-1, -1, like.shape[-1])


def _nobodys_requests(temperatures: Sequence[float], context: EngineContext) -> DraftInput:
    """A step of requests that nobody sent, each of which may draft as much as it can."""
    count = len(temperatures)
    ones = np.ones(count, dtype=np.int64)
    return DraftInput(
        request_ids=[f"warm-up {i}" for i in range(count)],
        token_history=np.zeros((count, 4), dtype=np.int32),
        rows=np.arange(count),
        num_tokens=3 * ones,
        num_prompt_tokens=ones,
        max_draft=context.facts.num_speculative_tokens * ones,
        temperatures=np.array(temperatures, dtype=np.float32),
        streams=0 * ones,
        hidden_states=None,
        cache_salts=None,
        length_control=Fixed(LengthControlOptions(), context),
    )
