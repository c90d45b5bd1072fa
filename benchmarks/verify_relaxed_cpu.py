"""What a step of relaxed verification costs on the CPU, against the lossless token rule.

Every rule gets the same float32 target logits `[N, V]`, as the engine bridge hands them over,
and returns tokens and their price. Kinds of step: drafts drawn from a law that is near the
target's (`drawn`), drafts that were chosen (n-grams, greedy heads; `chosen`), and greedy requests
(`greedy`); and two that no text has, for the most that greedy requests can cost: every draft token
nearly the target's best and never it (`forgiven`), and that of a target so undecided that bounds on
its normaliser decide nothing (`flat`).

    OMP_NUM_THREADS=1 taskset -c 2 python benchmarks/verify_relaxed_cpu.py

Rules take turns within each repeat, in shuffled order. `times_lossless` is the median over
repeats of a rule's time over lossless's in the same repeat; the bar is 1.3 at V = 32,000.
`cpu_times_lossless` is the same of the thread's own processor time, which other work on the machine
changes less. One JSON line per case and rule is appended to
benchmarks/results/verify_relaxed_cpu.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from provenance import provenance
from torch import Tensor

from vllm_spec_plugins.codebook_neighbours import NeighbourCard, write_neighbours
from vllm_spec_plugins.context import EngineContext, ModelFacts
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.judge_head import NORM_STATE, JudgeCard, JudgeHead
from vllm_spec_plugins.registry import Kind, installed
from vllm_spec_plugins.verifier import Verifier, VerifyInput

KINDS = ("drawn", "chosen", "greedy", "forgiven", "flat")
#: Width of the hidden states that the judge's head reads.
HIDDEN_SIZE = 4096
RESULTS = Path(__file__).parent / "results" / "verify_relaxed_cpu.jsonl"
#: Neighbours of each code in the table that a rule reads.
NEIGHBOURS = {"lantern": 1000, "lantern++": 10, "clusters": 15}


@dataclass(frozen=True)
class Step:
    """What all rules verify; the judge sees random hidden states beside it.

    Attributes:
        target_logits: `[N, V]` float32.
        bonus_logits: `[R, V]` float32.
        draft_token_ids: `[N]` int64.
        draft_law: `[N, V]` float32, or None for drafts that were chosen.
        temperature: Of every request; 0 = greedy.
        num_requests: R.
        num_draft: K, of every request.
        hidden_states: `[N, HIDDEN_SIZE]` float32.
    """

    target_logits: Tensor
    bonus_logits: Tensor
    draft_token_ids: Tensor
    draft_law: Tensor | None
    temperature: float
    num_requests: int
    num_draft: int
    hidden_states: Tensor

    def batch(self, position: int) -> VerifyInput:
        """A fresh batch: nothing is remembered from the last."""
        greedy = self.temperature == 0
        return VerifyInput(
            [str(i) for i in range(self.num_requests)],
            self.target_logits,
            self.bonus_logits,
            self.draft_token_ids,
            torch.full((self.num_requests,), self.num_draft),
            None if self.draft_law is None else DraftProbabilities(self.draft_law),
            torch.full((self.num_requests,), self.temperature),
            torch.arange(self.num_requests),
            torch.full((self.num_requests,), position),
            self.hidden_states,
            max_num_draft=self.num_draft,
            all_greedy=greedy,
            any_greedy=greedy,
        )


def make_step(kind: str, args: argparse.Namespace) -> Step:
    """Some fifty likely tokens per row, as in text; drafts mostly but not always follow."""
    if kind in ("forgiven", "flat"):
        return make_hard_step(kind, args)
    generator = torch.Generator().manual_seed(args.vocab)
    rows = args.requests * args.draft
    logits = torch.randn(rows + args.requests, args.vocab, generator=generator) * 2
    likely = torch.randint(args.vocab, (len(logits), 50), generator=generator)
    logits.scatter_add_(1, likely, torch.rand(likely.shape, generator=generator) * 12)
    target, bonus = logits.split([rows, args.requests])
    law = None
    if kind == "drawn":
        law = torch.softmax(target + torch.randn(target.shape, generator=generator) * 0.5, dim=1)
        drafts = torch.multinomial(law, 1, generator=generator).squeeze(1)
    else:
        second = torch.rand(rows, generator=generator) < 0.3
        drafts = target.topk(2, dim=1).indices.gather(1, second.long().unsqueeze(1)).squeeze(1)
    temperature = 0.0 if kind == "greedy" else 1.0
    hidden_states = torch.randn(rows, HIDDEN_SIZE, generator=generator)
    return Step(
        target.contiguous(), bonus.contiguous(), drafts, law, temperature, args.requests,
        args.draft, hidden_states,
    )  # fmt: skip


def make_hard_step(kind: str, args: argparse.Namespace) -> Step:
    """Greedy requests whose draft tokens are all mismatches, just below the most likely token.

    They are codes beside it, so that rules for image tokens are asked, too.
    """
    generator = torch.Generator().manual_seed(args.vocab)
    rows = args.requests * args.draft
    spread = 2.0 if kind == "forgiven" else 1.3
    logits = torch.randn(rows + args.requests, args.vocab, generator=generator) * spread
    best = torch.randint(args.vocab // 2 + 1, args.vocab, (rows, 1), generator=generator)
    # Of e^15, the rest is a twelfth; of e^6.6, a hundredfold: near the bar of `threshold`, -5.
    height = 15.0 if kind == "forgiven" else 6.6
    logits[:rows].scatter_(1, best, height).scatter_(1, best - 1, height - 0.05)
    hidden_states = torch.randn(rows, HIDDEN_SIZE, generator=generator)
    target, bonus = logits.split([rows, args.requests])
    return Step(
        target.contiguous(), bonus.contiguous(), best.squeeze(1) - 1, None, 0.0, args.requests,
        args.draft, hidden_states,
    )  # fmt: skip


def make_rules(vocab_size: int, num_draft: int, folder: Path) -> dict[str, Verifier]:
    """`lossless` and every relaxed rule with its defaults; the judge with a random head."""
    facts = ModelFacts("random", vocab_size, HIDDEN_SIZE, 2, 4096, num_draft)
    context = EngineContext(facts, torch.device("cpu"), max_num_requests=256, seed=0)
    codes = vocab_size // 2
    chosen: dict[str, tuple[str, dict[str, Any]]] = {
        "lossless": ("lossless", {}),
        "typical": ("typical", {}),
        "threshold": ("threshold", {}),
        "top_k_relaxed": ("top_k_relaxed", {}),
        "kl_judge": ("kl_judge", {}),
        "fly": ("fly", {"window_size": 3}),
        "judge": ("judge", {"head": write_head(folder, vocab_size)}),
        "threshold, limited": ("threshold", {"max_total_variation": 0.05}),
    }
    for rule in ("lantern", "lantern++", "gsd", "annealed", "clusters"):
        options: dict[str, Any] = {"rule": rule, "image_token_range": [codes, vocab_size]}
        if count := NEIGHBOURS.get(rule):
            path = folder / f"neighbours_{count}.safetensors"
            table = (torch.arange(codes).unsqueeze(1) + torch.arange(1, count + 1)) % codes
            write_neighbours(path, NeighbourCard(codes, count, 8, None, 0, "", "none"), table)
            options["neighbours"] = str(path)
        chosen[f"relaxed_visual {rule}"] = ("relaxed_visual", options)
    rules = {}
    for label, (name, options) in chosen.items():
        plugin = installed().load(Kind.VERIFIER, name)
        parsed = plugin.Options.model_validate_json(json.dumps(options))
        rules[label] = plugin(parsed, context)
    return rules


def write_head(folder: Path, vocab_size: int) -> str:
    """A head of random weights that lets every second draft token stand."""
    card = JudgeCard(
        "random", HIDDEN_SIZE, 2, vocab_size, 2, NORM_STATE, "float32", 0.5, [], "", {}
    )
    weight = torch.randn(HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    head = JudgeHead(card, weight, torch.zeros(1), torch.tensor([2]), {})
    path = folder / "head.safetensors"
    head.write(path)
    return str(path)


def measure(
    rules: dict[str, Verifier], step: Step, repeats: int
) -> dict[str, dict[str, float | list[float]]]:
    """Milliseconds, tokens and price of every rule, taking turns."""
    names = list(rules)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in names}
    accepted: dict[str, list[float]] = {name: [] for name in names}
    prices: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for repeat in range(-5, repeats):
        for name in order.sample(names, len(names)):
            batch = step.batch(repeat + 5)
            start, cpu_start = time.perf_counter(), time.thread_time()
            verification = rules[name].verify(batch)
            cpu_elapsed, elapsed = time.thread_time() - cpu_start, time.perf_counter() - start
            if repeat < 0:
                continue
            seconds[name].append(elapsed * 1e3)
            cpu_seconds[name].append(cpu_elapsed * 1e3)
            accepted[name].append(float(verification.accepted.double().mean()))
            extra = verification.extra_acceptance
            prices[name].append(0.0 if extra is None else float(extra.mean()))
    return {
        name: {
            "median_ms": round(statistics.median(seconds[name]), 3),
            "quartiles_ms": [round(q, 3) for q in statistics.quantiles(seconds[name], n=4)[::2]],
            # Neighbours in time, so that a busy machine slows both.
            "times_lossless": median_ratio(seconds[name], seconds["lossless"]),
            "cpu_times_lossless": median_ratio(cpu_seconds[name], cpu_seconds["lossless"]),
            "accepted_per_request": round(statistics.fmean(accepted[name]), 3),
            "total_variation_price": round(statistics.fmean(prices[name]), 5),
        }
        for name in names
    }


def median_ratio(times: list[float], others: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(times, others, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--draft", type=int, default=5, help="draft tokens of each request")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    origin = provenance()
    print(
        f"{'drafts':8s} {'rule':26s} {'ms':>9s} {'x lossless':>10s} {'cpu x':>6s} {'accepted':>8s}"
    )
    with TemporaryDirectory() as folder:
        rules = make_rules(args.vocab, args.draft, Path(folder))
        for kind in args.kinds:
            for name, row in measure(rules, make_step(kind, args), args.repeats).items():
                print(
                    f"{kind:8s} {name:26s} {row['median_ms']:9.2f} {row['times_lossless']:10.2f} "
                    f"{row['cpu_times_lossless']:6.2f} {row['accepted_per_request']:8.2f}"
                )
                if args.no_record:
                    continue
                line = {
                    "benchmark": "verify_relaxed_cpu",
                    "rule": name,
                    "drafts": kind,
                    "vocab_size": args.vocab,
                    "requests": args.requests,
                    "num_draft": args.draft,
                    "torch_threads": args.threads,
                    "repeats": args.repeats,
                    **row,
                    "load_average": round(os.getloadavg()[0], 1),
                    **origin,
                }
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
