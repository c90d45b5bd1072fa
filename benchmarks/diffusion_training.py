"""How good a diffusion drafter gets with the tokens it is trained on, beside a draft model.

    python benchmarks/diffusion_training.py [--target small] [--draft-model nano] [--steps 600]

Counts only: acceptance follows exactly from text the target wrote to held-out prompts, so no row
depends on how busy the machine was (seconds are given, but are no measurement).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance

from vllm_spec_plugins import zoo
from vllm_spec_plugins.calibration.adapter import padded, sample_windows
from vllm_spec_plugins.calibration.diffusion_evaluation import (
    evaluate,
    evaluate_causal,
    write_texts,
)
from vllm_spec_plugins.calibration.diffusion_start import (
    conditioned,
    from_model,
    mask_token_of,
)
from vllm_spec_plugins.calibration.diffusion_training import DiffusionRecipe, job_of, train
from vllm_spec_plugins.calibration.hugging_face import LocalModel
from vllm_spec_plugins.calibration.texts import Corpus, TextTokenizer, windows
from vllm_spec_plugins.diffusion.conditioning import TargetStates, layers_of
from vllm_spec_plugins.diffusion.drafter import DiffusionDrafter

ROWS = Path(__file__).parent / "results" / "diffusion_training.jsonl"


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    recipe = DiffusionRecipe(
        block=arguments.block,
        steps=arguments.steps,
        window=arguments.window,
        batch_size=arguments.batch_size,
        num_masks=arguments.masks,
        stage_two=arguments.stage_two,
        decay=arguments.decay,
        text_weight=arguments.text_weight,
        distil=not arguments.text_labels,
        matrix_lr=arguments.matrix_lr,
        lr=arguments.lr,
        checkpoint_every=arguments.every,
    )
    folder = zoo.ensure(arguments.target)
    target = LocalModel.load(folder)
    start = LocalModel.load(zoo.ensure(arguments.start)) if arguments.start else target
    tokenizer = TextTokenizer(folder)
    drafter = from_model(start, arguments.layers, mask_token_of(tokenizer, target.vocab_size))
    layers = layers_of(arguments.condition_on_layers, target.num_layers)
    if layers:
        states = TargetStates(arguments.target, None, target.num_layers, target.hidden_size, layers)
        drafter = conditioned(drafter, states)
    every, prompts = (
        [text.text for text in Corpus(["zoo"]) if text.held_out == held_out]
        for held_out in (False, True)
    )
    held_out = np.stack(
        sample_windows(windows(tokenizer, prompts, arguments.prompt), arguments.texts, 1)
    )
    written = {
        float(not greedy): write_texts(target, held_out, arguments.new, greedy=greedy)
        for greedy in (True, False)
    }
    shared = {
        "target": arguments.target,
        "texts": arguments.texts,
        "prompt_tokens": arguments.prompt,
        "new_tokens": arguments.new,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.output / f"{arguments.name}.checkpoint"
    resumed = checkpoint.exists()  # then its first rows are there already

    def keep(row: dict[str, Any]) -> None:
        _show(row)
        if arguments.record:
            with ROWS.open("a") as file:
                file.write(json.dumps({**row, **provenance()}) + "\n")

    compared = {} if resumed or arguments.draft_model == "none" else written
    for temperature, texts in compared.items():
        draft_model = LocalModel.load(zoo.ensure(arguments.draft_model))
        quality = evaluate_causal(target, draft_model, texts, recipe.block)
        keep(
            {
                **shared,
                "drafter": arguments.draft_model,
                "passes": "one per draft token",
                "parameters_in_layers": draft_model.layer_parameters * draft_model.num_layers,
                "parameters": sum(w.numel() for w in draft_model.module.parameters()),
                "temperature": temperature,
                **quality.rounded(),
            }
        )

    began = time.perf_counter()

    def measure(steps: int, drafter: DiffusionDrafter, *, withheld: bool = False) -> None:
        due = not arguments.measure or steps % arguments.measure == 0 or steps == recipe.steps
        if not due and not withheld:
            return
        most = recipe.block if steps == recipe.steps else min(8, recipe.block)
        seconds = round(time.perf_counter() - began, 1)
        for temperature, texts in written.items():
            quality = evaluate(target, drafter, texts, most, withheld=withheld)
            keep(
                {
                    **shared,
                    "drafter": arguments.name,
                    "passes": "one per draft",
                    "start": arguments.start or arguments.target,
                    "layers": arguments.layers,
                    "conditioned_on_layers": list(layers),
                    "states_withheld": withheld,
                    "parameters_in_layers": sum(w.numel() for w, _ in drafter.matrices()),
                    "parameters": sum(w.numel() for w in drafter.parameters()),
                    "recipe": dataclasses.asdict(recipe),
                    "steps": steps,
                    "text_tokens": steps * recipe.batch_size * recipe.window,
                    "seconds_loaded_machine": seconds,
                    "temperature": temperature,
                    **quality.rounded(),
                }
            )

    if arguments.withheld:
        state = torch.load(checkpoint, weights_only=True)
        drafter.load_state_dict(state["drafter"])
        measure(len(state["losses"]), drafter, withheld=True)
        return
    if not resumed:
        measure(0, drafter)
    learnt = padded(list(windows(tokenizer, every, recipe.window)))
    data = f"zoo {len(learnt)} {int(learnt.sum())}"
    job = job_of(recipe, drafter, target, data)
    trained = train(
        drafter,
        target,
        recipe,
        learnt,
        checkpoint,
        job,
        lambda step, loss: print(step, f"{loss:.3f}", flush=True) if step % 5 == 0 else None,
        measure,
    )
    torch.save(trained.drafter.export(), arguments.output / f"{arguments.name}.pt")
    losses = arguments.output / f"{arguments.name}.losses.json"
    losses.write_text(json.dumps(trained.losses))


def _show(row: dict[str, Any]) -> None:
    lengths = row["acceptance_length"]
    at = " ".join(f"{k}:{lengths[k - 1]:.2f}" for k in (1, 2, 4, 8, 16) if k <= len(lengths))
    overlap = " ".join(f"{x:.3f}" for x in row["overlap"][:6])
    agreement = " ".join(f"{x:.3f}" for x in row["agreement"][:6])
    print(
        f"{row['drafter']} steps {row.get('steps')} T={row['temperature']:g} length {at} | "
        f"overlap {overlap} | agreement {agreement}",
        flush=True,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="small")
    parser.add_argument("--draft-model", default="nano", help="to compare with; or none")
    parser.add_argument("--start", default="", help="model whose layers it starts from")
    parser.add_argument("--name", default="diffusion")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--condition-on-layers", default="none", help="numbers, spread or none")
    parser.add_argument(
        "--withheld",
        action="store_true",
        help="do not train: measure the checkpoint without the target's states, as where vLLM "
        "takes all of the text from its prefix cache",
    )
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--masks", type=int, default=192, help="beside each window")
    parser.add_argument("--stage-two", type=float, default=DiffusionRecipe().stage_two)
    parser.add_argument("--decay", type=float, default=1.5)
    parser.add_argument("--text-weight", type=float, default=0.5)
    parser.add_argument("--text-labels", action="store_true")
    parser.add_argument("--matrix-lr", type=float, default=0.01)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=25, help="steps between checkpoints")
    parser.add_argument("--measure", type=int, default=50, help="steps between measurements")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("diffusion-training"))
    parser.add_argument("--record", action="store_true", help="append the rows to results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
