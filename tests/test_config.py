"""`--speculative-config` taken apart: what goes where, and one message for whatever is wrong.

The engine's own part of the refusals is in `integration_tests/test_bad_input.py`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from pydantic import Field

from vllm_spec_plugins import Draft, DraftInput, ModelFacts, Proposer, ProposerOptions
from vllm_spec_plugins.config import Choice, EngineVocabulary, PluginSettings, concerns_us, split
from vllm_spec_plugins.draft_vocabulary import DraftVocabularyOptions, RankedVocabulary, rank
from vllm_spec_plugins.engine_proposer import EngineProposer
from vllm_spec_plugins.errors import ConfigError, PluginError, SpecPluginsError
from vllm_spec_plugins.length_control import Signals
from vllm_spec_plugins.registry import Kind, Registry, installed

ENGINE = EngineVocabulary(
    methods=frozenset({"ngram", "eagle3", "draft_model", "deepseek_mtp"}),
    fields=frozenset(
        {
            "method",
            "model",
            "num_speculative_tokens",
            "prompt_lookup_max",
            "prompt_lookup_min",
            "rejection_sample_method",
            "target_model_config",
        }
    ),
    methods_with_head=frozenset({"eagle3", "draft_model", "deepseek_mtp"}),
)


class ExitOptions(ProposerOptions):
    """Options of a proposer with one of each kind."""

    exit_layer: int = Field(ge=1, description="So many layers.")
    mode: Literal["fast", "exact"] = Field("fast", description="A choice.")
    weights: Path | None = Field(None, description="A file.")
    widths: tuple[int, ...] = Field((1, 2), description="A list.")
    threshold: float = Field(0.5, gt=0, lt=1, description="A bounded number.")


class Exit(Proposer):
    Options = ExitOptions
    #: What `check` was given last.
    facts: ClassVar[ModelFacts | None] = None

    @classmethod
    def check(cls, options: ProposerOptions, facts: ModelFacts) -> None:
        assert isinstance(options, ExitOptions)
        Exit.facts = facts
        if options.exit_layer > facts.num_layers:
            raise SpecPluginsError(f"no layer {options.exit_layer} in {facts.num_layers}")

    def propose(self, batch: DraftInput) -> Draft:
        raise NotImplementedError


class LentOptions(ProposerOptions):
    """Options of a proposer that lets vLLM draft."""

    strength: int = Field(1, ge=1, description="Ours.")


class Lent(EngineProposer):
    Options = LentOptions
    engine_method = "draft_model"


class Orphan(EngineProposer):
    engine_method = "beam"


REGISTRY = Registry(
    [
        *(
            point
            for kind, name in [
                (Kind.VERIFIER, "lossless"),
                (Kind.LENGTH_CONTROLLER, "fixed"),
                (Kind.LENGTH_CONTROLLER, "expected_speedup"),
            ]
            for point in [EntryPoint(name, installed().get(kind, name).value, kind.value)]
        ),
        EntryPoint("exit", f"{__name__}:Exit", Kind.PROPOSER.value),
        EntryPoint("lent", f"{__name__}:Lent", Kind.PROPOSER.value),
        EntryPoint("orphan", f"{__name__}:Orphan", Kind.PROPOSER.value),
    ]
)


def facts_for(num_speculative_tokens: int | None) -> ModelFacts:
    return ModelFacts("m", 512, 64, 4, 256, num_speculative_tokens or 0)


def take(**raw: Any) -> tuple[dict[str, Any], PluginSettings]:
    return split(raw, ENGINE, facts_for, REGISTRY)


def test_a_proposer_of_ours_with_defaults() -> None:
    rest, settings = take(method="exit", num_speculative_tokens=3, exit_layer=2)
    assert rest == {"method": "exit", "num_speculative_tokens": 3}
    assert settings.proposer == Choice(name="exit", options={"exit_layer": 2})
    assert settings.verifier == Choice(name="lossless")
    assert settings.verifiers_allowed == {"lossless": Choice(name="lossless")}
    assert settings.length_control == Choice(name="fixed")
    assert Exit.facts is not None
    assert Exit.facts.num_speculative_tokens == 3


def test_options_are_json_when_they_travel_and_typed_when_they_arrive() -> None:
    _, settings = take(
        method="exit",
        num_speculative_tokens=3,
        exit_layer=2,
        weights="head.safetensors",
        widths=[3, 4],
        verifier={"name": "lossless", "rule": "block"},
        length_control="expected_speedup",
    )
    arrived = PluginSettings.model_validate_json(settings.model_dump_json())
    assert arrived == settings
    assert arrived.proposer is not None
    _, options = arrived.proposer.build(Kind.PROPOSER, REGISTRY)
    assert (options.weights, options.widths) == (Path("head.safetensors"), (3, 4))
    assert arrived.verifier == Choice(name="lossless", options={"rule": "block"})
    # What requests may choose under the configured name is what was configured.
    assert arrived.verifiers_allowed == {"lossless": arrived.verifier}


def test_our_verifier_beside_vllms_method() -> None:
    rest, settings = take(
        method="ngram", num_speculative_tokens=4, prompt_lookup_max=3, verifier="lossless"
    )
    assert rest == {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    assert settings.proposer is None
    assert settings.verifier == Choice(name="lossless")


def test_vllm_infers_the_method_of_a_draft_model() -> None:
    rest, settings = take(model="draft", num_speculative_tokens=4, verifier="lossless")
    assert rest == {"model": "draft", "num_speculative_tokens": 4}
    assert settings.proposer is None


@pytest.fixture
def ranked_file(tmp_path: Path) -> str:
    """A draft vocabulary for the model of `facts_for`, recommended size 300."""
    counts = np.arange(512, 0, -1)
    always = np.array([1, 2])
    path = tmp_path / "vocab.safetensors"
    RankedVocabulary(512, always, (rank("all", counts, always, 300),), "", "a test").write(path)
    return str(path)


def test_a_draft_vocabulary_beside_vllms_method(ranked_file: str) -> None:
    raw = {"method": "draft_model", "model": "draft", "num_speculative_tokens": 4}
    rest, settings = take(**raw, draft_vocabulary=ranked_file)
    assert rest == raw
    assert settings.proposer is None
    assert settings.draft_vocabulary == DraftVocabularyOptions(file=ranked_file)  # pyright: ignore[reportCallIssue]
    # vLLM's own verification wants laws over the whole vocabulary.
    assert settings.verifier == Choice(name="lossless")
    arrived = PluginSettings.model_validate_json(settings.model_dump_json())
    assert arrived == settings

    rest, settings = take(
        **raw,
        draft_vocabulary={"file": ranked_file, "size": 400, "dynamic_tokens": 8},
        verifier={"name": "lossless", "rule": "block"},
    )
    assert settings.draft_vocabulary is not None
    assert settings.draft_vocabulary.size == 400
    assert settings.draft_vocabulary.dynamic_tokens == 8
    assert settings.verifier == Choice(name="lossless", options={"rule": "block"})


def test_a_draft_vocabulary_that_does_not_fit_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(SpecPluginsError, match="there is no file"):
        take(
            method="draft_model",
            model="draft",
            num_speculative_tokens=4,
            draft_vocabulary=str(tmp_path / "nothing"),
        )


def test_a_proposer_that_lets_vllm_draft() -> None:
    rest, settings = take(method="lent", model="draft", num_speculative_tokens=4, strength=2)
    assert rest == {"method": "draft_model", "model": "draft", "num_speculative_tokens": 4}
    assert settings.proposer == Choice(name="lent", options={"strength": 2})
    assert settings.verifier == Choice(name="lossless")
    assert concerns_us({"method": "lent", "model": "draft"}, ENGINE, REGISTRY)


def test_a_proposer_for_a_method_that_vllm_does_not_have() -> None:
    with pytest.raises(PluginError) as caught:
        take(method="orphan", num_speculative_tokens=4)
    assert str(caught.value) == (
        'The proposer "orphan" lets vLLM\'s method "beam" draft, which the installed vLLM does '
        "not have. It has: draft_model, eagle3, ngram."
    )


@pytest.mark.parametrize(
    ("raw", "ours"),
    [
        ({"method": "ngram", "num_speculative_tokens": 4}, False),
        ({"model": "draft", "num_speculative_tokens": 4}, False),
        # Left behind by vLLM when it builds its own config.
        ({"method": "ngram", "target_model_config": object()}, False),
        ({"method": "exit"}, True),
        ({"method": "nobody"}, True),
        ({"method": "ngram", "verifier": "lossless"}, True),
        ({"method": "ngram", "verifer": "lossless"}, True),
        ({"method": "draft_model", "draft_vocabulary": "file"}, True),
    ],
)
def test_what_concerns_us(raw: dict[str, Any], ours: bool) -> None:
    assert concerns_us(raw, ENGINE, REGISTRY) is ours


OURS = {"method": "exit", "num_speculative_tokens": 3, "exit_layer": 2}
VLLMS = {"method": "ngram", "num_speculative_tokens": 4}
WITH_HEAD = {"method": "draft_model", "model": "draft", "num_speculative_tokens": 4}
LENT = {"method": "lent", "model": "draft", "num_speculative_tokens": 4}


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        take(**raw)
    return str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        pytest.param(
            {"method": "exti", "num_speculative_tokens": 3},
            'Unknown speculative method "exti". Did you mean "exit"? From plugins: exit, lent, '
            "orphan. vLLM's own: draft_model, eagle3, ngram.",
            id="method of nobody",
        ),
        pytest.param(
            {"verifier": "lossless", "num_speculative_tokens": 3},
            '"method" must be given beside "verifier" and "length_control". From plugins: '
            "exit, lent, orphan. vLLM's own: draft_model, eagle3, ngram.",
            id="no method",
        ),
        pytest.param(
            {"method": "exit", "exit_layer": 2},
            '"num_speculative_tokens" is missing: "exit" needs the most tokens it may draft per '
            'step, for example {"method": "exit", "num_speculative_tokens": 5}.',
            id="no number of tokens",
        ),
        *(
            pytest.param(
                {**OURS, "num_speculative_tokens": tokens},
                f'"num_speculative_tokens" must be a whole number from 1 to 128, got {tokens!r}.',
                id=f"{tokens!r} tokens",
            )
            for tokens in (0, -1, 129, 2.0, "3", True)
        ),
        pytest.param(
            {"method": "exit", "num_speculative_tokens": 3},
            'The proposer "exit": "exit_layer" is missing. It is: So many layers.',
            id="required option missing",
        ),
        pytest.param(
            {**OURS, "exit_layers": 2},
            'The proposer "exit": unknown option "exit_layers". Did you mean "exit_layer"? '
            "Allowed: exit_layer, mode, threshold, weights, widths. Beside them: length_control, "
            "method, num_speculative_tokens, verifier, verifiers_allowed.",
            id="misspelt option",
        ),
        pytest.param(
            {**OURS, "prompt_lookup_max": 4},
            '"prompt_lookup_max" is an option of vLLM\'s own methods and would be ignored by '
            '"exit". Remove it. Options of "exit": exit_layer, mode, threshold, weights, widths; '
            "beside length_control, method, num_speculative_tokens, verifier, verifiers_allowed.",
            id="vLLM's option",
        ),
        pytest.param(
            {**OURS, "length_control": "fixd"},
            'Unknown length controller "fixd". Did you mean "fixed"? Installed: '
            "expected_speedup, fixed. `vllm-spec list` describes them.",
            id="unknown length controller",
        ),
        pytest.param(
            {**OURS, "length_control": {}},
            '"length_control" takes a name or {"name": ..., options}, got {}. Installed: '
            "expected_speedup, fixed.",
            id="length controller without a name",
        ),
        pytest.param(
            {**OURS, "verifier": "losless"},
            'Unknown verifier "losless". Did you mean "lossless"? Installed: lossless. '
            "`vllm-spec list` describes them.",
            id="unknown verifier",
        ),
        pytest.param(
            {**OURS, "verifier": {"rule": "block"}},
            "\"verifier\" takes a name or {\"name\": ..., options}, got {'rule': 'block'}. "
            "Installed: lossless.",
            id="verifier without a name",
        ),
        pytest.param(
            {**OURS, "verifier": {"name": "lossless", "rul": "block"}},
            'The verifier "lossless": unknown option "rul". Did you mean "rule"? Allowed: rule.',
            id="misspelt option of a verifier",
        ),
        pytest.param(
            {**OURS, "verifiers_allowed": "lossless"},
            '"verifiers_allowed" must be a list of names or {"name": ..., options}, got '
            "'lossless'.",
            id="allowed is no list",
        ),
        pytest.param(
            {**OURS, "verifiers_allowed": [3]},
            '"verifiers_allowed" takes a name or {"name": ..., options}, got 3. '
            "Installed: lossless.",
            id="allowed holds no name",
        ),
        pytest.param(
            {**OURS, "verifiers_allowed": ["lossless", {"name": "lossless", "rule": "block"}]},
            '"verifiers_allowed" names "lossless" twice.',
            id="allowed twice",
        ),
        pytest.param(
            {**VLLMS, "verifiers_allowed": ["lossless"]},
            '"verifiers_allowed" needs "verifier": without it vLLM\'s own verification runs and '
            'no request can choose. Add "verifier": "lossless".',
            id="allowed without a verifier",
        ),
        pytest.param(
            {**VLLMS, "length_control": "fixed"},
            '"length_control" works with proposers from plugins; "ngram" is vLLM\'s own and '
            "drafts num_speculative_tokens every time. Remove it, or choose a method from: exit, "
            "lent, orphan.",
            id="length control beside vLLM's method",
        ),
        pytest.param(
            {**VLLMS, "verifier": "lossless", "rejection_sample_method": "block"},
            '"rejection_sample_method": "block" is vLLM\'s own verification and would be ignored '
            'beside "verifier": "lossless". Remove one of them (block verification is '
            '{"name": "lossless", "rule": "block"}).',
            id="two verifications",
        ),
        pytest.param(
            {**VLLMS, "verifer": "lossless"},
            'Unknown option "verifer" beside vLLM\'s method "ngram". Did you mean "verifier"? '
            "It takes vLLM's own options, and from plugins: verifier, verifiers_allowed.",
            id="misspelt key beside vLLM's method",
        ),
        pytest.param(
            {**VLLMS, "draft_vocabulary": "file"},
            '"draft_vocabulary" cuts down the output head a draft token is chosen from, and '
            'vLLM\'s "ngram" has none that can be cut. Remove it, or choose a method from: '
            "draft_model, eagle3.",
            id="draft vocabulary without a head",
        ),
        pytest.param(
            {"model": "draft", "num_speculative_tokens": 4, "draft_vocabulary": "file"},
            '"draft_vocabulary" needs "method" beside it: one of draft_model, eagle3, for example '
            '"method": "draft_model".',
            id="draft vocabulary without a method",
        ),
        pytest.param(
            {**WITH_HEAD, "draft_vocabulary": 3},
            '"draft_vocabulary" takes a file name or an object with dynamic_tokens, file, size, '
            "got 3.",
            id="draft vocabulary of another type",
        ),
        pytest.param(
            {**WITH_HEAD, "draft_vocabulary": {"file": "f", "sise": 3}},
            '"draft_vocabulary": unknown option "sise". Did you mean "size"? Allowed: '
            "dynamic_tokens, file, size.",
            id="misspelt option of a draft vocabulary",
        ),
        pytest.param(
            {**WITH_HEAD, "draft_vocabulary": {"size": 3}},
            '"draft_vocabulary": "file" is missing. It is: Ranked vocabulary, written by '
            "`vllm-spec calibrate vocab`.",
            id="draft vocabulary without a file",
        ),
        pytest.param(
            {**WITH_HEAD, "draft_vocab": "file"},
            'Unknown option "draft_vocab" beside vLLM\'s method "draft_model". Did you mean '
            '"draft_vocabulary"? It takes vLLM\'s own options, and from plugins: '
            "draft_vocabulary, verifier, verifiers_allowed.",
            id="misspelt draft vocabulary",
        ),
        pytest.param(
            {**LENT, "length_control": "fixed"},
            '"length_control" works with proposers that draft themselves; "lent" lets vLLM\'s '
            '"draft_model" draft num_speculative_tokens every time. Remove it.',
            id="length control where vLLM drafts",
        ),
        pytest.param(
            {**LENT, "strenght": 2},
            'Unknown option "strenght" of "lent". Did you mean "strength"? It takes strength, the '
            'options of vLLM\'s "draft_model", and verifier, verifiers_allowed.',
            id="misspelt option where vLLM drafts",
        ),
        pytest.param(
            {**LENT, "rejection_sample_method": "block"},
            '"rejection_sample_method": "block" is vLLM\'s own verification and would be ignored '
            'beside "verifier": "lossless". Remove one of them (block verification is '
            '{"name": "lossless", "rule": "block"}).',
            id="vLLM's verification where vLLM drafts",
        ),
        pytest.param(
            {"method": "lent", "model": "draft"},
            '"num_speculative_tokens" is missing: "lent" needs the most tokens it may draft per '
            'step, for example {"method": "lent", "num_speculative_tokens": 5}.',
            id="no number of tokens where vLLM drafts",
        ),
        pytest.param(
            {**OURS, "weights": object},
            'The proposer "exit": options must be JSON values: Object of type type is not JSON '
            "serializable.",
            id="not JSON",
        ),
    ],
)
def test_refusals(raw: dict[str, Any], message: str) -> None:
    assert refusal(raw) == message


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("exit_layer", "2", "input should be a valid integer, got '2'"),
        ("exit_layer", True, "input should be a valid integer, got True"),
        ("exit_layer", 0, "input should be greater than or equal to 1, got 0"),
        ("mode", "slow", "input should be 'fast' or 'exact', got 'slow'"),
        ("threshold", 1.5, "input should be less than 1, got 1.5"),
        ("threshold", None, "input should be a valid number, got None"),
        ("widths", "12", "input should be a valid array, got '12'"),
    ],
)
def test_wrong_type_or_range(option: str, value: object, said: str) -> None:
    assert refusal({**OURS, option: value}).startswith(f'The proposer "exit": "{option}": {said}.')


def test_a_plugin_refuses_what_types_cannot() -> None:
    with pytest.raises(SpecPluginsError, match="no layer 5 in 4"):
        take(method="exit", num_speculative_tokens=3, exit_layer=5)


# --- what a length controller is told ---


class TokenByToken(Exit):
    """Asks `stop_after` where its option says so."""

    @classmethod
    def signals_for(cls, options: ProposerOptions) -> Signals:
        assert isinstance(options, ExitOptions)
        return Signals.CONFIDENCES if options.mode == "exact" else Signals.NONE


def take_with_controllers(**raw: Any) -> PluginSettings:
    """With every length controller of ours, and proposers that tell more or less."""
    ours = [
        (Kind.PROPOSER, "ngram_adaptive"),
        (Kind.PROPOSER, "early_exit"),
        (Kind.VERIFIER, "lossless"),
        *(
            (Kind.LENGTH_CONTROLLER, name)
            for name in ("additive", "confidence", "del", "expected_speedup", "fixed", "thompson")
        ),
    ]
    points = [
        EntryPoint(name, installed().get(kind, name).value, kind.value) for kind, name in ours
    ]
    points += [
        EntryPoint("token_by_token", f"{__name__}:TokenByToken", Kind.PROPOSER.value),
        EntryPoint("broken", f"{__name__}:nobody", Kind.LENGTH_CONTROLLER.value),
    ]
    return split(raw, ENGINE, facts_for, Registry(points))[1]


NGRAM = {"method": "ngram_adaptive", "num_speculative_tokens": 4}


@pytest.mark.parametrize(
    ("controller", "wanted"),
    [
        ("confidence", "draft token by token and tell how sure they are"),
        ("thompson", "draft token by token and tell how sure they are"),
        ("del", "draft token by token and can leave the target after one of several layers"),
    ],
)
def test_a_controller_that_would_not_be_told_is_refused(controller: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        take_with_controllers(**NGRAM, length_control=controller)
    assert str(caught.value) == (
        f'length_control "{controller}" works with proposers that {wanted}; "ngram_adaptive" does '
        "not. Beside it: additive, expected_speedup, fixed."
    )


@pytest.mark.parametrize("controller", ["additive", "expected_speedup", "fixed"])
def test_controllers_that_need_to_be_told_nothing(controller: str) -> None:
    settings = take_with_controllers(**NGRAM, length_control=controller)
    assert settings.length_control == Choice(name=controller)


def test_what_is_told_may_depend_on_the_proposers_options() -> None:
    asked = {"method": "token_by_token", "num_speculative_tokens": 3, "exit_layer": 2}
    settings = take_with_controllers(**asked, mode="exact", length_control="confidence")
    assert settings.length_control == Choice(name="confidence")
    with pytest.raises(ConfigError, match='"token_by_token" does not'):
        take_with_controllers(**asked, mode="fast", length_control="confidence")
    with pytest.raises(ConfigError, match="can leave the target after one of several layers"):
        take_with_controllers(**asked, mode="exact", length_control="del")
