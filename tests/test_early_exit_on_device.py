"""`early_exit` on the device: what it drafts and writes is what it drafts and writes on the host.

The target is a toy: a layer whose keys are the residual stream, and whose attention is their mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm_spec_plugins.proposers.early_exit import EarlyExit, EarlyExitOptions

from vllm_spec_plugins.context import EngineContext, ModelFacts
from vllm_spec_plugins.device_drafting import DeviceDraftInput
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.draft_vocabulary import RankedVocabulary, rank
from vllm_spec_plugins.length_control import Fixed, LengthControlOptions
from vllm_spec_plugins.proposer import DraftInput
from vllm_spec_plugins.target_model import LayerState

VOCABULARY, WIDTH, LONGEST, SLOTS, K = 40, 8, 32, 6, 3
#: Of the requests of `TEXTS`: all alike; or one of each kind.
LIMITS = {"alike": [K] * 5, "mixed": [K, 0, 1, 2, K]}
TEMPERATURES = {"greedy": [0.0] * 5, "drawn": [1.0] * 5, "mixed": [0.0, 0.7, 1.0, 0.0, 1.3]}
#: By slot.
TEXTS = {4: 9, 0: 20, 5: 1, 1: 13, 3: 28}


class Head:
    """A `LanguageModelHead`."""

    vocab_size, hidden_size = VOCABULARY, WIDTH

    def __init__(self) -> None:
        self.weight = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.row_logits(hidden, self.weight, None)

    def rows(self, token_ids: Tensor) -> tuple[Tensor, None]:
        return self.weight[token_ids], None

    def row_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is None
        return hidden @ weight.t()

    def most_likely_row(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        del hidden, weight, bias


class Sequences:
    """`PagedSequences` of some slots."""

    def __init__(self, target: Target, slots: Tensor, ends: Tensor) -> None:
        self.target, self.slots, self.ends = target, slots, ends

    def prepare(self, positions: Tensor, count: int) -> list[Tensor]:
        return [torch.minimum(positions + index, self.ends) for index in range(count)]

    def select(self, requests: Tensor) -> Sequences:
        return Sequences(self.target, self.slots[requests], self.ends[requests])

    @contextmanager
    def step(self, positions: Tensor) -> Iterator[None]:
        self.target.writes = self.slots, positions < self.ends
        yield
        self.target.writes = None


class Target:
    """As much of a `TargetModel` as an early exit asks for."""

    def __init__(self, minds_ends: bool = True) -> None:
        self.head, self.minds_ends = Head(), minds_ends
        generator = torch.Generator().manual_seed(1)
        self.embedding = torch.randn(VOCABULARY, WIDTH, generator=generator)
        #: `[slots, positions, H]`
        self.pages = torch.randn(SLOTS, LONGEST + 1, WIDTH, generator=generator)
        self.writes: tuple[Tensor, Tensor] | None = None
        self.most_tokens: NDArray[np.int64] | None = None

    def sequences(
        self,
        rows: NDArray[np.int64],
        most_tokens: NDArray[np.int64] | None = None,
        ends: Tensor | None = None,
    ) -> Sequences:
        self.most_tokens = most_tokens
        if ends is None or not self.minds_ends:
            ends = torch.full((len(rows),), LONGEST)
        return Sequences(self, torch.from_numpy(rows), ends)

    def layers(self, start: int, stop: int, **skips: Any) -> Any:
        del start, stop, skips
        return self.attend

    def attend(self, state: LayerState, positions: Tensor) -> LayerState:
        assert self.writes is not None
        slots, allowed = self.writes
        key = state.hidden + positions.unsqueeze(1).sin()
        self.pages[slots[allowed], positions[allowed]] = key[allowed]
        before = torch.arange(LONGEST + 1) <= positions.unsqueeze(1)
        seen = (self.pages[slots] * before.unsqueeze(2)).sum(dim=1)
        return LayerState(key, seen / (positions + 1).unsqueeze(1))

    def embed(self, token_ids: Tensor) -> LayerState:
        return LayerState(self.embedding[token_ids])

    def final_norm(self, state: LayerState) -> Tensor:
        return torch.nn.functional.rms_norm(state.merged, (WIDTH,))


def vocabulary(path: Path, *lists: range) -> str:
    counts = [np.bincount(np.array(ids), minlength=VOCABULARY) for ids in lists]
    ranked = tuple(rank(str(i), n, np.array([2]), int(n.sum()) + 1) for i, n in enumerate(counts))
    RankedVocabulary(VOCABULARY, np.array([2]), ranked, "", "a test").write(path)
    return str(path)


def proposer(target: Target, **options: Any) -> EarlyExit:
    facts = ModelFacts("a toy", VOCABULARY, WIDTH, 4, LONGEST, K)
    made = EarlyExit(
        EarlyExitOptions(exit_layer=1, **options),
        EngineContext(facts, torch.device("cpu"), SLOTS, seed=0),
    )
    made.load(target)  # pyright: ignore[reportArgumentType]
    return made


def history() -> NDArray[np.int32]:
    return np.random.default_rng(0).integers(0, VOCABULARY, (SLOTS, LONGEST), dtype=np.int32)


def on_host(limits: list[int], temperatures: list[float]) -> DraftInput:
    facts = ModelFacts("a toy", VOCABULARY, WIDTH, 4, LONGEST, K)
    context = EngineContext(facts, torch.device("cpu"), SLOTS, seed=0)
    return DraftInput(
        request_ids=[f"request {slot}" for slot in TEXTS],
        token_history=history(),
        rows=np.array(list(TEXTS)),
        num_tokens=np.array(list(TEXTS.values())),
        num_prompt_tokens=np.ones(len(TEXTS), dtype=np.int64),
        max_draft=np.array(limits),
        temperatures=np.array(temperatures, dtype=np.float32),
        streams=np.arange(len(TEXTS)) * 7,
        hidden_states=None,
        cache_salts=None,
        length_control=Fixed(LengthControlOptions(), context),
    )


def on_device(batch: DraftInput) -> DeviceDraftInput:
    """The same step; the host knows lengths as bounds only."""
    return DeviceDraftInput(
        token_ids=torch.from_numpy(batch.token_history),
        slots=torch.from_numpy(batch.rows),
        fresh=torch.zeros(len(batch.rows), dtype=torch.bool),
        num_tokens=torch.from_numpy(batch.num_tokens),
        num_prompt_tokens=torch.from_numpy(batch.num_prompt_tokens),
        max_draft=torch.from_numpy(batch.max_draft),
        temperatures=torch.from_numpy(batch.temperatures),
        streams=torch.from_numpy(batch.streams),
        num_speculative_tokens=K,
        rows=batch.rows,
        is_fresh=np.zeros(len(batch.rows), dtype=np.bool_),
        most_tokens=batch.num_tokens + K,
        temperatures_on_host=batch.temperatures,
    )


def laws(found: DraftProbabilities | None, drafted: Tensor) -> list[tuple[int, ...] | Tensor]:
    """The laws that tokens were drawn from, and which tokens those are."""
    if found is None:
        return []
    assert found.sampled is not None
    sampled = found.sampled & drafted
    vocabulary = found.vocabulary
    columns = [] if vocabulary is None else [vocabulary]
    return [sampled.nonzero(), found.values[sampled], *columns]


@pytest.mark.parametrize("options", [{}, {"draft_sample_method": "greedy"}])
@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("temperatures", TEMPERATURES)
@pytest.mark.parametrize("limits", LIMITS)
def test_host_and_device_draft_and_write_the_same(
    limits: str, temperatures: str, ranked: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    if ranked:
        options = {**options, "draft_vocabulary": vocabulary(tmp_path / "ranked", range(5, 25))}
    batch = on_host(LIMITS[limits], TEMPERATURES[temperatures])
    there, here = Target(), Target()
    expected = proposer(there, **options).propose(batch)
    assert isinstance(expected.token_ids, Tensor)
    found = proposer(here, **options).propose_on_device(on_device(batch))

    assert found.token_ids.tolist() == expected.token_ids.tolist()
    drafted = found.token_ids >= 0
    assert drafted.sum(dim=1).tolist() == LIMITS[limits]
    draws = temperatures != "greedy" and not options.get("draft_sample_method")
    assert (found.probabilities is not None) == draws
    torch.testing.assert_close(
        laws(found.probabilities, drafted), laws(expected.probabilities, drafted)
    )
    torch.testing.assert_close(here.pages, there.pages)
    assert here.most_tokens is not None


def test_a_pass_beyond_the_limit_would_be_seen() -> None:
    """Negative control: pages that do not know where a request ends."""
    batch = on_host(LIMITS["mixed"], TEMPERATURES["mixed"])
    there, here = Target(), Target(minds_ends=False)
    proposer(there).propose(batch)
    proposer(here).propose_on_device(on_device(batch))
    differs = (here.pages != there.pages).any(dim=2)  # [slots, positions]
    assert differs.sum(dim=1).tolist() == [K, 1, 0, 0, 0, K - 1]


@pytest.mark.parametrize(
    ("options", "able"),
    [
        ({"exit_layer": 2}, True),
        ({"exit_layer": 0.5, "skip_layers": (1,), "skip_ffn": (0,)}, True),
        ({}, False),
        ({"exit_candidates": (1, 2)}, False),
        ({"exit_layers": (1, 2)}, False),
        ({"adapter": "a file"}, True),
        ({"exit_layer": 2, "draft_vocabulary": "one"}, True),
        ({"exit_layer": 2, "draft_vocabulary": {"file": "one", "dynamic_tokens": 4}}, False),
        ({"exit_layer": 2, "draft_vocabulary": "two"}, False),
        ({"exit_layer": 2, "draft_vocabulary": "nowhere"}, False),
    ],
)
def test_which_options_can(
    options: dict[str, Any], able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where an exit is chosen, or texts decide on the host."""
    monkeypatch.chdir(tmp_path)
    vocabulary(tmp_path / "one", range(5, 25))
    vocabulary(tmp_path / "two", range(5, 25), range(10, 30))
    assert EarlyExit.drafts_on_device(EarlyExitOptions(**options)) == able
