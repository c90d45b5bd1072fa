"""Our proposers and verifiers on model runner V1 (CPU, and GPU where V1 is chosen).

The adapter hangs on one runner instance, after its device is initialised and before weights
load. It replaces what the runner looks up on itself: `drafter`, `propose_draft_token_ids`,
`rejection_sampler`, `sample_tokens`, `_update_states`. No class is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.model_executor.models.interfaces import supports_eagle3

from vllm_spec_plugins.context import EngineContext
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.errors import PluginError, UnsupportedEngineError
from vllm_spec_plugins.hookspecs import StepRecord, logger, plugin_manager, tell
from vllm_spec_plugins.length_control import Fixed, LengthController, RequestKeys
from vllm_spec_plugins.metrics import Metrics
from vllm_spec_plugins.proposer import Draft, DraftInput, Needs, Proposer, StepStates
from vllm_spec_plugins.registry import Kind
from vllm_spec_plugins.step_clock import StepClock
from vllm_spec_plugins.step_cost import StepTime
from vllm_spec_plugins.target_rows import TargetRows
from vllm_spec_plugins.verifier import TokenHistory, Verification, Verifier, VerifyInput

from .carrier import PluginSpeculativeConfig, chooses_exits, model_facts, registry
from .front_end import counters_writer
from .pass_times import pass_times
from .ranked_drafter import RankedDrafter
from .requests import RequestBatch, RequestStates
from .target import Target

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: A proposer that fails this often in a row is not asked again.
MAX_FAILURES = 3


def attach(worker: Any, vllm_config: VllmConfig) -> V1Adapter:
    """Hang an adapter on a worker's runner; it stays reachable as `runner.spec_plugins`."""
    adapter = V1Adapter(worker.model_runner, vllm_config)
    worker.model_runner.spec_plugins = adapter
    warm_up = worker.compile_or_warm_up_model

    def compile_or_warm_up_model() -> Any:
        times = warm_up()
        adapter.warm_up()
        return times

    worker.compile_or_warm_up_model = compile_or_warm_up_model
    # `LLM.collective_rpc("spec_plugins_metrics")` reads the tallies of every worker.
    worker.spec_plugins_metrics = adapter.metrics.as_dict
    return adapter


class V1Adapter:
    """Everything between one V1 runner and our plugins.

    Attributes:
        proposer: None when vLLM's own method drafts.
        verifiers: By name; empty when vLLM's own verification runs.
        metrics: What was drafted and accepted.
    """

    def __init__(self, runner: Any, vllm_config: VllmConfig) -> None:
        spec = vllm_config.speculative_config
        assert isinstance(spec, PluginSpeculativeConfig)
        settings, plugins = spec.settings, registry()
        parallel, model = vllm_config.parallel_config, vllm_config.model_config
        self.runner = runner
        self.context = EngineContext(
            facts=model_facts(model, parallel, spec.num_speculative_tokens),
            device=runner.device,
            max_num_requests=vllm_config.scheduler_config.max_num_seqs,
            seed=model.seed or 0,
            chooses_exits=chooses_exits(settings),
        )
        self.proposer_name = settings.proposer.name if settings.proposer else str(spec.method)
        self.requests = RequestStates(
            settings.verifier.name if settings.verifier else "vllm",
            settings.verifiers_allowed,
            spec.num_speculative_tokens,
            self.context.seed,
            parallel.data_parallel_index,
        )
        self.verifiers: dict[str, Verifier] = {}
        for name, choice in settings.verifiers_allowed.items():
            cls, options = choice.build(Kind.VERIFIER, plugins)
            self.verifiers[name] = cls(options, self.context)
        cls, options = settings.length_control.build(Kind.LENGTH_CONTROLLER, plugins)
        self.length_control: LengthController = cls(options, self.context)
        self._has_length_control = not isinstance(self.length_control, Fixed)

        self.metrics = Metrics()
        self._observers = plugin_manager()
        self._observers.register(self.metrics, "metrics")
        self._is_first_rank = parallel.rank % parallel.tensor_parallel_size == 0
        if self._is_first_rank and (writer := counters_writer(spec, vllm_config)) is not None:
            self._observers.register(writer, "counters")

        self.proposer: Proposer | None = None
        self.target: Target | None = None
        self._needs = Needs.HISTORY
        #: Numbers of layers after which hidden states are collected.
        self._layers: tuple[int, ...] = ()
        self._failures = 0
        self._draft: Draft | None = None
        self._row_in_draft: dict[str, int] = {}
        self._verification: Verification | None = None
        #: What was verified in this step, for proposers that read the target's logits.
        self._verified: VerifyInput | None = None
        self._state: Any = None
        self._clock = StepClock()

        self._propose_by_vllm: Callable[..., Any] = runner.propose_draft_token_ids
        self._sample_tokens_by_vllm: Callable[..., Any] = runner.sample_tokens
        self._update_states_by_vllm: Callable[..., Any] = runner._update_states
        runner.propose_draft_token_ids = self.propose_draft_token_ids
        runner.sample_tokens = self.sample_tokens
        runner._update_states = self.update_states
        self._ranked = RankedDrafter.of(runner, settings, self.context, self.requests)
        if settings.proposer is not None and spec.method == "custom_class":
            cls, options = settings.proposer.build(Kind.PROPOSER, plugins)
            self.proposer = cls(options, self.context)
            self._needs = spec.needs
            runner.drafter = self
            if Needs.LAYER_STATES in self._needs:
                self._layers = tuple(sorted(set(cls.layers(options, self.context.facts))))
                runner.use_aux_hidden_state_outputs = True
                runner._get_eagle3_aux_layers_from_config = lambda: self._layers
            # vLLM would draft zeros for the whole batch once one request comes near the model
            # length; we leave room per request instead.
            runner.effective_drafter_max_model_len = (
                self.context.facts.max_model_len + spec.num_speculative_tokens + 1
            )
        if self.verifiers:
            from .v1_verifier import VerifierBridge

            runner.rejection_sampler = VerifierBridge(
                self, self.verifiers, runner.sampler, spec, runner.device
            )

    # What the runner asks of its drafter.

    def load_model(self, target: Any, *args: Any, **kwargs: Any) -> None:
        """The target's weights are there."""
        del args, kwargs
        assert self.proposer is not None
        if self._layers and not bool(supports_eagle3(target)):
            raise UnsupportedEngineError(
                f"{type(target).__name__} does not hand out hidden states between its layers in "
                f'this vLLM, and "{self.proposer_name}" needs them with these options. Choose a '
                'fixed exit_layer and another length_control than "del", without an adapter.'
            )
        self.target = Target(target, self.runner, self.context.facts.num_speculative_tokens)
        self.proposer.load(self.target)

    def propose(self, *args: Any, **kwargs: Any) -> Any:
        """Reached only if the runner bypassed `propose_draft_token_ids`."""
        del args, kwargs
        raise RuntimeError("the runner bypassed the adapter: run `vllm-spec doctor`")

    def warm_up(self) -> None:
        """Caches exist, no request has come."""
        if self.proposer is not None:
            if self.target is not None and Needs.TARGET_LAYERS in self._needs:
                self.target.check()
            self.proposer.warm_up()
        self.time_passes(self.length_control)
        if self._is_first_rank:
            tell(
                self._observers,
                "spec_engine_ready",
                context=self.context,
                proposer=self.proposer_name,
                verifier=next(iter(self.verifiers), "vllm"),
            )

    def time_passes(self, control: LengthController) -> None:
        """Tell a length controller that wants it what passes of the target take."""
        if type(control).set_pass_times is not LengthController.set_pass_times:
            most = self.context.max_num_requests * (1 + self.context.facts.num_speculative_tokens)
            control.set_pass_times(*pass_times(self.runner, most))

    # Request events.

    def update_states(self, scheduler_output: Any) -> Any:
        """Wraps `GPUModelRunner._update_states`, which every step passes, drafting or not."""
        self._clock.begin_step()
        gone = list(scheduler_output.finished_req_ids)
        if gone:
            self._forget(gone)
            for verifier in self.verifiers.values():
                verifier.finish(gone)
            for request_id in gone:
                self.requests.remove(request_id)
                if self._is_first_rank:
                    tell(self._observers, "spec_request_finished", request_id=request_id)
        if preempted := list(scheduler_output.preempted_req_ids or ()):
            self._forget(preempted)  # verifiers remember: what a request has paid, say
        for new in scheduler_output.scheduled_new_reqs:
            self.requests.add(new.req_id, new.sampling_params, new.prompt_embeds is None)
        result = self._update_states_by_vllm(scheduler_output)
        if self.verifiers:
            # Our random numbers are keyed and vLLM's drafts ignore seeds, so nobody draws from
            # these; but vLLM winds them back after a part of a prompt, which a generator on the
            # CPU refuses: a seeded request with a long prompt would end the engine.
            self.runner.input_batch.generators.clear()
        return result

    def _forget(self, request_ids: Sequence[str]) -> None:
        """What drafting remembers of requests that are gone or preempted."""
        if self.proposer is not None:
            self.proposer.finish(request_ids)
        if self._ranked is not None:
            self._ranked.finish(request_ids)
        self.length_control.finish(request_ids)
        for request_id in request_ids:
            self._row_in_draft.pop(request_id, None)

    # Verification: what the bridge asks for.

    def requests_of_step(self, count: int) -> RequestBatch:
        """The `count` requests of the step, in row order; warm-up rows belong to nobody."""
        ids = self.runner.input_batch.req_ids[:count]
        return self.requests.batch(ids + [""] * (count - len(ids)))

    def first_draft_positions(self, count: int) -> Tensor:
        """`[R]` sequence position of the first draft token (or of the token to draw).

        The bookkeeping of the step has not run yet, so it is the number of known tokens.
        """
        known = self.runner.input_batch.num_tokens_no_spec[:count].astype(np.int64)
        return torch.from_numpy(known).to(self.runner.device)

    def token_history(self, requests: RequestBatch) -> TokenHistory | None:
        """What the requests of the step have said; None in warm-up, whose rows are nobody's."""
        batch, count = self.runner.input_batch, len(requests.request_ids)
        if len(batch.req_ids) < count:
            return None
        num_tokens = batch.num_tokens_no_spec[:count].astype(np.int64)
        if requests.lacks_history is not None:
            num_tokens[requests.lacks_history] = 0
        return TokenHistory(
            batch.token_ids_cpu,
            np.arange(count),
            num_tokens,
            batch.num_prompt_tokens[:count].astype(np.int64),
        )

    def draft_hidden_states(self, metadata: Any) -> Tensor | None:
        """`[N, H]` the target's final hidden state at each draft token."""
        if self._state is None:
            return None
        return self._state.sample_hidden_states[metadata.target_logits_indices.long() + 1]

    def draft_probabilities(
        self,
        by_vllm: Tensor | None,
        num_draft: Sequence[int],
        request_ids: Sequence[str],
        device: torch.device,
    ) -> DraftProbabilities | None:
        """The law of the step's draft tokens, `[N]` rows; None when all were choices.

        Args:
            by_vllm: `[N, V]` law vLLM's own proposer kept, or None.
            num_draft: `[R]` draft tokens scheduled; may be fewer than were drafted.
            request_ids: `[R]`.
            device: Where the target runs.
        """
        if self.proposer is None:
            if self._ranked is not None:
                return self._ranked.law(by_vllm, num_draft, request_ids)
            if by_vllm is None:
                return None
            # A drawn token of which nothing is dropped for what it is keeps its law; under a
            # grammar it is verified as a choice, which is exact whatever was dropped.
            drawn = self.requests.batch(request_ids).temperatures > 0
            rows = None if drawn.all() else torch.from_numpy(np.repeat(drawn, num_draft))
            return DraftProbabilities(by_vllm, sampled=None if rows is None else rows.to(device))
        kept = self._draft.probabilities if self._draft else None
        if kept is None:
            return None
        rows, columns, known = [], [], []
        for request_id, n in zip(request_ids, num_draft, strict=True):
            row = self._row_in_draft.get(request_id, -1)
            rows += [max(row, 0)] * n
            columns += range(n)
            known += [row >= 0] * n
        # Typed: a step may verify no draft token at all.
        row_index = torch.tensor(rows, dtype=torch.int64, device=device)
        index = row_index, torch.tensor(columns, dtype=torch.int64, device=device)
        sampled = torch.tensor(known, dtype=torch.bool, device=device)
        if kept.sampled is not None:
            sampled &= kept.sampled[index]
        vocabulary = kept.vocabulary
        if vocabulary is not None and vocabulary.ndim > 1:
            vocabulary = vocabulary[index]
        return DraftProbabilities(kept.values[index], vocabulary, sampled)

    def verified(self, batch: VerifyInput, verification: Verification) -> None:
        """The bridge reports what it decided, and on what."""
        self._verification = verification
        if Needs.TARGET_LOGITS in self._needs:
            self._verified = batch

    # The step.

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Wraps `GPUModelRunner.sample_tokens`: verification, bookkeeping, drafting."""
        # The runner clears its state before it samples; verifiers read hidden states from it.
        self._state = state = self.runner.execute_model_state
        try:
            output = self._sample_tokens_by_vllm(grammar_output)
        finally:
            self._state = None
        if state is not None:
            self._finish_step(state, output)
        self._verification = self._verified = None
        self._clock.end_step()
        return output

    def _finish_step(self, state: Any, output: Any) -> None:
        scheduled, metadata = state.scheduler_output, state.spec_decode_metadata
        num_tokens = scheduled.total_num_scheduled_tokens
        # Without any draft there is no metadata.
        num_draft = (
            metadata.num_draft_tokens if metadata else [0] * self.runner.input_batch.num_reqs
        )
        if self.proposer is None and metadata:
            # vLLM's own methods may draft before the step's tokens are known to the host, or
            # not be asked at all.
            self._record(output.sampled_token_ids, num_draft)
        # A prompt in the step would tell nothing about drafts.
        if self._has_length_control and num_tokens == sum(num_draft) + len(num_draft):
            seconds, drafting = self._clock.step()
            self.length_control.observe_step_time(
                StepTime(len(num_draft), num_tokens, max(num_draft), seconds, drafting)
            )

    def propose_draft_token_ids(
        self,
        scheduler_output: Any,
        sampled_token_ids: Any,
        sampling_metadata: Any,
        hidden_states: Tensor,
        sample_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        spec_decode_metadata: Any,
        common_attn_metadata: Any,
        slot_mappings: Any,
    ) -> Any:
        """Wraps `GPUModelRunner.propose_draft_token_ids`; returns lists, empty = no draft."""
        if self.proposer is None:
            if self._ranked is not None:
                self._ranked.begin(sampled_token_ids)
            drafts = self._propose_by_vllm(
                scheduler_output,
                sampled_token_ids,
                sampling_metadata,
                hidden_states,
                sample_hidden_states,
                aux_hidden_states,
                spec_decode_metadata,
                common_attn_metadata,
                slot_mappings,
            )
            return self._limit_vllm_drafts(drafts)
        num_draft = spec_decode_metadata.num_draft_tokens if spec_decode_metadata else []
        # Before the next draft replaces the one that was verified.
        self._record(sampled_token_ids, num_draft)
        if aux_hidden_states and self._layers:
            with self._clock.following():
                self._follow(scheduler_output, sampled_token_ids, num_draft, aux_hidden_states)
        limit = scheduler_output.num_spec_tokens_to_schedule
        with self._clock.drafting():
            return self._propose(sampled_token_ids, num_draft, limit, sample_hidden_states)

    def _limit_vllm_drafts(self, drafts: Any) -> Any:
        """Per-request choices on drafts of vLLM's own methods, decided before they were drawn."""
        ids = self.runner.input_batch.req_ids
        limits = self.requests.batch(ids).draft_limits
        if not len(limits) or limits.min() >= self.context.facts.num_speculative_tokens:
            return drafts
        if isinstance(drafts, Tensor):
            drafts = drafts.tolist()
        return [draft[:limit] for draft, limit in zip(drafts, limits.tolist(), strict=True)]

    def _propose(
        self,
        sampled_token_ids: list[list[int]],
        num_draft: Sequence[int],
        limit: int,
        sample_hidden_states: Tensor,
    ) -> list[list[int]]:
        """One call of our proposer for the requests that sampled a token."""
        batch = self._draft_input(sampled_token_ids, num_draft, limit, sample_hidden_states)
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        self._draft, self._row_in_draft = None, {}
        if batch is None or not batch.max_draft.any():
            return drafts
        draft = self._ask_proposer(batch)
        if draft is None:
            return drafts
        ids = draft.token_ids
        table = ids.cpu().numpy() if isinstance(ids, Tensor) else ids
        counts = self._count_drafted(table, batch)
        for row, request, count in zip(
            table.tolist(), batch.rows.tolist(), counts.tolist(), strict=True
        ):
            if count:
                drafts[request] = row[:count]
        self._draft = draft
        self._row_in_draft = {name: i for i, name in enumerate(batch.request_ids)}
        return drafts

    def _draft_input(
        self,
        sampled_token_ids: list[list[int]],
        num_draft: Sequence[int],
        limit: int,
        sample_hidden_states: Tensor,
    ) -> DraftInput | None:
        batch, facts = self.runner.input_batch, self.context.facts
        rows = [
            row
            for row, sampled in enumerate(sampled_token_ids)
            if sampled and self.requests[batch.req_ids[row]].has_token_history
        ]
        if not rows:
            return None
        requests = self.requests.batch([batch.req_ids[row] for row in rows])
        row_array = np.array(rows, dtype=np.int64)
        num_tokens = batch.num_tokens_no_spec[row_array].astype(np.int64)
        num_prompt = batch.num_prompt_tokens[row_array].astype(np.int64)
        # Every step emits one token beyond the accepted drafts, and all must fit.
        max_draft = np.minimum(requests.draft_limits, limit)
        np.minimum(max_draft, requests.max_tokens + (num_prompt - num_tokens) - 1, out=max_draft)
        np.minimum(max_draft, facts.max_model_len - 1 - num_tokens, out=max_draft)
        if self._has_length_control:
            keys = RequestKeys(requests.request_ids, requests.streams, num_tokens)
            limits = self.length_control.limits(keys)
            np.minimum(max_draft, limits, out=max_draft)
        np.maximum(max_draft, 0, out=max_draft)
        hidden = None
        if Needs.HIDDEN_STATES in self._needs:
            per_request = np.asarray(num_draft or [0] * len(sampled_token_ids)) + 1
            first = per_request.cumsum() - per_request
            last = [first[row] + len(sampled_token_ids[row]) - 1 for row in rows]
            hidden = sample_hidden_states[torch.tensor(last, device=sample_hidden_states.device)]
        return DraftInput(
            request_ids=requests.request_ids,
            token_history=batch.token_ids_cpu,
            rows=row_array,
            num_tokens=num_tokens,
            num_prompt_tokens=num_prompt,
            max_draft=max_draft,
            temperatures=requests.temperatures,
            streams=requests.streams,
            hidden_states=hidden,
            cache_salts=requests.cache_salts if Needs.CACHE_SALT in self._needs else None,
            length_control=self.length_control,
            target_rows=self._target_rows(sampled_token_ids, num_draft, row_array),
        )

    def _target_rows(
        self,
        sampled_token_ids: list[list[int]],
        num_draft: Sequence[int],
        rows: NDArray[np.int64],
    ) -> TargetRows | None:
        """What the step's verification computed past the token it ended with, of some requests."""
        verified = self._verified
        if verified is None or not num_draft:
            return None
        accepted = np.array([max(len(tokens) - 1, 0) for tokens in sampled_token_ids])
        return TargetRows.after(
            verified.target_logits,
            verified.bonus_logits,
            np.array(num_draft, dtype=np.int64),
            accepted,
            rows,
        )

    def _follow(
        self,
        scheduler_output: Any,
        emitted: list[list[int]],
        num_draft: Sequence[int],
        layer_states: Sequence[Tensor],
    ) -> None:
        """Show our proposer what the step computed."""
        assert self.proposer is not None
        if self._failures >= MAX_FAILURES:
            return
        runner = self.runner
        requests = self.requests.batch(runner.input_batch.req_ids)
        scheduled = np.array(
            [scheduler_output.num_scheduled_tokens[name] for name in requests.request_ids],
            dtype=np.int64,
        )
        drafted = np.array(num_draft or [0] * len(scheduled), dtype=np.int64)
        accepted = np.array([max(len(tokens) - 1, 0) for tokens in emitted], dtype=np.int64)
        count = int(scheduled.sum())
        states = StepStates(
            request_ids=requests.request_ids,
            rows=np.arange(len(scheduled)),
            num_scheduled=scheduled,
            num_verified=scheduled - drafted + accepted,
            num_draft=drafted,
            emitted=emitted,
            token_ids=runner.input_ids.gpu[:count].long(),
            positions=runner._get_positions(count).long(),
            layer_states={
                layer: state[:count]
                for layer, state in zip(self._layers, layer_states, strict=True)
            },
            temperatures=requests.temperatures,
            streams=requests.streams,
        )
        try:
            self.proposer.follow(states)
        except Exception:  # noqa: BLE001 - third-party code may raise anything
            self._failed()

    def _ask_proposer(self, batch: DraftInput) -> Draft | None:
        """A failing proposer costs speed, never a request."""
        assert self.proposer is not None
        if self._failures >= MAX_FAILURES:
            return None
        try:
            draft = self.proposer.propose(batch)
            self._check_draft(draft, batch)
        except Exception:  # noqa: BLE001 - third-party code may raise anything
            self._failed()
            return None
        self._failures = 0
        return draft

    def _failed(self) -> None:
        """Count and tell a failure of our proposer; inside an except clause."""
        self._failures += 1
        logger.exception(
            'The proposer "%s" failed (%d of %d in a row before it is switched off); '
            "this step goes on without drafts.",
            self.proposer_name,
            self._failures,
            MAX_FAILURES,
        )

    def _check_draft(self, draft: Draft, batch: DraftInput) -> None:
        """What a third party may get wrong, cheap enough for every step."""
        ids, count = draft.token_ids, len(batch.request_ids)
        if ids.ndim != 2 or ids.shape[0] != count:
            raise PluginError(
                f'"{self.proposer_name}" returned token_ids of shape {tuple(ids.shape)}; '
                f"expected ({count}, K)."
            )
        if 0 in ids.shape:
            return
        highest = int(ids.max())
        if highest >= self.context.facts.vocab_size:
            raise PluginError(
                f'"{self.proposer_name}" drafted the token {highest}; the target\'s vocabulary '
                f"has {self.context.facts.vocab_size}."
            )

    @staticmethod
    def _count_drafted(table: NDArray[Any], batch: DraftInput) -> NDArray[np.int64]:
        """`[R]` tokens before the first -1, at most `max_draft`."""
        none = table < 0
        counts = np.where(none.any(axis=1), none.argmax(axis=1), table.shape[1])
        return np.minimum(counts, batch.max_draft)

    # Observers.

    def _record(self, sampled_token_ids: list[list[int]], num_draft: Sequence[int]) -> None:
        """Tell the length controller and the observers what the step decided."""
        rows = [row for row, sampled in enumerate(sampled_token_ids) if sampled]
        if not rows or not num_draft:
            return
        ids = self.runner.input_batch.req_ids
        names = [ids[row] for row in rows]
        drafted = [num_draft[row] for row in rows]
        emitted = [sampled_token_ids[row] for row in rows]
        # A stop token cannot shorten this: the scheduler cuts the text, not the verification.
        accepted = [len(tokens) - 1 for tokens in emitted]
        if self._has_length_control:
            had = [i for i, count in enumerate(drafted) if count]
            if had:
                self.length_control.observe(
                    [names[i] for i in had],
                    np.array([drafted[i] for i in had], dtype=np.int64),
                    np.array([accepted[i] for i in had], dtype=np.int64),
                )
        if self._is_first_rank:
            tell(
                self._observers,
                "spec_step_finished",
                step=StepRecord(
                    proposer=self.proposer_name,
                    request_ids=names,
                    verifiers=self.requests.batch(names).verifiers,
                    num_draft=drafted,
                    num_accepted=accepted,
                    token_ids=emitted,
                    sources=(self._draft.sources if self._draft else ()) or (self.proposer_name,),
                    source_of=self._source_of(names),
                    extra_acceptance=self._extra_acceptance(rows, num_draft),
                ),
            )

    def _source_of(self, names: Sequence[str]) -> NDArray[np.int8] | None:
        """`[R, K]` who drafted each token of the step's drafts."""
        kept = self._draft.source_of if self._draft else None
        if kept is None:
            return None
        return kept[[self._row_in_draft.get(name, 0) for name in names]]

    def _extra_acceptance(
        self, rows: Sequence[int], num_draft: Sequence[int]
    ) -> list[float] | None:
        """`[R]` price of the step, summed over its positions."""
        extra = self._verification.extra_acceptance if self._verification else None
        if extra is None:
            return None
        ends = np.cumsum(num_draft)
        sums = np.concatenate([[0.0], extra.double().cumsum(0).cpu().numpy()])
        per_request = sums[ends] - sums[ends - np.asarray(num_draft)]
        return per_request[list(rows)].tolist()
