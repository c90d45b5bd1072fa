"""Bad input through vLLM's own front door: one clear error, before any weight is asked for.

The model served here has a configuration and no weights. `tests/test_config.py` has every
message about `--speculative-config` itself; broken packages are in `test_third_party.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_spec_plugins.errors import (
    ConfigError,
    PluginError,
    SpecPluginsError,
    UnsupportedEngineError,
)
from vllm_spec_plugins.registry import VLLM_METHODS, Kind, Registry, installed

pytestmark = pytest.mark.engine

OURS = {"method": "ngram_adaptive", "num_speculative_tokens": 3}
VLLMS = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 2,
    "prompt_lookup_max": 3,
}
BOTH = {**VLLMS, "verifier": "lossless"}


def serve(model: Path, spec: Any, **engine_args: Any) -> None:
    from vllm import LLM

    LLM(
        model=str(model),
        speculative_config=spec,
        **{
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 256,
            **engine_args,
        },
    )


@pytest.mark.parametrize(
    ("spec", "engine_args", "error", "phrases"),
    [
        pytest.param(
            {**OURS, "method": "ngram_adaptiv"},
            {},
            ConfigError,
            [
                'Unknown speculative method "ngram_adaptiv". Did you mean "ngram_adaptive"?',
                "From plugins: diffusion, early_exit, frequency_vocab, jacobi, ngram_adaptive",
                "vLLM's own: custom_class, ",
                ", ngram, ",
            ],
            id="unknown method",
        ),
        pytest.param(
            {**OURS, "method": "zzz"},
            {},
            ConfigError,
            ['Unknown speculative method "zzz". From plugins: '],
            id="unknown method, nothing near",
        ),
        pytest.param(
            {**OURS, "verifier": "losless"},
            {},
            ConfigError,
            ['Unknown verifier "losless". Did you mean "lossless"? Installed: ', "vllm-spec list"],
            id="unknown verifier",
        ),
        pytest.param(
            {**VLLMS, "verifier": "losless"},
            {},
            ConfigError,
            ['Unknown verifier "losless". Did you mean "lossless"?'],
            id="unknown verifier beside vLLM's method",
        ),
        pytest.param(
            {**OURS, "verifer": "lossless"},
            {},
            ConfigError,
            ['The proposer "ngram_adaptive": unknown option "verifer".'],
            id="misspelt key",
        ),
        pytest.param(
            {**VLLMS, "verifer": "lossless"},
            {},
            ConfigError,
            ['Unknown option "verifer" beside vLLM\'s method "ngram". Did you mean "verifier"?'],
            id="misspelt key beside vLLM's method",
        ),
        pytest.param(
            {**OURS, "verifier": {"name": "lossless", "rule": "blok"}},
            {},
            ConfigError,
            [
                "The verifier \"lossless\": \"rule\": input should be 'token' or 'block', "
                "got 'blok'."
            ],
            id="wrong value",
        ),
        pytest.param(
            {**OURS, "num_speculative_tokens": "3"},
            {},
            ConfigError,
            ["\"num_speculative_tokens\" must be a whole number from 1 to 128, got '3'."],
            id="wrong type",
        ),
        pytest.param(
            {**OURS, "num_speculative_tokens": 0},
            {},
            ConfigError,
            ['"num_speculative_tokens" must be a whole number from 1 to 128, got 0.'],
            id="out of range",
        ),
        pytest.param(
            {"method": "ngram_adaptive"},
            {},
            ConfigError,
            [
                '"num_speculative_tokens" is missing',
                '{"method": "ngram_adaptive", "num_speculative_tokens": 5}',
            ],
            id="no number of tokens",
        ),
        pytest.param(
            {**OURS, "prompt_lookup_max": 4},
            {},
            ConfigError,
            [
                '"prompt_lookup_max" is an option of vLLM\'s own methods and would be ignored by '
                '"ngram_adaptive". Remove it.'
            ],
            id="vLLM's option beside our method",
        ),
        pytest.param(
            {**VLLMS, "length_control": "fixed"},
            {},
            ConfigError,
            ['"length_control" works with proposers from plugins; "ngram" is vLLM\'s own'],
            id="length control beside vLLM's method",
        ),
        pytest.param(
            {**VLLMS, "verifiers_allowed": ["lossless"]},
            {},
            ConfigError,
            ['"verifiers_allowed" needs "verifier"', 'Add "verifier": "lossless".'],
            id="allowed without a verifier",
        ),
        pytest.param(
            {**BOTH, "rejection_sample_method": "block"},
            {},
            ConfigError,
            ['"rejection_sample_method": "block"', "Remove one of them"],
            id="two verifications",
        ),
        pytest.param(
            None,
            {"spec_method": "ngram_adaptive"},
            ConfigError,
            [
                '"--spec-method ngram_adaptive" is not possible: vLLM accepts only its own',
                'Use --speculative-config \'{"method": "ngram_adaptive", "num_speculative_tok',
            ],
            id="--spec-method with our name",
        ),
        pytest.param(
            OURS,
            {"spec_tokens": 4},
            ConfigError,
            ['"num_speculative_tokens" is given twice', "Remove --spec-tokens."],
            id="--spec-tokens beside the same key",
        ),
        *(
            pytest.param(
                spec,
                {"pipeline_parallel_size": 2},
                UnsupportedEngineError,
                ["pipeline_parallel_size is 2", "run with 1", "Use tensor_parallel_size"],
                id=f"pipeline parallel, {spec['method']}",
            )
            for spec in (OURS, BOTH)
        ),
        pytest.param(
            OURS,
            {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
            UnsupportedEngineError,
            ["decode_context_parallel_size is 2", "run with 1", "on one rank"],
            id="context parallel",
        ),
        *(
            pytest.param(
                spec,
                {"async_scheduling": True},
                ConfigError,
                ["--async-scheduling cannot be used here: ", why, "Remove it."],
                id=f"async scheduling, {spec['method']}",
            )
            for spec, why in ((OURS, 'method "ngram_adaptive"'), (BOTH, "model runner V1"))
        ),
        pytest.param(
            OURS,
            {"runner": "pooling"},
            UnsupportedEngineError,
            ['The model is served as "pooling"', "Remove --speculative-config."],
            id="not a generating model",
        ),
        pytest.param(
            "ngram_adaptive",
            {},
            ConfigError,
            ["--speculative-config must be an object, got 'ngram_adaptive'."],
            id="not an object",
        ),
    ],
)
def test_one_clear_error_before_the_model_loads(
    spec: Any,
    engine_args: dict[str, Any],
    error: type[SpecPluginsError],
    phrases: list[str],
    model_without_weights: Path,
) -> None:
    with pytest.raises(error) as caught:
        serve(model_without_weights, spec, **engine_args)
    for phrase in phrases:
        assert phrase in str(caught.value)


def test_what_only_the_whole_config_shows_is_refused_alike(
    model_without_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That vLLM will choose V1 may come out when its config is complete: one message all the same.

    Here as if it could have chosen V2 as far as was known before.
    """
    from vllm_spec_plugins.engine import async_support

    monkeypatch.setattr(async_support, "_is_v1_for_certain", lambda: False)
    spec = {**OURS, "matching": "device"}
    with pytest.raises(ConfigError) as caught:
        serve(model_without_weights, spec, async_scheduling=True)
    assert str(caught.value) == (
        "--async-scheduling cannot be used here: plugins on model runner V1 cannot plan a step "
        "before the last one is verified. Remove it."
    )


@pytest.mark.parametrize("spec", [None, OURS, BOTH], ids=["plain", "ours", "both"])
def test_good_input_gets_as_far_as_the_weights(spec: Any, model_without_weights: Path) -> None:
    """Negative control: the same model, asked for rightly, fails where weights are loaded."""
    with pytest.raises(RuntimeError, match="weights") as caught:
        serve(model_without_weights, spec, num_gpu_blocks_override=64)
    assert not isinstance(caught.value, SpecPluginsError)


class NotAProposer:
    """Registered as one below."""


def point(name: str, value: str, package: str) -> EntryPoint:
    found = EntryPoint(name, value, Kind.PROPOSER.value)
    return found._for(SimpleNamespace(name=package, version="1.0"))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("method", "phrases"),
    [
        (
            "mine",
            [
                'The proposer "mine" from acme 1.0 cannot be used: ',
                "NotAProposer",
                "is not a subclass of vllm_spec_plugins.proposer.Proposer",
            ],
        ),
        (
            "shared",
            [
                'two installed packages register the proposer "shared": acme 1.0 (',
                "bolt 1.0 (",
                "uninstall one of them",
            ],
        ),
    ],
)
def test_a_plugin_that_cannot_be_used(
    method: str,
    phrases: list[str],
    model_without_weights: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_spec_plugins.engine import options

    good = installed().get(Kind.PROPOSER, "ngram_adaptive").value
    bad = f"{__name__}:NotAProposer"
    points = [point("mine", bad, "acme"), point("shared", good, "acme")]
    registry = Registry([*points, point("shared", bad, "bolt")])
    monkeypatch.setattr(options, "registry", lambda: registry)
    with pytest.raises(PluginError) as caught:
        serve(model_without_weights, {"method": method, "num_speculative_tokens": 3})
    for phrase in phrases:
        assert phrase in str(caught.value)


def test_a_name_of_vllms_stays_vllms(
    model_without_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that registers "ngram" changes nothing for those who ask vLLM for it."""
    from vllm_spec_plugins.engine import carrier, options

    everything = [p for name in VLLM_METHODS for p in [point(name, "nowhere:X", "acme")]]
    registry = Registry(everything, reserved=carrier.engine_vocabulary().methods)
    monkeypatch.setattr(options, "registry", lambda: registry)
    with pytest.raises(RuntimeError, match="weights"):
        serve(model_without_weights, VLLMS, num_gpu_blocks_override=64)


def test_vllm_knows_the_reserved_names() -> None:
    """The list for when vLLM cannot be asked is the one it would give."""
    from vllm_spec_plugins.engine.carrier import engine_vocabulary

    assert set(engine_vocabulary().main_methods) == VLLM_METHODS


@pytest.fixture
def another_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from vllm_spec_plugins.engine import install, seams

    remembered = seams.require_supported, install._note_unknown_vllm
    for answer in remembered:
        answer.cache_clear()
    monkeypatch.setattr(seams, "installed_version", lambda: "0.99.1")
    yield
    for answer in remembered:
        answer.cache_clear()


@pytest.mark.usefixtures("another_vllm")
@pytest.mark.parametrize("spec", [OURS, BOTH], ids=["ours", "both"])
def test_an_unsupported_vllm_is_named_with_the_remedy(
    spec: dict[str, Any], model_without_weights: Path
) -> None:
    with pytest.raises(UnsupportedEngineError) as caught:
        serve(model_without_weights, spec)
    assert str(caught.value) == (
        "vllm-spec-plugins does not know vLLM 0.99.1: it serves 0.32, 0.33. Install one of those, "
        "or remove the plugin options from --speculative-config."
    )


@pytest.mark.usefixtures("another_vllm")
def test_an_unsupported_vllm_is_left_alone_by_those_who_ask_for_nothing(
    model_without_weights: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are told so, once."""
    from vllm_spec_plugins import hookspecs

    logger = logging.getLogger("test")
    logger.setLevel(logging.INFO)
    monkeypatch.setattr(hookspecs, "logger", logger)
    for spec in (None, None, VLLMS):
        with pytest.raises(RuntimeError, match="weights"):
            serve(model_without_weights, spec, num_gpu_blocks_override=64)
    said = [record.message for record in caplog.records if record.name == "test"]
    line = "vllm-spec-plugins serves vLLM 0.32, 0.33 and leaves vLLM 0.99.1 alone."
    assert said.count(line) == 1
