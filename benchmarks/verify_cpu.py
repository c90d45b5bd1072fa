"""Verification on the CPU: our rules against vLLM's rejection sampler, from raw logits to tokens.

Every contender gets the target's logits `[N + R, V]` as the model gives them and returns
tokens, bonus tokens included. `vllm` is `RejectionSampler.forward` with its expansion of
temperatures to draft rows put right (as shipped it reads uninitialised memory, which is
wrong but not slower). `token` and `block` gather the same rows, convert them to float32,
divide by the temperature and verify. `token*` and `block*` do so with the indexing of vLLM's
own forward, inside which the engine bridge runs them (without logprobs, as most requests come).

    OMP_NUM_THREADS=1 python benchmarks/verify_cpu.py

Contenders take turns within each repeat, in shuffled order: what one leaves in the caches and
the allocator meets each of the others. One JSON line per case and
contender is appended to benchmarks/results/verify_cpu.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vllm.v1.sample.rejection_sampler as vllm_module
from provenance import provenance
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.testing import build_verifier
from vllm_spec_plugins.verifier import Verifier, VerifyInput

RESULTS = Path(__file__).parent / "results" / "verify_cpu.jsonl"


@dataclass(frozen=True)
class Step:
    """One verification step as the model leaves it.

    Attributes:
        logits: `[N + R, V]` rows of each request in order, its bonus row last.
        draft_token_ids: `[N]` int32.
        draft_probabilities: `[N, V]` float32, or None for one-hot drafts.
        temperature: Of every request; 0 = greedy.
        num_requests: R.
        num_draft: K, for every request.
    """

    logits: Tensor
    draft_token_ids: Tensor
    draft_probabilities: Tensor | None
    temperature: float
    num_requests: int
    num_draft: int

    @property
    def bonus_rows(self) -> Tensor:
        return torch.arange(1, self.num_requests + 1) * (self.num_draft + 1) - 1

    @property
    def target_rows(self) -> Tensor:
        rows = torch.arange(len(self.logits)).view(self.num_requests, self.num_draft + 1)
        return rows[:, :-1].flatten()


def make_step(
    vocab_size: int, dtype: torch.dtype, temperature: float, drawn: bool, args: Any
) -> Step:
    """Peaked logits, and drafts that mostly but not always follow them."""
    requests, num_draft = args.requests, args.draft
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(requests * (num_draft + 1), vocab_size, generator=generator) * 2
    # Some fifty likely tokens per row, as in text.
    likely = torch.randint(vocab_size, (len(logits), 50), generator=generator)
    logits.scatter_add_(1, likely, torch.rand(likely.shape, generator=generator) * 12)
    step = Step(logits.to(dtype), torch.empty(0), None, temperature, requests, num_draft)
    target = step.logits[step.target_rows].float()
    if drawn:
        noise = torch.randn(target.shape, generator=generator) * 0.5
        law = torch.softmax((target + noise) / (temperature or 1.0), dim=1)
        drafts = torch.multinomial(law, 1, generator=generator).squeeze(1)
    else:
        law = None
        second = torch.rand(len(target), generator=generator) < 0.3
        drafts = target.topk(2, dim=1).indices.gather(1, second.long().unsqueeze(1)).squeeze(1)
    return Step(step.logits, drafts.int(), law, temperature, requests, num_draft)


def right_expand(
    values: Tensor,
    cu_num_tokens: Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> Tensor:
    """What vLLM's `expand_batch_to_tokens` is documented to do."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(values == replace_from, replace_to, values)
    return values.repeat_interleave(counts, output_size=num_tokens)


def vllm_arguments(step: Step) -> tuple[Any, ...]:
    """What the V1 runner passes to the rejection sampler."""
    requests, num_draft = step.num_requests, step.num_draft
    per_request = torch.full((requests,), num_draft)
    greedy = step.temperature == 0
    metadata = SpecDecodeMetadata(
        draft_token_ids=step.draft_token_ids,
        num_draft_tokens=per_request.tolist(),
        cu_num_draft_tokens=per_request.cumsum(0).int(),
        cu_num_sampled_tokens=(per_request + 1).cumsum(0).int(),
        target_logits_indices=step.target_rows.int(),
        bonus_logits_indices=step.bonus_rows.int(),
        logits_indices=torch.arange(len(step.logits), dtype=torch.int32),
    )
    nothing = torch.empty(0)
    sampling = SamplingMetadata(
        temperature=None if greedy else torch.full((requests,), step.temperature),
        all_greedy=greedy,
        all_random=not greedy,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=nothing,
        presence_penalties=nothing,
        repetition_penalties=nothing,
        output_token_ids=[[] for _ in range(requests)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
    return metadata, step.draft_probabilities, step.logits, sampling


def vllm_contender(step: Step) -> Callable[[int], Tensor]:
    sampler = vllm_module.RejectionSampler(Sampler())
    arguments = vllm_arguments(step)
    return lambda _: sampler(*arguments).sampled_token_ids


def our_contender(
    step: Step, verifier: Verifier, inside_vllm: bool = False
) -> Callable[[int], Tensor]:
    q = step.draft_probabilities
    requests = step.num_requests
    target_rows, bonus_rows = step.target_rows, step.bonus_rows
    counts = torch.full((requests,), step.num_draft)
    streams = torch.arange(requests)

    def run(position: int) -> Tensor:
        if inside_vllm:
            bonus = step.logits[bonus_rows].to(torch.float32)
            target = step.logits[target_rows].to(torch.float32)
        else:
            bonus = step.logits.index_select(0, bonus_rows).to(torch.float32)
            target = step.logits.index_select(0, target_rows).to(torch.float32)
        if step.temperature:
            target.div_(step.temperature)
            bonus.div_(step.temperature)
        batch = VerifyInput(
            [""] * requests,
            target,
            bonus,
            step.draft_token_ids.long(),
            counts,
            None if q is None else DraftProbabilities(q),
            torch.full((requests,), step.temperature),
            streams,
            torch.full((requests,), position),
            max_num_draft=step.num_draft,
            all_greedy=step.temperature == 0,
            any_greedy=step.temperature == 0,
        )
        return verifier.verify(batch).token_ids

    return run


def measure(contenders: dict[str, Callable[[int], Tensor]], repeats: int) -> dict[str, Any]:
    """Milliseconds and tokens of every contender, taking turns."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    tokens: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for repeat in range(-5, repeats):
        for name in order.sample(names, len(names)):
            start = time.perf_counter()
            emitted = contenders[name](repeat + 5)
            elapsed = time.perf_counter() - start
            if repeat >= 0:
                seconds[name].append(elapsed * 1e3)
                tokens[name].append(float((emitted >= 0).sum(dim=1).double().mean()))
    return {
        name: {
            "median_ms": round(statistics.median(seconds[name]), 3),
            "quartiles_ms": [round(q, 3) for q in statistics.quantiles(seconds[name], n=4)[::2]],
            "min_ms": round(min(seconds[name]), 3),
            "tokens_per_request": round(statistics.fmean(tokens[name]), 3),
            # Neighbours in time, so that a busy machine slows both.
            "times_faster_than_vllm": round(
                statistics.median(
                    theirs / ours
                    for theirs, ours in zip(seconds["vllm"], seconds[name], strict=True)
                ),
                3,
            ),
        }
        for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--draft", type=int, default=5, help="draft tokens of each request")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()

    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()
    vllm_module.expand_batch_to_tokens = right_expand
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    token = build_verifier("lossless", '{"rule": "token"}')
    block = build_verifier("lossless", '{"rule": "block"}')
    origin = provenance()
    print(f"{'case':44s} {'contender':13s} {'median ms':>9s} {'x vllm':>7s} {'tokens':>7s}")
    for vocab_size in args.vocab:
        for dtype in (torch.bfloat16, torch.float32):
            for temperature, drawn in ((0.0, False), (0.8, False), (0.8, True)):
                step = make_step(vocab_size, dtype, temperature, drawn, args)
                results = measure(
                    {
                        "vllm": vllm_contender(step),
                        "token": our_contender(step, token),
                        "block": our_contender(step, block),
                        "token*": our_contender(step, token, inside_vllm=True),
                        "block*": our_contender(step, block, inside_vllm=True),
                    },
                    args.repeats,
                )
                draft = "probabilities" if drawn else "one-hot"
                name = str(dtype).removeprefix("torch.")
                for contender, row in results.items():
                    case = f"V={vocab_size} {name} T={temperature} {draft}"
                    print(
                        f"{case:44s} {contender:13s} {row['median_ms']:9.2f} "
                        f"{row['times_faster_than_vllm']:7.2f} {row['tokens_per_request']:7.2f}"
                    )
                    if args.no_record:
                        continue
                    RESULTS.parent.mkdir(exist_ok=True)
                    with RESULTS.open("a") as file:
                        file.write(
                            json.dumps(
                                {
                                    "benchmark": "verify_cpu",
                                    "contender": contender,
                                    "vocab_size": vocab_size,
                                    "dtype": name,
                                    "temperature": temperature,
                                    "draft": draft,
                                    "requests": args.requests,
                                    "num_draft": args.draft,
                                    "torch_threads": args.threads,
                                    "repeats": args.repeats,
                                    **row,
                                    "load_average": round(os.getloadavg()[0], 1),
                                    **origin,
                                }
                            )
                            + "\n"
                        )


if __name__ == "__main__":
    main()
