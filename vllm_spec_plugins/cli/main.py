"""The `vllm-spec` command. Each subcommand lives in a file of its own, imported when called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

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

Number = TypeVar("Number", int, float)
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


@app.command()
def bench(
    model: Annotated[
        str, typer.Argument(help="A model of the zoo, or the folder of a Hugging Face one.")
    ],
    speculative_config: Annotated[
        list[str],
        typer.Option(help="As `vllm serve` takes it. Repeat it to compare several."),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(help='JSON lines, {"prompt": ...}. Default: held-out source code.'),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts of each pass.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of each.")] = 128,
    temperature: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1",
    concurrency: Annotated[str, typer.Option(help="Comma-separated: requests at a time.")] = "1",
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes of each.")] = 3,
    threads: Annotated[
        int, typer.Option(min=0, help="CPU threads of each model; 0 = by its size.")
    ] = 0,
    max_model_len: Annotated[
        int, typer.Option(min=1, help="Room for prompt and continuation.")
    ] = 1024,
    output: Annotated[
        Path | None, typer.Option(help="File that rows are appended to, as JSON lines.")
    ] = None,
) -> None:
    """Speculative configs beside plain decoding: speed, acceptance, and what verification costs."""
    from . import bench as measuring

    settings = measuring.Settings(
        model,
        [_json_object(text) for text in speculative_config],
        prompts,
        num_prompts,
        tokens,
        _numbers("--temperature", temperature, float, 0.0),
        _numbers("--concurrency", concurrency, int, 1),
        repeats,
        threads,
        max_model_len,
        output,
    )
    raise typer.Exit(measuring.run(settings))


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"--speculative-config {text!r} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"--speculative-config must be a JSON object, got {text}")
    return found


def _numbers(option: str, text: str, kind: type[Number], least: Number) -> list[Number]:
    """Comma-separated numbers, each once."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found) or not min(found) >= least:
        raise typer.BadParameter(
            f"{option} must be different numbers from {least:g} on, separated by commas; "
            f"got {text!r}"
        )
    return found


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
