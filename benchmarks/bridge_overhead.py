"""What the bridge costs per step: vLLM's own `ngram` drafts, replayed through our adapter.

Two engines in one process decode the same prompts greedily. One runs vLLM's `ngram` as it
is; in the other a proposer of ours asks vLLM's own code for the same drafts, and `lossless`
verifies them. Same drafts, same text, same steps: what differs is the bridge. Engines take
turns, and the order rotates; a step is one `engine.step()`, timed whole.

    python benchmarks/bridge_overhead.py --model MODEL --output ROWS.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# With more, vLLM's ngram makes every step of the process two hundred times slower.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from provenance import provenance
from vllm import LLM, SamplingParams
from vllm.v1.spec_decode import ngram_proposer

from vllm_spec_plugins.engine.install import shield_llvmlite
from vllm_spec_plugins.proposer import Draft, DraftInput, Proposer
from vllm_spec_plugins.registry import Kind

LOOKUP = {"prompt_lookup_min": 2, "prompt_lookup_max": 4}


class ReplayedNgram(Proposer):
    """Drafts exactly what vLLM's `ngram` would, with vLLM's own compiled function."""

    def propose(self, batch: DraftInput) -> Draft:
        k = self.context.facts.num_speculative_tokens
        table = np.full((len(batch.request_ids), k), -1, dtype=np.int64)
        for i, (row, length) in enumerate(zip(batch.rows, batch.num_tokens, strict=True)):
            found = ngram_proposer._find_longest_matched_ngram_and_propose_tokens(
                batch.token_history[row, :length], LOOKUP["prompt_lookup_min"],
                LOOKUP["prompt_lookup_max"], self.context.facts.max_model_len, k,
            )  # fmt: skip
            table[i, : len(found)] = found
        return Draft(table)


def install_replay(folder: Path) -> None:
    """Register the replaying proposer as any package would: by entry point."""
    info = folder / "replayed_ngram-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: replayed-ngram\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        f"[{Kind.PROPOSER.value}]\nreplayed_ngram = {Path(__file__).stem}:ReplayedNgram\n"
    )
    sys.path.append(str(folder))


def engine(model: str, speculative_config: dict[str, Any], max_num_seqs: int) -> LLM:
    shield_llvmlite()  # vLLM's ngram has loaded numba
    return LLM(
        model=model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=max_num_seqs,
        speculative_config=speculative_config,
        enable_prefix_caching=False,
        seed=0,
    )


def run(llm: LLM, prompts: list[list[int]], num_tokens: int) -> tuple[list[float], list[list[int]]]:
    """Seconds of each decode step (those of full batches), and the text."""
    core = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    for i, prompt in enumerate(prompts):
        core.add_request(f"{time.perf_counter_ns()}-{i}", {"prompt_token_ids": prompt}, params)
    seconds, texts = [], []
    while core.has_unfinished_requests():
        started = time.perf_counter()
        outputs = core.step()
        seconds.append(time.perf_counter() - started)
        texts += [list(o.outputs[0].token_ids) for o in outputs if o.finished]
    return seconds[1:], sorted(texts)


def main(stack: contextlib.ExitStack) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    install_replay(Path(stack.enter_context(tempfile.TemporaryDirectory())))
    # Both live as long as the process: vLLM's process groups do not survive either's end.
    most = max(arguments.requests)
    engines = {
        "vllm": engine(
            arguments.model, {"method": "ngram", "num_speculative_tokens": 4, **LOOKUP}, most
        ),
        "bridge": engine(
            arguments.model, {"method": "replayed_ngram", "num_speculative_tokens": 4}, most
        ),
    }
    rng = np.random.default_rng(0)
    rows = []
    for num_requests in arguments.requests:
        prompts = [
            np.tile(rng.integers(10, 1000, size=16), 4).tolist() for _ in range(num_requests)
        ]
        steps: dict[str, list[float]] = {name: [] for name in engines}
        texts = {}
        for repeat in range(arguments.repeats + 1):
            order = list(engines) if repeat % 2 else list(reversed(engines))
            for name in order:
                seconds, texts[name] = run(engines[name], prompts, arguments.tokens)
                if repeat:  # the first is the warm-up
                    steps[name] += seconds
        assert texts["vllm"] == texts["bridge"], "the two engines wrote different text"
        median = {name: statistics.median(s) for name, s in steps.items()}
        ratio = median["bridge"] / median["vllm"]
        rows.append(
            {
                "benchmark": "bridge_overhead",
                "requests": num_requests,
                "steps": {name: len(s) for name, s in steps.items()},
                "median_ms": {name: 1e3 * m for name, m in median.items()},
                "quartiles_ms": {
                    name: [1e3 * q for q in statistics.quantiles(s, n=4)]
                    for name, s in steps.items()
                },
                "bridge_over_vllm": ratio,
                **provenance(),
            }
        )
        print(
            f"{num_requests} requests: vLLM {1e3 * median['vllm']:.3f} ms/step, "
            f"through the bridge {1e3 * median['bridge']:.3f} ms/step, ratio {ratio:.3f}"
        )
    if arguments.output:
        with arguments.output.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        main(stack)
