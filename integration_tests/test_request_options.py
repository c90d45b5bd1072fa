"""What one request chooses, on the real engine, beside others that choose differently.

HTTP is in the tests of the command line; the choices themselves in `tests/test_request_options.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from vllm_spec_plugins import AcceptanceRule, Guarantee, VerifyInput, hookimpl
from vllm_spec_plugins.hookspecs import StepRecord
from vllm_spec_plugins.registry import Kind

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = pytest.mark.engine

NUM_SPECULATIVE_TOKENS = 4
ALLOWED = ["lossless", "nothing"]
CONFIGS = {
    "ours": {
        "method": "ngram_adaptive",
        "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
        "verifiers_allowed": ALLOWED,
    },
    "vLLM's": {
        "method": "ngram",
        "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
        "verifier": "lossless",
        "verifiers_allowed": ALLOWED,
    },
}


class Nothing(AcceptanceRule):
    """Accepts no draft token and draws every one itself: exact, and easily told from others."""

    guarantee = Guarantee.LOSSLESS

    def acceptance(self, batch: VerifyInput) -> Tensor:
        return torch.zeros_like(batch.draft_token_probability)

    def acceptance_over_vocabulary(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        return torch.zeros_like(batch.target_logits[rows])

    def greedy_acceptance(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        del batch
        return torch.zeros_like(rows, dtype=torch.bool)


class Watcher:
    """What each request was drafted, had accepted, and was verified by, step by step."""

    def __init__(self) -> None:
        self.steps: dict[str, list[tuple[int, int, str]]] = {}

    @hookimpl
    def spec_step_finished(self, step: StepRecord) -> None:
        what = zip(step.num_draft, step.num_accepted, step.verifiers, strict=True)
        for request_id, of_it in zip(step.request_ids, what, strict=True):
            # vLLM appends a suffix of its own to the name a request was given.
            self.steps.setdefault(request_id.split("-")[0], []).append(of_it)

    def drafted(self, name: str) -> list[int]:
        return [drafted for drafted, _, _ in self.steps.get(name, [])]

    def accepted(self, name: str) -> int:
        return sum(accepted for _, accepted, _ in self.steps.get(name, []))

    def verifiers(self, name: str) -> set[str]:
        return {verifier for drafted, _, verifier in self.steps.get(name, []) if drafted}


@pytest.fixture(scope="module")
def second_verifier() -> Iterator[None]:
    """`nothing` as if it were installed."""
    from vllm_spec_plugins.engine.carrier import registry

    key = (Kind.VERIFIER, "nothing")
    registry()._add(Kind.VERIFIER, EntryPoint("nothing", f"{__name__}:Nothing", key[0].value))
    yield
    del registry()._entries[Kind.VERIFIER]["nothing"], registry()._points[key]


@pytest.fixture(scope="module")
def plain_texts(serve_offline: Any, generate: Any, prompts: Any) -> list[list[int]]:
    """Plain decoding, whatever `extra_args` says: the key is nobody's there."""
    with serve_offline() as llm:
        texts = generate(llm, prompts)
        chosen = {"extra_args": {"spec_decode": {"enabled": "nonsense"}}}
        assert generate(llm, prompts, **chosen) == texts
    return texts


@pytest.fixture(scope="module", params=CONFIGS)
def llm(
    request: pytest.FixtureRequest, serve_offline: Any, second_verifier: None, plain_texts: Any
) -> Iterator[LLM]:
    del second_verifier, plain_texts  # first, so that one engine is alive at a time
    with serve_offline(CONFIGS[request.param]) as llm:
        yield llm


@pytest.fixture
def watcher(llm: LLM, adapter_of: Any) -> Iterator[Watcher]:
    watcher, observers = Watcher(), adapter_of(llm)._observers
    observers.register(watcher)
    yield watcher
    observers.unregister(watcher)


def decode(llm: LLM, prompts: list[Any], chosen: list[dict[str, Any]], **sampling: Any) -> Any:
    """Names and token ids of the outputs, each request with its own `extra_args`."""
    from vllm import SamplingParams

    shared = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "detokenize": False}
    params = [
        SamplingParams(extra_args=extra_args, **{**shared, **sampling}) for extra_args in chosen
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    names = [output.request_id for output in outputs]
    return names, [list(output.outputs[0].token_ids) for output in outputs]


def test_different_choices_in_one_batch(
    llm: LLM, watcher: Watcher, prompts: Any, plain_texts: list[list[int]]
) -> None:
    names, texts = decode(
        llm,
        prompts[:1] * 8,  # one of which n-grams are found
        [
            {},
            {"spec_decode": {"enabled": False}},
            {"spec_decode": {"num_speculative_tokens": 2}},
            {"spec_decode": {"verifier": "nothing"}},
            {"spec_decode.enabled": 0},
            {"spec_decode.verifier": "nothing", "spec_decode": {"num_speculative_tokens": 1}},
            {"spec_decode": {"num_speculative_tokens": 0}},
            {"spec_decode": {"verifier": "lossless", "enabled": True}},
        ],
    )
    assert texts == plain_texts[:1] * 8
    default, off, two, nothing, off_dotted, nothing_one, none, lossless = names

    for name in (default, lossless):
        assert max(watcher.drafted(name)) == NUM_SPECULATIVE_TOKENS
        assert watcher.accepted(name) > 0
        assert watcher.verifiers(name) == {"lossless"}
    for name in (off, off_dotted, none):
        assert sum(watcher.drafted(name)) == 0
    assert max(watcher.drafted(two)) == 2
    assert watcher.accepted(two) > 0
    assert sum(watcher.drafted(nothing)) > 0
    assert max(watcher.drafted(nothing_one)) == 1
    for name in (nothing, nothing_one):
        assert watcher.accepted(name) == 0
        assert watcher.verifiers(name) == {"nothing"}


def test_drafting_switched_off_for_all(
    llm: LLM, drafted_by: Any, prompts: Any, plain_texts: list[list[int]]
) -> None:
    before = drafted_by(llm)
    _, texts = decode(llm, prompts, [{"spec_decode": {"enabled": False}}] * len(prompts))
    assert texts == plain_texts
    after = drafted_by(llm)
    assert {k: row["drafted"] for k, row in after.items()} == {
        k: row["drafted"] for k, row in before.items()
    }


def test_metrics_tell_verifiers_apart(llm: LLM, drafted_by: Any, prompts: Any) -> None:
    chosen = [{"spec_decode": {"verifier": name}} for name in ALLOWED * (len(prompts) // 2)]
    decode(llm, prompts, chosen)
    found = {verifier: row for (_, verifier), row in drafted_by(llm).items()}
    assert found["nothing"]["drafted"] > 0
    assert found["nothing"]["accepted"] == 0
    assert found["nothing"]["acceptance_length"] == 1
    assert found["lossless"]["acceptance_rate"] > 0.2


def test_choices_of_others_leave_a_sampled_request_alone(llm: LLM, prompts: Any) -> None:
    """A seeded request draws the same tokens whatever its neighbours choose."""
    sampling = {"temperature": 0.8, "seed": 11}
    _, [alone] = decode(llm, prompts[:1], [{}], **sampling)
    others = [{"spec_decode": {"enabled": i % 2 == 0}} for i in range(len(prompts) - 1)]
    _, texts = decode(llm, prompts, [{}, *others], **sampling)
    assert texts[0] == alone
    _, [other_seed] = decode(llm, prompts[:1], [{}], **{**sampling, "seed": 12})
    assert other_seed != alone


@pytest.mark.parametrize(
    ("extra_args", "phrases"),
    [
        ({"spec_decode": {"enable": False}}, ['unknown option "enable". Did you mean "enabled"?']),
        ({"spec_decode": {"enabled": "no"}}, ['"enabled": input should be a valid boolean']),
        ({"spec_decode": {"verifier": "judge"}}, ['the verifier "judge"', "lossless, nothing"]),
        ({"spec_decode.num_speculative_tokens": 5}, ["this server drafts at most 4"]),
        ({"spec_decode": {"num_speculative_tokens": -1}}, ["greater than or equal to 0"]),
    ],
)
def test_a_refused_request_raises_for_itself(
    extra_args: dict[str, Any],
    phrases: list[str],
    llm: LLM,
    prompts: Any,
    plain_texts: list[list[int]],
) -> None:
    """Others that are already being decoded are unharmed."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    engine: Any = llm.llm_engine
    good = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    bad = SamplingParams(temperature=0, max_tokens=40, detokenize=False, extra_args=extra_args)
    engine.add_request("first", prompts[0], good)
    engine.step()
    with pytest.raises(VLLMValidationError) as caught:
        engine.add_request("refused", prompts[1], bad)
    for phrase in ['"spec_decode"', *phrases]:
        assert phrase in str(caught.value)
    engine.add_request("second", prompts[2], good)
    texts = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            texts[output.request_id] = list(output.outputs[0].token_ids)
    assert texts == {"first": plain_texts[0], "second": plain_texts[2]}


def test_a_batch_with_a_refused_request_leaves_nothing_behind(
    llm: LLM, prompts: Any, plain_texts: list[list[int]]
) -> None:
    from vllm.exceptions import VLLMValidationError

    chosen = [{} for _ in prompts]
    chosen[3] = {"spec_decode": {"verifier": "judge"}}
    with pytest.raises(VLLMValidationError, match="judge"):
        decode(llm, prompts, chosen)
    assert not llm.llm_engine.has_unfinished_requests()
    assert decode(llm, prompts, [{}] * len(prompts))[1] == plain_texts
