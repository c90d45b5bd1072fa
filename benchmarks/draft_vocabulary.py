"""Which share of held-out source code draft vocabularies of the zoo's tokenizer have.

    python benchmarks/draft_vocabulary.py [--target small] [--dynamic-tokens 64]

What `vllm-spec calibrate vocab small --texts zoo` counts and measures, at sizes that double, with
and without dynamic tokens. Nothing is timed. One JSON line per size is appended to
benchmarks/results/draft_vocabulary.jsonl.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from provenance import provenance

from vllm_spec_plugins import zoo
from vllm_spec_plugins.calibration import vocabulary
from vllm_spec_plugins.calibration.texts import Corpus, TextTokenizer
from vllm_spec_plugins.draft_vocabulary import rank

RESULTS = Path(__file__).parent / "results" / "draft_vocabulary.jsonl"


def rows(folder: Path, dynamic_tokens: int) -> Iterator[dict[str, Any]]:
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
        }
        size *= 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="small", help="model of the zoo")
    parser.add_argument("--dynamic-tokens", type=int, default=64)
    arguments = parser.parse_args()
    source = {"target": arguments.target, "corpus": "zoo", **provenance()}
    for row in rows(zoo.ensure(arguments.target), arguments.dynamic_tokens):
        with RESULTS.open("a") as file:
            file.write(json.dumps({"benchmark": "draft_vocabulary", **row, **source}) + "\n")
        print(
            f"{row['size']:>6,}: {row['covered']:.1%}, "
            f"with dynamic tokens {row['covered_with_dynamic']:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
