"""What a text comes to, as the user's own checker says: a Python function or a command."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from vllm_spec_plugins.errors import SpecPluginsError


@dataclass(frozen=True, slots=True)
class Checker:
    """Gives the outcome of a completion; two completions are as good if theirs are equal.

    Attributes:
        name: As the user gave it.
        outcome: From prompt and completion to any plain JSON value; None, false or "" where
            the completion comes to nothing.
    """

    name: str
    outcome: Callable[[str, str], Any]

    @classmethod
    def of(cls, name: str) -> Checker:
        """A function, as `module:function`, or a command.

        The function is called with prompt and completion. The command gets one JSON object
        {"prompt", "completion"} as its input; what it prints is the outcome.

        Raises:
            SpecPluginsError: There is no such function or command.
        """
        words = shlex.split(name)
        if len(words) == 1 and ":" in name:
            return cls(name, _function(name))
        if not words or shutil.which(words[0]) is None:
            raise SpecPluginsError(
                f'the checker "{name}" is neither module:function nor a command on this machine.'
            )

        def run(prompt: str, completion: str) -> str:
            text = json.dumps({"prompt": prompt, "completion": completion})
            done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SpecPluginsError(
                    f'the checker "{name}" ended with {done.returncode}: {done.stderr.strip()}'
                )
            return done.stdout.strip()

        return cls(name, run)


def _function(name: str) -> Callable[[str, str], Any]:
    module, _, attribute = name.partition(":")
    # A script of the user's own stands in the folder the command is given in.
    sys.path.insert(0, "")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SpecPluginsError(f'no checker "{name}": {error}.') from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise SpecPluginsError(f'the checker "{name}" is no function.')
    return found
