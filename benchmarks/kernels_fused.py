"""Benchmark cases of fused verification and the ranked output head.

Peers: for verification our PyTorch path, eager and compiled, and both of vLLM's paths where it
is installed (V1's sampler over probabilities, V2's kernels on logits that its temperature kernel
has processed); for the head the same product by cuBLAS with argmax behind it, over the ranked
rows and over the whole vocabulary, and the first compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from kernel_case import KernelCase
from torch import Tensor
from vllm_spec_plugins.triton_kernels.ranked_lm_head import (
    Noise,
    ranked_lm_head,
    ranked_lm_head_reference,
)
from vllm_spec_plugins.triton_kernels.relaxations import DraftLogits
from vllm_spec_plugins.triton_kernels.verify_fused import verify_fused
from vllm_spec_plugins.triton_kernels.verify_reference import verify_fused_reference

from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.testing.chi_square import compare
from vllm_spec_plugins.verifier import VerifyInput

VOCABULARY = 128_256
RANKED = 32_768
#: Requests whose tokens are compared with their law before anything is timed.
LAW_SAMPLES = 1_000_000


def cases(device: torch.device) -> Iterator[KernelCase]:
    """Every case, smallest first; each makes its tensors when it is asked for."""
    for num_requests, num_draft in ((1, 5), (8, 5), (32, 5), (64, 5), (256, 3)):
        for rule in ("token", "block"):
            for law in ("one_hot", "logits"):
                for temperature in (0.8, 1.0):
                    yield verification(device, num_requests, num_draft, rule, law, temperature)
        yield verification(device, num_requests, num_draft, "token", "ranked", 0.8)
    for hidden_size in (2048, 4096):
        for width in (8192, RANKED):
            for rows in (1, 4, 8, 16, 64):
                yield head(device, rows, width, hidden_size)
    yield head(device, 8, RANKED, 4096, num_columns=8)
    yield head(device, 8, RANKED, 4096, drawn=True)


def verification(
    device: torch.device,
    num_requests: int,
    num_draft: int,
    rule: str,
    law: str,
    temperature: float,
) -> KernelCase:
    """Bfloat16 logits from before the temperature, peaked as in text."""
    generator = torch.Generator(device).manual_seed(num_requests)
    rows = num_requests * (num_draft + 1)
    logits = torch.randn(rows, VOCABULARY, generator=generator, device=device) * 2
    likely = torch.randint(VOCABULARY, (rows, 50), generator=generator, device=device)
    logits.scatter_add_(1, likely, torch.rand(rows, 50, generator=generator, device=device) * 12)
    logits = logits.to(torch.bfloat16)
    table = logits.view(num_requests, num_draft + 1, VOCABULARY)
    target = table[:, :-1].reshape(-1, VOCABULARY)
    vocabulary = draft = None
    if law == "one_hot":
        near = target.float().topk(2, dim=1).indices
        second = torch.rand(len(target), generator=generator, device=device) < 0.3
        ids = near.gather(1, second.long().unsqueeze(1)).squeeze(1)
    else:
        size = RANKED if law == "ranked" else VOCABULARY
        order = torch.randperm(VOCABULARY, generator=generator, device=device)
        columns = order[:size].sort().values
        vocabulary = columns if law == "ranked" else None
        values = target[:, columns].float()
        values += torch.randn(values.shape, generator=generator, device=device) * 0.5
        values = values.to(torch.bfloat16)
        draft = DraftLogits(values, vocabulary)
        drawn = torch.multinomial(
            torch.softmax(values.float() / temperature, 1), 1, generator=generator
        )
        ids = columns[drawn.squeeze(1)]
    batch = VerifyInput(
        [""] * num_requests,
        target,
        table[:, -1].contiguous(),
        ids,
        torch.full((num_requests,), num_draft, device=device),
        None,
        torch.full((num_requests,), temperature, device=device),
        torch.arange(num_requests, device=device),
        torch.full((num_requests,), 100, device=device),
        max_num_draft=num_draft,
        all_greedy=False,
        any_greedy=False,
    )
    run = partial(verify_fused, batch, rule, raw=True, draft_logits=draft)
    eager = partial(_reference, batch, rule, draft)

    def check() -> None:
        wide = VerifyInput(**_fields(batch) | {
            "target_logits": batch.target_logits.double(),
            "bonus_logits": batch.bonus_logits.double(),
        })  # fmt: skip
        expected = _reference(wide, rule, draft).token_ids
        wrong = int((run().token_ids != expected).any(dim=1).sum())
        # float32 against float64: a uniform may lie within rounding of a boundary.
        assert wrong <= max(1, num_requests // 100), f"{wrong} of {num_requests} requests differ"
        assert_law(device, rule)

    peers: dict[str, Callable[[], object]] = {
        "PyTorch, eager": eager,
        "PyTorch, compiled": torch.compile(eager, mode="max-autotune-no-cudagraphs"),
    }
    if vllm := _vllm_v2(logits, batch, draft, temperature, rule):
        peers["vLLM V2"] = vllm
    read = target.nbytes + batch.bonus_logits.nbytes
    if draft is not None:
        read += draft.values.nbytes
    shape = {"B": num_requests, "K": num_draft, "V": VOCABULARY, "rule": rule, "draft": law,
             "T": temperature, "dtype": "bf16"}  # fmt: skip
    return KernelCase("verify_fused", shape, run, 2, read, check, peers)


def _fields(batch: VerifyInput) -> dict[str, Any]:
    names = ("request_ids", "target_logits", "bonus_logits", "draft_token_ids", "num_draft",
             "draft_probabilities", "temperatures", "streams", "positions", "max_num_draft",
             "all_greedy", "any_greedy")  # fmt: skip
    return {name: getattr(batch, name) for name in names}


def _reference(batch: VerifyInput, rule: str, draft: DraftLogits | None) -> Any:
    # A batch keeps what it has worked out: each run gets a new one.
    return verify_fused_reference(VerifyInput(**_fields(batch)), rule, raw=True, draft_logits=draft)


def assert_law(device: torch.device, rule: str) -> None:
    """A million requests with one draft token: the first token emitted follows the target."""
    target = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], device=device)
    law = target.flip(0)
    ids = torch.multinomial(law, LAW_SAMPLES, replacement=True)
    ones = torch.ones(LAW_SAMPLES, device=device)
    logits = target.log().expand(LAW_SAMPLES, -1).contiguous()
    batch = VerifyInput(
        [""] * LAW_SAMPLES, logits, logits, ids, ones.long(),
        DraftProbabilities(law.expand(LAW_SAMPLES, -1).contiguous()), ones,
        torch.arange(LAW_SAMPLES, device=device), torch.zeros_like(ids),
        max_num_draft=1, all_greedy=False, any_greedy=False,
    )  # fmt: skip
    tokens = verify_fused(batch, rule).token_ids[:, 0]
    fit = compare("first token", tokens.bincount(minlength=5).cpu(), target.cpu())
    assert fit.p_value > 1e-4, str(fit)


def _vllm_v2(
    logits: Tensor, batch: VerifyInput, draft: DraftLogits | None, temperature: float, rule: str
) -> Callable[[], object] | None:
    """vLLM's V2 path on the same logits; None where it is not installed or has other laws."""
    if draft is not None and draft.vocabulary is not None:
        return None
    try:
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample
    except ImportError:
        return None
    device, num_requests, num_draft = logits.device, len(batch.num_draft), batch.max_num_draft
    width = num_draft + 1
    ids = torch.zeros(num_requests, width, dtype=torch.int64, device=device)
    ids[:, 1:] = batch.draft_token_ids.view(num_requests, num_draft)
    request = torch.arange(num_requests, dtype=torch.int32, device=device)
    place = torch.arange(width, dtype=torch.int32, device=device).repeat(num_requests)
    cumulative = torch.arange(num_requests + 1, dtype=torch.int32, device=device) * width
    values = None
    if draft is not None:
        values = draft.values.view(num_requests, num_draft, -1)

    def run() -> object:
        processed = logits
        if temperature != 1:
            processed = logits.float().div_(temperature)
        return rejection_sample(
            processed, values, ids.flatten(), cumulative, place.long() + 100, request,
            request.repeat_interleave(width), place, batch.temperatures, batch.streams,
            num_draft, use_block_verification=rule == "block",
        )  # fmt: skip

    return run


def head(
    device: torch.device,
    rows: int,
    width: int,
    hidden_size: int,
    *,
    num_columns: int = 1,
    drawn: bool = False,
) -> KernelCase:
    """Bfloat16 weights, a quarter or a sixteenth of the vocabulary."""
    generator = torch.Generator(device).manual_seed(rows)
    normal = partial(torch.randn, generator=generator, device=device)
    full = normal(VOCABULARY, hidden_size).to(torch.bfloat16)
    weight = full[:width].contiguous()
    hidden = normal(rows, hidden_size).to(torch.bfloat16) / hidden_size**0.5
    noise = None
    if drawn:
        streams = torch.arange(rows, device=device)
        noise = Noise(torch.full((rows,), 0.8, device=device), streams, streams, 0)
    run = partial(ranked_lm_head, hidden, weight, noise=noise, num_columns=num_columns,
                  keep_logits=drawn)  # fmt: skip

    def library(rows_of_head: Tensor) -> object:
        logits = torch.nn.functional.linear(hidden, rows_of_head)
        best = logits.topk(num_columns).indices if num_columns > 1 else logits.argmax(dim=1)
        return best, torch.logsumexp(logits.float(), dim=1)

    def check() -> None:
        wide = ranked_lm_head_reference(
            hidden.double(), weight.double(), noise=noise, num_columns=num_columns
        )
        found = run()
        # Products are summed in another order: where columns differ their logits are as good.
        same = (found.columns == wide.columns).double().mean()
        assert same > 0.98, f"{same:.1%} of the columns are the reference's"
        torch.testing.assert_close(found.log_normaliser.double(), wide.log_normaliser,
                                   atol=1e-3, rtol=1e-4)  # fmt: skip

    ranked = partial(library, weight)
    peers = {
        "cuBLAS, ranked rows": ranked,
        "cuBLAS, ranked rows, compiled": torch.compile(ranked, mode="max-autotune-no-cudagraphs"),
        "cuBLAS, whole head": partial(library, full),
    }
    shape = {"rows": rows, "M": width, "H": hidden_size, "k": num_columns, "drawn": drawn,
             "dtype": "bf16"}  # fmt: skip
    return KernelCase("ranked_lm_head", shape, run, 2, weight.nbytes, check, peers)
