"""Asynchronous scheduling on model runner V2: a step is planned before the last is verified."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_spec_plugins import StepRecord, hookimpl

pytestmark = [
    pytest.mark.engine,
    pytest.mark.v2,
    pytest.mark.usefixtures("acme_methods", "asynchronous"),
]

MAX_TOKENS = 24
LENGTHS = (8, 33, 40, 20, 17, 5)
PROMPTS = [
    {"prompt_token_ids": [(i * k * k + 5 * k) % 13 + 3 for k in range(length)]}
    for i, length in enumerate(LENGTHS)
]

_DRAFTS = {"num_speculative_tokens": 3}
ON_DEVICE = {"method": "acme_on_device", **_DRAFTS}
NGRAM = {"method": "ngram_gpu", "prompt_lookup_min": 1, "prompt_lookup_max": 3, **_DRAFTS}
BLOCK = {"name": "lossless", "rule": "block"}
EARLY_EXIT = {"method": "early_exit", "exit_layer": 2, **_DRAFTS}
CONFIGURATIONS = {"a plugin's, token": ON_DEVICE}
MORE_CONFIGURATIONS = {
    "early_exit, token": EARLY_EXIT,
    "early_exit, block": {**EARLY_EXIT, "verifier": BLOCK},
    "jacobi": {"method": "jacobi", **_DRAFTS},
    "early_exit without an attention": {**EARLY_EXIT, "exit_layer": 3, "skip_attention": (1,)},
    "ngram_adaptive, token": {"method": "ngram_adaptive", "matching": "device", **_DRAFTS},
    "ngram of vLLM, block": {**NGRAM, "verifier": BLOCK},
    "a plugin's, block": {**ON_DEVICE, "verifier": BLOCK},
    "a plugin's draws, token": {**ON_DEVICE, "draws": True},
    "ngram of vLLM, token": {**NGRAM, "verifier": "lossless"},
    "draft_model of vLLM, token": {"method": "draft_model", **_DRAFTS, "verifier": "lossless"},
    "draft_model of vLLM, block": {"method": "draft_model", **_DRAFTS, "verifier": BLOCK},
}


@pytest.fixture(scope="module")
def plain(plain_texts: Any) -> list[list[int]]:
    return plain_texts(PROMPTS, MAX_TOKENS)


class Told:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.finished: list[str] = []

    @hookimpl
    def spec_step_finished(self, step: StepRecord) -> None:
        assert not set(step.request_ids) & set(self.finished)
        self.steps.append(step)

    @hookimpl
    def spec_request_finished(self, request_id: str) -> None:
        self.finished.append(request_id)

    def texts(self) -> list[list[int]]:
        """What each request was said to have emitted, in the order the requests finished."""
        texts: defaultdict[str, list[int]] = defaultdict(list)
        for step in self.steps:
            for name, tokens in zip(step.request_ids, step.token_ids, strict=True):
                texts[name] += tokens
        return [texts[name] for name in self.finished]


def is_asynchronous(llm: Any) -> bool:
    return llm.llm_engine.vllm_config.scheduler_config.async_scheduling


@pytest.mark.parametrize(
    "name",
    [*CONFIGURATIONS, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE_CONFIGURATIONS)],
)
def test_greedy_texts_are_plain_decodings(
    name: str,
    serve_v2: Any,
    plain: list[list[int]],
    generate: Any,
    drafted_by: Any,
    watch: Any,
    adapter_of: Any,
) -> None:
    """Prompts come in parts, six requests share four slots, and observers hear of every token."""
    told = Told()
    with serve_v2({**CONFIGURATIONS, **MORE_CONFIGURATIONS}[name]) as llm:
        assert is_asynchronous(llm)
        watched, adapter = watch(llm), adapter_of(llm)
        adapter._observers.register(told)
        assert generate(llm, PROMPTS, max_tokens=MAX_TOKENS) == plain
        [tally] = drafted_by(llm).values()
        # The worker hears with the next step that the last request has ended.
        generate(llm, PROMPTS[:1], max_tokens=1)
        assert len(told.finished) == len(PROMPTS)
        assert len(adapter.requests) == 1
        assert adapter._failures == 0
    # A first token comes without a draft, and is told of beside drafts of others only; the last
    # step may go beyond the end.
    texts = {tuple(text) for text in plain} | {tuple(text[1:]) for text in plain}
    for said in told.texts():
        assert any(tuple(said[: len(text)]) == text for text in texts), said
        assert tally["accepted"] > 0
        assert tally["accepted"] < tally["drafted"]
        assert watched.chunked_prompts > 0


@pytest.mark.parametrize(
    "config",
    [
        ON_DEVICE,
        pytest.param({**ON_DEVICE, "verifier": BLOCK}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_preempted_requests_go_on_as_they_would(
    config: dict[str, Any],
    serve_v2: Any,
    plain: list[list[int]],
    generate: Any,
    watch: Any,
    adapter_of: Any,
) -> None:
    """The prompts of four requests fit into 6 blocks of 32 tokens, their texts do not."""
    small = {"block_size": 32, "num_gpu_blocks_override": 7, "enable_prefix_caching": False}
    with serve_v2(config, **small) as llm:
        assert is_asynchronous(llm)
        watched = watch(llm)
        assert generate(llm, PROMPTS, max_tokens=MAX_TOKENS) == plain
        assert watched.preemptions > 0
        assert adapter_of(llm)._failures == 0


@pytest.mark.slow
def test_options_of_requests(
    serve_v2: Any, plain: list[list[int]], generate: Any, drafted_by: Any, adapter_of: Any
) -> None:
    """A request without drafts, one with one token each, one by another verifier."""
    options = [
        {"spec_decode": {"enabled": False}},
        {"spec_decode": {"num_speculative_tokens": 1}},
        {"spec_decode": {"verifier": "lossless"}},
        {},
    ]
    each = [{"extra_args": options[i % 4]} for i in range(len(PROMPTS))]
    told = Told()
    for config in (ON_DEVICE, NGRAM):
        with serve_v2({**config, "verifier": "typical"}) as llm:
            assert is_asynchronous(llm)
            adapter_of(llm)._observers.register(told)
            assert generate(llm, PROMPTS, max_tokens=MAX_TOKENS, each=each) == plain
            assert {verifier for _, verifier in drafted_by(llm)} == {"typical", "lossless"}
    longest: defaultdict[int, int] = defaultdict(int)
    for step in told.steps:
        for name, count in zip(step.request_ids, step.num_draft, strict=True):
            request = int(name.split("-")[0]) % len(PROMPTS)
            longest[request] = max(longest[request], count)
    assert [longest[i] for i in range(len(PROMPTS))] == [0, 1, 3, 3, 0, 1]


@pytest.mark.slow
def test_ends_of_texts(serve_v2: Any, generate: Any) -> None:
    """Stop tokens, `min_tokens`, `max_tokens` and the model's length cut where they would."""
    each = [
        {"stop_token_ids": [2]},
        {"stop_token_ids": [2, 5], "min_tokens": 9},
        {"max_tokens": 1},
        {"max_tokens": 2},
        {"max_tokens": 100},  # 128 - 20 tokens are left
        {"max_tokens": 123},
    ]
    with serve_v2() as llm:
        wanted = generate(llm, PROMPTS, each=each)
    for config in (ON_DEVICE, NGRAM):
        with serve_v2({"verifier": "lossless", **config}) as llm:
            assert is_asynchronous(llm)
            assert generate(llm, PROMPTS, each=each) == wanted


@pytest.mark.slow
def test_aborted_requests_leave_nothing(
    serve_v2: Any, plain: list[list[int]], generate: Any, adapter_of: Any
) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, detokenize=False)
    with serve_v2(ON_DEVICE) as llm:
        for i in range(3):
            llm.llm_engine.add_request(str(i), PROMPTS[i], params)
        for _ in range(4):
            llm.llm_engine.step()
        llm.llm_engine.abort_request(["0", "2"])
        llm.llm_engine.step()
        llm.llm_engine.abort_request(["1"])
        assert generate(llm, PROMPTS, max_tokens=MAX_TOKENS) == plain
        generate(llm, PROMPTS[:1], max_tokens=1)
        assert len(adapter_of(llm).requests) == 1


@pytest.mark.slow
def test_slots_that_change_hands_are_told(serve_v2: Any, generate: Any, adapter_of: Any) -> None:
    """The proposer counts the steps of each request by slot, and forgets where it is told to."""
    with serve_v2(ON_DEVICE, max_num_seqs=1) as llm:
        generate(llm, PROMPTS[:1], max_tokens=MAX_TOKENS)
        generate(llm, PROMPTS[:1], max_tokens=2)
        [steps] = adapter_of(llm).proposer.steps.tolist()
    assert 0 < steps <= 4


@pytest.mark.slow
def test_a_failing_proposer_costs_no_request(
    serve_v2: Any, plain: list[list[int]], generate: Any, adapter_of: Any, drafted_by: Any
) -> None:
    """Wrong shapes, tokens that do not exist, exceptions: texts go on without drafts."""
    import torch

    from vllm_spec_plugins import DeviceDraft

    with serve_v2(ON_DEVICE) as llm:
        adapter = adapter_of(llm)
        proposer, asked = adapter.proposer, []

        def propose_on_device(batch: Any) -> DeviceDraft:
            asked.append(len(batch.slots))
            if len(asked) % 3 == 0:
                return DeviceDraft(torch.full((len(batch.slots), 5), 10_000))
            if len(asked) % 3 == 1:
                return DeviceDraft(torch.zeros(len(batch.slots) + 1, 3, dtype=torch.int64))
            raise RuntimeError("acme has no idea")

        proposer.propose_on_device = propose_on_device
        assert generate(llm, PROMPTS, max_tokens=MAX_TOKENS) == plain
        assert len(asked) > 3
        assert all(tally["drafted"] == 0 for tally in drafted_by(llm).values())


@pytest.mark.parametrize(
    ("spec", "reasons"),
    [
        ({"method": "acme_on_device"}, []),
        ({"method": "acme_on_device", "verifier": BLOCK}, []),
        ({"method": "acme_on_device", "verifier": "typical"}, []),
        ({"method": "ngram_adaptive"}, ['method "ngram_adaptive" with these options']),
        ({"method": "early_exit", "exit_layer": 2}, []),
        ({"method": "early_exit"}, ['method "early_exit" with these options']),
        (
            {"method": "acme_on_device", "length_control": "additive"},
            ['length_control "additive"'],
        ),
        (
            {
                "method": "acme_on_device",
                "verifier": {"name": "typical", "max_total_variation": 0.1},
            },
            [],
        ),
        (
            {
                "method": "acme_on_device",
                "verifiers_allowed": [
                    {
                        "name": "top_k_relaxed",
                        "begin_thinking_token_id": 3,
                        "end_thinking_token_id": 4,
                    }
                ],
            },
            ['verifier "top_k_relaxed" with these options'],
        ),
        ({**NGRAM, "verifier": "lossless"}, []),
    ],
)
def test_what_ends_it_is_named(spec: dict[str, Any], reasons: list[str]) -> None:
    """Whatever a request may choose counts, too."""
    from vllm_spec_plugins.config import split
    from vllm_spec_plugins.context import ModelFacts
    from vllm_spec_plugins.engine.async_support import reasons_against_async
    from vllm_spec_plugins.engine.carrier import engine_vocabulary, registry

    facts = ModelFacts("", 16, 8, 4, 64, 3)
    _, settings = split({**_DRAFTS, **spec}, engine_vocabulary(), lambda _: facts, registry())
    assert reasons_against_async(settings) == reasons


def test_one_line_says_why_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none where it was switched off, or is kept."""
    from vllm_spec_plugins.config import split
    from vllm_spec_plugins.context import ModelFacts
    from vllm_spec_plugins.engine import async_support
    from vllm_spec_plugins.engine.carrier import engine_vocabulary, registry

    lines: list[str] = []
    monkeypatch.setattr(async_support.logger, "info", lambda line, *a: lines.append(line % a))
    facts = ModelFacts("", 16, 8, 4, 64, 3)
    for spec, given, wanted in (
        (ON_DEVICE, None, None),
        ({**ON_DEVICE, "length_control": "additive"}, False, False),
        ({**ON_DEVICE, "length_control": "additive"}, None, False),
    ):
        _, settings = split(spec, engine_vocabulary(), lambda _: facts, registry())
        args: Any = SimpleNamespace(async_scheduling=given)
        async_support.settle(settings, args)
        assert args.async_scheduling is wanted
    assert lines == [
        'Asynchronous scheduling is off, because of length_control "additive".',
    ]


def test_who_forces_it_gets_one_error(serve_v2: Any) -> None:
    from vllm_spec_plugins.errors import ConfigError

    config = {**ON_DEVICE, "length_control": "additive"}
    with (
        pytest.raises(ConfigError, match=r'here: length_control "additive" cannot .* Remove it\.'),
        serve_v2(config, async_scheduling=True),
    ):
        pass


@pytest.mark.slow
def test_it_can_be_forced_and_switched_off(
    serve_v2: Any, plain: list[list[int]], generate: Any
) -> None:
    for wanted in (True, False):
        with serve_v2(ON_DEVICE, async_scheduling=wanted) as llm:
            assert is_asynchronous(llm) == wanted
            assert generate(llm, PROMPTS[:2], max_tokens=8) == [text[:8] for text in plain[:2]]


def test_a_proposer_cannot_need_what_is_not_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_spec_plugins.config import split
    from vllm_spec_plugins.engine.carrier import engine_vocabulary, registry
    from vllm_spec_plugins.errors import PluginError
    from vllm_spec_plugins.proposer import Needs
    from vllm_spec_plugins.registry import Kind

    proposer = registry().load(Kind.PROPOSER, "acme_on_device")
    monkeypatch.setattr(proposer, "needs", Needs.HIDDEN_STATES)
    with pytest.raises(PluginError, match="needs HIDDEN_STATES"):
        split(ON_DEVICE, engine_vocabulary(), lambda _: None, registry())


@pytest.mark.slow
def test_sampling_options_reach_every_draft_token(serve_v2: Any, generate: Any) -> None:
    """Penalties count the draft tokens before a row; those that nobody drafted come after it."""
    each = [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"allowed_token_ids": [2, 3, 5, 7]},
        {},
        {"logprobs": 2},
        {"min_tokens": 12, "stop_token_ids": [2]},
    ]
    with serve_v2() as llm:
        wanted = generate(llm, PROMPTS, max_tokens=MAX_TOKENS, each=each)
    assert len({tuple(text) for text in wanted}) == len(PROMPTS)
    with serve_v2(ON_DEVICE) as llm:
        assert is_asynchronous(llm)
        assert generate(llm, PROMPTS, max_tokens=MAX_TOKENS, each=each) == wanted
