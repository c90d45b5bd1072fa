"""`vllm-spec calibrate`: what can be measured or trained for a model before it is served.

Each subcommand lives in a file of its own, imported when called.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
    """What the user got wrong is one message and exit code 1; Ctrl-C and SIGTERM are 130.

    Both unwind the stack: vLLM's processes are stopped on the way.
    """
    from rich.console import Console

    from vllm_spec_plugins.errors import SpecPluginsError

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
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
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command()
def adapter(
    model: Model,
    exit_layer: Annotated[
        int, typer.Option(min=1, help="Layers of the target that run before the adapter.")
    ],
    texts: Texts,
    output: Annotated[
        Path, typer.Option(help="Adapter file; report and loss curve are written beside it.")
    ] = Path("adapter.safetensors"),
    generations: Annotated[
        int,
        typer.Option(
            min=0,
            help="Learn from so many texts that the target continues itself, at temperature 1; "
            "0: from the texts as they are.",
        ),
    ] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 600,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of text per step.")] = 8,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    learning_rate: Annotated[
        float, typer.Option(min=1e-6, max=1.0, help="Peak, of Muon, for the matrices.")
    ] = 0.03,
    ffn_size: Annotated[
        int, typer.Option(min=0, help="Width of a feed-forward part; 0: none, as in the paper.")
    ] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of the target: auto (as saved), float32 or bfloat16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's own choice.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and order of text.")] = 0,
) -> None:
    """Train an adapter for early_exit: one attention block after an early layer (Kangaroo)."""
    from vllm_spec_plugins.calibration.adapter import AdapterRecipe

    from . import calibrate_adapter

    recipe = AdapterRecipe(
        exit_layer=exit_layer,
        steps=steps,
        batch_size=batch_size,
        window=window,
        matrix_lr=learning_rate,
        ffn_size=ffn_size,
        seed=seed,
    )
    with errors_in_words():
        calibrate_adapter.run(
            model,
            texts,
            output,
            recipe,
            generations=generations,
            dtype=dtype,
            device=device,
            threads=threads,
        )


@app.command(name="diffusion-drafter")
def diffusion_drafter(
    model: Model,
    texts: Texts,
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("diffusion-drafter"),
    block: Annotated[int, typer.Option(min=1, help="Longest draft, in tokens.")] = 16,
    start: Annotated[
        str,
        typer.Option(
            help="Model whose embedding, first layers and head training starts from: a folder, or "
            "of the zoo; none: new weights of the sizes below. By default the target."
        ),
    ] = "",
    layers: Annotated[int, typer.Option(min=1, help="Of the drafter.")] = 2,
    condition_on_layers: Annotated[
        str,
        typer.Option(
            help="Read the target's hidden states after so many of its layers, as 2,4,6; spread: "
            "early, middle and late ones; none. Such a drafter serves this target alone."
        ),
    ] = "none",
    hidden_size: Annotated[
        int | None, typer.Option(min=2, help="With --start none; 256 by default.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="With --start none; columns over 64 by default.")
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="With --start none; as many as heads by default.")
    ] = None,
    ffn_size: Annotated[
        int | None, typer.Option(min=1, help="With --start none; 3 x hidden size by default.")
    ] = None,
    generations: Annotated[
        int,
        typer.Option(
            min=0,
            help="Learn from so many texts that the target continues itself, at temperature 1; "
            "0: from the texts as they are.",
        ),
    ] = 0,
    labels: Annotated[
        str,
        typer.Option(help="Learn the target's probabilities (target), or the tokens (text)."),
    ] = "target",
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 600,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of text per step.")] = 4,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    masks: Annotated[int, typer.Option(min=1, help="Masked tokens beside each window.")] = 192,
    stage_two: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the steps that refine the first tokens.")
    ] = 0.75,
    learning_rate: Annotated[
        float, typer.Option(min=1e-6, max=1.0, help="Peak, of Muon, for the matrices.")
    ] = 0.01,
    num_prompts: Annotated[int, typer.Option(min=2, help="Held-out prompts to judge by.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens written to each.")] = 64,
    dtype: Annotated[
        str, typer.Option(help="Of the target: auto (as saved), float32 or bfloat16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's own choice.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, blocks and order of text.")] = 0,
) -> None:
    """Train a drafter for diffusion: a small model that writes a whole draft in one pass."""
    with errors_in_words():
        from vllm_spec_plugins.calibration.diffusion_training import DiffusionRecipe
        from vllm_spec_plugins.errors import SpecPluginsError

        from . import calibrate_diffusion_drafter as command

        if labels not in ("target", "text"):
            raise SpecPluginsError(f'--labels must be target or text, not "{labels}".')
        command.run(
            model,
            texts,
            output,
            DiffusionRecipe(
                block=block,
                steps=steps,
                batch_size=batch_size,
                window=window,
                num_masks=masks,
                stage_two=stage_two,
                distil=labels == "target",
                matrix_lr=learning_rate,
                seed=seed,
            ),
            command.start_of(
                start, layers, hidden_size, heads, kv_heads, ffn_size, condition_on_layers
            ),
            held_out=command.HeldOutTexts(num_prompts, new_tokens=new_tokens),
            generations=generations,
            dtype=dtype,
            device=device,
            threads=threads,
        )


@app.command()
def vocab(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(help="File to write; table (.json), plot (.png) and unfinished work beside."),
    ] = Path("vocab.safetensors"),
    texts: Texts = [],  # noqa: B006  # typer copies it
    lists: Annotated[
        list[str],
        typer.Option(
            "--list",
            metavar="NAME=SOURCE",
            help="A list of its own, for a language or kind of text; each request is drafted for "
            "from the list that knows its prompt best. May be given several times.",
        ),
    ] = [],  # noqa: B006
    generations: Annotated[
        int,
        typer.Option(
            min=0,
            help="Rank by what the model itself writes after so many prompts of each list; "
            "0: by the texts as they are. Best 1000 or more.",
        ),
    ] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each generation.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Of the generations.")] = 1.0,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Recommend this size instead of the fastest predicted one."),
    ] = None,
    dynamic_tokens: Annotated[
        int,
        typer.Option(min=0, max=4096, help="Show coverage with so many dynamic tokens as well."),
    ] = 64,
    draft_share: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Weights of the draft's layers over the target's: the share of layers before the "
            "exit, or that of the draft model.",
        ),
    ] = 0.25,
    dtype: Annotated[str, typer.Option(help="Of the model while it generates.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads while it generates.")
    ] = None,
) -> None:
    """Ranks the tokens a draft needs: a file for "draft_vocabulary"."""
    with errors_in_words():
        from vllm_spec_plugins.calibration.generations import Engine, Sampling

        from . import calibrate_vocab

        calibrate_vocab.run(
            calibrate_vocab.Job(
                model,
                calibrate_vocab.lists_of(texts, lists),
                output,
                generations,
                Sampling(max_tokens, temperature),
                Engine(dtype, threads),
                size,
                dynamic_tokens,
                draft_share,
            )
        )


@app.command()
def judge(
    model: Model,
    output: Annotated[
        Path, typer.Option(help="Head to write; report, curve and kept work are put beside it.")
    ] = Path("judge.safetensors"),
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Marked answers: a .jsonl of prompt, answer, correct, error_position.",
        ),
    ] = None,
    prompts: Annotated[
        list[str],
        typer.Option(
            help="Find labels by what becomes of the model's answers to these prompts: a .jsonl "
            "of prompts, or see --texts elsewhere. May be given several times."
        ),
    ] = [],  # noqa: B006  # typer copies it
    draft: Annotated[
        str | None, typer.Option(help="Draft model whose tokens are tried; with --prompts.")
    ] = None,
    checker: Annotated[
        str | None,
        typer.Option(
            help="What an answer comes to: a Python module:function of prompt and completion, or a "
            "command that reads both as JSON and prints the outcome; with --prompts.",
        ),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=10, help="Prompts to take, at most.")] = 500,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 256,
    recall: Annotated[
        float,
        typer.Option(min=0.01, max=1.0, help="Share of errors the threshold shall catch."),
    ] = 0.9,
    dtype: Annotated[
        str, typer.Option(help="Of the model: auto (as saved), float32 or bfloat16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where hidden states are computed.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's own choice.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of held-out prompts.")] = 0,
) -> None:
    """Train a head for the verifier judge, and say whether it is worth its keep."""
    from . import calibrate_judge

    with errors_in_words():
        calibrate_judge.run(
            model,
            output,
            labels=labels,
            mining=calibrate_judge.mining_of(draft, prompts, checker, num_prompts, max_tokens),
            recall=recall,
            dtype=dtype,
            device=device,
            threads=threads,
            seed=seed,
        )


@app.command(name="exit")
def exit_layer(
    model: Model,
    texts: Annotated[
        list[str],
        typer.Option(
            "--texts",
            "--prompts",
            help="Where prompts are taken from: a file, a folder, a .jsonl of texts or prompts, "
            "zoo:held-out. May be given several times.",
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Config file; rows, picture and kept work are put beside it.")
    ] = Path("exit.json"),
    temperature: Annotated[
        str, typer.Option(help="Of the target's text and its requests: 0, 1 or both.")
    ] = "both",
    layers: Annotated[
        str, typer.Option(help="Exits to measure, such as 2,4,6; by default after every layer.")
    ] = "",
    max_draft: Annotated[
        int, typer.Option(min=1, max=64, help="Longest draft to consider, in tokens.")
    ] = 8,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Requests in a step; several allowed, recommended for the first. Default 1."
        ),
    ] = None,
    draft_vocabulary: Annotated[
        Path | None, typer.Option(help="Draft from a file of `calibrate vocab`.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Also measure an adapter of `calibrate adapter`.")
    ] = None,
    search_skips: Annotated[
        bool, typer.Option("--search-skips", help="Look for sublayers that a draft can leave out.")
    ] = False,
    evaluations: Annotated[int, typer.Option(min=1, help="Sets that each search may try.")] = 200,
    num_prompts: Annotated[int, typer.Option(min=2, help="Prompts to take.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=8, help="Tokens of a prompt, at most.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=8, help="Tokens the target writes to each.")] = 128,
    costs: Annotated[
        Path | None,
        typer.Option(help="Take times from the .rows.json of a run on the machine that serves."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the model: auto (as saved), float32 or bfloat16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where to measure: cpu, cuda.")] = "cpu",
    eager: Annotated[bool, typer.Option("--eager", help="As vLLM's --enforce-eager.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and texts.")] = 0,
) -> None:
    """Which exit and draft length early_exit should use, or that it should not be used.

    Measures acceptance on text the model writes itself and times vLLM on this machine.
    """
    from . import calibrate_exit

    with errors_in_words():
        calibrate_exit.run(
            model,
            texts,
            output,
            temperature=temperature,
            layers=layers,
            dtype=dtype,
            num_prompts=num_prompts,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            most=max_draft,
            batches=tuple(batch or [1]),
            draft_vocabulary=draft_vocabulary,
            adapter=adapter,
            search_skips=search_skips,
            evaluations=evaluations,
            device=device,
            eager=eager,
            costs=costs,
            seed=seed,
        )


@app.command()
def codebook(
    codebook: Annotated[
        str,
        typer.Argument(
            help="safetensors file with the embeddings of the image codes, or digits of the zoo."
        ),
    ],
    tensor: Annotated[
        str | None, typer.Option(help="Their name in the file; by default its only matrix.")
    ] = None,
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("neighbours.safetensors"),
    neighbours: Annotated[
        int, typer.Option(min=1, help="Nearest codes kept of each code; itself is left out.")
    ] = 100,
    max_distance: Annotated[
        float | None, typer.Option(min=0, help="Codes further away are no neighbours.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Check against this model's config: a folder, or of the zoo (digits)."),
    ] = None,
    first_token_id: Annotated[
        int | None,
        typer.Option(min=0, help="Token id of code 0; by default what the model's config says."),
    ] = None,
) -> None:
    """Which image codes look alike: a table for the verifier relaxed_visual."""
    from . import calibrate_codebook

    with errors_in_words():
        calibrate_codebook.run(
            calibrate_codebook.Job(
                codebook, tensor, output, neighbours, max_distance, model, first_token_id
            )
        )
