"""A draft step over a ranked vocabulary drafts the same tokens with the fused head and without.

Hidden states and weights are small multiples of 1/8: products and sums are exact however they are
ordered, and rounded to bfloat16 many are equal.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm_spec_plugins.triton_kernels.dispatch import INTERPRETED

from vllm_spec_plugins.draft_head import DraftHead
from vllm_spec_plugins.draft_sampling import (
    Draws,
    MostLikely,
    draw,
    most_likely_column,
    token_ids_of,
)
from vllm_spec_plugins.draft_vocabulary import DraftVocabularyOptions, RankedVocabulary, rank

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
VOCAB_SIZE, HIDDEN_SIZE = 400, 96
SCALE = 0.5

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class EighthsHead:
    """A `LanguageModelHead` of one matrix, with many equal rows."""

    vocab_size, hidden_size = VOCAB_SIZE, HIDDEN_SIZE

    def __init__(self, dtype: torch.dtype, soft_cap: float | None) -> None:
        self.weight = eighths(0, VOCAB_SIZE, HIDDEN_SIZE).to(dtype)
        self.weight[1::2] = self.weight[0::2]
        self.bias = eighths(1, VOCAB_SIZE).to(dtype)
        self.bias[1::2] = self.bias[0::2]
        self.soft_cap = soft_cap

    def logits(self, hidden: Tensor) -> Tensor:
        return self.row_logits(hidden, self.weight, self.bias)

    def rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.weight[token_ids], self.bias[token_ids]

    def row_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight.ndim == 3:
            logits = torch.bmm(weight, hidden.unsqueeze(2)).squeeze(2).float()
        else:
            logits = torch.nn.functional.linear(hidden, weight, bias).float()
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits * SCALE

    def most_likely_row(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> MostLikely | None:
        return most_likely_column(hidden, weight, bias, SCALE, self.soft_cap)


def eighths(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-9, 10, shape, generator=generator) / 8).to(DEVICE)


def draft_head(head: EighthsHead, folder: Path, *names: str, dynamic_tokens: int = 0) -> DraftHead:
    counts = np.arange(VOCAB_SIZE, 0, -1)
    counts[::5] = 0
    lists = tuple(rank(name, counts, np.array([0]), 300) for name in names)
    RankedVocabulary(VOCAB_SIZE, np.array([0]), lists, "", "").write(folder / "v.safetensors")
    options = DraftVocabularyOptions(
        file=str(folder / "v.safetensors"), dynamic_tokens=dynamic_tokens
    )
    return DraftHead(head, options, DEVICE, 80)


def begin(draft: DraftHead, rows: int) -> None:
    one = np.ones(rows, np.int64)
    names = [str(i) for i in range(rows)]
    draft.begin(names, np.full((rows, 1), 5, np.int32), np.arange(rows), one, one)


@pytest.mark.parametrize("soft_cap", [None, 40.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [7, 19])
def test_the_same_tokens(
    rows: int, dtype: torch.dtype, soft_cap: float | None, tmp_path: Path
) -> None:
    head = EighthsHead(dtype, soft_cap)
    draft, hidden = draft_head(head, tmp_path, "text"), eighths(2, rows, HIDDEN_SIZE).to(dtype)
    begin(draft, rows)
    logits, vocabulary = draft.logits(hidden, np.arange(rows))
    best = logits.max(dim=1, keepdim=True).values
    assert ((logits == best).sum(dim=1) > 1).any()  # ties
    expected = draw(logits.clone(), None, 0, wants_confidences=True)
    output, vocabulary = draft.read(hidden, np.arange(rows), all_chosen=True)
    assert isinstance(output, MostLikely)
    found = draw(output, None, 0, wants_confidences=True)
    token_ids = token_ids_of(found.columns, vocabulary)
    assert torch.equal(token_ids, token_ids_of(expected.columns, vocabulary))
    torch.testing.assert_close(found.confidences, expected.confidences)
    assert found.probabilities is None
    assert draw(output, None, 0).confidences is None


def test_a_row_without_numbers_drafts_some_token(tmp_path: Path) -> None:
    head = EighthsHead(torch.float32, None)
    head.bias[:] = -torch.inf
    draft, hidden = draft_head(head, tmp_path, "text"), eighths(2, 3, HIDDEN_SIZE)
    begin(draft, 3)
    output, vocabulary = draft.read(hidden, np.arange(3), all_chosen=True)
    assert isinstance(output, MostLikely)
    assert 0 <= int(output.columns.min()) <= int(output.columns.max()) < len(vocabulary)


@pytest.mark.parametrize("case", ["drawn", "two_lists", "dynamic", "many_rows"])
def test_what_needs_logits_gets_them(case: str, tmp_path: Path) -> None:
    """Laws of drawn tokens are kept; columns of each row's own, and many rows, are not fused."""
    rows = 65 if case == "many_rows" else 4
    names = ("low", "high") if case == "two_lists" else ("text",)
    draft = draft_head(
        EighthsHead(torch.float32, None), tmp_path, *names, dynamic_tokens=3 * (case == "dynamic")
    )
    hidden = eighths(2, rows, HIDDEN_SIZE)
    begin(draft, rows)
    output, _ = draft.read(hidden, np.arange(rows), all_chosen=case != "drawn")
    assert isinstance(output, Tensor)
    assert torch.equal(output, draft.logits(hidden, np.arange(rows))[0])
    draws = Draws.of(np.ones(rows, np.float32), torch.full((rows, 1), 0.5).double().to(DEVICE))
    assert draw(output, draws, 0).probabilities is not None
