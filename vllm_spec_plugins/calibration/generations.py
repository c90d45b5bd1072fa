"""What the target itself writes after given prompts, through offline vLLM, kept in a .jsonl.

Statistics of the target's own text rank a draft vocabulary best (VocabTrim, arXiv 2506.22694).
A killed run goes on where it was: finished texts are in the file, and the file's name has a
hash of everything that decides them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm import LLM

#: Prompts given to vLLM at a time: what a killed run may lose.
_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the target is asked to write.

    Attributes:
        max_tokens: Per prompt; a text may end before.
        temperature: 1 is the target's own law; 0 is greedy, where small models loop.
        seed: Of the engine. Requests have none of their own: on a CPU vLLM ends when a seeded
            prompt is read in parts, so what a killed run had not drawn is drawn otherwise.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Engine:
    """How vLLM runs the target.

    Attributes:
        dtype: Of the weights; "auto" is as saved, but float32 for a model saved so, which
            vLLM would otherwise round.
        threads: CPU threads; None leaves it to the environment (`OMP_NUM_THREADS`).
        tensor_parallel_size: Ranks.
        options: Further arguments of `vllm.LLM`. On a CPU nothing is compiled unless they say
            so: it takes longer than it saves.
    """

    dtype: str = "auto"
    threads: int | None = None
    tensor_parallel_size: int = 1
    options: dict[str, Any] | None = None


def generate(
    model: Path,
    prompts: Sequence[NDArray[np.int64]],
    folder: Path,
    sampling: Sampling | None = None,
    engine: Engine | None = None,
    on_progress: Callable[[int], object] = lambda _: None,
) -> list[NDArray[np.int64]]:
    """Have the target continue each prompt; what an earlier run did is taken from its file.

    Args:
        model: Folder of the target.
        prompts: Token ids of each.
        folder: Where the .jsonl is kept.
        sampling: See there.
        engine: Ignored when nothing is left to do: vLLM is then not even imported.
        on_progress: Told the number of prompts done.

    Returns:
        The tokens written after each prompt, in the order of the prompts.
    """
    sampling, engine = sampling or Sampling(), engine or Engine()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"generations-{_key(model, prompts, sampling)}.jsonl"
    done = read(path)
    on_progress(len(done))
    left = [number for number in range(len(prompts)) if number not in done]
    if left:
        seed = sampling.seed + len(done)
        with _running(model, prompts, sampling, engine, seed) as complete, path.open("ab") as file:
            file.truncate(_complete_length(path))
            for first in range(0, len(left), _CHUNK):
                chunk = left[first : first + _CHUNK]
                for number, token_ids in zip(chunk, complete(chunk), strict=True):
                    record = {"prompt": number, "token_ids": token_ids}
                    file.write(json.dumps(record).encode() + b"\n")
                    done[number] = np.array(token_ids, dtype=np.int64)
                file.flush()
                os.fsync(file.fileno())
                on_progress(len(done))
    return [done[number] for number in range(len(prompts))]


def read(path: Path) -> dict[int, NDArray[np.int64]]:
    """Finished texts of a file by number of their prompt; a line cut short is passed over."""
    if not path.is_file():
        return {}
    lines = path.read_bytes()[: _complete_length(path)].splitlines()
    records = [json.loads(line) for line in lines]
    return {record["prompt"]: np.array(record["token_ids"], dtype=np.int64) for record in records}


def _complete_length(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    return path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0


def _key(model: Path, prompts: Sequence[NDArray[np.int64]], sampling: Sampling) -> str:
    """Twelve hexadecimal digits: of the model's files, the prompts and the sampling."""
    total = hashlib.sha256(json.dumps(asdict(sampling)).encode())
    for file in sorted([*model.glob("*.json"), *model.glob("*.safetensors"), *model.glob("*.bin")]):
        status = file.stat()
        total.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    for prompt in prompts:
        total.update(len(prompt).to_bytes(8, "little") + prompt.astype("<i8").tobytes())
    return total.hexdigest()[:12]


@contextmanager
def _running(
    model: Path,
    prompts: Sequence[NDArray[np.int64]],
    sampling: Sampling,
    engine: Engine,
    seed: int,
) -> Iterator[Callable[[list[int]], list[list[int]]]]:
    """An engine; yields what completes the prompts of these numbers."""
    longest = max(map(len, prompts)) + sampling.max_tokens

    def complete(numbers: list[int]) -> list[list[int]]:
        from vllm import SamplingParams  # after the environment it reads is set

        outputs = llm.generate(
            [{"prompt_token_ids": prompts[number].tolist()} for number in numbers],
            SamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                detokenize=False,
            ),
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    with offline_engine(model, longest, engine, seed) as llm:
        yield complete


@contextmanager
def offline_engine(model: Path, longest: int, engine: Engine, seed: int) -> Iterator[LLM]:
    """vLLM serving a model offline, ended on the way out.

    Args:
        model: Folder.
        longest: Tokens of prompt and text together, at most.
        engine: How it runs.
        seed: Of requests that have none.
    """
    for name, value in _environment(engine).items():
        os.environ.setdefault(name, value)
    import torch
    from vllm import LLM

    from vllm_spec_plugins.engine.offline import hugging_face_classes_kept, shut_down

    options = {"enforce_eager": not torch.cuda.is_available(), **(engine.options or {})}
    with hugging_face_classes_kept():
        llm = LLM(
            str(model),
            dtype=_dtype(model, engine.dtype),  # pyright: ignore[reportArgumentType]
            max_model_len=longest,
            tensor_parallel_size=engine.tensor_parallel_size,
            seed=seed,
            **options,
        )
        try:
            yield llm
        finally:
            shut_down(llm)


def _environment(engine: Engine) -> dict[str, str]:
    """What vLLM on a CPU needs to share a machine; on a GPU none of it matters."""
    environment = {
        # Otherwise threads are pinned, and not at all where cores are forbidden.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if engine.threads is not None:
        environment["OMP_NUM_THREADS"] = str(engine.threads)
    return environment


def _dtype(model: Path, dtype: str) -> str:
    """vLLM's "auto" rounds float32 weights to 16 bits; the text would be another model's."""
    if dtype != "auto":
        return dtype
    config = json.loads((model / "config.json").read_text())
    saved = config.get("dtype") or config.get("torch_dtype")
    return "float32" if saved == "float32" else "auto"
