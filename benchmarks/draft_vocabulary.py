"""Which share of held-out source code draft vocabularies of the zoo's tokenizer have.

    python benchmarks/draft_vocabulary.py [--target small] [--dynamic-tokens 64]
                                          [--generations 256]

What `vllm-spec calibrate vocab small --texts zoo` counts and measures, at sizes that double, with
and without dynamic tokens; beside it the same share of what the target itself writes at
temperature 1 after that many prompts. Nothing is timed, and nothing generated is counted. One JSON
line per size is appended to benchmarks/results/draft_vocabulary.jsonl.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from provenance import provenance

from vllm_spec_plugins import zoo
from vllm_spec_plugins.calibration import vocabulary
from vllm_spec_plugins.calibration.generations import Engine, Sampling, generate
from vllm_spec_plugins.calibration.texts import Corpus, TextTokenizer
from vllm_spec_plugins.draft_vocabulary import rank

RESULTS = Path(__file__).parent / "results" / "draft_vocabulary.jsonl"


def own_text(folder: Path, number: int, sampling: Sampling) -> list[vocabulary.Request]:
    """What the target writes after prompts from texts that are not held out."""
    prompts = vocabulary.prompts(TextTokenizer(folder), Corpus(["zoo"]), number)
    with tempfile.TemporaryDirectory() as scratch:
        written = generate(folder, prompts, Path(scratch), sampling, Engine(threads=1))
    return [
        vocabulary.Request(np.concatenate([prompt, continued]), len(prompt))
        for prompt, continued in zip(prompts, written, strict=True)
    ]


def rows(
    folder: Path, dynamic_tokens: int, generated: Sequence[vocabulary.Request]
) -> Iterator[dict[str, Any]]:
    """One for each size, from 512 tokens to half of the vocabulary."""
    tokenizer, corpus = TextTokenizer(folder), Corpus(["zoo"])
    vocab_size = vocabulary.vocab_size_of(folder)
    always = vocabulary.control_token_ids(folder, tokenizer, vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        counted = vocabulary.count(tokenizer, corpus, vocab_size, Path(scratch) / "counting", "")
    ranked = rank("text", counted.counts, always, 0)
    needed = vocabulary.smallest_size_with(ranked, always, vocab_size)
    requests = [vocabulary.Request(token_ids) for token_ids in counted.held_out]
    size = 512
    while size < vocab_size:
        yield {
            "vocab_size": vocab_size,
            "size": size,
            "dynamic_tokens": dynamic_tokens,
            "texts": counted.num_texts,
            "held_out_texts": sum(text.held_out for text in corpus),
            "counted_tokens": int(counted.counts.sum()),
            "held_out_tokens": sum(map(len, counted.held_out)),
            "covered": vocabulary.coverage(needed, requests, size, 0),
            "covered_with_dynamic": vocabulary.coverage(needed, requests, size, dynamic_tokens),
            "generated_texts": len(generated),
            "generated_tokens": sum(len(text.token_ids) - text.start for text in generated),
            "generated_covered": vocabulary.coverage(needed, generated, size, 0),
            "generated_covered_with_dynamic": vocabulary.coverage(
                needed, generated, size, dynamic_tokens
            ),
        }
        size *= 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="small", help="model of the zoo")
    parser.add_argument("--dynamic-tokens", type=int, default=64)
    parser.add_argument("--generations", type=int, default=256, help="texts the target writes")
    arguments = parser.parse_args()
    folder, sampling = zoo.ensure(arguments.target), Sampling(max_tokens=256, temperature=1.0)
    source = {
        "target": arguments.target,
        "corpus": "zoo",
        "temperature": sampling.temperature,
        **provenance(),
    }
    generated = own_text(folder, arguments.generations, sampling)
    for row in rows(folder, arguments.dynamic_tokens, generated):
        with RESULTS.open("a") as file:
            file.write(json.dumps({"benchmark": "draft_vocabulary", **row, **source}) + "\n")
        print(
            f"{row['size']:>6,}: {row['covered']:.1%}, "
            f"with dynamic tokens {row['covered_with_dynamic']:.1%}; "
            f"the target's own text {row['generated_covered']:.1%}, "
            f"with dynamic tokens {row['generated_covered_with_dynamic']:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
