"""What may stand in `--speculative-config`, and every error message about it.

`split` takes the dictionary apart: what is vLLM's goes back to vLLM, what is ours becomes
`PluginSettings`, checked down to the last option of the last plugin before any model loads.
Knows no vLLM: the caller says which methods and fields the installed one has.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from . import draft_vocabulary
from .context import ModelFacts
from .device_drafting import NEEDS_ON_DEVICE
from .draft_vocabulary import DraftVocabularyOptions
from .engine_proposer import EngineProposer
from .errors import ConfigError, PluginError, did_you_mean, listed
from .length_control import Signals
from .options import PluginOptions
from .proposer import Needs
from .registry import Kind, Registry, installed
from .request_options import problems

#: Keys of `--speculative-config` that are ours, beside a plugin's own options.
OUR_KEYS = frozenset({"verifier", "verifiers_allowed", "length_control"})
#: The one key of ours that changes what a method of vLLM's drafts.
DRAFT_VOCABULARY = "draft_vocabulary"
#: Keys of vLLM's that mean something beside a proposer of ours.
SHARED_KEYS = frozenset({"method", "num_speculative_tokens"})
#: The default verifier of our proposers, and what any request may fall back to.
LOSSLESS = "lossless"


class Choice(BaseModel):
    """One plugin by name, with its options as they were given (validated, JSON-able)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    def build(self, kind: Kind, registry: Registry) -> tuple[type[Any], Any]:
        """The plugin's class and its options object."""
        plugin = registry.load(kind, self.name)
        return plugin, read_options(kind, self.name, plugin.Options, self.options)


class PluginSettings(BaseModel):
    """Everything of ours, as it travels from the front end to the workers.

    Attributes:
        proposer: None when a method of vLLM's is asked for by its own name.
        draft_vocabulary: Beside a method of vLLM's: what its draft head is cut down to.
        length_control: Of our proposer.
        verifier: None when vLLM's own verification runs.
        verifiers_allowed: What requests may choose, by name, the configured one included.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    proposer: Choice | None = None
    draft_vocabulary: DraftVocabularyOptions | None = None
    length_control: Choice = Choice(name="fixed")
    verifier: Choice | None = None
    verifiers_allowed: dict[str, Choice] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineVocabulary:
    """What the installed vLLM calls its own.

    Attributes:
        methods: Its speculative methods.
        fields: The keys its `SpeculativeConfig` takes.
        methods_with_head: Methods that draft through an output head over the vocabulary.
    """

    methods: Collection[str]
    fields: Collection[str]
    methods_with_head: Collection[str] = frozenset()

    @property
    def main_methods(self) -> list[str]:
        """Without the old per-model spellings of `mtp`: what an error message should list."""
        return _without_spellings(self.methods)


def _without_spellings(methods: Collection[str]) -> list[str]:
    return [method for method in methods if not method.endswith("_mtp")]


def concerns_us(raw: Mapping[str, Any], engine: EngineVocabulary, registry: Registry) -> bool:
    """Whether a speculative config asks for anything of ours, or for something nobody has."""
    method = raw.get("method")
    return (
        bool(OUR_KEYS & raw.keys())
        or (isinstance(method, str) and method not in engine.methods)
        or (method in registry.names(Kind.PROPOSER))
        or not raw.keys() <= set(engine.fields)
    )


def split(
    raw: Mapping[str, Any],
    engine: EngineVocabulary,
    facts_for: Any,
    registry: Registry | None = None,
) -> tuple[dict[str, Any], PluginSettings]:
    """Take a speculative config apart.

    Args:
        raw: What the user wrote, keys with underscores.
        engine: vLLM's own names.
        facts_for: `num_speculative_tokens -> ModelFacts`, called once options are well formed.
        registry: Where to look plugins up; the installed ones by default.

    Returns:
        vLLM's share of the keys, and ours. A proposer of ours is still in `method`, unless it
        lets a method of vLLM's draft.

    Raises:
        SpecPluginsError: One message for the first thing that is wrong.
    """
    registry = registry or installed()
    rest = dict(raw)
    method = rest.get("method")
    verifier = rest.pop("verifier", None)
    allowed = rest.pop("verifiers_allowed", None)
    length_control = rest.pop("length_control", None)

    # Without a method vLLM infers one of its own from the draft model's name.
    ranked = None
    if method in engine.methods or (method is None and "model" in rest):
        if length_control is not None:
            raise ConfigError(
                f'"length_control" works with proposers from plugins; "{method or "draft_model"}" '
                "is vLLM's own and drafts num_speculative_tokens every time. Remove it, or choose "
                f"a method from: {listed(registry.names(Kind.PROPOSER))}."
            )
        if DRAFT_VOCABULARY in rest:
            ranked = _draft_vocabulary(method, rest.pop(DRAFT_VOCABULARY), engine)
            verifier = verifier if verifier is not None else LOSSLESS
        _refuse_unknown(method, rest, engine)
        proposer = None
    else:
        proposer, rest = _proposer(method, rest, engine, registry, length_control)
        verifier = verifier if verifier is not None else LOSSLESS

    settings = PluginSettings(
        proposer=proposer,
        draft_vocabulary=ranked,
        length_control=_choice(
            Kind.LENGTH_CONTROLLER,
            "fixed" if length_control is None else length_control,
            "length_control",
            registry,
        ),
        verifier=(
            None if verifier is None else _choice(Kind.VERIFIER, verifier, "verifier", registry)
        ),
        verifiers_allowed=_allowed(verifier, allowed, registry),
    )
    if settings.verifier and rest.get("rejection_sample_method") not in (None, "standard"):
        raise ConfigError(
            f'"rejection_sample_method": "{rest["rejection_sample_method"]}" is vLLM\'s own '
            f'verification and would be ignored beside "verifier": "{settings.verifier.name}". '
            'Remove one of them (block verification is {"name": "lossless", "rule": "block"}).'
        )
    _check(settings, facts_for, rest, registry)
    return rest, settings


def _proposer(
    method: Any,
    rest: dict[str, Any],
    engine: EngineVocabulary,
    registry: Registry,
    length_control: Any,
) -> tuple[Choice, dict[str, Any]]:
    """A proposer of ours from its keys, and vLLM's share of them."""
    ours = registry.names(Kind.PROPOSER)
    if not isinstance(method, str):
        raise ConfigError(
            f'"method" must be given beside "verifier" and "length_control". From plugins: '
            f"{listed(ours)}. vLLM's own: {listed(engine.main_methods)}."
        )
    if method not in {entry.name for entry in registry.entries(Kind.PROPOSER)}:
        raise ConfigError(
            f'Unknown speculative method "{method}".'
            f"{did_you_mean(method, {*ours, *engine.methods})} "
            f"From plugins: {listed(ours)}. vLLM's own: {listed(engine.main_methods)}."
        )
    plugin = registry.load(Kind.PROPOSER, method)
    options_type = plugin.Options
    beside = SHARED_KEYS | OUR_KEYS
    if issubclass(plugin, EngineProposer):
        beside -= {"length_control"}
        _check_engine_proposer(method, plugin, rest, engine, length_control)
        shared = {key: rest[key] for key in rest if key not in options_type.model_fields}
        shared["method"] = plugin.engine_method
    else:
        shared = {key: rest[key] for key in rest if key in SHARED_KEYS}
    options = {key: rest[key] for key in rest if key not in shared}
    if ignored := sorted(
        k for k in options if k in engine.fields and k not in options_type.model_fields
    ):
        raise ConfigError(
            f'"{ignored[0]}" is an option of vLLM\'s own methods and would be ignored by '
            f'"{method}". Remove it. Options of "{method}": {listed(options_type.model_fields)}; '
            f"beside {listed(beside)}."
        )
    tokens = shared.get("num_speculative_tokens")
    if tokens is None:
        raise ConfigError(
            f'"num_speculative_tokens" is missing: "{method}" needs the most tokens it may draft '
            'per step, for example {"method": "%s", "num_speculative_tokens": 5}.' % method
        )
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= 128:
        raise ConfigError(
            f'"num_speculative_tokens" must be a whole number from 1 to 128, got {tokens!r}.'
        )
    parsed = read_options(Kind.PROPOSER, method, options_type, options, beside=beside)
    return Choice(name=method, options=parsed.model_dump(mode="json", exclude_unset=True)), shared


def _check_engine_proposer(
    method: str,
    plugin: type[EngineProposer],
    rest: Mapping[str, Any],
    engine: EngineVocabulary,
    length_control: Any,
) -> None:
    """Keys beside a proposer that lets vLLM draft: its own, and vLLM's."""
    if plugin.engine_method not in engine.methods:
        raise PluginError(
            f'The proposer "{method}" lets vLLM\'s method "{plugin.engine_method}" draft, which '
            f"the installed vLLM does not have. It has: {listed(engine.main_methods)}."
        )
    if length_control is not None:
        raise ConfigError(
            f'"length_control" works with proposers that draft themselves; "{method}" lets '
            f'vLLM\'s "{plugin.engine_method}" draft num_speculative_tokens every time. Remove it.'
        )
    own = plugin.Options.model_fields.keys()
    for key in sorted(rest.keys() - own - set(engine.fields)):
        raise ConfigError(
            f'Unknown option "{key}" of "{method}".'
            f"{did_you_mean(key, {*own, *engine.fields, *OUR_KEYS})} "
            f'It takes {listed(own)}, the options of vLLM\'s "{plugin.engine_method}", and '
            "verifier, verifiers_allowed."
        )


def _draft_vocabulary(
    method: str | None, value: Any, engine: EngineVocabulary
) -> DraftVocabularyOptions:
    """A file or an object, beside a method of vLLM's that has a head to cut down."""
    with_head = listed(_without_spellings(engine.methods_with_head))
    if method is None:
        raise ConfigError(
            f'"{DRAFT_VOCABULARY}" needs "method" beside it: one of {with_head}, for example '
            '"method": "draft_model".'
        )
    if method not in engine.methods_with_head:
        raise ConfigError(
            f'"{DRAFT_VOCABULARY}" cuts down the output head a draft token is chosen from, and '
            f'vLLM\'s "{method}" has none that can be cut. Remove it, or choose a method from: '
            f"{with_head}."
        )
    try:
        return DraftVocabularyOptions.model_validate_json(json.dumps(value))
    except TypeError as error:
        raise ConfigError(f'"{DRAFT_VOCABULARY}" must be a JSON value: {error}.') from None
    except ValidationError as error:
        if not isinstance(value, (str, Mapping)):
            raise ConfigError(
                f'"{DRAFT_VOCABULARY}" takes a file name or an object with '
                f"{listed(DraftVocabularyOptions.model_fields)}, got {value!r}."
            ) from None
        raise ConfigError(
            f'"{DRAFT_VOCABULARY}": {problems(error, DraftVocabularyOptions)}'
        ) from None


def _refuse_unknown(method: str | None, rest: dict[str, Any], engine: EngineVocabulary) -> None:
    """A key that is neither vLLM's nor ours, beside a method of vLLM's."""
    ours = {"verifier", "verifiers_allowed"}
    if method in engine.methods_with_head:
        ours.add(DRAFT_VOCABULARY)
    for key in sorted(rest.keys() - set(engine.fields)):
        raise ConfigError(
            f'Unknown option "{key}" beside vLLM\'s method "{method or "draft_model"}".'
            f"{did_you_mean(key, {*engine.fields, *OUR_KEYS, *ours})} "
            f"It takes vLLM's own options, and from plugins: {listed(ours)}."
        )


def _choice(kind: Kind, value: Any, key: str, registry: Registry) -> Choice:
    """`"name"` or `{"name": ..., options}`, from under a key of the speculative config."""
    if isinstance(value, str):
        name, options = value, {}
    elif isinstance(value, Mapping) and isinstance(value.get("name"), str):
        name, options = value["name"], {k: v for k, v in value.items() if k != "name"}
    else:
        raise ConfigError(
            f'"{key}" takes a name or {{"name": ..., options}}, got {value!r}. '
            f"Installed: {listed(registry.names(kind))}."
        )
    options_type = registry.load(kind, name).Options
    parsed = read_options(kind, name, options_type, options)
    return Choice(name=name, options=parsed.model_dump(mode="json", exclude_unset=True))


def _allowed(verifier: Any, allowed: Any, registry: Registry) -> dict[str, Choice]:
    """What a request may choose: by default the configured verifier and `lossless`."""
    if verifier is None:
        if allowed is not None:
            raise ConfigError(
                '"verifiers_allowed" needs "verifier": without it vLLM\'s own verification runs '
                f'and no request can choose. Add "verifier": "{LOSSLESS}".'
            )
        return {}
    configured = _choice(Kind.VERIFIER, verifier, "verifier", registry)
    if allowed is None:
        allowed = [LOSSLESS]
    if not isinstance(allowed, (list, tuple)):
        raise ConfigError(
            f'"verifiers_allowed" must be a list of names or {{"name": ..., options}}, '
            f"got {allowed!r}."
        )
    choices: dict[str, Choice] = {}
    for value in allowed:
        choice = _choice(Kind.VERIFIER, value, "verifiers_allowed", registry)
        if choice.name in choices:
            raise ConfigError(f'"verifiers_allowed" names "{choice.name}" twice.')
        choices[choice.name] = choice
    return {**choices, configured.name: configured}


def read_options(
    kind: Kind,
    name: str,
    options_type: type[PluginOptions],
    options: Mapping[str, Any],
    beside: Collection[str] = (),
) -> Any:
    """Options validated by pydantic, or one error in words."""
    try:
        # They came as JSON: strict JSON validation takes a list for a tuple, a string for a path.
        return options_type.model_validate_json(json.dumps(dict(options)))
    except TypeError as error:
        raise ConfigError(
            f'The {kind.noun} "{name}": options must be JSON values: {error}.'
        ) from None
    except ValidationError as error:
        misspelt = any(item["type"] == "extra_forbidden" for item in error.errors())
        also = f" Beside them: {listed(beside)}." if beside and misspelt else ""
        raise ConfigError(
            f'The {kind.noun} "{name}": {problems(error, options_type)}{also}'
        ) from None


def _check(
    settings: PluginSettings, facts_for: Any, rest: dict[str, Any], registry: Registry
) -> None:
    """Let every plugin refuse what its option types could not."""
    _check_signals(settings, registry)
    _check_looks_ahead(settings, registry)
    _check_device_draft(settings, registry)
    facts: ModelFacts = facts_for(rest.get("num_speculative_tokens"))
    if settings.draft_vocabulary is not None:
        draft_vocabulary.check(settings.draft_vocabulary, facts)
    chosen = [
        (Kind.PROPOSER, settings.proposer),
        (Kind.LENGTH_CONTROLLER, settings.length_control),
        *((Kind.VERIFIER, choice) for choice in settings.verifiers_allowed.values()),
    ]
    for kind, choice in chosen:
        if choice is not None:
            plugin, options = choice.build(kind, registry)
            plugin.check(options, facts)


def _check_signals(settings: PluginSettings, registry: Registry) -> None:
    """A length controller must be told what it lives on."""
    if settings.proposer is None:
        return
    control = settings.length_control
    needs: Signals = registry.load(Kind.LENGTH_CONTROLLER, control.name).needs
    proposer, options = settings.proposer.build(Kind.PROPOSER, registry)
    told: Signals = proposer.signals_for(options)
    if needs & ~told:
        works = [
            name
            for name in registry.names(Kind.LENGTH_CONTROLLER)
            if not _signals_of(registry, name) & ~told
        ]
        raise ConfigError(
            f'length_control "{control.name}" works with proposers that {_WANTED[needs & ~told]}; '
            f'"{settings.proposer.name}" does not. Beside it: {listed(works)}.'
        )


def _check_looks_ahead(settings: PluginSettings, registry: Registry) -> None:
    """Draft tokens that are to be drafted again must not have been looked at."""
    if settings.proposer is None:
        return
    proposer, options = settings.proposer.build(Kind.PROPOSER, registry)
    if not proposer.keeps_rejected_drafts(options):
        return
    for choice in settings.verifiers_allowed.values():
        verifier, options = choice.build(Kind.VERIFIER, registry)
        if verifier.looks_ahead(options):
            with_options = f" with {json.dumps(choice.options)}" if choice.options else ""
            raise ConfigError(
                f'"{settings.proposer.name}" with these options drafts tokens behind a rejection '
                f'again, and the verifier "{choice.name}"{with_options} looks at them before it '
                "rejects: the text would not follow the target's law. Choose another verifier "
                f'("{LOSSLESS}" by its token rule), or draft anew ("coupling": "none").'
            )


def _check_device_draft(settings: PluginSettings, registry: Registry) -> None:
    """Not everything that a proposer may need is to be had on the device."""
    if settings.proposer is None:
        return
    proposer, options = settings.proposer.build(Kind.PROPOSER, registry)
    needs: Needs = proposer.needs_for(options)
    on_device, on_host = proposer.drafts_on_device(options), proposer.drafts_on_host(options)
    if not on_device and not on_host:
        raise PluginError(
            f'The proposer "{settings.proposer.name}" drafts neither on the device nor on the '
            "host with these options. Its author must have one of `drafts_on_device` and "
            "`drafts_on_host` say otherwise."
        )
    if on_device and (missing := needs & ~(NEEDS_ON_DEVICE if on_host else Needs.HISTORY)):
        raise PluginError(
            f'The proposer "{settings.proposer.name}" drafts on the device with these options and '
            f"needs {missing.name}, which `DeviceDraftInput` does not bring"
            + ("" if on_host else " where texts are kept on the host")
            + ". Its author must leave one of them out."
        )


def _signals_of(registry: Registry, name: str) -> Signals:
    """What a length controller needs; everything when it cannot be loaded."""
    try:
        return registry.load(Kind.LENGTH_CONTROLLER, name).needs
    except PluginError:
        return ~Signals.NONE


#: In words, for people.
_WANTED = {
    Signals.CONFIDENCES: "draft token by token and tell how sure they are",
    Signals.EXITS: "can leave the target after one of several layers",
    Signals.CONFIDENCES | Signals.EXITS: (
        "draft token by token and can leave the target after one of several layers"
    ),
}
