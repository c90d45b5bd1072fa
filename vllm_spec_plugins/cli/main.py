"""The `vllm-spec` command. Each subcommand lives in a file of its own, imported when called."""

from __future__ import annotations

from typing import Annotated

import typer

from . import calibrate, demo

app = typer.Typer(
    name="vllm-spec",
    help="Speculative decoding in vLLM with proposers and verifiers from plugins.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(calibrate.app)
app.add_typer(demo.app)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.callback()
def main() -> None:
    """Keeps the subcommand's name on the command line even where there is only one."""


@app.command(name="list")
def list_plugins(as_json: AsJson = False) -> None:
    """Proposers, verifiers and length controllers that are installed, and their options."""
    from . import listing

    listing.run(as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Whether this vLLM can be served by plugins, and what it would silently do otherwise.

    Exit code 0: everything the plugins need is there. 1: something is missing.
    """
    from . import health

    raise typer.Exit(health.run(as_json))


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        # vLLM's own help, with all its arguments.
        "help_option_names": [],
    }
)
def serve(context: typer.Context) -> None:
    """vLLM's own server: every argument is passed on to `vllm serve`."""
    from . import serving

    raise typer.Exit(serving.run(context.args))
