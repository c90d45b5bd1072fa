"""vLLM loads general plugins in every process it starts, and pytest its plugins in every run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "vllm", "numba", "transformers")


def imported_by(program: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter has after running a program."""
    program += (
        "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "program",
    [
        "import vllm_spec_plugins",
        "import vllm_spec_plugins.plugin",
        "import vllm_spec_plugins.testing.pytest_plugin",
        "import vllm_spec_plugins.engine.seams; vllm_spec_plugins.engine.seams.check()",
        "from vllm_spec_plugins.registry import Kind, Registry; Registry().entries(Kind.PROPOSER)",
        "import vllm_spec_plugins.request_options",
        "import vllm_spec_plugins.draft_vocabulary, safetensors.numpy",
        "import vllm_spec_plugins.hookspecs, vllm_spec_plugins.metrics, vllm_spec_plugins.errors",
    ],
)
def test_no_heavy_import(program: str) -> None:
    assert not imported_by(program) & set(HEAVY)


def test_a_heavy_import_would_be_noticed() -> None:
    """Negative control."""
    assert "torch" in imported_by("from vllm_spec_plugins import AcceptanceRule")


def test_public_names_resolve() -> None:
    import vllm_spec_plugins

    for name in vllm_spec_plugins.__all__:
        assert getattr(vllm_spec_plugins, name) is not None
    assert set(vllm_spec_plugins.__all__) <= set(dir(vllm_spec_plugins))
    with pytest.raises(AttributeError, match="no attribute 'Propser'"):
        vllm_spec_plugins.Propser  # noqa: B018


def test_pytest_itself_starts_light() -> None:
    """With our pytest plugin loaded, as in any environment that has this package."""
    program = "import pytest; pytest.main(['--version', '--version', '-p', 'no:cacheprovider'])"
    imported = imported_by(program)
    assert "vllm_spec_plugins" in imported
    assert not imported & set(HEAVY)
