"""Relaxed verification on the real engine: the law is off by what the metrics say, no more.

Requests of every rule, and exact ones, share the batches of one engine with the target of 16
tokens. The exact laws of target and draft model are read from plain decoding's own logprobs.
Where a rule's output exceeds the target's law is known from both, so the distance of the
sampled texts is one unbiased proportion, and its standard error is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_spec_plugins.testing.chi_square import compare, failures

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.engine

VOCABULARY = 16
PROMPT = [1, 3, 3, 11, 9, 12, 8, 6, 15, 8, 6, 11, 0, 5, 6, 15, 7, 8, 11, 1, 2, 13, 4, 15]
#: Texts of each verifier.
TEXTS = 1200
#: Comparisons below are held to this many standard errors.
SIGMAS = 4.5

RULES: dict[str, dict[str, Any]] = {
    "typical": {"epsilon": 0.15, "delta": 0.3},
    "threshold": {"min_log_probability": -2.5},
    "top_k_relaxed": {"k": 3},
    "kl_judge": {"max_divergence": 0.5},
    "fly": {"window_size": 1},
}
LIMITED = "threshold"
CONFIG = {
    "method": "draft_model",
    "num_speculative_tokens": 2,
    "draft_sample_method": "probabilistic",
    "verifier": "lossless",
}


@pytest.fixture(scope="module")
def serve_narrow(
    serve_crowd: Callable[..., Any], narrow_models: tuple[Path, Path]
) -> Callable[..., Any]:
    @contextmanager
    def serve(config: Mapping[str, Any] | None, model: int = 0, **more: Any) -> Iterator[Any]:
        if config is not None:
            config = {**config, "model": str(narrow_models[1])}
        with serve_crowd(config, narrow_models[model], **more) as llm:
            yield llm

    return serve


@pytest.fixture(scope="module")
def laws(
    serve_narrow: Callable[..., Any], exact_law: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """`[V, V]` joint law of the first two tokens, and `[V, V]` the draft model's of the second."""
    found = []
    for model in (0, 1):
        more = {"logprobs_mode": "processed_logprobs", "max_logprobs": VOCABULARY}
        with serve_narrow(None, model, **more) as llm:
            found.append(exact_law(llm, PROMPT, {"temperature": 1.0}).sum(dim=2))
    target, draft = found
    return target, draft / draft.sum(dim=1, keepdim=True)


def texts_of(llm: Any, verifiers: list[str]) -> list[Any]:
    """Outputs of two tokens, one for each verifier named, all in the same batches."""
    from vllm import SamplingParams

    def params(name: str) -> SamplingParams:
        # fly needs the token after the one it judges; of the others one token is looked at.
        chosen = {"verifier": name, "num_speculative_tokens": 2 if name == "fly" else 1}
        return SamplingParams(
            max_tokens=2,
            temperature=1.0,
            ignore_eos=True,
            detokenize=False,
            extra_args={"spec_decode": chosen},
        )

    prompts = [{"prompt_token_ids": PROMPT}] * len(verifiers)
    return llm.generate(prompts, [params(name) for name in verifiers], use_tqdm=False)


def more_than_the_target(name: str, p: Tensor, q: Tensor) -> Tensor:
    """`[V, V]` bool: second tokens that the rule emits more often than the target would."""
    import torch

    more = q > p
    if name == "typical":  # these two refuse tokens whatever q says
        entropy = torch.special.entr(p).sum(dim=1, keepdim=True)
        bar = (RULES[name]["delta"] * (-entropy).exp()).clamp(max=RULES[name]["epsilon"])
        more &= p > bar
    if name == "threshold":
        more &= p >= math.exp(RULES[name]["min_log_probability"])
    return more


def test_the_distance_of_the_texts_is_the_price_in_the_metrics(
    serve_narrow: Any, laws: tuple[Tensor, Tensor], drafted_by: Any
) -> None:
    import torch

    target, q = laws
    p = target / target.sum(dim=1, keepdim=True)
    config = {**CONFIG, "verifiers_allowed": [{"name": n, **o} for n, o in RULES.items()]}
    names = ["lossless", *RULES] * TEXTS
    with serve_narrow(config, per_request_spec_decode_metrics="summary") as llm:
        outputs = texts_of(llm, names)
        tallies = {verifier: tally for (_, verifier), tally in drafted_by(llm).items()}
    for name in ("lossless", *RULES):
        mine = [o.outputs[0] for o, other in zip(outputs, names, strict=True) if other == name]
        tokens = torch.tensor([list(output.token_ids) for output in mine])
        reports = [output.spec_decode_metrics for output in mine]
        assert {report.verifier for report in reports} == {name}
        drafted = [report.num_draft_tokens for report in reports]
        assert set(drafted) == {2 if name == "fly" else 1}
        # Single requests add up to what the metrics say.
        prices = torch.tensor(
            [r.total_variation_price * r.num_examined_draft_tokens for r in reports],
            dtype=torch.float64,
        )
        tally = tallies[name]
        assert tally["drafted"] == sum(drafted)
        examined = sum(report.num_examined_draft_tokens for report in reports)
        assert tally["examined"] == examined
        assert examined == sum(drafted) if name != "fly" else examined <= sum(drafted)
        assert tally["total_variation_price"] == pytest.approx(
            float(prices.sum()) / examined, abs=1e-9
        )
        if name == "lossless":
            counts = torch.bincount(tokens[:, 0] * VOCABULARY + tokens[:, 1], minlength=256)
            fit = compare("exact requests among relaxed ones", counts, target.flatten())
            assert not failures([fit], 1e-6), str(fit)
            assert float(prices.max()) == 0
            continue
        more = more_than_the_target(name, p, q)
        found = more[tokens[:, 0], tokens[:, 1]].double()
        distance = float(found.mean() - target[more].sum())
        price = float(prices.mean())
        error = math.sqrt((float(found.var()) + float(prices.var())) / TEXTS)
        assert abs(distance - price) < SIGMAS * error, f"{name}: {distance:.4f} != {price:.4f}"
        # The test would pass if nothing was relaxed.
        assert price > 4 * error, f"{name}: {price:.4f} +- {error:.4f}"


@pytest.mark.slow
def test_a_limit_keeps_each_requests_mean_price_near_it(serve_narrow: Any) -> None:
    from vllm import SamplingParams

    limit = 0.05
    rule = {"name": LIMITED, **RULES[LIMITED]}
    prices = {}
    for maximum in (None, limit):
        chosen = rule if maximum is None else {**rule, "max_total_variation": maximum}
        with serve_narrow(
            {**CONFIG, "verifier": chosen}, per_request_spec_decode_metrics="summary"
        ) as llm:
            params = SamplingParams(max_tokens=80, temperature=1.0, ignore_eos=True)
            params.detokenize = False
            outputs = llm.generate([{"prompt_token_ids": PROMPT}] * 16, params, use_tqdm=False)
            prices[maximum] = [
                o.outputs[0].spec_decode_metrics.total_variation_price for o in outputs
            ]
    # It is checked between steps: near the limit.
    assert sum(prices[None]) / 16 > 2 * limit
    assert max(prices[limit]) < limit + 0.02
    assert min(prices[limit]) > limit / 4


def test_without_verifiers_allowed_no_request_is_relaxed(
    serve_narrow: Any, drafted_by: Any
) -> None:
    from vllm.exceptions import VLLMValidationError

    with serve_narrow(CONFIG) as llm:
        with pytest.raises(VLLMValidationError, match="does not allow the verifier"):
            texts_of(llm, ["threshold"])
        assert len(texts_of(llm, ["lossless"] * 20)) == 20
        [((_, verifier), tally)] = drafted_by(llm).items()
    assert verifier == "lossless"
    assert tally["drafted"] == 20
    assert tally["total_variation_price"] == 0


@pytest.mark.slow
def test_prometheus_shows_what_each_verifier_cost(serve_narrow: Any, drafted_by: Any) -> None:
    from prometheus_client import REGISTRY, generate_latest

    config = {**CONFIG, "verifiers_allowed": [{"name": n, **o} for n, o in RULES.items()]}
    served = {"served_model_name": "narrow-in-this-test"}

    def samples() -> dict[tuple[str, str], float]:
        return {
            (sample.name, sample.labels["verifier"]): sample.value
            for metric in REGISTRY.collect()
            for sample in metric.samples
            if sample.labels.get("model_name") == "narrow-in-this-test"
        }

    with serve_narrow(config, **served) as llm:
        nothing = samples()
        texts_of(llm, ["lossless", "threshold", "threshold"] * 50)
        tallies = {verifier: tally for (_, verifier), tally in drafted_by(llm).items()}
        found = samples()
    assert nothing["vllm_spec_plugins:draft_tokens_total", "threshold"] == 0
    for name, expected in (("lossless", 50), ("threshold", 100), ("fly", 0)):
        assert found["vllm_spec_plugins:steps_total", name] == expected
        assert found["vllm_spec_plugins:draft_tokens_total", name] == expected
    price = tallies["threshold"]["total_variation_price"] * 100
    assert price > 1
    assert found["vllm_spec_plugins:total_variation_total", "threshold"] == pytest.approx(price)
    accepted = tallies["threshold"]["accepted"]
    assert found["vllm_spec_plugins:accepted_tokens_total", "threshold"] == accepted
    labels = 'engine="0",model_name="narrow-in-this-test",proposer="draft_model"'
    assert labels in generate_latest(REGISTRY).decode()


def test_the_log_says_how_far_a_bounded_verifier_goes(caplog: pytest.LogCaptureFixture) -> None:
    from vllm_spec_plugins.config import Choice, PluginSettings
    from vllm_spec_plugins.engine.options import _announce
    from vllm_spec_plugins.hookspecs import logger

    logger.addHandler(caplog.handler)
    try:
        for name, options, said in (
            ("kl_judge", {"max_divergence": 0.08}, "bounded and measured, at most 0.2 per draft"),
            ("typical", {}, "measured, not bounded)."),
        ):
            choice = Choice(name=name, options=options)
            with caplog.at_level("INFO", logger=logger.name):
                _announce(PluginSettings(verifier=choice, verifiers_allowed={name: choice}), {})
            assert said in caplog.messages[-1]
    finally:
        logger.removeHandler(caplog.handler)
