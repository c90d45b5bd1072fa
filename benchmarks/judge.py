"""What a judge's head buys on sums written out in words, and what it costs.

    vllm-spec calibrate judge sums --prompts prompts.jsonl --draft sums-draft \\
        --checker vllm_spec_plugins.zoo.sums:final_answer --max-tokens 72 --recall 0.99 \\
        --output judge.safetensors
    OMP_NUM_THREADS=1 python benchmarks/judge.py judge.safetensors
    python benchmarks/judge.py --plot

The zoo's `sums`, drafted for by `sums-draft` through the real engine, on prompts the head was not
trained on: acceptance length (with the bonus token), price in total variation per draft token, and
the share of right answers. Lossless, the head at several thresholds, and the verifier `threshold`,
which asks for the target's own probability, at several as well. Rows of kind "roc" are the curves
of the head's calibration, on its held-out prompts. The task is made so that harmless tokens may
be as unlikely as wrong ones (`zoo/sums.py`): it shows what a judge is for, not what it is worth
elsewhere.
"""

from __future__ import annotations

import json
import math
import os
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
from provenance import provenance

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm_spec_plugins import zoo
from vllm_spec_plugins.calibration.generations import Engine, offline_engine
from vllm_spec_plugins.judge_head import JudgeCard
from vllm_spec_plugins.zoo.sums import final_answer, solve, sums

RESULTS = Path(__file__).parent / "results" / "judge.jsonl"
PICTURE = RESULTS.with_suffix(".png")
#: Seed of the tasks, and seed and number of those the head learnt from (docs/judge.md).
SEED, LEARNT = 3, (2, 300)
MAX_TOKENS = 72
#: Beside the head's own threshold: of its score.
SCORES = (0.99, 0.1, 0.001)
#: Of the target's log probability.
LOG_PROBABILITIES = (-4.0, -5.0, -6.5, -8.0)


def prompts_not_learnt(count: int, learnt: set[str]) -> list[str]:
    """So many different prompts."""
    found = dict.fromkeys(task.prompt for task in sums(SEED, 4 * count))
    return [prompt for prompt in found if prompt not in learnt][:count]


def main(
    head: Annotated[str, typer.Argument(help="Of `vllm-spec calibrate judge`.")] = "",
    prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 150,
    num_speculative_tokens: Annotated[int, typer.Option(help="Tokens drafted.")] = 6,
    seeds: Annotated[str, typer.Option(help="Of the requests at temperature 1.")] = "0,1",
    plot: Annotated[bool, typer.Option("--plot", help="Only draw what was measured.")] = False,
) -> None:
    if not plot:
        rows = measure(head, prompts, num_speculative_tokens, [int(s) for s in seeds.split(",")])
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw([json.loads(line) for line in RESULTS.read_text().splitlines()])


def measure(head: str, count: int, most: int, seeds: list[int]) -> list[dict[str, Any]]:
    """All rows of a run."""
    card = JudgeCard.read(head)
    target, draft = zoo.ensure("sums"), zoo.ensure("sums-draft")
    learnt = {task.prompt for task in sums(*LEARNT)}
    texts = prompts_not_learnt(count, learnt)
    source = provenance()
    report = json.loads(Path(head).with_suffix(".json").read_text())
    held_out = report["training"]["held_out"]
    shared = {
        "held_out": {key: held_out[key] for key in ("tokens", "errors", "prompts")},
        "gain": held_out["gain"],
        "gain_error": held_out["gain_error"],
        "data_sha256": card.data_sha256,
    }
    rows = [
        {"kind": "roc", "score": name, **held_out[name], **curve, **shared, **source}
        for name, curve in report["curves"].items()
    ]
    levels = sorted({*SCORES, card.threshold}, reverse=True)
    for score, least in zip_longest(levels, LOG_PROBABILITIES):
        # Requests of all three share the batches of one engine, and do not touch each other.
        allowed: list[dict[str, Any]] = []
        if score is not None:
            allowed.append({"name": "judge", "head": head, "threshold": score})
        if least is not None:
            allowed.append({"name": "threshold", "min_log_probability": least})
        of: dict[str, float | None] = {"lossless": None} if score == levels[0] else {}
        of |= {one["name"]: score if one["name"] == "judge" else least for one in allowed}
        config = {
            "method": "draft_model",
            "model": str(draft),
            "num_speculative_tokens": most,
            "draft_sample_method": "probabilistic",
            "verifier": "lossless",
            "verifiers_allowed": allowed,
        }
        engine = Engine("float32", 1, options={"speculative_config": config, "max_num_seqs": 32})
        with offline_engine(target, 128, engine, seed=0) as llm:
            for temperature, seed in [(0.0, 0), *((1.0, seed) for seed in seeds)]:
                for row in run(llm, texts, temperature, seed, list(of)):
                    level = of[row["verifier"]]
                    row |= {
                        "kind": "engine",
                        "level": level,
                        "own_threshold": level == card.threshold,
                        "num_speculative_tokens": most,
                        "prompts": len(texts),
                    }
                    print(row, flush=True)
                    rows.append({**row, **source})
    return rows


def run(
    llm: Any, texts: list[str], temperature: float, seed: int, verifiers: list[str]
) -> list[dict[str, Any]]:
    """One pass over the prompts with each verifier, all at once."""
    from vllm import SamplingParams

    before = tallies(llm)
    asked = [(text, name) for text in texts for name in verifiers]
    params = [
        SamplingParams(
            temperature=temperature,
            seed=1000 * seed + i // len(verifiers),
            max_tokens=MAX_TOKENS,
            extra_args={"spec_decode": {"verifier": name}},
        )
        for i, (_, name) in enumerate(asked)
    ]
    outputs = llm.generate([text for text, _ in asked], params, use_tqdm=False)
    after = tallies(llm)
    rows: list[dict[str, Any]] = []
    for name in verifiers:
        spent = {key: after[name][key] - before.get(name, {}).get(key, 0) for key in after[name]}
        mine = [
            (prompt, output.outputs[0])
            for (prompt, other), output in zip(asked, outputs, strict=True)
            if other == name
        ]
        right = sum(final_answer(prompt, output.text) == solve(prompt) for prompt, output in mine)
        rows.append(
            {
                "verifier": name,
                "temperature": temperature,
                "seed": seed,
                "acceptance_length": 1 + spent["accepted"] / spent["steps"],
                "price": spent["price"] / spent["drafted"],
                "accuracy": right / len(mine),
                **{key: int(spent[key]) for key in ("steps", "drafted", "accepted")},
                "tokens": sum(len(output.token_ids) for _, output in mine),
            }
        )
    return rows


def tallies(llm: Any) -> dict[str, dict[str, float]]:
    """What was drafted for each verifier so far, and its price."""
    [metrics] = llm.collective_rpc("spec_plugins_metrics")
    return {
        row["verifier"]: {
            **{key: row[key] for key in ("steps", "drafted", "accepted")},
            "price": row["total_variation_price"] * row["examined"],
        }
        for row in metrics["by_method"]
    }


def draw(rows: list[dict[str, Any]]) -> None:
    """Both curves, and quality against acceptance length at both temperatures."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator

    mpl.use("Agg")
    figure = Figure(figsize=(15, 4.8), layout="constrained", facecolor="white")
    left, *others = figure.subplots(1, 3)
    colours = {"judge": "#5b8def", "head": "#5b8def", "threshold": "#c0504d",
               "probability": "#c0504d", "lossless": "#202124"}  # fmt: skip
    for row in rows:
        if row["kind"] == "roc":
            label = "head" if row["score"] == "head" else "target's own probability"
            left.plot(row["errors"], row["harmless"], color=colours[row["score"]],
                      label=f"{label}: area {row['area']:.3f}")  # fmt: skip
            left.plot([1 - row["recall"]], [row["harmless_passed"]], "o",
                      color=colours[row["score"]])  # fmt: skip
            held_out = row["held_out"]
    left.set(
        title=f"{held_out['tokens']} mismatches of {held_out['prompts']} held-out prompts",
        xlabel="share of errors that pass",
        ylabel="share of harmless tokens that stand",
    )
    left.legend(frameon=False, loc="lower right")
    for axes, temperature in zip(others, (0.0, 1.0), strict=True):
        chosen = [r for r in rows if r["kind"] == "engine" and r["temperature"] == temperature]
        for name, label in (
            ("lossless", "lossless"),
            ("judge", "judge, by threshold of the score"),
            ("threshold", "threshold, by least log probability"),
        ):
            points = [mean_of(chosen, name, level) for level in levels_of(chosen, name)]
            axes.errorbar(
                [p["acceptance_length"] for p in points],
                [p["accuracy"] for p in points],
                yerr=[p["accuracy_error"] for p in points],
                xerr=[p["length_error"] for p in points],
                fmt="o-" if len(points) > 1 else "D",
                color=colours[name],
                label=label,
                capsize=2,
            )
            # Curves may meet: the labels of one are above its points, those of the other below.
            place, side = ((6, 6), "left") if name == "judge" else ((-6, -12), "right")
            for point in points:
                if point["level"] is not None:
                    axes.annotate(
                        f"{point['level']:.3g}", (point["acceptance_length"], point["accuracy"]),
                        xytext=place, textcoords="offset points", fontsize=8, ha=side,
                        color=colours[name],
                    )  # fmt: skip
        axes.margins(x=0.12)
        axes.set(
            title=f"temperature {temperature:g}",
            xlabel="acceptance length, bonus token included",
            ylabel="share of right answers",
            ylim=(-0.03, 1.06),
        )
        axes.xaxis.set_major_locator(MultipleLocator(0.5))
        axes.legend(frameon=False, loc="lower left")
    figure.savefig(PICTURE, dpi=130)
    print(PICTURE.name)


def levels_of(rows: list[dict[str, Any]], name: str) -> list[Any]:
    """Levels of one curve in order of rising acceptance."""
    found = dict.fromkeys(row["level"] for row in rows if row["verifier"] == name)
    return sorted(found, key=lambda level: -(level or 0))


def mean_of(rows: list[dict[str, Any]], name: str, level: Any) -> dict[str, Any]:
    """One point: the mean over seeds. Its error: over seeds where there are several."""
    chosen = [row for row in rows if row["verifier"] == name and row["level"] == level]
    lengths = [row["acceptance_length"] for row in chosen]
    accuracy = sum(row["accuracy"] for row in chosen) / len(chosen)
    mean = sum(lengths) / len(lengths)
    spread = sum((length - mean) ** 2 for length in lengths) / max(1, len(lengths) - 1)
    texts = sum(row["prompts"] for row in chosen)
    return {
        "level": level,
        "acceptance_length": mean,
        "length_error": math.sqrt(spread / len(lengths)),
        "accuracy": accuracy,
        "accuracy_error": math.sqrt(accuracy * (1 - accuracy) / texts),
    }


if __name__ == "__main__":
    typer.run(main)
