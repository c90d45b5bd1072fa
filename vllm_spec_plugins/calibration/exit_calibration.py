"""All of `vllm-spec calibrate exit`, without what people see of it.

Three stages, each kept on disk under a name that says what decided it, so that a killed run
goes on and an unchanged one repeats nothing: texts the target writes, measurements on them,
times of engines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_spec_plugins.adapter_file import AdapterCard
from vllm_spec_plugins.draft_vocabulary import RankedVocabulary
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.zoo.cache import write_atomically

from .adapter import sample_windows
from .adapter_block import load_block
from .draft_pass import DraftPass
from .draft_table import Judged, Recommendation, Row, recommend, rows_of
from .engine_clock import EngineChoice, engines_to_time, measure_costs
from .exits import (
    Adapter,
    Agreement,
    Continuation,
    MeasurementStore,
    exits_to_measure,
    measure,
)
from .generations import Engine, Sampling, generate
from .hugging_face import LocalModel
from .layer_skips import DraftRounds, draft_rounds
from .round_costs import RoundCosts
from .skip_search import Found, MeasuredText, predicted_speedup, search
from .texts import Corpus, TextTokenizer, windows

#: A prompt shorter than this says little about what follows.
_SHORTEST_PROMPT = 8
#: With a search for skips, one prompt in so many is searched on and judged on by nobody.
_SEARCHED = 4
#: Windows looked at for prompts.
_MOST_WINDOWS = 50_000


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for.

    Attributes:
        folder: Of the model.
        texts: Sources of prompts, see `Corpus`.
        num_prompts: How many.
        prompt_tokens: Of each, at most.
        new_tokens: That the target writes after each.
        temperatures: 0, 1 or both.
        most: Longest draft.
        exits: Numbers of layers; None: all.
        batches: Numbers of requests; recommended for the first.
        draft_vocabulary: File, or None.
        adapter: File, or None.
        search_skips: Whether to search for sublayers to leave out.
        evaluations: Sets that the search may try, in each of its runs.
        dtype: "float32" or "bfloat16", of measurement and engine.
        device: Of the measurement.
        eager: Engines without compilation.
        costs: File of an earlier run's rows whose times are to be used; None: measure.
        seed: Of prompts and texts.
    """

    folder: Path
    texts: tuple[str, ...]
    num_prompts: int = 32
    prompt_tokens: int = 128
    new_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 1.0)
    most: int = 8
    exits: tuple[int, ...] | None = None
    batches: tuple[int, ...] = (1,)
    draft_vocabulary: Path | None = None
    adapter: Path | None = None
    search_skips: bool = False
    evaluations: int = 200
    dtype: str = "float32"
    device: str = "cpu"
    eager: bool = False
    costs: Path | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SkipReport:
    """What came of a search below one exit.

    Attributes:
        exit_layer: Layers of the passes searched.
        path: Sets on the way, with what was predicted on the texts searched.
    """

    exit_layer: int
    path: tuple[Found, ...]

    @property
    def best(self) -> Found:
        return max(self.path, key=lambda found: found.speedup)


@dataclass(frozen=True, slots=True)
class Report:
    """What was found.

    Attributes:
        rows: Every setting.
        recommendation: The best.
        costs: What rounds cost.
        costs_from: Where costs come from, in words.
        texts: By temperature, the continuations that were judged.
        reused: Stored measurements that were read back.
        vocabulary_size: Tokens that drafts are drawn from; None: all.
        skips: Of each search.
    """

    rows: tuple[Row, ...]
    recommendation: Recommendation
    costs: tuple[RoundCosts, ...]
    costs_from: str
    texts: Mapping[float, tuple[Continuation, ...]]
    reused: int
    vocabulary_size: int | None
    skips: tuple[SkipReport, ...]


class Progress:
    """Told how far a stage is; does nothing. Subclass it to show people."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Yields what is to be called with the number done and a word on what comes."""
        del name, total

        def ignore(done: int, what: str) -> None:
            del done, what

        yield ignore


def calibrate(request: Request, work: Path, progress: Progress | None = None) -> Report:
    """Measure, and recommend.

    Args:
        request: What for.
        work: Folder for what is kept.
        progress: Told how far it is.

    Raises:
        SpecPluginsError: Something in the request is wrong, or an engine cannot run.
    """
    progress = progress or Progress()
    model = LocalModel.load(request.folder, request.dtype, request.device)
    exits = exits_to_measure(model.num_layers, request.exits)
    vocabulary = _vocabulary(request.draft_vocabulary, model)
    adapter, passes = None, [DraftPass(e) for e in exits]
    if request.adapter is not None:
        adapter = load_block(request.adapter, model)
        passes.append(DraftPass(AdapterCard.read(request.adapter).exit_layer, adapter=True))

    continuations = _continuations(request, work, progress)
    costs, costs_from = _costs(request, work, exits, model.num_layers, progress)
    store = MeasurementStore(work / "measurements", _inputs(request))

    searched, judged_texts = _split(continuations, request.search_skips)
    judged: list[Judged] = []
    with progress.stage("measuring exits", sum(map(len, judged_texts.values()))) as step:
        done = 0
        for temperature, texts in judged_texts.items():
            agreements: list[Agreement] = []
            for text in texts:
                agreements.append(_exits(store, model, text, passes, vocabulary, adapter))
                done += 1
                step(done, f"temperature {temperature:g}")
            judged.append(Judged(temperature, passes, agreements))
    rows = [row for part in judged for row in rows_of(part, costs, request.most)]
    skips: list[SkipReport] = []
    if request.search_skips:
        deepest = recommend(rows, request.batches[0]).rows[0].draft_pass.exit_layer
        with draft_rounds(model) as rounds:
            bench = _SkipBench(request, model, rounds, vocabulary, costs, store, progress)
            skips = [bench.search(e, searched) for e in sorted({deepest, model.num_layers})]
            for found in sorted({report.best.draft_pass for report in skips}):
                if found.num_skipped:
                    rows += bench.judge(found, judged_texts)
    return Report(
        rows=tuple(rows),
        recommendation=recommend(rows, request.batches[0]),
        costs=tuple(costs),
        costs_from=costs_from,
        texts={temperature: tuple(texts) for temperature, texts in judged_texts.items()},
        reused=store.reused,
        vocabulary_size=None if vocabulary is None else len(vocabulary),
        skips=tuple(skips),
    )


class _SkipBench:
    """Searches for skip sets and judges them."""

    def __init__(
        self,
        request: Request,
        model: LocalModel,
        rounds: DraftRounds,
        vocabulary: Tensor | None,
        costs: Sequence[RoundCosts],
        store: MeasurementStore,
        progress: Progress,
    ) -> None:
        self._request, self._model, self._rounds = request, model, rounds
        self._vocabulary, self._costs = vocabulary, costs
        self._store, self._progress = store, progress

    def search(
        self, exit_layer: int, searched: Mapping[float, Sequence[Continuation]]
    ) -> SkipReport:
        """The best set below one exit, on the texts to search on."""
        request = self._request
        texts = [self._open(text) for found in searched.values() for text in found]
        costs = [
            cost
            for cost in self._costs
            if cost.batch == request.batches[0] and cost.temperature in request.temperatures
        ]
        stage = f"searching skips below layer {exit_layer}"
        with self._progress.stage(stage, request.evaluations) as step:
            path = search(
                exit_layer,
                lambda draft_pass: predicted_speedup(texts, costs, draft_pass, request.most),
                request.evaluations,
                lambda asked, found: step(asked, f"best {found.speedup:.2f}x: {found.draft_pass}"),
            )
        return SkipReport(exit_layer, tuple(path))

    def judge(
        self, draft_pass: DraftPass, judged: Mapping[float, Sequence[Continuation]]
    ) -> list[Row]:
        """Rows of a set, on the texts that no search has seen, from every position."""
        most = self._request.most
        rows: list[Row] = []
        for temperature, texts in judged.items():
            with self._progress.stage(f"judging {draft_pass}", len(texts)) as step:
                agreements: list[Agreement] = []
                for text in texts:
                    agreements.append(self._agreement(draft_pass, text))
                    step(len(agreements), f"temperature {temperature:g}")
            rows += rows_of(Judged(temperature, [draft_pass], agreements), self._costs, most)
        return rows

    def _agreement(self, draft_pass: DraftPass, text: Continuation) -> Agreement:
        most = self._request.most
        return self._store.get(
            f"{draft_pass} in rounds of {most}",
            text,
            lambda: self._open(text).agreement(draft_pass, most),
        )

    def _open(self, text: Continuation) -> MeasuredText:
        return MeasuredText(self._model, self._rounds, text, self._vocabulary)


def _exits(
    store: MeasurementStore,
    model: LocalModel,
    text: Continuation,
    passes: Sequence[DraftPass],
    vocabulary: Tensor | None,
    adapter: Adapter | None,
) -> Agreement:
    what = ", ".join(map(str, passes))
    return store.get(what, text, lambda: measure(model, text, passes, vocabulary, adapter))


def _vocabulary(file: Path | None, model: LocalModel) -> Tensor | None:
    """`[M]` int64, sorted.

    Raises:
        SpecPluginsError: No such file, several lists in it, or made for another model.
    """
    if file is None:
        return None
    found = RankedVocabulary.read(file)
    if found.vocab_size != model.vocab_size:
        raise SpecPluginsError(
            f"{file} was made for a model of {found.vocab_size} tokens, this one has "
            f"{model.vocab_size}."
        )
    (ranked, *others) = found.lists
    if others:
        raise SpecPluginsError(
            f"{file} holds {len(found.lists)} lists, and which one a request drafts from is "
            "decided while serving: calibrate exits with a file of one list."
        )
    return torch.from_numpy(found.token_ids(ranked)).to(model.device)


def _continuations(
    request: Request, work: Path, progress: Progress
) -> dict[float, list[Continuation]]:
    """By temperature, what the target writes after each prompt; too short ones are left out."""
    prompts = _prompts(request)
    found: dict[float, list[Continuation]] = {}
    for temperature in request.temperatures:
        sampling = Sampling(request.new_tokens, temperature, request.seed)
        options = {"enforce_eager": True} if request.eager else None
        stage = f"the target writes, temperature {temperature:g}"
        with progress.stage(stage, len(prompts)) as step:
            written = generate(
                request.folder,
                prompts,
                work,
                sampling,
                Engine(dtype=request.dtype, options=options),
                lambda done, step=step: step(done, ""),
            )
        found[temperature] = [
            Continuation((*prompt.tolist(), *text.tolist()), len(prompt), temperature)
            for prompt, text in zip(prompts, written, strict=True)
            # One token from the prompt's own pass, then a round, at least.
            if len(text) > request.most
        ]
        needed = 2 * _SEARCHED if request.search_skips else 2
        if len(found[temperature]) < needed:
            raise SpecPluginsError(
                f"at temperature {temperature:g} only {len(found[temperature])} of "
                f"{len(prompts)} continuations are longer than {request.most} tokens, {needed} "
                "are needed: give more prompts, or a lower --max-draft."
            )
    return found


def _prompts(request: Request) -> list[NDArray[np.int64]]:
    """Beginnings and parts of the texts; of the held-out ones where there are enough."""
    corpus, tokenizer = Corpus(request.texts), TextTokenizer(request.folder)

    def some(held_out_only: bool) -> list[NDArray[np.int64]]:
        texts = (text.text for text in corpus if text.held_out or not held_out_only)
        found = windows(tokenizer, texts, request.prompt_tokens, shortest=_SHORTEST_PROMPT)
        bounded = (window for _, window in zip(range(_MOST_WINDOWS), found, strict=False))
        return sample_windows(bounded, request.num_prompts, request.seed)

    # Nothing was trained or counted on those.
    prompts = some(held_out_only=True)
    if len(prompts) < request.num_prompts:
        prompts = some(held_out_only=False)
    if not prompts:
        raise SpecPluginsError(
            f"no text of at least {_SHORTEST_PROMPT} tokens in {', '.join(request.texts)}."
        )
    return prompts


def _split(
    continuations: Mapping[float, list[Continuation]], search_skips: bool
) -> tuple[dict[float, list[Continuation]], dict[float, list[Continuation]]]:
    """Texts to search on, and texts to judge on."""
    searched: dict[float, list[Continuation]] = {}
    judged: dict[float, list[Continuation]] = {}
    for temperature, texts in continuations.items():
        mask = [search_skips and number % _SEARCHED == 0 for number in range(len(texts))]
        searched[temperature] = [text for text, take in zip(texts, mask, strict=True) if take]
        judged[temperature] = [text for text, take in zip(texts, mask, strict=True) if not take]
    return searched, judged


def _costs(
    request: Request, work: Path, exits: Sequence[int], num_layers: int, progress: Progress
) -> tuple[list[RoundCosts], str]:
    """From a file of the user's, from an earlier run, or measured now."""
    if request.costs is not None:
        return _given_costs(request), f"{request.costs.name}, measured before"
    vocabulary, adapter = request.draft_vocabulary, request.adapter
    choice = EngineChoice(
        str(request.folder),
        request.dtype,
        request.eager,
        {"draft_vocabulary": str(vocabulary)} if vocabulary else {},
        (str(adapter), AdapterCard.read(adapter).exit_layer) if adapter else None,
    )
    # Greedy drafts at temperature 1 cost what drafts at temperature 0 do.
    temperatures = sorted({0.0, *request.temperatures})
    key = [
        _files(request), asdict(choice), list(exits), request.most, list(request.batches),
        temperatures, request.search_skips,
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    path = work / f"costs-{name}.json"
    if not path.exists():
        engines = engines_to_time(choice, exits, num_layers, request.search_skips)
        with progress.stage("timing engines", len(engines)) as step:
            costs = measure_costs(
                choice,
                exits,
                num_layers,
                request.most,
                request.batches,
                temperatures,
                request.search_skips,
                step,
            )
        text = json.dumps([cost.as_dict() for cost in costs], indent=2) + "\n"
        work.mkdir(parents=True, exist_ok=True)

        def write(neighbour: Path) -> None:
            neighbour.write_text(text)

        write_atomically(path, write)
    stored = json.loads(path.read_text())
    return [RoundCosts.from_dict(cost) for cost in stored], "vLLM on this machine"


def _given_costs(request: Request) -> list[RoundCosts]:
    """Costs in the rows file of another run.

    Raises:
        SpecPluginsError: There are none, or not for these batch sizes.
    """
    assert request.costs is not None
    try:
        stored = json.loads(request.costs.read_text())["costs"]
        costs = [RoundCosts.from_dict(cost) for cost in stored]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecPluginsError(
            f"{request.costs} holds no costs ({error}): give the .rows.json of another run."
        ) from None
    known = {(cost.batch, cost.temperature) for cost in costs}
    missing = {(b, t) for b in request.batches for t in request.temperatures} - known
    if missing:
        batch, temperature = min(missing)
        raise SpecPluginsError(
            f"{request.costs} has no costs for batch size {batch} at temperature {temperature:g}."
        )
    if request.adapter and not any(cost.adapter for cost in costs):
        raise SpecPluginsError(f"{request.costs} was measured without an adapter.")
    if request.search_skips and not any(cost.attention or cost.ffn for cost in costs):
        raise SpecPluginsError(f"{request.costs} was measured without --search-skips.")
    return costs


def saved_dtype(folder: Path) -> str:
    """What "auto" means: bfloat16 for a model saved in 16 bits, else float32."""
    config = json.loads((folder / "config.json").read_text())
    saved = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if saved in ("bfloat16", "float16") else "float32"


def _inputs(request: Request) -> dict[str, Any]:
    """What decides a measurement beside passes and text."""
    return {"files": _files(request), "dtype": request.dtype, "measurement": 1}


def _files(request: Request) -> list[list[Any]]:
    """Every file that decides what the model computes: name, size, time."""
    found = [p for p in sorted(request.folder.iterdir()) if p.suffix in (".json", ".safetensors")]
    found += sorted(request.folder.glob("*.bin"))
    found += [p for p in (request.draft_vocabulary, request.adapter) if p is not None]
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in found]
