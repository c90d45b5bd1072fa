"""Target passes with `jacobi`, against plain decoding: digits of the zoo, and text.

A pass is one step of the engine for one request, its prompt's included: counted from what the
scheduler decided, so how loaded the machine is does not matter. For each draft length, coupling
and filler: passes per text, tokens per pass, acceptance at each place of the draft, and for
digits how likely the codes' marginals and pairs are as far from those of as many images decoded
plainly as they are (chi-square of two samples, each image a draw; p-values of 63 pairs and 64
marginals together, Bonferroni).

    OMP_NUM_THREADS=1 python benchmarks/jacobi.py                      # digits
    OMP_NUM_THREADS=1 python benchmarks/jacobi.py --model small        # source code
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from engine_worker import ENVIRONMENT
from provenance import provenance

if TYPE_CHECKING:
    from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "jacobi.jsonl"
COUPLINGS = ("none", "maximal", "gumbel")
IMAGE_ROW_LENGTH = 8
PROMPT_TOKENS = 128
#: Requests in a step, at most.
BATCH = 64
#: Counts expected below this are merged.
SMALLEST_EXPECTED = 10.0


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to decode. `options` None: plain."""

    num_draft: int
    temperature: float
    options: dict[str, Any] | None = field(default_factory=dict)

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def speculative_config(self) -> dict[str, Any] | None:
        if self.options is None:
            return None
        return {"method": "jacobi", "num_speculative_tokens": self.num_draft, **self.options}


def settings(
    model: str, lengths: list[int], temperatures: list[float], only: list[str]
) -> list[Setting]:
    """Plain decoding first: the others are compared with it."""
    fillers: list[dict[str, Any]] = [{"filler": "repeat_left"}, {"filler": "random"}]
    if model == "digits":
        fillers.append({"filler": "above", "image_row_length": IMAGE_ROW_LENGTH})
    fillers = [filler for filler in fillers if filler["filler"] in only]
    found = [Setting(0, temperature, None) for temperature in temperatures]
    for temperature in temperatures:
        for length in lengths:
            for filler in fillers:
                # Greedy drafts are choices: there is nothing to couple.
                couplings = COUPLINGS if temperature > 0 else ("none",)
                found += [
                    Setting(length, temperature, {"coupling": coupling, **filler})
                    for coupling in couplings
                ]
    return found


@dataclass(slots=True)
class Decoded:
    """Texts `[N, length]` and what they took.

    Attributes:
        token_ids: Int64.
        passes: Of the target, over all texts.
        acceptance_rate_at: Accepted at each place of the draft, among drafts as long as that.
    """

    token_ids: Tensor
    passes: int
    acceptance_rate_at: list[float]


def decode(
    model: str, setting: Setting, prompts: list[list[int]], tokens: int, seed: int
) -> Decoded:
    """Continue every prompt by so many tokens."""
    import torch
    from vllm import LLM, SamplingParams

    from vllm_spec_plugins import zoo
    from vllm_spec_plugins.engine.offline import shut_down

    llm: Any = LLM(
        model=str(zoo.ensure(model)),
        dtype="float32",
        max_model_len=len(prompts[0]) + tokens + 32,
        max_num_seqs=BATCH,
        max_num_batched_tokens=8192,
        enforce_eager=True,
        enable_prefix_caching=False,
        use_tqdm_on_load=False,
        disable_log_stats=True,
        skip_tokenizer_init=True,
        seed=seed,
        speculative_config=setting.speculative_config,
    )
    passes = Counter[str]()
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule = scheduler.schedule

    def counted(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        passes.update(output.num_scheduled_tokens.keys())
        return output

    scheduler.schedule = counted
    sampling = SamplingParams(
        temperature=setting.temperature, max_tokens=tokens, ignore_eos=True, detokenize=False
    )
    try:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(given, sampling, use_tqdm=False)
        rates: list[float] = []
        if setting.options is not None:
            [metrics] = llm.collective_rpc("spec_plugins_metrics")
            [row] = metrics["by_method"]
            rates = row["acceptance_rate_at"]
    finally:
        shut_down(llm)
    texts = torch.tensor([list(output.outputs[0].token_ids) for output in outputs])
    assert len(passes) == len(prompts)
    return Decoded(texts, passes.total(), rates)


def law_p_value(found: Tensor, wanted: Tensor) -> float:
    """Chance that two samples of images `[N, 64]` of one law differ as much somewhere.

    Every code's marginal and every pair of neighbours in raster order is one test of
    homogeneity; the smallest p-value times their number.
    """
    import torch

    tests = list(zip(found.unbind(1), wanted.unbind(1), strict=True))
    width = int(max(found.max(), wanted.max())) + 1
    pairs = [texts[:, :-1] * width + texts[:, 1:] for texts in (found, wanted)]
    tests += list(zip(pairs[0].unbind(1), pairs[1].unbind(1), strict=True))
    smallest = 1.0
    for one, two in tests:
        _, index = torch.unique(torch.cat([one, two]), return_inverse=True)
        bins = int(index.max()) + 1
        counts = torch.stack(
            [torch.bincount(part, minlength=bins).double() for part in index.split(len(one))]
        )
        rare = counts.sum(dim=0) < 2 * SMALLEST_EXPECTED
        merged = torch.cat([counts[:, ~rare], counts[:, rare].sum(dim=1, keepdim=True)], dim=1)
        merged = merged[:, merged.sum(dim=0) > 0]
        expected = merged.mean(dim=0)
        statistic = float(((merged - expected) ** 2 / expected).sum())
        half = torch.tensor([(merged.shape[1] - 1) / 2, statistic / 2], dtype=torch.float64)
        if merged.shape[1] > 1:
            smallest = min(smallest, float(torch.special.gammaincc(half[0], half[1])))
    return min(1.0, smallest * len(tests))


def prompts_for(model: str, count: int) -> list[list[int]]:
    """The ten digits in turn, or the beginnings of held-out source files."""
    if model == "digits":
        import torch

        from vllm_spec_plugins.zoo.image_tokens import prompts_of

        return prompts_of(torch.arange(count) % 10).tolist()
    from vllm_spec_plugins import zoo
    from vllm_spec_plugins.calibration.texts import TextTokenizer, windows
    from vllm_spec_plugins.zoo.corpus import held_out_files

    tokenizer = TextTokenizer(zoo.ensure(model))
    first = (next(windows(tokenizer, [f.text], PROMPT_TOKENS), None) for f in held_out_files())
    found = [part.tolist() for part in first if part is not None]
    if len(found) < count:
        raise typer.BadParameter(f"there are {len(found)} held-out prompts, not {count}")
    return found[:count]


def done_before(path: Path) -> set[str]:
    """What rows are there already: a stopped run goes on."""
    if not path.exists():
        return set()
    return {_identity(json.loads(line)) for line in path.read_text().splitlines()}


def _identity(row: dict[str, Any]) -> str:
    return json.dumps([row[name] for name in ("model", "key", "texts", "tokens", "seed")])


def main(
    model: Annotated[str, typer.Option(help="Of the zoo.")] = "digits",
    texts: Annotated[int, typer.Option(min=1, help="Of each setting.")] = 0,
    lengths: Annotated[str, typer.Option(help="Draft tokens, comma-separated.")] = "4,8,16,32",
    fillers: Annotated[str, typer.Option(help="Comma-separated.")] = "repeat_left,random,above",
    temperatures: Annotated[str, typer.Option(help="Comma-separated.")] = "1.0",
    seed: Annotated[int, typer.Option(help="Of plain decoding; the others take the next.")] = 0,
    output: Annotated[Path, typer.Option(help="Rows are appended.")] = RESULTS,
) -> None:
    """Measure every setting; settings that have their rows are left out."""
    os.environ.update(ENVIRONMENT)
    from vllm_spec_plugins.zoo.image_tokens import TOKENS_PER_IMAGE

    is_image = model == "digits"
    count = texts or (1000 if is_image else 20)
    tokens = TOKENS_PER_IMAGE if is_image else 128
    prompts = prompts_for(model, count)
    output.parent.mkdir(parents=True, exist_ok=True)
    done, where_from = done_before(output), provenance()
    plain: dict[float, Tensor] = {}
    chosen = settings(
        model,
        [int(n) for n in lengths.split(",")],
        [float(t) for t in temperatures.split(",")],
        fillers.split(","),
    )
    for setting in chosen:
        identity = {
            "model": model,
            "key": setting.key,
            "texts": count,
            "tokens": tokens,
            "seed": seed,
        }
        is_plain = setting.options is None
        if _identity(identity) in done and not is_plain:
            continue
        found = decode(model, setting, prompts, tokens, seed if is_plain else seed + 1)
        if is_plain:
            plain[setting.temperature] = found.token_ids
            if _identity(identity) in done:
                continue
        row: dict[str, Any] = {
            **identity,
            "coupling": (setting.options or {}).get("coupling"),
            "filler": (setting.options or {}).get("filler"),
            "num_draft": setting.num_draft,
            "temperature": setting.temperature,
            "passes_per_text": found.passes / count,
            "tokens_per_pass": count * tokens / found.passes,
            "acceptance_rate_at": [round(rate, 4) for rate in found.acceptance_rate_at],
        }
        if setting.temperature == 0 and not is_plain:
            same = (found.token_ids == plain[0.0]).all(dim=1)
            row["texts_like_plain"] = int(same.sum())
        elif is_image and not is_plain:
            row["law_p_value"] = law_p_value(found.token_ids, plain[setting.temperature])
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **where_from}) + "\n")
        print({k: v for k, v in row.items() if k not in ("key", "acceptance_rate_at")}, flush=True)


if __name__ == "__main__":
    typer.run(main)
