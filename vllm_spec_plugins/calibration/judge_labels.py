"""What a judge learns from: tokens in their context, each harmless or an error.

Judge Decoding (Bachmann et al. 2501.19309) takes answers that people marked: every token of a
right answer is harmless, the first error of a wrong one is an error, and what follows an error
says nothing. `judge_mining.py` finds labels without people.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_spec_plugins.errors import SpecPluginsError

from .texts import TextTokenizer

HARMLESS, ERROR, UNKNOWN = 1, 0, -1


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text some of whose tokens are labelled.

    Attributes:
        token_ids: Prompt and answer.
        labels: Of each token: `HARMLESS`, `ERROR` or `UNKNOWN`.
        prompt: Number of its prompt. Texts of one prompt are all learnt from, or all held out.
    """

    token_ids: tuple[int, ...]
    labels: tuple[int, ...]
    prompt: int


def read_labels(path: Path, tokenizer: TextTokenizer) -> list[LabelledText]:
    """Read marked answers: a .jsonl of {"prompt", "answer", "correct", "error_position"}.

    `error_position` is where the first error of a wrong answer stands: the number of characters
    before it, or [first, past the last]. Tokens before it are harmless, after it unknown.

    Raises:
        SpecPluginsError: No such file, or a line is not as it should be.
    """
    if not path.is_file():
        raise SpecPluginsError(f"there are no labels at {path}: give a .jsonl of marked answers.")
    texts: list[LabelledText] = []
    prompts: dict[str, int] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            record = _record(line, f"{path}, line {number}")
            prompt = prompts.setdefault(record["prompt"], len(prompts))
            before = tokenizer.encode([record["prompt"]], special_tokens=True)[0]
            token_ids, offsets = tokenizer.encode_answer(record["answer"])
            if record["correct"]:
                labels = [HARMLESS] * len(token_ids)
            else:
                first, end = record["error_position"]
                labels = [
                    HARMLESS if stop <= first else ERROR if start < end else UNKNOWN
                    for start, stop in offsets.tolist()
                ]
            texts.append(
                LabelledText(
                    (*before.tolist(), *token_ids.tolist()),
                    (*[UNKNOWN] * len(before), *labels),
                    prompt,
                )
            )
    return texts


def _record(line: str, where: str) -> dict[str, Any]:
    """One line, checked; `error_position` as two numbers."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise SpecPluginsError(f"{where} is not JSON: {error}.") from None
    kinds = {"prompt": str, "answer": str, "correct": bool}
    for key, kind in kinds.items():
        if not isinstance(record, dict) or not isinstance(record.get(key), kind):
            raise SpecPluginsError(
                f'{where}: each line must be an object with texts "prompt" and "answer", '
                f'"correct": true or false, and "error_position" where it is false.'
            )
    if record["correct"]:
        return record
    position = record.get("error_position")
    if isinstance(position, int):
        position = [position, position + 1]
    right = (
        isinstance(position, list)
        and len(position) == 2
        and all(type(place) is int for place in position)
        and 0 <= position[0] < position[1] <= len(record["answer"])
    )
    if not right:
        raise SpecPluginsError(
            f'{where}: a wrong answer needs "error_position", the number of characters before its '
            "first error, or [first, past the last], within its "
            f"{len(record['answer'])} characters."
        )
    return {**record, "error_position": position}


def without(texts: Iterable[LabelledText], never: Iterable[int]) -> list[LabelledText]:
    """The same, with no labels on tokens a judge has no say in; texts left without are dropped."""
    silent = frozenset(never)
    kept: list[LabelledText] = []
    for text in texts:
        labels = tuple(
            UNKNOWN if token in silent else label
            for token, label in zip(text.token_ids, text.labels, strict=True)
        )
        if any(label != UNKNOWN for label in labels):
            kept.append(LabelledText(text.token_ids, labels, text.prompt))
    return kept


def digest(texts: Sequence[LabelledText]) -> str:
    """SHA-256 over all tokens and labels, in hexadecimal."""
    total = hashlib.sha256()
    for text in texts:
        rows = np.array([text.token_ids, text.labels], dtype="<i8")
        total.update(len(text.token_ids).to_bytes(8, "little") + rows.tobytes())
    return total.hexdigest()
