"""What the installed vLLM does wrong, or takes as an option and then ignores.

Where a fact can be tried it is tried; the others are read from vLLM's source files, so that
each statement is about the version that is installed and disappears with the defect.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from pydantic import ValidationError

from vllm_spec_plugins.errors import SpecPluginsError, listed
from vllm_spec_plugins.proposer import Proposer
from vllm_spec_plugins.registry import Kind, Registry, installed

from .install import shield_llvmlite
from .seams import DISTRIBUTIONS, Source, installed_source

CONFIG = "config/speculative.py"
V1_SAMPLER = "v1/sample/rejection_sampler.py"
V1_RUNNER = "v1/worker/gpu_model_runner.py"
CPU_KERNELS = "utils/cpu_triton_utils.py"
NGRAM = "v1/spec_decode/ngram_proposer.py"

#: Speculative methods that vLLM 0.33 no longer has.
REMOVED_IN_0_33 = ("medusa", "mlp_speculator")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth knowing before serving.

    Attributes:
        topic: The option or part it is about.
        level: "ok" where all is well, "note" for facts, "warning" where vLLM does not do what it
            was asked, "error" where it cannot be used at all.
        detail: What happens.
        remedy: What to do; empty where there is nothing to do.
    """

    topic: str
    level: Literal["ok", "note", "warning", "error"]
    detail: str
    remedy: str = ""


def findings(source: Source | None = None) -> list[Finding]:
    """Everything known about the installed vLLM. Imports it to try what can be tried."""
    source = source or installed_source()
    on_cpu = platform_is_cpu()
    return [
        *command_line(),
        *sampling_of_draft_rows(on_cpu),
        *ignored_rejection_methods(source),
        *synthetic_on_cpu(source, on_cpu),
        *ignored_tokens_per_batch_size(source),
        *model_runner(on_cpu),
        *scheduling(),
        *ngram_threads(source, on_cpu),
        *going_away(source),
    ]


def platform_is_cpu() -> bool:
    """Whether this vLLM computes on the CPU."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def command_line() -> Iterator[Finding]:
    """vLLM's own command asks for the version of a package called `vllm`."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        provider = listed(name for name in DISTRIBUTIONS if _is_installed(name))
        yield Finding(
            "the `vllm` command",
            "warning",
            'stops with PackageNotFoundError: it looks for the package "vllm", and vLLM comes '
            f"from {provider} here",
            "use `vllm-spec serve`, which takes the same arguments",
        )
    else:
        yield Finding("the `vllm` command", "ok", "finds its package")


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def sampling_of_draft_rows(on_cpu: bool) -> Iterator[Finding]:
    """Tried here: do temperature, top-k and top-p reach the rows of draft tokens?"""
    topic = "vLLM's own verification at temperature > 0"
    if expansion_is_right(on_cpu):
        yield Finding(topic, "ok", "every draft token is judged at its request's temperature")
    else:
        yield Finding(
            topic,
            "warning",
            "temperature, top-k and top-p of draft tokens are uninitialised memory "
            "(vllm-project/vllm#55005): the text does not follow the model's distribution, with "
            "any method that vLLM verifies itself",
            'add "verifier": "lossless" to --speculative-config',
        )


def expansion_is_right(on_cpu: bool) -> bool:
    """One value per request, repeated for each of its draft tokens, by vLLM's own function."""
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    device = "cpu" if on_cpu else current_platform.device_type
    if on_cpu:
        shield_llvmlite()
        current_platform.register_triton_kernel_overrides()
    counts = torch.tensor([2, 0, 3], device=device)
    ends = counts.cumsum(0).to(torch.int32)
    # Different values each time: uninitialised memory may still hold the last result.
    for values in ([0.25, 0.5, 0.75], [3.0, 5.0, 7.0], [11.0, 13.0, 17.0]):
        per_request = torch.tensor(values, device=device)
        found = expand_batch_to_tokens(per_request, ends, 5)
        if not torch.equal(found, per_request.repeat_interleave(counts)):
            return False
    return True


def ignored_rejection_methods(source: Source) -> Iterator[Finding]:
    """Values of `rejection_sample_method` that model runner V1 takes and never looks at."""
    offered = _literal(source(CONFIG), "RejectionSampleMethod") - {"standard"}
    for value in sorted(offered - _strings(source(V1_SAMPLER))):
        remedy = 'use "verifier": {"name": "lossless", "rule": "block"}' if value == "block" else ""
        yield Finding(
            f'"rejection_sample_method": "{value}"',
            "warning",
            "accepted and ignored on model runner V1: standard rejection sampling runs instead",
            remedy,
        )


def synthetic_on_cpu(source: Source, on_cpu: bool) -> Iterator[Finding]:
    """The CPU's sampling kernels assert that synthetic acceptance is off."""
    if on_cpu and any("Synthetic acceptance not" in text for text in _strings(source(CPU_KERNELS))):
        yield Finding(
            '"rejection_sample_method": "synthetic"',
            "warning",
            "accepted, and the engine stops with an AssertionError at the first sampled request",
        )


def ignored_tokens_per_batch_size(source: Source) -> Iterator[Finding]:
    """Methods whose branch in model runner V1 never looks at the scheduler's number."""
    ignoring = [
        method
        for function in ast.walk(ast.parse(source(V1_RUNNER)))
        if isinstance(function, ast.FunctionDef) and function.name == "propose_draft_token_ids"
        for method, body in _branches_on_method(function)
        if "num_spec_tokens_to_schedule" not in _names(body)
    ]
    if ignoring:
        yield Finding(
            '"num_speculative_tokens_per_batch_size"',
            "warning",
            f"accepted and ignored on model runner V1 with the methods {listed(ignoring)}",
            'with a proposer of a plugin, use "length_control"',
        )


def model_runner(on_cpu: bool) -> Iterator[Finding]:
    """Which of vLLM's two model runners a plugin is served by, and what runs eagerly there."""
    from vllm import envs
    from vllm.config.vllm import HAS_TRITON  # as the choice of runner sees it

    topic, forced = "model runner", envs.VLLM_USE_V2_MODEL_RUNNER
    eager = (
        "proposers draft outside CUDA graphs there, and so does the verification; the target's "
        "own pass is captured"
    )
    if forced and not HAS_TRITON:
        yield Finding(
            topic,
            "error",
            "VLLM_USE_V2_MODEL_RUNNER=1 asks for V2, which needs Triton and a device that Triton "
            "compiles for; there is none",
            "unset it",
        )
    elif forced:
        yield Finding(topic, "ok", f"V2, by VLLM_USE_V2_MODEL_RUNNER=1; {eager}")
    elif forced is False:
        yield Finding(topic, "ok", f"V1, by VLLM_USE_V2_MODEL_RUNNER=0; {eager}")
    elif not HAS_TRITON:
        where = "the CPU" if on_cpu else "this device"
        yield Finding(topic, "ok", f"V1: V2 needs Triton, which does not compile for {where}")
    else:
        yield Finding(
            topic,
            "ok",
            "V2, which serves every proposer and verifier; V1 for a draft_vocabulary beside a "
            f"drafting method of vLLM's own, adaptive verification or batch-sharded sampling; "
            f"{eager}",
        )


def scheduling() -> Iterator[Finding]:
    """Where the next step is planned before the last one is verified."""
    plugins = installed()
    drafting = [name for name in plugins.names(Kind.PROPOSER) if _drafts_on_device(plugins, name)]
    verifying = [
        name for name in plugins.names(Kind.VERIFIER) if _verifies_on_device(plugins, name)
    ]
    by = f", or, with options that allow it, by {listed(drafting)}" if drafting else ""
    yield Finding(
        "asynchronous scheduling",
        "note",
        f"kept on model runner V2 where the draft is made on the device (by a method of vLLM's "
        f"own{by}), verified there (by default options: {listed(verifying)}), and no "
        "length_control is set. Everything else, and V1, needs each step's tokens on the host "
        "before it plans the next; the log says at start which option does",
    )


def _drafts_on_device(plugins: Registry, name: str) -> bool:
    """Whether a proposer can with some options; False where it is broken."""
    try:
        plugin = plugins.load(Kind.PROPOSER, name)
    except SpecPluginsError:
        return False
    return plugin.drafts_on_device.__func__ is not Proposer.drafts_on_device.__func__


def _verifies_on_device(plugins: Registry, name: str) -> bool:
    """Whether a verifier does with its default options; False where it has none or is broken."""
    try:
        plugin = plugins.load(Kind.VERIFIER, name)
        return bool(plugin.verifies_on_device(plugin.Options()))
    except (SpecPluginsError, ValidationError):
        return False


def ngram_threads(source: Source, on_cpu: bool) -> Iterator[Finding]:
    """vLLM's `ngram` brings a second pool of OpenMP threads, which fights with torch's."""
    if not on_cpu or "parallel=True" not in source(NGRAM):
        return
    topic, remedy = "vLLM's ngram on the CPU", "set NUMBA_THREADING_LAYER=workqueue"
    if os.environ.get("NUMBA_THREADING_LAYER") == "workqueue":
        yield Finding(topic, "ok", "its threads leave torch's alone")
    elif os.environ.get("NUMBA_NUM_THREADS") == "1":
        # numba's OpenMP layer calls omp_set_num_threads, in the library torch uses.
        yield Finding(
            topic, "note", "with NUMBA_NUM_THREADS=1 it leaves torch one thread too", remedy
        )
    else:
        yield Finding(
            topic,
            "warning",
            "its threads compete with torch's for the cores: on the 4 cores we measured, every "
            "forward pass became 200 times slower",
            remedy,
        )


def going_away(source: Source) -> Iterator[Finding]:
    """Methods of this vLLM that the next one does not have."""
    offered = _literal(source(CONFIG), "SpeculativeMethod")
    if gone := [method for method in REMOVED_IN_0_33 if method in offered]:
        yield Finding(
            f'"method": {listed(gone)}', "note", "offered by this vLLM; vLLM 0.33 has removed it"
        )


def _literal(text: str, name: str) -> set[str]:
    """The strings of `name = Literal[...]` that stand in it directly."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in node.targets
        ):
            return _strings_below(node.value)
    return set()


def _strings(text: str) -> set[str]:
    """Every string constant of a module."""
    return _strings_below(ast.parse(text))


def _strings_below(node: ast.AST) -> set[str]:
    return {
        child.value
        for child in ast.walk(node)
        if isinstance(child, ast.Constant) and isinstance(child.value, str)
    }


def _names(body: list[ast.stmt]) -> set[str]:
    return {
        node.id for statement in body for node in ast.walk(statement) if isinstance(node, ast.Name)
    }


def _branches_on_method(function: ast.FunctionDef) -> Iterator[tuple[str, list[ast.stmt]]]:
    """The bodies of `if spec_config.method == "x"` and its `elif`s."""
    for node in ast.walk(function):
        if (
            isinstance(node, ast.If)
            and isinstance(test := node.test, ast.Compare)
            and isinstance(test.left, ast.Attribute)
            and test.left.attr == "method"
            and isinstance(test.ops[0], ast.Eq)
            and isinstance(value := test.comparators[0], ast.Constant)
        ):
            yield str(value.value), node.body
