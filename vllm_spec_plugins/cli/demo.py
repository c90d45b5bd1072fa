"""`vllm-spec demo`: text through real servers; `vllm-spec demo visual`: images.

Each lives in a file of its own, imported when called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="demo", invoke_without_command=True)


@app.callback()
def text(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(help="A model of the zoo (nano, small), or the folder of a Hugging Face one."),
    ] = "nano",
    output: Annotated[
        Path, typer.Option(help="Folder for the pictures, the rows and the servers' logs.")
    ] = Path("demo_output"),
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes over the prompts.")] = 3,
    threads: Annotated[
        int, typer.Option(min=0, help="CPU threads of each model; 0 = by its size.")
    ] = 0,
) -> None:
    """Plain decoding, vLLM's ngram and ngram_adaptive, each on a real server, side by side."""
    from click.core import ParameterSource

    if context.invoked_subcommand is not None:
        for name in ("model", "output", "repeats", "threads"):
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise typer.BadParameter(
                    f"--{name} before `{context.invoked_subcommand}` belongs to the demo of text; "
                    f"options of `{context.invoked_subcommand}` come after it"
                )
        return
    from . import demonstration

    raise typer.Exit(demonstration.run(model, output, repeats, threads))


@app.command()
def visual(
    images: Annotated[
        int, typer.Option(min=50, help="Images each way; the more, the surer the distances.")
    ] = 500,
    draft_tokens: Annotated[int, typer.Option(min=1, max=16, help="Tokens of a draft.")] = 4,
    output: Annotated[
        Path, typer.Option(help="Folder for the picture, the rows and the neighbour table.")
    ] = Path("demo_output"),
) -> None:
    """Images of digits, verified exactly and relaxed: what it gains, and what it costs."""
    from . import visual_demonstration

    raise typer.Exit(visual_demonstration.run(output, images, draft_tokens))
