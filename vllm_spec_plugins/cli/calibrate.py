"""`vllm-spec calibrate`: what can be measured or trained for a model before it is served.

Each subcommand lives in a file of its own, imported when called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

app = typer.Typer(
    name="calibrate",
    help="Measure or train what speculative decoding of one model needs; killed runs go on.",
    no_args_is_help=True,
)

Model = Annotated[
    str,
    typer.Argument(help="Folder of a Hugging Face model, or a model of the zoo (nano, small)."),
]
Texts = Annotated[
    list[str],
    typer.Option(
        help="Text to learn from: a file, a folder, a .jsonl of texts or prompts, or zoo (Python's "
        "own source code). May be given several times."
    ),
]


@app.callback()
def main() -> None:
    """Keeps the subcommand's name on the command line even where there is only one."""


@contextmanager
def errors_in_words() -> Iterator[None]:
    """What the user got wrong is one message and exit code 1; Ctrl-C is 130."""
    from rich.console import Console

    from vllm_spec_plugins.errors import SpecPluginsError

    try:
        yield
    except SpecPluginsError as error:
        Console(stderr=True).print(
            f"[bold red]error:[/bold red] {error}", highlight=False, soft_wrap=True
        )
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command goes on from here")
        raise typer.Exit(130) from None
