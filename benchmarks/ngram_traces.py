"""Trace replay: `ngram_adaptive` against vLLM's `ngram` where the text to be produced is known.

A draft token counts as accepted when it is the token of the known text, which is what greedy
verification does. Three traces:

* spec_bench: Spec-Bench prompts (all turns) -> their references of 32 tokens or more;
* edit: a standard-library module in one Python -> the same module in another, where they differ;
* held_out: the first half of a standard-library file -> its second half, files with
  sha1(path) % 20 == 0.

Tokens are those of the zoo's byte-level BPE (8,192), trained on the other standard-library
files. The first token of each text comes from prefill. vLLM's drafts come from vLLM's own
compiled function.

    python benchmarks/ngram_traces.py --spec-bench FILE [--old-stdlib DIR --new-stdlib DIR]
    python benchmarks/ngram_traces.py --spec-bench FILE --fit    # refit both PRIORs, print, stop
    python benchmarks/ngram_traces.py --spec-bench FILE --device-only    # keep the other rows
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import ngram_device_replay as on_device
import numba
import numpy as np
import torch
import typer
from ngram_prior import fit_prior
from numpy.typing import NDArray
from provenance import provenance
from vllm_spec_plugins.proposers.ngram_adaptive import NgramAdaptive, NgramAdaptiveOptions

from vllm_spec_plugins.context import EngineContext, ModelFacts
from vllm_spec_plugins.proposer import DraftInput
from vllm_spec_plugins.zoo.corpus import source_files, training_files
from vllm_spec_plugins.zoo.tokenizer import train_tokenizer

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 8192
SHORTEST_REFERENCE = 32
LOOKUPS = {"vllm ngram 2-4": (2, 4), "vllm ngram 5": (5, 5)}
VARIANTS: dict[str, dict[str, Any]] = {
    "ngram_adaptive": {},
    "ngram_adaptive, no adaptation": {"adaptation": False},
    "ngram_adaptive, shared index": {"shared_index": True},
}
ON_DEVICE = "ngram_adaptive, on the device"
THRESHOLDS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)

#: Prompt and text to produce, int32.
Item = tuple[NDArray[np.int32], NDArray[np.int32]]


def spec_bench(path: Path, encode: Callable[[str], NDArray[np.int32]]) -> Iterator[Item]:
    """Turns and references, each joined by newlines."""
    for line in path.read_text().splitlines():
        question = json.loads(line)
        references: list[str] = []
        for reference in question.get("reference") or []:
            references += reference if isinstance(reference, list) else [reference]
        output = encode("\n".join(references))
        if len(output) >= SHORTEST_REFERENCE:
            yield encode("\n".join(question["turns"])), output


def edits(old: Path, new: Path, encode: Callable[[str], NDArray[np.int32]]) -> Iterator[Item]:
    """Modules that both have and that differ."""
    before = {file.path: file.text for file in source_files(old)}
    for file in source_files(new):
        if before.get(file.path, file.text) != file.text:
            yield encode(before[file.path]), encode(file.text)


def held_out(encode: Callable[[str], NDArray[np.int32]]) -> Iterator[Item]:
    """Files no model of the zoo has seen, cut in the middle."""
    for file in source_files():
        if file.held_out:
            tokens = encode(file.text)
            yield tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]


def standard_libraries() -> list[tuple[tuple[int, int], Path]]:
    """Version and library folder of every Python found, newest last, one for each version."""
    names = [f"python3.{minor}" for minor in range(9, 16)]
    found = [Path(path) for name in names if (path := shutil.which(name))]
    found += sorted(Path.home().glob(".pyenv/versions/3.*/bin/python"))
    code = "import sys, sysconfig; print(*sys.version_info[:2], sysconfig.get_path('stdlib'))"
    libraries: dict[tuple[int, int], Path] = {}
    for python in (Path(sys.executable), *found):
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if answer.returncode == 0:
            major, minor, folder = answer.stdout.strip().split(" ", 2)
            libraries.setdefault((int(major), int(minor)), Path(folder))
    return sorted(libraries.items())


@numba.njit
def replay_vllm(find: Any, tokens: NDArray[np.int32], prompt: int, low: int, high: int, k: int):
    """Steps, drafted and accepted tokens of vLLM's `ngram` on one text."""
    known, steps, drafted, accepted = prompt + 1, 0, 0, 0
    while known < len(tokens):
        room = min(k, len(tokens) - known - 1)
        draft = find(tokens[:known], low, high, 1 << 30, room)
        right = 0
        while right < len(draft) and draft[right] == tokens[known + right]:
            right += 1
        steps += 1
        drafted += len(draft)
        accepted += right
        known += right + 1
    return steps, drafted, accepted


def replay(
    proposer: NgramAdaptive, name: str, tokens: NDArray[np.int32], prompt: int, k: int
) -> NDArray[np.int64]:
    """The same for ours, `[4]`: the last counts tokens drafted by the shared index."""
    total = np.zeros(4, dtype=np.int64)
    one = np.ones(1, dtype=np.int64)
    batch = DraftInput(
        request_ids=[name],
        token_history=tokens.reshape(1, -1),
        rows=0 * one,
        num_tokens=(prompt + 1) * one,
        num_prompt_tokens=prompt * one,
        max_draft=k * one,
        temperatures=np.zeros(1, dtype=np.float32),
        streams=0 * one,
        hidden_states=None,
        cache_salts=[""],
        length_control=None,  # pyright: ignore[reportArgumentType]
    )
    known = prompt + 1
    while known < len(tokens):
        batch.num_tokens[0] = known
        batch.max_draft[0] = min(k, len(tokens) - known - 1)
        draft = proposer.propose(batch)
        ids = np.asarray(draft.token_ids)[0]
        length = int((ids >= 0).sum())
        right = ids[:length] == tokens[known : known + length]
        accepted = length if right.all() else int(right.argmin())
        shared = int((draft.source_of[0] == 1).sum()) if draft.source_of is not None else 0
        total += (1, length, accepted, shared)
        known += accepted + 1
    proposer.finish([name])
    return total


def replay_all(items: list[Item], k: int, options: dict[str, Any]) -> NDArray[np.int64]:
    """All texts of a trace one after the other, with one proposer."""
    longest = max(len(prompt) + len(output) for prompt, output in items)
    facts = ModelFacts("trace", VOCABULARY, 1, 1, longest, k)
    proposer = NgramAdaptive(
        NgramAdaptiveOptions(**options), EngineContext(facts, torch.device("cpu"), 1, 0)
    )
    total = np.zeros(4, dtype=np.int64)
    for number, (prompt, output) in enumerate(items):
        total += replay(proposer, str(number), np.concatenate([prompt, output]), len(prompt), k)
    return total


def rows_of(
    trace: str, items: list[Item], k: int, texts: on_device.Trace, device_only: bool
) -> Iterator[dict[str, Any]]:
    """One row for every proposer."""
    from vllm.v1.spec_decode.ngram_proposer import (
        _find_longest_matched_ngram_and_propose_tokens as find,
    )

    def row(proposer: str, counts: Any, seconds: float, **more: Any) -> dict[str, Any]:
        steps, drafted, accepted = (int(count) for count in counts[:3])
        return {
            "trace": trace,
            "texts": len(items),
            "tokens": int(sum(len(output) for _, output in items)),
            "num_speculative_tokens": k,
            "proposer": proposer,
            **more,
            "steps": steps,
            "drafted": drafted,
            "accepted": accepted,
            "accepted_per_drafted": accepted / max(drafted, 1),
            "acceptance_length": 1 + accepted / steps,
            "seconds": round(seconds, 3),
        }

    begin = time.perf_counter()
    thresholds = [0.54 / math.sqrt(k), *THRESHOLDS]
    counts_at = on_device.replay(texts, k, thresholds)
    seconds = time.perf_counter() - begin
    for name, counts in zip(("default", *THRESHOLDS), counts_at, strict=True):
        of_all = "all settings in one batch, searched once for each place"
        yield row(ON_DEVICE, counts, seconds, min_acceptance=name, seconds_of=of_all)
    if device_only:
        return
    for name, (low, high) in LOOKUPS.items():
        begin = time.perf_counter()
        counts = np.zeros(3, dtype=np.int64)
        for prompt, output in items:
            text = np.concatenate([prompt, output])
            counts += replay_vllm(find, text, len(prompt), low, high, k)
        yield row(name, counts, time.perf_counter() - begin)
    settings = list(VARIANTS.items())
    settings += [("ngram_adaptive", {"min_acceptance": each}) for each in THRESHOLDS]
    for name, options in settings:
        begin = time.perf_counter()
        counts = replay_all(items, k, options)
        yield row(
            name,
            counts,
            time.perf_counter() - begin,
            min_acceptance=options.get("min_acceptance", "default"),
            shared_drafted=int(counts[3]),
        )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Acceptance length over accepted per drafted: up and to the right is better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    traces = list(dict.fromkeys(row["trace"] for row in rows))
    lengths = sorted({row["num_speculative_tokens"] for row in rows})
    figure, axes = plt.subplots(
        len(lengths), len(traces), figsize=(4.2 * len(traces), 3.6 * len(lengths)), squeeze=False
    )
    marks = {
        "vllm ngram 2-4": ("s", "tab:red"),
        "vllm ngram 5": ("^", "tab:orange"),
        "ngram_adaptive": ("o", "tab:blue"),
        "ngram_adaptive, no adaptation": ("x", "tab:cyan"),
        "ngram_adaptive, shared index": ("D", "tab:green"),
        ON_DEVICE: ("P", "tab:purple"),
    }
    for i, k in enumerate(lengths):
        for j, trace in enumerate(traces):
            here = [r for r in rows if (r["trace"], r["num_speculative_tokens"]) == (trace, k)]
            axis = axes[i][j]
            settings = [r for r in here if isinstance(r.get("min_acceptance"), float)]
            for name, colour in (("ngram_adaptive", "lightsteelblue"), (ON_DEVICE, "plum")):
                curve = [r for r in settings if r["proposer"] == name]
                axis.plot(
                    [r["accepted_per_drafted"] for r in curve],
                    [r["acceptance_length"] for r in curve],
                    ".-",
                    color=colour,
                    label=f"{name}, min_acceptance 0.1 to 0.7",
                )
            for r in here:
                if r not in settings:
                    mark, colour = marks[r["proposer"]]
                    axis.plot(
                        r["accepted_per_drafted"],
                        r["acceptance_length"],
                        mark,
                        color=colour,
                        label=r["proposer"],
                        markersize=7,
                        linestyle="none",
                    )
            axis.set_title(f"{trace}, {k} draft tokens")
            axis.set_xlabel("accepted / drafted tokens")
            axis.set_ylabel("acceptance length, bonus included")
            axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=110)


def beaten(rows: list[dict[str, Any]]) -> None:
    """Print, for each setting, ours against both of vLLM's, and whether both numbers are better."""
    for row in rows:
        if (
            row["proposer"] in (*LOOKUPS, ON_DEVICE)
            and row.get("min_acceptance", "default") == "default"
        ):
            ours = next(
                r
                for r in rows
                if r["proposer"] == "ngram_adaptive"
                and r["min_acceptance"] == "default"
                and r["trace"] == row["trace"]
                and r["num_speculative_tokens"] == row["num_speculative_tokens"]
            )
            names = ("accepted_per_drafted", "acceptance_length")
            better = all(ours[name] > row[name] for name in names)
            print(
                f"{row['trace']:>10} K={row['num_speculative_tokens']} {row['proposer']:<15}"
                f" {row[names[0]]:.3f} {row[names[1]]:.3f} | ngram_adaptive"
                f" {ours[names[0]]:.3f} {ours[names[1]]:.3f} |",
                "better" if better else "NOT better",
            )


def main(
    spec_bench_file: Annotated[Path, typer.Option("--spec-bench", help="Spec-Bench questions")],
    old_stdlib: Annotated[Path | None, typer.Option(help="folder; default: found")] = None,
    new_stdlib: Annotated[Path | None, typer.Option(help="folder; default: found")] = None,
    only_fit: Annotated[bool, typer.Option("--fit", help="refit the priors and stop")] = False,
    device_only: Annotated[bool, typer.Option(help="replace the device's rows, no others")] = False,
    trace_names: Annotated[
        list[str] | None, typer.Option("--trace", help="with --device-only: only these traces")
    ] = None,
) -> None:
    """Replay the traces, write rows and plot."""
    tokenizer = train_tokenizer([file.text for file in training_files()], VOCABULARY)

    def encode(text: str) -> NDArray[np.int32]:
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    traces = {"spec_bench": list(spec_bench(spec_bench_file, encode))}
    pair = ""
    if old_stdlib is None or new_stdlib is None:
        libraries = standard_libraries()
        here = [version for version, _ in libraries].index(sys.version_info[:2])
        if len(libraries) > 1:
            here = min(here, len(libraries) - 2)
            (old, old_stdlib), (new, new_stdlib) = libraries[here : here + 2]
            pair = f"Python {old[0]}.{old[1]} -> {new[0]}.{new[1]}"
    if old_stdlib and new_stdlib:
        traces["edit"] = list(edits(old_stdlib, new_stdlib, encode))
    else:
        print("edit trace left out: only one Python found; give --old-stdlib and --new-stdlib")
    traces["held_out"] = list(held_out(encode))

    if only_fit:
        fit_prior(traces)
        on_device.fit_prior(traces)
        return
    source = {**provenance(), "edit_pair": pair or "as given", "tokenizer": "zoo BPE 8192"}
    results = RESULTS / "ngram_traces.jsonl"
    rows = []
    if device_only:
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        traces = {name: traces[name] for name in trace_names or traces}
        rows = [r for r in rows if r["proposer"] != ON_DEVICE or r["trace"] not in traces]
    with results.open("w", buffering=1) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        for trace, items in traces.items():
            texts = on_device.Trace(items)
            for k in (4, 8):
                for row in rows_of(trace, items, k, texts, device_only):
                    rows.append(row)
                    file.write(json.dumps({**row, **source}) + "\n")
                    print(
                        f"{row['trace']:>10} K={k} {row['proposer']:<30}"
                        f" {row.get('min_acceptance', '')!s:<8}"
                        f" accepted/drafted {row['accepted_per_drafted']:.4f}"
                        f" length {row['acceptance_length']:.4f} {row['seconds']:.1f} s",
                        flush=True,
                    )
    beaten(rows)
    plot(rows, RESULTS / "ngram_traces.png")


if __name__ == "__main__":
    typer.run(main)
