"""The kit as a third party meets it: a pytest plugin, their own verifier, no test written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_spec_plugins.errors import ConfigError, PluginError
from vllm_spec_plugins.testing.guarantees import build_verifier

THEIRS = """
from vllm_spec_plugins.acceptance_rule import AcceptanceRule, token_acceptance
from vllm_spec_plugins.verifier import Guarantee

class Right(AcceptanceRule):
    guarantee = Guarantee.LOSSLESS

    def acceptance(self, batch):
        return token_acceptance(batch)

class Mislabelled(AcceptanceRule):
    guarantee = Guarantee.LOSSLESS

    def acceptance(self, batch):
        return (token_acceptance(batch) * 1.1).clamp(max=1)

class NotAVerifier:
    pass
"""


@pytest.fixture
def their_package(tmp_path: Path) -> Path:
    (tmp_path / "their_package.py").write_text(THEIRS)
    return tmp_path


def conformance(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--pyargs"]
    command += ["vllm_spec_plugins.testing.conformance", "-k", "enumerated and not mixed"]
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_right_verifier_passes(their_package: Path) -> None:
    result = conformance(their_package, "--spec-verifier", "their_package:Right")
    assert result.returncode == 0, result.stdout
    assert "passed" in result.stdout


def test_mislabelled_verifier_fails(their_package: Path) -> None:
    result = conformance(their_package, "--spec-verifier", "their_package:Mislabelled")
    assert result.returncode == 1, result.stdout
    assert "failed" in result.stdout


def test_no_verifier_named_is_a_skip(their_package: Path) -> None:
    result = conformance(their_package)
    assert result.returncode == 0, result.stdout
    assert "name a verifier with --spec-verifier" in result.stdout


def test_a_misspelt_verifier_is_one_message(their_package: Path) -> None:
    result = conformance(their_package, "--spec-verifier", "losless")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR, result.stdout
    assert (result.stdout + result.stderr).count('Did you mean "lossless"') == 1


def test_unknown_names(their_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match='Did you mean "lossless"'):
        build_verifier("losless")
    with pytest.raises(ConfigError, match='Did you mean "epsilon"'):
        build_verifier("typical", '{"epsilom": 0.1}')
    for not_an_object in ("{epsilon: 0.1}", "[0.1]"):
        with pytest.raises(ConfigError, match="must be"):
            build_verifier("typical", not_an_object)
    with pytest.raises(PluginError, match="No module named 'nobody'"):
        build_verifier("nobody:Verifier")
    monkeypatch.syspath_prepend(their_package)
    with pytest.raises(PluginError, match="is not a subclass of"):
        build_verifier("their_package:NotAVerifier")


def test_loading_the_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys, vllm_spec_plugins.testing.pytest_plugin; "
        "print([m for m in ('torch', 'vllm', 'numpy', 'pydantic') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout.strip() == "[]", output.stderr
