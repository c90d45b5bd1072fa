"""What both model runners share: everything between a runner and our plugins.

An adapter hangs on one runner instance, after its device is initialised and before weights
load. What a runner calls, and where it keeps the state of a step, is the business of
`v1_runner` and `v2_runner`; which requests there are, what they may draft, who is asked, what
was accepted, and who is told, is decided here, the same for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

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
from vllm_spec_plugins.random_numbers import Purpose, uniforms
from vllm_spec_plugins.registry import Kind
from vllm_spec_plugins.step_clock import StepClock
from vllm_spec_plugins.step_cost import StepTime
from vllm_spec_plugins.target_rows import TargetRows
from vllm_spec_plugins.transfers import to_device
from vllm_spec_plugins.verifier import Verification, Verifier, VerifyInput

from .carrier import PluginSpeculativeConfig, chooses_exits, model_facts, registry
from .device_asker import DeviceAsker
from .front_end import counters_writer
from .pass_times import pass_times
from .requests import RequestStates

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

    from .target import Target
    from .verified_step import StepTokens, VerifiedStep

#: A proposer that fails this often in a row is not asked again.
MAX_FAILURES = 3


class RunnerAdapter:
    """One runner's requests, proposer, verifiers, length controller, metrics and observers.

    Attributes:
        proposer: None when vLLM's own method drafts.
        verifiers: By name; empty when vLLM's own verification runs.
        metrics: What was drafted and accepted.
    """

    #: Whether the runner itself keeps texts where a proposer on the device can read them.
    keeps_texts_on_device: ClassVar[bool] = False

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
        self._telling = Lock()
        self._is_first_rank = parallel.rank % parallel.tensor_parallel_size == 0
        if self._is_first_rank and (writer := counters_writer(spec, vllm_config)) is not None:
            self._observers.register(writer, "counters")

        self.proposer: Proposer | None = None
        self.target: Target | None = None
        self._needs = Needs.HISTORY
        #: Numbers of layers after which hidden states are collected.
        self._layers: tuple[int, ...] = ()
        if settings.proposer is not None and spec.method == "custom_class":
            cls, options = settings.proposer.build(Kind.PROPOSER, plugins)
            self.proposer = cls(options, self.context)
            self._needs = spec.needs
            if Needs.LAYER_STATES in self._needs:
                self._layers = tuple(sorted(set(cls.layers(options, self.context.facts))))
        #: Asks a proposer that drafts on the device alone, of texts on the host.
        self._asker: DeviceAsker | None = None
        if self.proposer and spec.drafts_on_device_alone and not self.keeps_texts_on_device:
            self._asker = DeviceAsker(self.proposer, self.context)
        self._failures = 0
        self._draft: Draft | None = None
        self._row_in_draft: dict[str, int] = {}
        #: Requests our proposer has drafted for.
        self._have_drafts: set[str] = set()
        self._verification: Verification | None = None
        #: What was verified in this step, for proposers that read the target's logits.
        self._verified: VerifyInput | None = None
        self._clock = StepClock()

    # Before the first request.

    def load(self, target: Target) -> None:
        """The target's weights are there."""
        assert self.proposer is not None
        if self._layers and not bool(supports_eagle3(target.module)):
            raise UnsupportedEngineError(
                f"{type(target.module).__name__} does not hand out hidden states between its "
                f'layers in this vLLM, and "{self.proposer_name}" needs them with these options. '
                'Choose a fixed exit_layer and another length_control than "del", without an '
                "adapter; for diffusion a drafter trained without --condition-on-layers."
            )
        self.target = target
        self.proposer.load(target)

    def warm_up(self) -> None:
        """Caches exist, no request has come."""
        nobody = torch.zeros(1, dtype=torch.int64)
        uniforms(nobody, nobody, 0, Purpose.ACCEPT)  # on the host their code is loaded by now
        if self.proposer is not None:
            if self.target is not None and Needs.TARGET_LAYERS in self._needs:
                self.target.check()
            self.proposer.warm_up()
        for verifier in self.verifiers.values():
            verifier.warm_up()
        self.time_passes(self.length_control)
        if self._is_first_rank:
            self._tell(
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

    def request_came(
        self, request_id: str, params: SamplingParams | None, has_token_history: bool
    ) -> None:
        """A request's first step, or a new turn of a streaming session."""
        if self._asker is not None:
            self._asker.forget([request_id])
        self.requests.add(request_id, params, has_token_history)

    def requests_gone(self, finished: Sequence[str], preempted: Sequence[str]) -> None:
        """Forget requests that finished or were aborted, and drafts of preempted ones."""
        if finished:
            self._forget(finished)
            for verifier in self.verifiers.values():
                verifier.finish(finished)
            for request_id in finished:
                self.requests.remove(request_id)
                if self._is_first_rank:
                    self._tell("spec_request_finished", request_id=request_id)
        if preempted:
            self._forget(preempted)  # verifiers remember: what a request has paid, say

    def _forget(self, request_ids: Sequence[str]) -> None:
        """What drafting remembers of requests that are gone or preempted."""
        if self.proposer is not None:
            self.proposer.finish(request_ids)
        if self._asker is not None:
            self._asker.forget(request_ids)
        self.length_control.finish(request_ids)
        for request_id in request_ids:
            self._row_in_draft.pop(request_id, None)
            self._have_drafts.discard(request_id)

    # Verification.

    def law_of_our_drafts(
        self, num_draft: Sequence[int], request_ids: Sequence[str], device: torch.device
    ) -> DraftProbabilities | None:
        """The law of draft tokens of our proposer, `[N]` rows; None when all were choices.

        Args:
            num_draft: `[R]` draft tokens scheduled; may be fewer than were drafted.
            request_ids: `[R]`.
            device: Where the target runs.
        """
        kept = self._draft.probabilities if self._draft else None
        if kept is None:
            return None
        rows, columns, known = [], [], []
        for request_id, n in zip(request_ids, num_draft, strict=True):
            row = self._row_in_draft.get(request_id, -1)
            rows += [max(row, 0)] * n
            # Another draft may have been longer than any of these.
            columns += range(n) if row >= 0 else [0] * n
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

    def law_of_dense_drafts(
        self, law: Tensor, num_draft: Sequence[int], request_ids: Sequence[str]
    ) -> DraftProbabilities:
        """The law of draft tokens of a method of vLLM's.

        A drawn token of which nothing is dropped for what it is keeps its law; under a grammar it
        is verified as a choice, which is exact whatever was dropped.

        Args:
            law: `[N, V]`.
            num_draft: `[R]` draft tokens scheduled.
            request_ids: `[R]`.
        """
        drawn = self.requests.batch(request_ids).temperatures > 0
        rows = None if drawn.all() else to_device(np.repeat(drawn, num_draft), law.device)
        return DraftProbabilities(law, sampled=rows)

    def verified(self, batch: VerifyInput, verification: Verification) -> None:
        """The bridge reports what it decided, and on what."""
        self._verification = verification
        if Needs.TARGET_LOGITS in self._needs:
            self._verified = batch

    # Drafting.

    def draft(self, step: VerifiedStep, limit: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """One call of our proposer for the requests that emitted a token.

        Args:
            step: What the step decided.
            limit: Most tokens the scheduler takes of each request.

        Returns:
            `[S, K]` drafted tokens of every request of the step, and `[S]` how many of them
            count; 0 = none.
        """
        count = len(step.request_ids)
        self._draft, self._row_in_draft = None, {}
        nothing = np.zeros((count, 0), dtype=np.int64), np.zeros(count, dtype=np.int64)
        rows = [
            row
            for row, emitted in enumerate(step.emitted)
            if emitted and self.requests[step.request_ids[row]].has_token_history
        ]
        if not rows:
            return nothing
        batch = self._draft_input(step, rows, limit)
        if not batch.max_draft.any():
            return nothing
        asked = self._ask_proposer(batch)
        if asked is None:
            return nothing
        draft, drafted = asked
        table = np.zeros((count, drafted.shape[1]), dtype=np.int64)
        counts = np.zeros(count, dtype=np.int64)
        table[rows], counts[rows] = drafted, self._count_drafted(drafted, batch)
        self._draft = draft
        self._row_in_draft = {name: i for i, name in enumerate(batch.request_ids)}
        self._have_drafts.update(batch.request_ids)
        return table, counts

    def _draft_input(self, step: VerifiedStep, rows: list[int], limit: int) -> DraftInput:
        """What our proposer is asked with, for some of the step's requests."""
        facts = self.context.facts
        requests = self.requests.batch([step.request_ids[row] for row in rows])
        row_array = np.array(rows, dtype=np.int64)
        history = step.history.select(row_array)
        num_tokens, num_prompt = history.num_tokens, history.num_prompt_tokens
        # Every step emits one token beyond the accepted drafts, and all must fit.
        max_draft = np.minimum(requests.draft_limits, limit)
        np.minimum(max_draft, requests.max_tokens + (num_prompt - num_tokens) - 1, out=max_draft)
        np.minimum(max_draft, facts.max_model_len - 1 - num_tokens, out=max_draft)
        if self._has_length_control:
            keys = RequestKeys(requests.request_ids, requests.streams, num_tokens)
            np.minimum(max_draft, self.length_control.limits(keys), out=max_draft)
        np.maximum(max_draft, 0, out=max_draft)
        hidden = None
        if Needs.HIDDEN_STATES in self._needs:
            per_request = np.asarray(step.num_draft or [0] * len(step.emitted)) + 1
            first = per_request.cumsum() - per_request
            last = [first[row] + len(step.emitted[row]) - 1 for row in rows]
            states = step.sample_hidden_states
            hidden = states[torch.tensor(last, device=states.device)]
        return DraftInput(
            request_ids=requests.request_ids,
            token_history=history.token_ids,
            rows=history.rows,
            num_tokens=num_tokens,
            num_prompt_tokens=num_prompt,
            max_draft=max_draft,
            temperatures=requests.temperatures,
            streams=requests.streams,
            hidden_states=hidden,
            cache_salts=requests.cache_salts if Needs.CACHE_SALT in self._needs else None,
            length_control=self.length_control,
            target_rows=self._target_rows(step, row_array),
        )

    def _target_rows(self, step: VerifiedStep, rows: NDArray[np.int64]) -> TargetRows | None:
        """What the step's verification computed past the token it ended with, of some requests."""
        verified = self._verified
        if verified is None or not step.num_draft:
            return None
        return TargetRows.after(
            verified.target_logits,
            verified.bonus_logits,
            np.array(step.num_draft, dtype=np.int64),
            step.accepted,
            rows,
        )

    def show_states(
        self, step: VerifiedStep, tokens: StepTokens, layer_states: Sequence[Tensor]
    ) -> None:
        """Show our proposer what the step computed.

        Args:
            step: What was decided.
            tokens: What was computed on.
            layer_states: `[T, H]` for each of `self._layers`; rows beyond T are padding.
        """
        assert self.proposer is not None
        if self._failures >= MAX_FAILURES:
            return
        requests = self.requests.batch(step.request_ids)
        scheduled = tokens.num_scheduled
        drafted = np.array(step.num_draft or [0] * len(scheduled), dtype=np.int64)
        count = int(scheduled.sum())
        states = StepStates(
            request_ids=requests.request_ids,
            rows=step.history.rows,
            num_scheduled=scheduled,
            num_verified=scheduled - drafted + step.accepted,
            num_draft=drafted,
            emitted=step.emitted,
            token_ids=tokens.token_ids[:count].long(),
            positions=tokens.positions[:count].long(),
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

    def _ask_proposer(self, batch: DraftInput) -> tuple[Draft, NDArray[Any]] | None:
        """A draft and its `[R, K]` tokens; a failing proposer costs speed, never a request."""
        assert self.proposer is not None
        if self._failures >= MAX_FAILURES:
            return None
        try:
            propose = self.proposer.propose if self._asker is None else self._asker.propose
            draft = propose(batch)
            drafted = self._token_ids_of(draft, batch)
        except Exception:  # noqa: BLE001 - third-party code may raise anything
            self._failed()
            return None
        self._failures = 0
        return draft, drafted

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

    def _token_ids_of(self, draft: Draft, batch: DraftInput) -> NDArray[Any]:
        """`[R, K]` on the host, after a look at what a third party may get wrong."""
        ids, count = draft.token_ids, len(batch.request_ids)
        if ids.ndim != 2 or ids.shape[0] != count:
            raise PluginError(
                f'"{self.proposer_name}" returned token_ids of shape {tuple(ids.shape)}; '
                f"expected ({count}, K)."
            )
        drafted = ids.cpu().numpy() if isinstance(ids, Tensor) else ids
        highest = int(drafted.max(initial=-1))
        if highest >= self.context.facts.vocab_size:
            raise PluginError(
                f'"{self.proposer_name}" drafted the token {highest}; the target\'s vocabulary '
                f"has {self.context.facts.vocab_size}."
            )
        return drafted

    @staticmethod
    def _count_drafted(table: NDArray[Any], batch: DraftInput) -> NDArray[np.int64]:
        """`[R]` tokens before the first -1, at most `max_draft`."""
        none = table < 0
        counts = np.where(none.any(axis=1), none.argmax(axis=1), table.shape[1])
        return np.minimum(counts, batch.max_draft)

    # Observers.

    def observe_step_time(self, num_draft: Sequence[int], num_tokens: int) -> None:
        """Tell the length controller what a step of decoding took.

        Args:
            num_draft: `[S]` draft tokens verified.
            num_tokens: Tokens of the step. A prompt among them would tell nothing about drafts.
        """
        if self._has_length_control and num_tokens == sum(num_draft) + len(num_draft):
            seconds, drafting = self._clock.step()
            self.length_control.observe_step_time(
                StepTime(len(num_draft), num_tokens, max(num_draft), seconds, drafting)
            )

    def record(
        self, ids: Sequence[str], emitted_by: Sequence[Sequence[int]], num_draft: Sequence[int]
    ) -> None:
        """Tell the length controller and the observers what the step decided.

        Args:
            ids: `[S]` requests of the step, in row order.
            emitted_by: `[S]` tokens each emitted; empty where a prompt is not read yet.
            num_draft: `[S]` draft tokens verified; empty where nothing was.
        """
        rows = [row for row, emitted in enumerate(emitted_by) if emitted]
        if not rows or not num_draft:
            return
        names = [ids[row] for row in rows]
        # Of a request whose prompt is cached but for one token, vLLM schedules placeholders.
        nobodys = [self.proposer is not None and name not in self._have_drafts for name in names]
        drafted = [0 if nobodys[i] else num_draft[row] for i, row in enumerate(rows)]
        emitted = [list(emitted_by[row]) for row in rows]
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
            self._tell(
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

    def tallies(self) -> dict[str, Any]:
        """The metrics so far, as plain values."""
        with self._telling:
            return self.metrics.as_dict()

    def _tell(self, hook: str, **what: object) -> None:
        """Tell every observer; from whichever thread, never two at once."""
        with self._telling:
            tell(self._observers, hook, **what)

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
