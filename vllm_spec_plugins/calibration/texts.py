"""Text to calibrate on: from files, folders or the zoo's corpus, to token ids of one model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_spec_plugins.errors import SpecPluginsError

#: Sources that are not paths: the zoo's training files and those no model of it has seen.
ZOO, ZOO_HELD_OUT = "zoo", "zoo:held-out"

#: Characters of a piece of a plain text file; longer files are cut at ends of lines.
_PIECE = 16_384
#: One text in so many is held out.
_HELD_OUT = 20


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a corpus: a file or a piece of one, a line of a .jsonl.

    Attributes:
        text: Not empty.
        num_bytes: What it takes in its file, for progress.
        held_out: Not to be counted or trained on. By the text itself, so that copies of it are
            on the same side; in the zoo by the file's path, as its models were trained.
    """

    text: str
    num_bytes: int
    held_out: bool


class Corpus:
    """Texts of several sources, in the same order every time they are read.

    A source is a text file, a .jsonl whose lines have a "text" or "prompt", a folder of both,
    `zoo` (its held-out files included, marked so) or `zoo:held-out` (those alone, not marked).
    """

    def __init__(self, sources: Sequence[str]) -> None:
        """Find the files.

        Raises:
            SpecPluginsError: A source does not exist or has no files.
        """
        self.sources = tuple(sources)
        self._files = [(source, _files_of(source)) for source in sources]
        described: list[Any] = []
        #: Size of all sources.
        self.num_bytes = 0
        for source, files in self._files:
            if files is None:
                from vllm_spec_plugins.zoo import corpus

                described.append([source, corpus.digest()])
                self.num_bytes += sum(text.num_bytes for text in _zoo_texts(source))
            for file in files or ():
                status = file.stat()
                described.append([str(file.resolve()), status.st_size, status.st_mtime_ns])
                self.num_bytes += status.st_size
        #: Changes when any file does.
        self.fingerprint = hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def __iter__(self) -> Iterator[Text]:
        for source, files in self._files:
            if files is None:
                yield from _zoo_texts(source)
            for file in files or ():
                yield from _texts_of(file, named=str(file) == source)


def _files_of(source: str) -> list[Path] | None:
    """None for the zoo's corpus, which is no path."""
    if source in (ZOO, ZOO_HELD_OUT):
        return None
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise SpecPluginsError(
            f'there are no texts at "{source}": give a text file, a .jsonl, a folder of them, or '
            f"{ZOO} (Python's own source code)."
        )
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise SpecPluginsError(f"the folder {path} holds no files to take texts from.")
    return files


def _zoo_texts(source: str) -> Iterator[Text]:
    from vllm_spec_plugins.zoo import corpus

    files = corpus.held_out_files() if source == ZOO_HELD_OUT else corpus.source_files()
    for file in files:
        marked = source == ZOO and file.held_out
        yield Text(file.text, len(file.text.encode()), marked)


def _texts_of(file: Path, named: bool) -> Iterator[Text]:
    """Texts of one file. One that is no text fails only if the user named it."""
    pieces = _lines(file) if file.suffix == ".jsonl" else _pieces(file)
    try:
        for text, num_bytes in pieces:
            if text.strip():
                yield Text(text, num_bytes, _is_held_out(text))
    except UnicodeDecodeError:
        if named:
            raise SpecPluginsError(f"{file} is not a UTF-8 text file.") from None


def _is_held_out(text: str) -> bool:
    return int(hashlib.sha1(text.encode()).hexdigest(), 16) % _HELD_OUT == 0


def _pieces(file: Path) -> Iterator[tuple[str, int]]:
    """A text file in pieces of whole lines."""
    piece: list[str] = []
    length = 0
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            piece.append(line)
            length += len(line)
            if length >= _PIECE:
                text = "".join(piece)
                yield text, len(text.encode())
                piece, length = [], 0
    text = "".join(piece)
    yield text, len(text.encode())


def _lines(file: Path) -> Iterator[tuple[str, int]]:
    """The texts of a .jsonl."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise SpecPluginsError(f"{file}, line {number} is not JSON: {error}.") from None
            text = (
                (record.get("text") or record.get("prompt")) if isinstance(record, dict) else None
            )
            if not isinstance(text, str):
                raise SpecPluginsError(
                    f'{file}, line {number}: each line must be an object with a string "text" or '
                    f'"prompt".'
                )
            yield text, len(line.encode())


class TextTokenizer:
    """The tokenizer of a model's folder, from its `tokenizer.json` or through transformers."""

    def __init__(self, folder: Path) -> None:
        """Load it; nothing is downloaded.

        Raises:
            SpecPluginsError: The folder has none.
        """
        self._fast: Any = None
        self._slow: Any = None
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            self._fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
            # Written by training scripts into some files; it would cut or fill the texts.
            self._fast.no_truncation()
            self._fast.no_padding()
            return
        if not (folder / "tokenizer_config.json").is_file():
            raise SpecPluginsError(
                f"{folder} has neither a tokenizer.json nor a tokenizer_config.json: put the "
                "model's tokenizer files there."
            )
        try:
            from transformers import AutoTokenizer

            self._slow = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (ImportError, OSError, ValueError, KeyError) as error:
            raise SpecPluginsError(
                f"transformers cannot load the tokenizer in {folder} ({type(error).__name__}: "
                f"{error}), and there is no tokenizer.json."
            ) from None

    def encode(
        self, texts: Sequence[str], *, special_tokens: bool = False
    ) -> list[NDArray[np.int64]]:
        """Token ids of each text.

        Args:
            texts: Any number.
            special_tokens: Begin (and end) as the tokenizer does for a prompt.
        """
        if self._fast is not None:
            encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
            return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        ids = self._slow(list(texts), add_special_tokens=special_tokens)["input_ids"]
        return [np.array(row, dtype=np.int64) for row in ids]

    def encode_answer(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids of a text that follows a prompt, and where each begins and ends in it.

        Returns:
            `[T]` ids, without special tokens, and `[T, 2]` offsets in characters.

        Raises:
            SpecPluginsError: The folder has no tokenizer.json; others know no offsets.
        """
        if self._fast is None:
            raise SpecPluginsError(
                "positions in answers need a tokenizer.json: save one beside the model with "
                "transformers' save_pretrained of its fast tokenizer."
            )
        encoding = self._fast.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int64)
        return ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens, without special ones."""
        tokenizer = self._slow if self._fast is None else self._fast
        return tokenizer.decode([int(i) for i in token_ids], skip_special_tokens=True)

    def added_tokens(self) -> dict[int, str]:
        """Id and content of every token beside the learnt ones: control, chat and tool tokens."""
        if self._fast is not None:
            added = self._fast.get_added_tokens_decoder()
            return {token_id: token.content for token_id, token in added.items()}
        added = {
            token_id: str(token) for token_id, token in self._slow.added_tokens_decoder.items()
        }
        special = zip(self._slow.all_special_ids, self._slow.all_special_tokens, strict=True)
        return {**added, **dict(special)}


def windows(
    tokenizer: TextTokenizer,
    texts: Iterable[str],
    length: int,
    *,
    shortest: int | None = None,
    special_tokens: bool = True,
) -> Iterator[NDArray[np.int64]]:
    """Texts as token windows: each text from its start, in parts of `length` tokens.

    Args:
        tokenizer: Of the model.
        texts: In order; tokenized in batches, read no faster than windows are taken.
        length: Tokens of a window.
        shortest: Shorter rests are dropped; None: anything short of `length` is.
        special_tokens: Begin each text as the tokenizer does for a prompt.

    Yields:
        `[length]` int64, or `[shortest]` and longer.
    """
    shortest = length if shortest is None else shortest
    for batch in batched(texts):
        for token_ids in tokenizer.encode(batch, special_tokens=special_tokens):
            for start in range(0, len(token_ids), length):
                if len(window := token_ids[start : start + length]) >= shortest:
                    yield window


def batched(texts: Iterable[str], characters: int = 1_000_000) -> Iterator[list[str]]:
    """Texts in lists of about so many characters: enough for a tokenizer's threads."""
    batch: list[str] = []
    total = 0
    for text in texts:
        batch.append(text)
        total += len(text)
        if total >= characters:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
