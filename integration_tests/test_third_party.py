"""Plugins of a third party, really installed, really served; and broken ones beside them.

Two small distributions from `packages/` are installed with pip into a folder of their own.
Subprocesses with that folder on their path see both; this process sees neither.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vllm_spec_plugins.testing.chi_square import compare, failures

PACKAGES = Path(__file__).parent / "packages"
FALSE_ALARM = 1e-6

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with both distributions in it."""
    target = tmp_path_factory.mktemp("site")
    sources = tmp_path_factory.mktemp("sources")
    for name in ("acme_spec_methods", "acme_broken"):
        shutil.copytree(PACKAGES / name, sources / name)  # a build leaves files beside the source
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "--target", str(target)]
    command += [str(sources / name) for name in ("acme_spec_methods", "acme_broken")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="session")
def run(installed: Path, engine_environment: dict[str, str]) -> Run:
    """`run(program, *arguments)`: a process in which both distributions are installed."""

    def run(
        program: str | Path, *arguments: str | Path, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **engine_environment, "PYTHONPATH": str(installed)}
        return subprocess.run(
            [str(program), *map(str, arguments)],
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )

    return run


@dataclass
class Jobs:
    """Engines to serve in one subprocess, and what came of them, by name."""

    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    batches: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, name: str, model: Path, spec: Any, batches: list[Any], **engine: Any) -> None:
        self.engines[name] = {
            "model": str(model),
            "speculative_config": spec,
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 256,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 128,
            "num_gpu_blocks_override": 256,
            "seed": 0,
            **engine,
        }
        self.batches[name] = batches

    def serve(self, run: Run, folder: Path, **variables: str) -> dict[str, dict[str, Any]]:
        jobs, results = folder / "jobs.json", folder / "results.json"
        listed = [
            {"engine": engine, "batches": self.batches[name]}
            for name, engine in self.engines.items()
        ]
        jobs.write_text(json.dumps(listed))
        done = run(sys.executable, PACKAGES / "serve_jobs.py", jobs, results, **variables)
        assert done.returncode == 0, done.stderr[-4000:]
        found = dict(zip(self.engines, json.loads(results.read_text()), strict=True))
        return {**found, "log": {"text": done.stdout + done.stderr}}


def drafting(method: str, **options: Any) -> dict[str, Any]:
    return {"method": method, "num_speculative_tokens": 4, **options}


#: Every one of these must leave greedy text as it is.
GREEDY_CONFIGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "ngram of vLLM": drafting(
        "ngram", prompt_lookup_min=2, prompt_lookup_max=4, verifier="lossless"
    ),
    "ngram_adaptive": drafting("ngram_adaptive"),
    "deterministic": drafting("acme_bigram"),
    "sampled": drafting("acme_sampled"),
    "hidden states": drafting("acme_hidden_states"),
    "lenient": drafting("acme_sampled", verifier={"name": "acme_lenient", "floor": 0.25}),
    "failing": drafting("acme_failing", good_steps=12),
}

#: Token ids of the narrow model: few, so that every pair of tokens has a bin of its own.
NARROW = 16
NARROW_PROMPT = [1, 3, 3, 11, 9, 12, 8, 6, 3, 8, 6, 11, 3, 5, 6, 3]
TEXTS = 1500
#: Sampled from the narrow model; the first two must leave its law alone.
LAW_CONFIGS: dict[str, dict[str, Any]] = {
    "law, sampled": drafting("acme_sampled"),
    "law, sampled, compact, block": drafting(
        "acme_sampled", vocabulary="compact", verifier={"name": "lossless", "rule": "block"}
    ),
    "law, wrong": drafting("acme_wrong_law"),
    "law, lenient": drafting("acme_sampled", verifier="acme_lenient"),
}

REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no module": (
        drafting("broken_no_module"),
        ["importing acme_broken.no_such_module:Proposer failed", "ModuleNotFoundError"],
    ),
    "no attribute": (
        drafting("broken_no_attribute"),
        ["importing acme_broken.plugins:NoSuchClass failed", "AttributeError"],
    ),
    "raises at import": (
        drafting("broken_import"),
        ["raises_at_import:Proposer failed: RuntimeError: acme needs a licence file"],
    ),
    "exits at import": (
        drafting("broken_exit"),
        ["exits_at_import:Proposer failed: SystemExit: acme needs a newer driver"],
    ),
    "not a proposer": (
        drafting("broken_contract"),
        ["NotAProposer", "is not a subclass of vllm_spec_plugins.proposer.Proposer"],
    ),
    "not a class": (
        drafting("broken_instance"),
        ["NotAProposer object", "is not a subclass of vllm_spec_plugins.proposer.Proposer"],
    ),
    "abstract": (drafting("broken_abstract"), ["WithoutPropose does not define propose"]),
    "odd options": (
        drafting("broken_options"),
        ["WithOddOptions.Options is not a subclass of ProposerOptions"],
    ),
    "no guarantee": (
        drafting("acme_bigram", verifier="broken_guarantee"),
        ["WithoutGuarantee.guarantee is not one of"],
    ),
    "no guarantee, only allowed": (
        drafting("acme_bigram", verifiers_allowed=["broken_guarantee"]),
        ["WithoutGuarantee.guarantee is not one of"],
    ),
    "controller": (
        drafting("acme_bigram", length_control="broken_controller"),
        ["is not a subclass of vllm_spec_plugins.length_control.LengthController"],
    ),
    "two plugins with one name": (
        drafting("acme_contested"),
        [
            'two installed packages register the proposer "acme_contested"',
            "acme-spec-methods 1.2.0 (acme_spec_methods.bigram:Bigram)",
            "acme-broken 0.0.1 (acme_broken.plugins:Eagle3)",
            "uninstall one of them",
        ],
    ),
    "misspelt": (drafting("acme_bigrm"), ['Did you mean "acme_bigram"?']),
    "misspelt option": (
        drafting("acme_sampled", vocabulry="compact"),
        ['unknown option "vocabulry"', 'Did you mean "vocabulary"?'],
    ),
}


@dataclass(frozen=True)
class Narrow:
    """A model of 16 tokens, and its law `[V, V]` of the first two after the prompt."""

    folder: Path
    law: Any


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Narrow:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("narrow")
    config = LlamaConfig(
        vocab_size=NARROW,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        model = LlamaForCausalLM(config).eval()
        for weights in model.parameters():
            if weights.ndim == 2:
                weights.mul_(5)
        model.save_pretrained(folder)
        contexts = torch.tensor([[*NARROW_PROMPT, token] for token in range(NARROW)])
        laws = model(contexts).logits[:, -2:].double().softmax(dim=-1)
    return Narrow(folder, laws[0, 0, :, None] * laws[:, 1])


@pytest.fixture(scope="session")
def served(
    run: Run,
    random_model: Path,
    model_without_weights: Path,
    narrow: Narrow,
    prompts: list[dict[str, list[int]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """One process, one engine after another, both distributions installed in all of them."""
    folder = tmp_path_factory.mktemp("served")
    token_ids = [prompt["prompt_token_ids"] for prompt in prompts]
    greedy = {"prompts": token_ids, "sampling": {"temperature": 0.0, "max_tokens": 40}}
    jobs = Jobs()
    for name, spec in GREEDY_CONFIGS.items():
        jobs.add(name, random_model, spec, [greedy])
    # The first token comes without a draft; the second is verified, or drawn after it.
    sampled = {
        "prompts": [NARROW_PROMPT] * TEXTS,
        "sampling": {"temperature": 1.0, "max_tokens": 4},
    }
    for name, spec in LAW_CONFIGS.items():
        wide = {"max_num_seqs": 256, "max_num_batched_tokens": 4096}
        jobs.add(name, narrow.folder, spec, [sampled], **wide)
    for name, (spec, _) in REFUSED.items():
        jobs.add(name, model_without_weights, spec, [])
    record = folder / "record.jsonl"
    return jobs.serve(run, folder, ACME_RECORD=str(record)) | {
        "record": {"lines": [json.loads(line) for line in record.read_text().splitlines()]}
    }


@pytest.fixture(scope="session")
def greedy_texts(
    serve_offline: Any, generate: Any, prompts: list[dict[str, list[int]]]
) -> list[list[int]]:
    """What this process, without the two distributions, decodes."""
    with serve_offline() as llm:
        return generate(llm, prompts, max_tokens=40)


def tally(result: dict[str, Any]) -> dict[str, Any]:
    [row] = result["metrics"]["by_method"]
    return row


@pytest.mark.engine
@pytest.mark.parametrize("name", GREEDY_CONFIGS)
def test_greedy_text_is_plain_decodings(
    name: str, served: dict[str, Any], greedy_texts: list[list[int]]
) -> None:
    assert served[name]["error"] is None
    assert served[name]["texts"][0] == greedy_texts


@pytest.mark.engine
@pytest.mark.parametrize("name", ["deterministic", "sampled", "hidden states", "lenient"])
def test_a_third_partys_drafts_are_verified(name: str, served: dict[str, Any]) -> None:
    found = tally(served[name])
    assert found["proposer"].startswith("acme_")
    assert found["drafted"] > 100
    assert 0 < found["accepted"] < found["drafted"]
    assert served[name]["metrics"]["accepted_by_source"] == {found["proposer"]: found["accepted"]}


@pytest.mark.engine
def test_a_proposer_that_fails_costs_no_request(served: dict[str, Any]) -> None:
    """Some good steps, three failures, then it is left alone; the text is whole (above)."""
    log = served["log"]["text"]
    assert log.count('The proposer "acme_failing" failed') == 3
    assert "(1 of 3 in a row before it is switched off)" in log
    assert "acme_failing has run out of good steps" in log
    assert 0 < tally(served["failing"])["steps"] < tally(served["deterministic"])["steps"]


@pytest.mark.engine
def test_an_observer_sees_every_step(served: dict[str, Any]) -> None:
    lines = served["record"]["lines"]
    ready = [line for line in lines if line["event"] == "ready"]
    assert {
        "event": "ready",
        "proposer": "acme_bigram",
        "verifier": "lossless",
        "vocab_size": 512,
    } in ready
    steps = [s for s in lines if s["event"] == "step" and s["proposer"] == "acme_bigram"]
    found = tally(served["deterministic"])
    assert sum(sum(step["drafted"]) for step in steps) == found["drafted"]
    assert sum(sum(step["accepted"]) for step in steps) == found["accepted"]
    requests = {request for step in steps for request in step["requests"]}
    assert len(requests) == 8
    # vLLM's scheduler reports finished requests with the next step; after the last there is none.
    finished = {line["request"] for line in lines if line["event"] == "finished"}
    assert requests - finished <= set(steps[-1]["requests"])


@pytest.mark.engine
def test_failing_observers_are_reported_and_removed_alone(served: dict[str, Any]) -> None:
    """`acme_recorder` goes on seeing steps (above); nobody's text or metrics suffer."""
    log = served["log"]["text"]
    assert 'The observer "broken_observer" (acme_broken.observers:RaisesWhenBuilt)' in log
    assert 'The observer "broken_hook" (acme_broken.observers:WithUnknownArgument)' in log
    engines_of_ours = len(GREEDY_CONFIGS) - 1 + len(LAW_CONFIGS)
    failed = 'The observer "acme_broken.observers:RaisesInEveryStep" failed in spec_step_finished'
    assert log.count(failed) == engines_of_ours


@pytest.mark.engine
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_before_the_model_loads(
    name: str, served: dict[str, Any]
) -> None:
    """The model served here has no weights: an error about them would mean they were asked for."""
    error = served[name]["error"]
    assert error.startswith(("PluginError: ", "ConfigError: "))
    for phrase in REFUSED[name][1]:
        assert phrase in error
    if not name.startswith("misspelt"):
        assert "acme-broken 0.0.1" in error


def test_reading_the_registry_imports_no_plugin(run: Run) -> None:
    program = """
import json, sys
from vllm_spec_plugins.registry import Kind, Registry
registry = Registry()
found = {e.name: [e.origin, e.problem] for k in Kind for e in registry.entries(k)}
imported = [m for m in sys.modules if m.startswith(("acme", "torch", "vllm.", "numpy"))]
print(json.dumps([found, registry.names(Kind.PROPOSER), imported]))
"""
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    found, proposers, imported = json.loads(done.stdout)
    assert imported == []
    assert found["acme_bigram"] == ["acme-spec-methods 1.2.0", None]
    assert found["broken_import"] == ["acme-broken 0.0.1", None]
    assert "reserved for vLLM's own method" in found["eagle3"][1]
    assert "two installed packages" in found["acme_contested"][1]
    assert "eagle3" not in proposers
    assert "ngram_adaptive" in proposers


def test_listing_names_what_works_and_what_does_not(run: Run) -> None:
    vllm_spec = Path(sys.executable).with_name("vllm-spec")
    done = run(vllm_spec, "list", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    proposers = {plugin["name"]: plugin for plugin in found["proposers"]}
    assert proposers["acme_bigram"]["package"] == "acme-spec-methods"
    assert proposers["acme_bigram"]["version"] == "1.2.0"
    assert proposers["acme_bigram"]["problem"] is None
    [vocabulary] = proposers["acme_sampled"]["options"]
    assert (vocabulary["name"], vocabulary["default"]) == ("vocabulary", "whole")
    assert "licence file" in proposers["broken_import"]["problem"]
    assert "newer driver" in proposers["broken_exit"]["problem"]
    [lenient] = [v for v in found["verifiers"] if v["name"] == "acme_lenient"]
    assert lenient["guarantee"] == "heuristic"


@pytest.mark.engine
@pytest.mark.parametrize("name", LAW_CONFIGS)
def test_the_law_of_sampled_text(name: str, served: dict[str, Any], narrow: Narrow) -> None:
    """True draft laws leave the target's law alone; a wrong one, or a relaxed rule, shows."""
    import torch

    assert served[name]["error"] is None
    tokens = torch.tensor(served[name]["texts"][0])
    counts = torch.bincount(tokens[:, 0] * NARROW + tokens[:, 1], minlength=NARROW**2)
    fit = compare(name, counts, narrow.law.flatten())
    if name in ("law, wrong", "law, lenient"):
        assert failures([fit], FALSE_ALARM), fit
    else:
        assert not failures([fit], FALSE_ALARM), fit
    found = tally(served[name])
    assert found["steps"] > 0.9 * TEXTS
    assert 0.1 < found["acceptance_rate"] < 0.95
    # What a relaxed verifier costs is measured while it runs.
    assert (found["total_variation_price"] > 0.05) == (name == "law, lenient")
