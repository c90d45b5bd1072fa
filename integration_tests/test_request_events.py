"""The life of requests, as a proposer sees it; and what it may draft near their end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.engine

NUM_SPECULATIVE_TOKENS = 4
CONFIG = {
    "method": "ngram_adaptive",
    "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
    "min_acceptance": 0.05,
}
#: A text that repeats itself: there is always something to draft.
PROMPT = [5, 6, 7, 8, 9] * 4


@dataclass
class Probe:
    """What the proposer of an engine was asked and told.

    Attributes:
        asked: Request ids of every `propose`.
        finished: Request ids given to `finish`, in order.
    """

    asked: list[list[str]] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    def watch(self, proposer: Any) -> None:
        propose, finish = proposer.propose, proposer.finish

        def watched_propose(batch: Any) -> Any:
            self.asked.append(list(batch.request_ids))
            return propose(batch)

        def watched_finish(request_ids: Sequence[str]) -> None:
            self.finished.extend(request_ids)
            finish(request_ids)

        proposer.propose, proposer.finish = watched_propose, watched_finish


@pytest.fixture(scope="module")
def llm(serve_offline: Callable[..., Any]) -> Iterator[Any]:
    with serve_offline(CONFIG) as llm:
        yield llm


@pytest.fixture
def probe(llm: Any, adapter_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Probe:
    """Watches the proposer of `llm` during one test."""
    probe, proposer = Probe(), adapter_of(llm).proposer
    # So that the attributes are as before when the test is over.
    monkeypatch.setattr(proposer, "propose", proposer.propose)
    monkeypatch.setattr(proposer, "finish", proposer.finish)
    probe.watch(proposer)
    return probe


def add(llm: Any, name: str, prompt: Sequence[int] = PROMPT, **sampling: Any) -> None:
    from vllm import SamplingParams

    params = SamplingParams(
        **{"temperature": 0.0, "max_tokens": 60, "ignore_eos": True, **sampling}, detokenize=False
    )
    llm.llm_engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)


def step(llm: Any, times: int = 1) -> list[Any]:
    return [output for _ in range(times) for output in llm.llm_engine.step()]


def run(llm: Any) -> dict[str, list[int]]:
    """Step until nothing is left; the texts by request id."""
    texts = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in step(llm):
            if output.finished:
                texts[output.request_id] = list(output.outputs[0].token_ids)
    return texts


def after_another_step(llm: Any) -> None:
    """vLLM tells the worker who has finished with the next step, whosever it is."""
    add(llm, "another", max_tokens=1)
    run(llm)


def external(ids: Sequence[str]) -> list[str]:
    """vLLM appends something random to request ids; without it."""
    return [name.rsplit("-", 1)[0] for name in ids]


def test_a_finished_request_is_forgotten(llm: Any, probe: Probe) -> None:
    add(llm, "one", max_tokens=6)
    add(llm, "two", max_tokens=30)
    run(llm)
    assert any(external(ids) == ["one", "two"] for ids in probe.asked)
    after_another_step(llm)
    assert external(probe.finished)[:2] == ["one", "two"]
    last_asked = {name: i for i, ids in enumerate(probe.asked) for name in external(ids)}
    assert last_asked["one"] < last_asked["two"]


def test_an_aborted_request_is_forgotten(llm: Any, probe: Probe, adapter_of: Any) -> None:
    add(llm, "aborted")
    add(llm, "other")
    step(llm, 4)
    assert "aborted" in external(probe.asked[-1])
    llm.llm_engine.abort_request(["aborted"])
    step(llm, 2)
    assert external(probe.finished)[-1:] == ["aborted"]
    assert external(probe.asked[-1]) == ["other"]
    assert len(adapter_of(llm).requests) == 1
    assert len(run(llm)["other"]) == 60


def test_a_request_aborted_before_its_first_step_leaves_nothing(
    llm: Any, probe: Probe, adapter_of: Any
) -> None:
    after_another_step(llm)
    add(llm, "aborted")
    llm.llm_engine.abort_request(["aborted"])
    after_another_step(llm)
    after_another_step(llm)
    assert not any("aborted" in external(ids) for ids in probe.asked)
    assert len(adapter_of(llm).requests) == 1  # the last one, until the next step


def test_a_preempted_request_is_forgotten_and_comes_back(
    serve_offline: Callable[..., Any], adapter_of: Any, watch: Callable[..., Any]
) -> None:
    """Its text is whole, and the proposer is asked for it again with its whole history."""
    names = [f"request {i}" for i in range(8)]
    prompts = {name: [20 + i, *PROMPT] for i, name in enumerate(names)}
    with serve_offline(CONFIG) as llm:
        for name, prompt in prompts.items():
            add(llm, name, prompt)
        wanted = run(llm)
    with serve_offline(CONFIG, num_gpu_blocks_override=12, block_size=32) as llm:
        probe, watched = Probe(), watch(llm)
        probe.watch(adapter_of(llm).proposer)
        for name, prompt in prompts.items():
            add(llm, name, prompt)
        texts = run(llm)
        after_another_step(llm)
        states = len(adapter_of(llm).requests)
    preempted = [n for s in watched.steps for n in s.preempted_req_ids or ()]
    assert preempted
    assert watched.resumptions == len(preempted)
    for name in set(preempted):
        assert probe.finished.count(name) == 1 + preempted.count(name)
    # Asked for it again after it was forgotten for the first time.
    assert any(preempted[0] in ids for ids in probe.asked[len(probe.asked) // 2 :])
    assert texts == wanted
    assert states == 1


def test_verifiers_remember_a_preempted_request() -> None:
    """What it has paid of `max_total_variation`, say; drafting starts anew."""
    from vllm_spec_plugins.engine.v1_runner import V1Adapter
    from vllm_spec_plugins.step_clock import StepClock

    by_drafting: list[str] = []
    by_verifying: list[str] = []
    adapter: Any = object.__new__(V1Adapter)
    adapter.__dict__.update(
        proposer=SimpleNamespace(finish=by_drafting.extend),
        length_control=SimpleNamespace(finish=by_drafting.extend),
        verifiers={"lossless": SimpleNamespace(finish=by_verifying.extend)},
        requests=SimpleNamespace(remove=lambda _: None),
        runner=SimpleNamespace(input_batch=SimpleNamespace(generators={})),
        _ranked=None,
        _row_in_draft={},
        _have_drafts=set(),
        _asker=None,
        _is_first_rank=False,
        _clock=StepClock(),
        _update_states_by_vllm=lambda _: None,
    )
    step = {"preempted_req_ids": {"preempted"}, "scheduled_new_reqs": []}
    adapter.update_states(SimpleNamespace(finished_req_ids={"finished"}, **step))
    assert by_drafting == ["finished", "finished", "preempted", "preempted"]
    assert by_verifying == ["finished"]


def test_nothing_is_left_of_many_requests(llm: Any, adapter_of: Any) -> None:
    """200 requests of every fate; after one more step only that step's request is known."""
    for i in range(200):
        add(llm, str(i), [3 + i % 50, *PROMPT], max_tokens=1 + i % 13, seed=i % 3 or None)
        if i % 5 == 0:
            step(llm)
        if i % 7 == 0:
            llm.llm_engine.abort_request([str(i)])
    run(llm)
    after_another_step(llm)
    adapter = adapter_of(llm)
    assert len(adapter.requests) == 1
    assert len(adapter.proposer._slot_of) <= 1
    assert len(adapter._row_in_draft) <= 1
    assert adapter.proposer.num_bytes < 100_000


MODEL_LENGTH = 64
#: Prompt and `max_tokens` of requests that end for either reason.
SHORT = {
    "far from both": (PROMPT, 40),
    **{f"towards the model length {i}": (PROMPT * 2 + [10 + i] * i, 100) for i in range(8)},
    "one token before it": ([*PROMPT * 3, 5, 6, 7], 100),
    "few tokens": (PROMPT, 3),
    "one token": (PROMPT, 1),
}


def test_nothing_is_drafted_beyond_the_end(
    serve_offline: Callable[..., Any], watch: Callable[..., Any]
) -> None:
    """Near the model length and near `max_tokens`; batch mates go on drafting meanwhile.

    vLLM's own proposers draft zeros for the whole batch once one request is near the end.
    """
    with serve_offline(max_model_len=MODEL_LENGTH) as llm:
        for name, (prompt, max_tokens) in SHORT.items():
            add(llm, name, prompt, max_tokens=max_tokens)
        wanted = run(llm)
    with serve_offline(CONFIG, max_model_len=MODEL_LENGTH) as llm:
        watched = watch(llm)
        for name, (prompt, max_tokens) in SHORT.items():
            add(llm, name, prompt, max_tokens=max_tokens)
        texts = run(llm)
    assert texts == wanted

    beside = 0
    for scheduled in watched.steps:
        computed = {
            new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs
        } | dict(
            zip(
                scheduled.scheduled_cached_reqs.req_ids,
                scheduled.scheduled_cached_reqs.num_computed_tokens,
                strict=True,
            )
        )
        drafts = scheduled.scheduled_spec_decode_tokens
        for request_id, tokens in drafts.items():
            prompt, max_tokens = SHORT[external([request_id])[0]]
            # Known tokens: those computed, and the one sampled last. With the draft and the
            # token after it they must fit.
            after = computed[request_id] + 1 + len(tokens) + 1
            assert after <= min(MODEL_LENGTH, len(prompt) + max_tokens)
        near = [
            request_id
            for request_id, count in computed.items()
            if count + 1 + NUM_SPECULATIVE_TOKENS >= MODEL_LENGTH
        ]
        beside += sum(len(tokens) for name, tokens in drafts.items() if near and name not in near)
    assert beside > 0
