"""The registry: what entry points become, and what is wrong with those that cannot be used."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_spec_plugins import Draft, DraftInput, Proposer, Verifier, VerifierOptions, VerifyInput
from vllm_spec_plugins.engine_proposer import EngineProposer
from vllm_spec_plugins.errors import ConfigError, PluginError
from vllm_spec_plugins.registry import VLLM_METHODS, Kind, Registry, contract_problem


class Good(Proposer):
    def propose(self, batch: DraftInput) -> Draft:
        raise NotImplementedError


class Abstract(Proposer):
    pass


class OfVerifierOptions(Good):
    Options = VerifierOptions  # type: ignore[assignment]


class Nameless(EngineProposer):
    pass


class NoGuarantee(Verifier):
    def verify(self, batch: VerifyInput) -> Any:
        raise NotImplementedError


def point(
    name: str, value: str, kind: Kind = Kind.PROPOSER, package: str | None = None
) -> EntryPoint:
    found = EntryPoint(name, f"{__name__}:{value}", kind.value)
    if package is not None:
        found = found._for(SimpleNamespace(name=package, version="1.0"))  # type: ignore[attr-defined]
    return found


def test_the_built_ins_come_through_entry_points() -> None:
    registry = Registry()
    assert "ngram_adaptive" in registry.names(Kind.PROPOSER)
    assert "lossless" in registry.names(Kind.VERIFIER)
    assert {"fixed", "additive", "expected_speedup"} <= set(registry.names(Kind.LENGTH_CONTROLLER))
    ours = {
        e.name for k in Kind for e in registry.entries(k) if e.distribution == "vllm-spec-plugins"
    }
    points = {p.name for k in Kind for p in entry_points(group=k.value)}
    assert ours <= points


@pytest.mark.parametrize("kind", Kind)
def test_every_built_in_meets_its_contract(kind: Kind) -> None:
    registry = Registry()
    for entry in registry.entries(kind):
        if entry.distribution == "vllm-spec-plugins":
            assert issubclass(registry.load(kind, entry.name), kind.base)


def test_a_good_plugin_is_loaded() -> None:
    registry = Registry([point("mine", "Good", package="acme")])
    [entry] = registry.entries(Kind.PROPOSER)
    assert (entry.origin, entry.problem) == ("acme 1.0", None)
    assert registry.load(Kind.PROPOSER, "mine") is Good


def test_an_unknown_name_gets_the_nearest() -> None:
    registry = Registry([point("mine", "Good"), point("other", "Good")])
    with pytest.raises(ConfigError) as caught:
        registry.load(Kind.PROPOSER, "mnie")
    assert str(caught.value) == (
        'Unknown proposer "mnie". Did you mean "mine"? Installed: mine, other. '
        "`vllm-spec list` describes them."
    )


@pytest.mark.parametrize("name", sorted(VLLM_METHODS))
def test_a_name_of_vllms_is_reserved(name: str) -> None:
    registry = Registry([point(name, "Good", package="acme"), point("mine", "Good")])
    assert registry.names(Kind.PROPOSER) == ["mine"]
    with pytest.raises(PluginError) as caught:
        registry.load(Kind.PROPOSER, name)
    assert f'the package acme registers the proposer "{name}"' in str(caught.value)
    assert "reserved for vLLM's own method; its author must choose another" in str(caught.value)


def test_verifiers_may_be_called_like_vllms_methods() -> None:
    registry = Registry([point("ngram", "NoGuarantee", Kind.VERIFIER)])
    assert registry.names(Kind.VERIFIER) == ["ngram"]


@pytest.mark.parametrize("swapped", [False, True])
def test_two_packages_with_one_name(swapped: bool) -> None:
    points = [point("mine", "Good", package="acme"), point("mine", "Abstract", package="bolt")]
    points.append(point("other", "Good", package="acme"))
    registry = Registry(points[::-1] if swapped else points)
    with pytest.raises(PluginError) as caught:
        registry.load(Kind.PROPOSER, "mine")
    message = str(caught.value)
    assert 'two installed packages register the proposer "mine"' in message
    assert f"acme 1.0 ({__name__}:Good)" in message
    assert f"bolt 1.0 ({__name__}:Abstract)" in message
    assert "uninstall one of them" in message
    assert registry.load(Kind.PROPOSER, "other") is Good


def test_one_package_seen_twice_is_no_clash() -> None:
    """An editable install is on the path twice."""
    registry = Registry([point("mine", "Good", package="acme")] * 2)
    assert registry.load(Kind.PROPOSER, "mine") is Good


def test_one_name_for_two_kinds_is_no_clash() -> None:
    registry = Registry([point("mine", "Good"), point("mine", "NoGuarantee", Kind.VERIFIER)])
    assert registry.load(Kind.PROPOSER, "mine") is Good


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        (
            Kind.PROPOSER,
            "NoSuchClass",
            f"importing {__name__}:NoSuchClass failed: AttributeError",
        ),
        (Kind.PROPOSER, "Abstract", "Abstract does not define propose"),
        (
            Kind.PROPOSER,
            "Nameless",
            "Nameless.engine_method is not the name of a method of vLLM's",
        ),
        (Kind.PROPOSER, "NoGuarantee", "is not a subclass of vllm_spec_plugins.proposer.Proposer"),
        (Kind.PROPOSER, "point", "is not a subclass of vllm_spec_plugins.proposer.Proposer"),
        (
            Kind.PROPOSER,
            "OfVerifierOptions",
            "OfVerifierOptions.Options is not a subclass of ProposerOptions",
        ),
        (
            Kind.VERIFIER,
            "NoGuarantee",
            "NoGuarantee.guarantee is not one of Guarantee.BOUNDED, Guarantee.HEURISTIC, "
            "Guarantee.LOSSLESS",
        ),
        (Kind.LENGTH_CONTROLLER, "Good", "vllm_spec_plugins.length_control.LengthController"),
    ],
)
def test_what_does_not_meet_the_contract(kind: Kind, value: str, problem: str) -> None:
    registry = Registry([point("mine", value, kind, package="acme")])
    [entry] = registry.entries(kind)
    assert entry.problem is None, "reading the registry imports nothing"
    with pytest.raises(PluginError) as caught:
        registry.load(kind, "mine")
    assert str(caught.value).startswith(f'The {kind.noun} "mine" from acme 1.0 cannot be used: ')
    assert problem in str(caught.value)


@pytest.mark.parametrize("raised", [RuntimeError("no licence"), SystemExit("no licence")])
def test_a_plugin_that_fails_at_import(
    raised: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Licensed(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise raised if name == "Good" else AttributeError(name)

    monkeypatch.setitem(sys.modules, "licensed", Licensed("licensed"))
    registry = Registry([EntryPoint("mine", "licensed:Good", Kind.PROPOSER.value)])
    with pytest.raises(PluginError, match=f"{type(raised).__name__}: no licence"):
        registry.load(Kind.PROPOSER, "mine")


def test_the_contract_is_met() -> None:
    assert contract_problem(Kind.PROPOSER, Good) is None
