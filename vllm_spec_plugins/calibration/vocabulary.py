"""Which tokens a draft needs: counted in text and in what the target itself writes.

Shapes: V tokens of the target's vocabulary; B token ids of one text or part of a text.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_spec_plugins.draft_vocabulary import RankedList
from vllm_spec_plugins.errors import SpecPluginsError

from .texts import Corpus, Text, TextTokenizer, windows

#: Held-out tokens kept for measuring, in parts of at most so many: what one request may hold.
_HELD_OUT_TOKENS, _HELD_OUT_PART = 1_000_000, 4096
#: Bytes tokenized at once, and seconds between two saved states.
_BATCH, _SAVE_EVERY = 1_000_000, 20.0
#: Tokens of each prompt that the target continues.
PROMPT_TOKENS = 128
#: One generation in so many is measured on, not counted.
_HELD_OUT_GENERATIONS = 10
#: Beside the target's own text, other text counts as so many tokens per entry of the vocabulary.
#: Measured on the zoo's `small`: best for held-out generations with 12,000 and 61,000 tokens.
_TOKENS_OF_TEXT = 10
#: Predicted speed-ups this close to the best are as good.
_NEARLY_BEST = 0.02
#: Places kept free for future tokens: they stand for nothing and are never written.
_RESERVED = re.compile(r"reserved|unused|extra_id|placeholder|\bdummy", re.IGNORECASE)


# --- counting --------------------------------------------------------------------------------


@dataclass(slots=True)
class Counted:
    """A corpus, counted.

    Attributes:
        counts: `[V]` int64 occurrences in what is not held out.
        held_out: `[B]` int64 each: held-out texts, long ones in parts.
        num_texts: Read so far, held-out ones included.
    """

    counts: NDArray[np.int64]
    held_out: list[NDArray[np.int64]] = field(default_factory=list)
    num_texts: int = 0

    def add(self, tokenizer: TextTokenizer, texts: Sequence[Text]) -> None:
        """Count some texts, or keep them where they are held out."""
        encoded = tokenizer.encode([text.text for text in texts])
        counted = [ids for ids, text in zip(encoded, texts, strict=True) if not text.held_out]
        if counted:
            every_id = np.concatenate(counted)
            if len(every_id) and int(every_id.max()) >= len(self.counts):
                raise SpecPluginsError(
                    f"the tokenizer gives id {every_id.max()}, the model has {len(self.counts)} "
                    "tokens: tokenizer and config.json are not of the same model."
                )
            self.counts += np.bincount(every_id, minlength=len(self.counts))
        for ids, text in zip(encoded, texts, strict=True):
            if text.held_out and sum(map(len, self.held_out)) < _HELD_OUT_TOKENS:
                self.held_out += np.split(ids, range(_HELD_OUT_PART, len(ids), _HELD_OUT_PART))
        self.num_texts += len(texts)

    def save(self, path: Path, key: str) -> None:
        """Write the state; it appears complete or not at all."""
        from safetensors.numpy import save_file

        lengths = np.array([len(part) for part in self.held_out], dtype=np.int64)
        tokens = np.concatenate([*self.held_out, np.zeros(0, np.int64)])
        tensors = {"counts": self.counts, "held_out": tokens, "lengths": lengths}
        neighbour = path.with_name(path.name + ".new")
        save_file(tensors, neighbour, {"key": key, "num_texts": str(self.num_texts)})
        neighbour.replace(path)

    @classmethod
    def load(cls, path: Path, key: str) -> Counted | None:
        """A saved state of the same count; None where there is none."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != key:
                    return None
                counts, tokens, lengths = map(file.get_tensor, ("counts", "held_out", "lengths"))
        except (OSError, SafetensorError):
            return None
        parts = np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []
        return cls(counts, list(parts), int(metadata["num_texts"]))


def count(
    tokenizer: TextTokenizer,
    corpus: Corpus,
    vocab_size: int,
    state: Path,
    key: str,
    on_progress: Callable[[int], object] = lambda _: None,
) -> Counted:
    """Count a corpus; a killed run goes on from its last saved state.

    Args:
        tokenizer: Of the target.
        corpus: Read in order.
        vocab_size: V.
        state: File for the state; left there, for the caller to remove once all is done.
        key: Says which tokenizer counts; the corpus is added.
        on_progress: Told the bytes read so far.

    Raises:
        SpecPluginsError: No text is held out, so nothing could be measured; or the tokenizer is
            another model's.
    """
    key = hashlib.sha256(f"{key} {corpus.fingerprint}".encode()).hexdigest()
    counted = Counted.load(state, key) or Counted(np.zeros(vocab_size, np.int64))
    already, saved, num_bytes = counted.num_texts, time.monotonic(), 0
    batch: list[Text] = []
    waiting = 0
    for number, text in enumerate(corpus):
        num_bytes += text.num_bytes
        if number < already:
            continue
        batch.append(text)
        waiting += text.num_bytes
        if waiting >= _BATCH:
            counted.add(tokenizer, batch)
            batch, waiting = [], 0
            on_progress(num_bytes)
            if time.monotonic() - saved >= _SAVE_EVERY:
                counted.save(state, key)
                saved = time.monotonic()
    counted.add(tokenizer, batch)
    on_progress(num_bytes)
    counted.save(state, key)
    if not counted.held_out:
        raise SpecPluginsError(
            f"too few texts: none of {counted.num_texts} fell into the twentieth that is "
            "held out to measure coverage on. Give more."
        )
    return counted


def control_token_ids(folder: Path, tokenizer: TextTokenizer, vocab_size: int) -> NDArray[np.int64]:
    """Sorted ids that belong in every draft vocabulary, however rare in text.

    End-of-text tokens and all tokens added for control, chat and tools; places reserved for
    tokens of the future are not among them.
    """
    found = {
        token_id
        for token_id, content in tokenizer.added_tokens().items()
        if not _RESERVED.search(content)
    }
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text())
            for part in (config, config.get("text_config") or {}):
                end = part.get("eos_token_id")
                found |= set(end if isinstance(end, list) else [] if end is None else [end])
    return np.array(sorted(i for i in found if 0 <= i < vocab_size), dtype=np.int64)


def vocab_size_of(folder: Path) -> int:
    """V as the target's config says.

    Raises:
        SpecPluginsError: It does not.
    """
    config = json.loads((folder / "config.json").read_text())
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(size, int):
        raise SpecPluginsError(f'{folder / "config.json"} does not say the "vocab_size".')
    return size


# --- the target's own text -------------------------------------------------------------------


def prompts(tokenizer: TextTokenizer, corpus: Corpus, number: int) -> list[NDArray[np.int64]]:
    """So many prompts for the target, from texts spread evenly over what is not held out.

    Texts are chosen by a hash of their content, so the choice needs no list of all of them. Where
    there are fewer than prompts, each gives several.

    Raises:
        SpecPluginsError: The texts are too short.
    """
    chosen = heapq.nsmallest(
        number,
        (text.text for text in corpus if not text.held_out),
        key=lambda text: hashlib.sha1(text.encode()).digest(),
    )
    by_text = [
        list(windows(tokenizer, [text], PROMPT_TOKENS, shortest=PROMPT_TOKENS // 4))
        for text in chosen
    ]
    longest = max(map(len, by_text), default=0)
    in_turns = [parts[turn] for turn in range(longest) for parts in by_text if turn < len(parts)]
    if not in_turns:
        raise SpecPluginsError(
            f"no text is long enough for a prompt of {PROMPT_TOKENS // 4} tokens."
        )
    return in_turns[:number]


def split_generations(
    prompts: Sequence[NDArray[np.int64]], generations: Sequence[NDArray[np.int64]]
) -> tuple[list[NDArray[np.int64]], list[Request]]:
    """Generations to count, and requests to measure on: every tenth."""
    held_out = [
        Request(np.concatenate([prompt, generated]), len(prompt))
        for i, (prompt, generated) in enumerate(zip(prompts, generations, strict=True))
        if i % _HELD_OUT_GENERATIONS == 0
    ]
    return [g for i, g in enumerate(generations) if i % _HELD_OUT_GENERATIONS], held_out


def merge(text: NDArray[np.int64], generated: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[V]` counts of a mixture of text and what the target wrote itself.

    The target's own text ranks best, but there is little of it: the text's law is the prior of a
    Dirichlet, whose mean moves to the generated text as that grows. Scaled to the number of
    tokens of both; what occurred in either is counted at least once.
    """
    weight = generated.sum() / (generated.sum() + _TOKENS_OF_TEXT * len(text))
    law = (1 - weight) * text / max(text.sum(), 1) + weight * generated / max(generated.sum(), 1)
    return np.ceil(law * (text.sum() + generated.sum())).astype(np.int64)


# --- coverage --------------------------------------------------------------------------------


def sizes_to_try(vocab_size: int, num_always: int, longest: int) -> list[int]:
    """Powers of two and half-way between, from 512 or a sixteenth of V; then the whole list."""
    start = min(512, vocab_size // 16)
    steps = sorted(
        size for power in range(vocab_size.bit_length()) for size in (2**power, 3 * 2**power // 2)
    )
    return [
        *(s for s in dict.fromkeys(steps) if max(start, num_always + 1) <= s < longest),
        longest,
    ]


def smallest_size_with(
    ranked: RankedList, always: NDArray[np.int64], vocab_size: int
) -> NDArray[np.int64]:
    """`[V]` int64: the smallest draft vocabulary each token is in; above V: in none."""
    size = np.full(vocab_size, vocab_size + 1, np.int64)
    size[ranked.token_ids] = len(always) + 1 + np.arange(len(ranked.token_ids))
    size[always] = len(always)
    return size


@dataclass(frozen=True, slots=True)
class Request:
    """Held-out text as one request would see it.

    Attributes:
        token_ids: `[B]` int64.
        start: Tokens before are its prompt: they are not drafted, but their own are dynamic.
    """

    token_ids: NDArray[np.int64]
    start: int = 0


def coverage(
    needed: NDArray[np.int64], requests: Iterable[Request], size: int, dynamic_tokens: int
) -> float:
    """Share of tokens that a draft vocabulary of this size has when they come.

    Args:
        needed: `[V]` from `smallest_size_with`.
        requests: What is measured on.
        size: Of the draft vocabulary.
        dynamic_tokens: The last used tokens of a request outside the list that are in as well.
    """
    covered = total = 0
    for request in requests:
        outside = needed[request.token_ids] > size
        total += len(outside) - request.start
        covered += int(np.count_nonzero(~outside[request.start :]))
        if dynamic_tokens:
            positions = np.flatnonzero(outside)
            recurs = _recurs(request.token_ids[positions].tolist(), dynamic_tokens)
            covered += int(np.count_nonzero(recurs & (positions >= request.start)))
    return covered / max(total, 1)


def _recurs(token_ids: Sequence[int], most: int) -> NDArray[np.bool_]:
    """Which of them were among the last `most` distinct ones before."""
    recent: OrderedDict[int, None] = OrderedDict()
    found = np.zeros(len(token_ids), np.bool_)
    for i, token_id in enumerate(token_ids):
        if token_id in recent:
            found[i] = True
            recent.move_to_end(token_id)
        else:
            recent[token_id] = None
            if len(recent) > most:
                recent.popitem(last=False)
    return found


# --- what a size is worth --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SpeedModel:
    """Predicted speed-up of decoding one sequence where reading weights is what takes time.

    tokens per round / time of a round = ((1 - a^(k+1)) / (1 - a)) / (1 + k c), where a is
    acceptance times coverage and c the weights a draft step reads over those the target does
    (VocabTrim's memory-bound speed-up).

    Attributes:
        body: Bytes of the target's layers.
        head: Bytes of its whole output head.
        vocab_size: V.
        draft_share: Bytes of the draft's layers over the target's.
        acceptance: Chance that a token drafted from the whole vocabulary is accepted.
        num_draft: k, tokens drafted per round.
    """

    body: int
    head: int
    vocab_size: int
    draft_share: float = 0.25
    acceptance: float = 0.7
    num_draft: int = 4

    def speed_up(self, size: int, covered: float) -> float:
        """Over plain decoding, of a draft vocabulary of `size` that has `covered` of the text."""
        a = self.acceptance * covered
        emitted = sum(a**i for i in range(self.num_draft + 1))
        drafting = self.draft_share * self.body + self.head * size / self.vocab_size
        return emitted / (1 + self.num_draft * drafting / (self.body + self.head))

    @property
    def rule(self) -> str:
        """In words, for people."""
        return (
            f"the largest size within {_NEARLY_BEST:.0%} of the highest predicted speed-up, where "
            f"a draft of {self.num_draft} tokens reads {self.draft_share:.0%} of the target's "
            "layers and its share of the head for each, and a token is accepted with probability "
            f"{self.acceptance:g} if the vocabulary has it"
        )


def weights_of(folder: Path, vocab_size: int) -> tuple[int, int]:
    """Bytes of the target's layers, and of its output head.

    Tables of one row per token are embedding and head, or both in one; the rest is layers. Where
    there are no safetensors files: from the sizes in config.json, in 16 bits.
    """
    tables, layers = [], 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            first, last = tensor["data_offsets"]
            if tensor["shape"] and tensor["shape"][0] >= vocab_size:
                tables.append(last - first)
            else:
                layers += last - first
    if tables and layers:
        return layers, max(tables)
    config = json.loads((folder / "config.json").read_text())
    config = {**config, **(config.get("text_config") or {})}
    width, depth = config["hidden_size"], config["num_hidden_layers"]
    return 2 * 12 * depth * width * width, 2 * vocab_size * width


@dataclass(frozen=True, slots=True)
class Row:
    """One size of one list: one line of the table. Coverages are shares of held-out tokens.

    Attributes:
        list: Name of the list.
        size: Of the draft vocabulary.
        text: Coverage of text.
        text_dynamic: The same with dynamic tokens.
        generated: Coverage of what the target wrote; None where it did not write.
        generated_dynamic: The same with dynamic tokens.
        speed_up: Predicted, from `generated`, else `text`.
    """

    list: str
    size: int
    text: float
    text_dynamic: float
    generated: float | None
    generated_dynamic: float | None
    speed_up: float


def measure(
    ranked: RankedList,
    always: NDArray[np.int64],
    text: Sequence[Request],
    generated: Sequence[Request],
    dynamic_tokens: int,
    model: SpeedModel,
    sizes: Iterable[int],
) -> Iterator[Row]:
    """A row for each size.

    Args:
        ranked: The list.
        always: `[A]` tokens in any size.
        text: Held-out texts.
        generated: Held-out generations; may be none.
        dynamic_tokens: For the columns that have them.
        model: Predicts the speed-up.
        sizes: Rising.
    """
    needed = smallest_size_with(ranked, always, model.vocab_size)
    for size in sizes:
        of_text, of_text_dynamic, of_generated, of_generated_dynamic = (
            coverage(needed, requests, size, dynamic) if requests else None
            for requests in (text, generated)
            for dynamic in (0, dynamic_tokens)
        )
        assert of_text is not None
        assert of_text_dynamic is not None
        yield Row(
            ranked.name,
            size,
            of_text,
            of_text_dynamic,
            of_generated,
            of_generated_dynamic,
            model.speed_up(size, of_text if of_generated is None else of_generated),
        )


def recommend(rows: Sequence[Row]) -> int:
    """The largest size that is nearly the fastest.

    Coverage is measured and speed is predicted without what a draft step costs beside reading
    weights, which makes the head matter less: where the prediction hardly differs, coverage wins.
    """
    best = max(row.speed_up for row in rows)
    return max(row.size for row in rows if row.speed_up >= (1 - _NEARLY_BEST) * best)
