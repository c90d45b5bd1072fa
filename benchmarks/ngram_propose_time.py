"""Time of one `propose` of `ngram_adaptive`, over length of history and number of requests.

Every request replays held-out source code after a history of that length: each step brings the
tokens that verification would have accepted of the last draft, and one more. The time is the
whole call, Python included, on one thread. Also: the first sight of a prompt, per token; and a
fixed piece of Python and numpy work beside each step, to see how busy the machine was.

    OMP_NUM_THREADS=1 python benchmarks/ngram_propose_time.py
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
import torch
import typer
from provenance import provenance
from vllm_spec_plugins.proposers.ngram_adaptive import NgramAdaptive, NgramAdaptiveOptions

from vllm_spec_plugins.context import EngineContext, ModelFacts
from vllm_spec_plugins.proposer import DraftInput
from vllm_spec_plugins.zoo.corpus import source_files, training_files
from vllm_spec_plugins.zoo.tokenizer import train_tokenizer

RESULTS = Path(__file__).parent / "results" / "ngram_propose_time.jsonl"


def control() -> float:
    """Seconds of some work that has nothing to do with us."""
    begin = time.perf_counter()
    np.sort(np.arange(4000) * 7919 % 4001)
    return time.perf_counter() - begin


def measure(
    corpus: np.ndarray, requests: int, history: int, k: int, steps: int, **options: Any
) -> dict[str, Any]:
    """One row."""
    room = history + steps * (k + 1) + 1
    generator = np.random.default_rng(0)
    starts = generator.integers(0, len(corpus) - room, requests)
    table = np.stack([corpus[start : start + room] for start in starts])
    facts = ModelFacts("time", int(corpus.max()) + 1, 1, 1, room, k)
    proposer = NgramAdaptive(
        NgramAdaptiveOptions(**options), EngineContext(facts, torch.device("cpu"), requests, 0)
    )
    proposer.warm_up()
    batch = DraftInput(
        request_ids=[f"request-{number}" for number in range(requests)],
        token_history=table,
        rows=np.arange(requests),
        num_tokens=np.full(requests, history),
        num_prompt_tokens=np.full(requests, history),
        max_draft=np.full(requests, k),
        temperatures=np.zeros(requests, dtype=np.float32),
        streams=np.arange(requests),
        hidden_states=None,
        cache_salts=None,
        length_control=None,  # pyright: ignore[reportArgumentType]
    )
    begin = time.perf_counter()
    drafts = np.asarray(proposer.propose(batch).token_ids)
    first = time.perf_counter() - begin
    seconds, controls, new_tokens, drafted = [], [], [], []
    for _ in range(steps):
        offsets = batch.num_tokens[:, None] + np.arange(drafts.shape[1])
        right = drafts == np.take_along_axis(table, offsets, axis=1)
        new = 1 + np.cumprod(right, axis=1).sum(axis=1)
        batch.num_tokens[:] += new
        begin = time.perf_counter()
        draft = proposer.propose(batch)
        seconds.append(time.perf_counter() - begin)
        drafts = np.asarray(draft.token_ids)
        controls.append(control())
        new_tokens.append(new.mean())
        drafted.append((drafts >= 0).sum() / requests)
    microseconds = 1e6 * np.array(seconds)
    return {
        "requests": requests,
        "history": history,
        "num_speculative_tokens": k,
        "steps": steps,
        "new_tokens_per_request": float(np.mean(new_tokens)),
        "drafted_per_request": float(np.mean(drafted)),
        "median_us": float(np.median(microseconds)),
        "p10_us": float(np.quantile(microseconds, 0.1)),
        "p90_us": float(np.quantile(microseconds, 0.9)),
        "control_median_us": 1e6 * float(np.median(controls)),
        "first_sight_us_per_1000_tokens": 1e9 * first / requests / history,
        "bytes_per_token": proposer.num_bytes / requests / history,
    }


def main(
    steps: Annotated[int, typer.Option(help="steps measured in each setting")] = 300,
    repeats: Annotated[int, typer.Option(help="runs of each setting, in turn")] = 3,
) -> None:
    """Measure, print and keep the rows."""
    tokenizer = train_tokenizer([file.text for file in training_files()], 8192)
    files = sorted(source_files(), key=lambda file: not file.held_out)  # held-out ones first
    ids = [tokenizer.encode(file.text, add_special_tokens=False).ids for file in files[:300]]
    corpus = np.concatenate([np.array(each, dtype=np.int32) for each in ids])
    source = provenance()
    with RESULTS.open("w") as out:
        for repeat in range(repeats):
            for requests, history in (
                (64, 512), (64, 2048), (64, 8192), (64, 32768), (1, 8192), (256, 2048),
            ):  # fmt: skip
                row = measure(corpus, requests, history, 4, steps)
                row["load_average"] = os.getloadavg()[0]
                out.write(json.dumps({"repeat": repeat, **row, **source}) + "\n")
                print(
                    f"{requests:>4} requests x {history:>6} tokens: median "
                    f"{row['median_us']:7.1f} us (10-90 %: {row['p10_us']:.0f}-{row['p90_us']:.0f})"
                    f", {row['new_tokens_per_request']:.2f} new, "
                    f"{row['drafted_per_request']:.2f} drafted; first sight "
                    f"{row['first_sight_us_per_1000_tokens']:.0f} us per 1000 tokens; "
                    f"{row['bytes_per_token']:.0f} bytes per token; "
                    f"control {row['control_median_us']:.0f} us, "
                    f"load {row['load_average']:.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    typer.run(main)
