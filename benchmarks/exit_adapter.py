"""What trained exit adapters add to the bare exit, on held-out text no model has seen.

    python benchmarks/exit_adapter.py small ADAPTER.safetensors [MORE ...]

Trained by, for example,

    vllm-spec calibrate adapter small --exit-layer 2 --texts zoo --steps 300

Each row is one draft (bare exit, adapter, bare exit one layer later) of one adapter file, as
`calibration.adapter.evaluate` measures it, with how the adapter was trained.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from provenance import provenance

from vllm_spec_plugins import zoo
from vllm_spec_plugins.adapter_file import AdapterCard
from vllm_spec_plugins.calibration.adapter import evaluate, padded, sample_windows
from vllm_spec_plugins.calibration.adapter_block import load_block
from vllm_spec_plugins.calibration.hugging_face import LocalModel
from vllm_spec_plugins.calibration.texts import Corpus, TextTokenizer, windows

RESULTS = Path(__file__).parent / "results" / "exit_adapter.jsonl"
WINDOWS, LENGTH = 128, 256


def main(name: str, paths: list[str]) -> None:
    folder = zoo.ensure(name)
    model = LocalModel.load(folder)
    texts = (text.text for text in Corpus(["zoo:held-out"]))
    every = windows(TextTokenizer(folder), texts, LENGTH)
    held_out = padded(sample_windows(every, WINDOWS, seed=1))
    with RESULTS.open("a") as file:
        for path in paths:
            card = AdapterCard.read(path)
            result = evaluate(model, load_block(path, model), card.exit_layer, held_out)
            training = {k: v for k, v in card.training.items() if k not in ("held_out", "job")}
            for draft in result.drafts:
                row = {
                    "model": name,
                    "exit_layer": card.exit_layer,
                    "ffn_size": card.ffn_size,
                    **{f"draft_{key}": value for key, value in asdict(draft).items()},
                    "gain": result.gain,
                    "gain_standard_error": result.gain_error,
                    "held_out_windows": result.windows,
                    "window_tokens": LENGTH,
                    "training": training,
                    **provenance(),
                }
                file.write(json.dumps(row) + "\n")
                print(path, draft, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model of the zoo")
    parser.add_argument("adapters", nargs="+", help="files of `vllm-spec calibrate adapter`")
    arguments = parser.parse_args()
    main(arguments.model, arguments.adapters)
