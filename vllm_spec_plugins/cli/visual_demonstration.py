"""`vllm-spec demo visual`: images drafted and verified by vLLM, exactly and relaxed, side by side.

Every way gets an engine of its own, one after the other: the target of the zoo writes 64 image
codes for each digit asked for, its draft model drafts them, a verifier decides.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from vllm_spec_plugins.errors import SpecPluginsError

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_spec_plugins.zoo.image_folder import DigitImages

TARGET, DRAFT = "digits", "digits-draft"

#: Requests in a step, at most.
_BATCH = 64
#: vLLM's, where the user's own environment does not say otherwise.
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Engines follow each other in this process: starting processes takes longer than the images.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
#: Rows of ten digits in the picture, for each way.
_ROWS = 4


@dataclass(frozen=True, slots=True)
class Way:
    """One way to generate.

    Attributes:
        name: For people.
        verifier: As in `--speculative-config`; None: plain decoding, without drafts.
        temperature: Of the requests.
    """

    name: str
    verifier: Mapping[str, Any] | None
    temperature: float = 1.0


#: The neighbour table's place is filled in where a rule takes one.
WAYS: tuple[Way, ...] = (
    Way("plain", None),
    Way("lossless", {"name": "lossless"}),
    Way("annealed 1.5", {"rule": "annealed", "factor": 1.5}),
    Way("lantern++ 2", {"rule": "lantern++", "num_neighbours": 10, "factor": 2.0}),
    Way("lantern++ 5", {"rule": "lantern++", "num_neighbours": 10, "factor": 5.0}),
    Way("lantern 0.1", {"rule": "lantern", "num_neighbours": 16, "budget": 0.1}),
    Way("gsd 8", {"rule": "gsd", "group_size": 8}),
)


@dataclass(frozen=True, slots=True)
class Generated:
    """Images, and what it took.

    Attributes:
        token_ids: `[N, 64]` int64.
        labels: `[N]` int64, the digits asked for.
        seconds: To generate them all, engine start and warm-up aside.
        acceptance_length: Codes of the images per pass of the target over a draft, the bonus
            token included.
        price: Total variation per draft token looked at, those past an image's end included.
    """

    token_ids: Tensor
    labels: Tensor
    seconds: float
    acceptance_length: float
    price: float

    @property
    def tokens_per_second(self) -> float:
        return self.token_ids.numel() / self.seconds


@dataclass(frozen=True, slots=True)
class Row:
    """One way in the table."""

    way: str
    acceptance_length: float
    tokens_per_second: float
    accuracy: float
    frechet_distance: float
    price: float
    options: Mapping[str, Any] = field(default_factory=dict)


def run(output: Path, images: int, num_draft: int) -> int:
    """Everything the command does. Returns the exit code."""
    from .side_by_side import pictures_module, terminated_as_interrupted

    console = Console()
    with terminated_as_interrupted():
        try:
            pictures_module()
            _run(console, output, images, num_draft)
        except SpecPluginsError as error:
            console.print(f"[bold red]error:[/bold red] {error}", highlight=False, soft_wrap=True)
            return 1
        except KeyboardInterrupt:
            console.print("interrupted; every engine has been stopped")
            return 130
    return 0


def _run(console: Console, output: Path, images: int, num_draft: int) -> None:
    from vllm_spec_plugins import zoo
    from vllm_spec_plugins.zoo.image_folder import CODEBOOK, read_images

    from . import calibrate_codebook, visual_pictures

    folder = zoo.images(TARGET)
    digit_images = read_images(folder)
    for name in (TARGET, DRAFT):
        zoo.ensure(name)
    output.mkdir(parents=True, exist_ok=True)
    table = output / "neighbours.safetensors"
    calibrate_codebook.run(
        calibrate_codebook.Job(str(folder / CODEBOOK), None, table, num_neighbours=64, model=TARGET)
    )
    console.print(
        f"[bold]{TARGET}[/bold]: {images} images of 64 codes each way, temperature 1, drafts of "
        f"{num_draft} by {DRAFT}, up to {_BATCH} at a time; engines one after the other",
        highlight=False,
    )
    rows, grids = [], []
    for way in WAYS:
        started = time.perf_counter()
        generated = generate(with_table(way, table), images, num_draft, seed=0)
        rows.append(_row(way, generated, digit_images))
        grids.append(digit_images.tokens.decode(generated.token_ids[: 10 * _ROWS]))
        console.print(
            f"{way.name}: {generated.seconds:.1f} s, {time.perf_counter() - started:.0f} s with "
            "the engine's start",
            highlight=False,
        )
    console.print(result_table(rows))
    console.print(
        "price: total variation to the target's law per draft token looked at, as the verifier "
        "measures it while it serves. Frechet distance: in features of a small classifier, to "
        "real digits; it comes out larger the fewer images there are, so compare rows of equally "
        "many."
    )
    path = output / "visual.jsonl"
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    picture = output / "visual.png"
    visual_pictures.draw(picture, [(row.way, caption(row)) for row in rows], grids)
    console.print(f"wrote {picture} and {path}", highlight=False)


def with_table(way: Way, table: Path) -> Way:
    """The way with a full verifier: its name, and the table where its rule takes one."""
    if way.verifier is None or "rule" not in way.verifier:
        return way
    verifier = {"name": "relaxed_visual", **way.verifier}
    if "num_neighbours" in verifier:
        verifier["neighbours"] = str(table)
    return Way(way.name, verifier, way.temperature)


def generate(way: Way, images: int, num_draft: int, seed: int, draft: str = DRAFT) -> Generated:
    """Generate images of the digits 0 to 9 in turn, by vLLM.

    Args:
        way: How.
        images: How many.
        num_draft: Tokens of a draft.
        seed: Of the engine.
        draft: The draft model, of the zoo.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch
    from vllm import LLM, SamplingParams

    from vllm_spec_plugins import zoo
    from vllm_spec_plugins.engine.offline import shut_down
    from vllm_spec_plugins.zoo.image_tokens import TOKENS_PER_IMAGE, prompts_of

    speculative: dict[str, Any] | None = None
    if way.verifier is not None:
        speculative = {
            "method": "draft_model",
            "model": str(zoo.ensure(draft)),
            "num_speculative_tokens": num_draft,
            "draft_sample_method": "probabilistic",
            "verifier": dict(way.verifier),
        }
    llm = LLM(
        model=str(zoo.ensure(TARGET)),
        dtype="float32",
        max_model_len=128,
        max_num_seqs=_BATCH,
        enforce_eager=True,
        enable_prefix_caching=False,
        use_tqdm_on_load=False,
        disable_log_stats=True,
        seed=seed,
        speculative_config=speculative,
    )
    try:
        labels = torch.arange(images) % 10
        prompts: list[Any] = [{"prompt_token_ids": i} for i in prompts_of(labels).tolist()]
        sampling = SamplingParams(
            temperature=way.temperature,
            max_tokens=TOKENS_PER_IMAGE,
            ignore_eos=True,
            detokenize=False,
        )
        llm.generate(prompts[:_BATCH], sampling, use_tqdm=False)  # warm-up
        before = _counted(llm, speculative)
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        after = _counted(llm, speculative)
    finally:
        shut_down(llm)
    token_ids = torch.tensor([list(output.outputs[0].token_ids) for output in outputs])
    steps, looked_at, price = (a - b for a, b in zip(after, before, strict=True))
    return Generated(
        token_ids,
        labels,
        seconds,
        # The first code comes with the prompt; what is accepted past the last one is no gain.
        (token_ids.numel() - images) / steps if steps else 1.0,
        price / looked_at if looked_at else 0.0,
    )


def _counted(llm: Any, speculative: object) -> tuple[float, float, float]:
    """Drafts verified so far, draft tokens looked at, and what they cost."""
    if speculative is None:
        return 0, 0, 0
    [metrics] = llm.collective_rpc("spec_plugins_metrics")
    steps = looked_at = price = 0.0
    for row in metrics["by_method"]:
        steps += row["steps"]
        looked_at += row["examined"]
        price += row["total_variation_price"] * row["examined"]
    return steps, looked_at, price


def _row(way: Way, generated: Generated, digit_images: DigitImages) -> Row:
    images = digit_images.tokens.decode(generated.token_ids)
    return Row(
        way.name,
        generated.acceptance_length,
        generated.tokens_per_second,
        digit_images.classifier.accuracy(images, generated.labels),
        digit_images.frechet_distance(images),
        generated.price,
        way.verifier or {},
    )


def caption(row: Row) -> str:
    """One line under a way's name in the picture."""
    return (
        f"{row.acceptance_length:.2f} codes per pass, price {row.price:.3f}, "
        f"{row.accuracy:.0%} recognised, Frechet {row.frechet_distance:.1f}"
    )


def result_table(rows: Sequence[Row]) -> Table:
    """The comparison, for a terminal."""
    shown = Table(title=f"{TARGET}: exact and relaxed verification", title_justify="left")
    shown.add_column("")
    for name in ("acceptance length", "tokens/s", "recognised", "Frechet distance", "price"):
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(
            row.way,
            f"{row.acceptance_length:.2f}",
            f"{row.tokens_per_second:.0f}",
            f"{row.accuracy:.1%}",
            f"{row.frechet_distance:.2f}",
            f"{row.price:.4f}",
        )
    return shown
