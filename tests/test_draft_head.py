"""The draft head: logits of some rows of the head, and which rows for which request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm_spec_plugins.verifiers.lossless import Lossless

from vllm_spec_plugins.draft_head import DraftHead
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.draft_vocabulary import DraftVocabularyOptions, RankedVocabulary, rank
from vllm_spec_plugins.testing.enumeration import enumeration_error
from vllm_spec_plugins.testing.toy_problems import random_problem, toy_context, within_vocabulary
from vllm_spec_plugins.verifier import VerifyInput

VOCAB_SIZE, HIDDEN_SIZE = 60, 8
ALWAYS = np.array([0, 1])
CPU = torch.device("cpu")


class TorchHead:
    """A `LanguageModelHead` that is one matrix, scaled and capped as Gemma's is."""

    vocab_size = VOCAB_SIZE
    hidden_size = HIDDEN_SIZE

    def __init__(self, with_bias: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator)
        self.bias = torch.randn(VOCAB_SIZE, generator=generator) if with_bias else None
        self.copied: list[list[int]] = []

    def logits(self, hidden: Tensor) -> Tensor:
        return self.row_logits(hidden, self.weight, self.bias)

    def rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        self.copied.append(token_ids.tolist())
        bias = None if self.bias is None else self.bias[token_ids].clone()
        return self.weight[token_ids].clone(), bias

    def row_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = torch.einsum("th,tmh->tm" if weight.ndim == 3 else "th,mh->tm", hidden, weight)
        if bias is not None:
            logits = logits + bias
        return 30 * torch.tanh(logits * 0.5 / 30)

    def most_likely_row(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        del hidden, weight, bias


def write(path: Path, **lists: Sequence[int]) -> str:
    """A file whose lists rank the given tokens in the given order."""
    ranked = []
    for name, token_ids in lists.items():
        counts = np.zeros(VOCAB_SIZE, np.int64)
        counts[list(token_ids)] = np.arange(len(token_ids), 0, -1)
        ranked.append(rank(name, counts, ALWAYS, len(ALWAYS) + len(token_ids)))
    RankedVocabulary(VOCAB_SIZE, ALWAYS, tuple(ranked), "", "a test").write(path)
    return str(path)


@pytest.fixture
def one_list(tmp_path: Path) -> str:
    return write(tmp_path / "one.safetensors", text=[30, 10, 20, 40])


@pytest.fixture
def two_lists(tmp_path: Path) -> str:
    return write(tmp_path / "two.safetensors", low=range(2, 12), high=range(30, 36))


def draft_head(head: TorchHead, file: str, *, places: int = 4, **options: int) -> DraftHead:
    return DraftHead(head, DraftVocabularyOptions(file=file, **options), CPU, places)


def begin(draft: DraftHead, **texts: Sequence[int]) -> None:
    """A round of these requests, which have written these tokens."""
    history = np.full((len(texts) + 1, 64), 59, np.int32)  # stale past the end
    for row, text in zip(history[1:], texts.values(), strict=True):
        row[: len(text)] = text
    lengths = np.array([len(text) for text in texts.values()])
    draft.begin(list(texts), history, np.arange(1, len(texts) + 1), lengths)


def hidden_states(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def columns(vocabulary: Tensor, row: int) -> list[int]:
    """The tokens of one row, sorted."""
    return sorted(token for token in vocabulary[row].tolist() if token >= 0)


def assert_are_the_heads_own(
    head: TorchHead, hidden: Tensor, logits: Tensor, vocabulary: Tensor
) -> None:
    """Equal to the full head's logits where a column stands for a token, else -inf."""
    full = head.logits(hidden)
    expected = full.gather(1, vocabulary.expand(len(hidden), -1).clamp(min=0))
    expected = torch.where(vocabulary < 0, -torch.inf, expected)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("with_bias", [False, True])
def test_one_list_is_shared_by_all_rows(one_list: str, with_bias: bool) -> None:
    head = TorchHead(with_bias)
    draft = draft_head(head, one_list)
    begin(draft, a=[50, 51], b=[52])
    hidden = hidden_states(3)
    logits, vocabulary = draft.logits(hidden, torch.tensor([0, 1, 1]))
    assert vocabulary.tolist() == [0, 1, 10, 20, 30, 40]
    assert vocabulary.dtype == torch.int64
    assert draft.width == 6
    assert_are_the_heads_own(head, hidden, logits, vocabulary)
    assert head.copied == [[0, 1, 10, 20, 30, 40]], "rows are copied once"


def test_size_takes_the_most_frequent(one_list: str) -> None:
    _, vocabulary = draft_head(TorchHead(), one_list, size=4).logits(
        hidden_states(1), np.array([0])
    )
    assert vocabulary.tolist() == [0, 1, 10, 30]


@pytest.mark.parametrize("with_bias", [False, True])
def test_dynamic_tokens_are_the_last_used_outside_the_list(one_list: str, with_bias: bool) -> None:
    head = TorchHead(with_bias)
    draft = draft_head(head, one_list, dynamic_tokens=3)
    begin(draft, a=[50, 51, 10, 50, 30], b=[2, 3, 4, 5, 3], c=[10, 20])
    hidden = hidden_states(4)
    logits, vocabulary = draft.logits(hidden, torch.tensor([2, 1, 0, 1]))
    ranked = [0, 1, 10, 20, 30, 40]
    assert columns(vocabulary, 0) == ranked
    assert columns(vocabulary, 1) == columns(vocabulary, 3) == sorted([*ranked, 3, 4, 5])
    assert columns(vocabulary, 2) == sorted([*ranked, 50, 51])
    assert vocabulary.shape == (4, draft.width) == (4, 9)
    assert_are_the_heads_own(head, hidden, logits, vocabulary)


def test_only_rows_of_tokens_that_come_are_copied(one_list: str) -> None:
    head = TorchHead()
    draft = draft_head(head, one_list, dynamic_tokens=2)
    text = [50, 51]
    begin(draft, a=text)
    del head.copied[:]
    begin(draft, a=[*text, 10])
    begin(draft, a=[*text, 10, 50])
    assert head.copied == [], "nothing came"
    begin(draft, a=[*text, 10, 50, 52])
    assert head.copied == [[52]], "in the place of 51, which was used longer ago than 50"
    assert columns(draft.logits(hidden_states(1), torch.tensor([0]))[1], 0)[-2:] == [50, 52]


def last_used(text: Sequence[int], ranked: Sequence[int], size: int) -> list[int]:
    """What the dynamic tokens of a text must be, in plain words; sorted."""
    kept: list[int] = []
    for token in reversed(text):
        if token not in ranked and token not in kept:
            kept.append(token)
    return sorted(kept[:size])


@pytest.mark.parametrize("size", [1, 3, 8])
def test_dynamic_tokens_depend_on_the_text_alone(one_list: str, size: int) -> None:
    """Whatever parts it comes in, whoever else is there, wherever its row is."""
    random = np.random.default_rng(size)
    ranked = [0, 1, 10, 20, 30, 40]
    texts = {name: random.integers(0, VOCAB_SIZE, 60).tolist() for name in "abc"}
    head = TorchHead()
    draft = draft_head(head, one_list, dynamic_tokens=size, places=3)
    lengths = dict.fromkeys(texts, 0)
    for _ in range(12):
        here = [name for name in texts if random.random() < 0.7] or ["a"]
        random.shuffle(here)
        for name in here:
            lengths[name] = min(60, lengths[name] + int(random.integers(1, 12)))
        begin(draft, **{name: texts[name][: lengths[name]] for name in here})
        hidden = hidden_states(len(here))
        logits, vocabulary = draft.logits(hidden, np.arange(len(here)))
        for i, name in enumerate(here):
            expected = last_used(texts[name][: lengths[name]], ranked, size)
            assert columns(vocabulary, i) == sorted([*ranked, *expected])
            alone = draft_head(TorchHead(), one_list, dynamic_tokens=size, places=1)
            begin(alone, x=texts[name][: lengths[name]])
            logits_alone, vocabulary_alone = alone.logits(hidden[i : i + 1], torch.tensor([0]))
            assert vocabulary_alone[0].tolist() == vocabulary[i].tolist()
            torch.testing.assert_close(logits_alone[0], logits[i])
        assert_are_the_heads_own(head, hidden, logits, vocabulary)
        for requests in (np.arange(len(here))[::-1].copy(), torch.arange(len(here)).flip(0)):
            logits, turned = draft.logits(hidden, requests)
            assert turned.tolist() == vocabulary.flip(0).tolist()
            assert_are_the_heads_own(head, hidden, logits, turned)


def test_a_finished_request_leaves_nothing_to_the_next(one_list: str) -> None:
    draft = draft_head(TorchHead(), one_list, dynamic_tokens=2, places=1)
    begin(draft, a=[50, 51])
    draft.finish(["a", "never seen"])
    begin(draft, b=[10, 52])
    vocabulary = draft.logits(hidden_states(1), torch.tensor([0]))[1]
    assert columns(vocabulary, 0)[-1] == 52
    assert 50 not in columns(vocabulary, 0)
    draft.finish(["b"])
    begin(draft, c=[10])
    logits, vocabulary = draft.logits(hidden_states(1), torch.tensor([0]))
    assert columns(vocabulary, 0) == [0, 1, 10, 20, 30, 40]
    assert torch.isinf(logits[0, 6:]).all()


def test_made_in_inference_mode_and_used_outside_of_it(one_list: str) -> None:
    """As an engine does, with weights that could learn."""
    head = TorchHead(with_bias=True)
    head.weight = torch.nn.Parameter(head.weight)
    with torch.inference_mode():
        draft = draft_head(head, one_list, dynamic_tokens=2)
    begin(draft, a=[50, 51])
    logits, _ = draft.logits(hidden_states(1), np.array([0]))
    assert not logits.requires_grad
    with torch.inference_mode():
        begin(draft, a=[50, 51, 52])
        draft.logits(hidden_states(1), np.array([0]))
    draft.finish(["a"])


def test_ids_the_head_does_not_have_are_passed_over(one_list: str, two_lists: str) -> None:
    """Placeholders of images and embeddings."""
    for file in (one_list, two_lists):
        draft = draft_head(TorchHead(), file, dynamic_tokens=2)
        begin(draft, a=[-1, VOCAB_SIZE + 5, 50])
        assert columns(draft.logits(hidden_states(1), np.array([0]))[1], 0)[-1] == 50


def test_each_request_has_the_list_of_its_prompt(two_lists: str) -> None:
    head = TorchHead()
    draft = draft_head(head, two_lists)
    begin(draft, a=[31, 32, 33, 3, 3, 3, 3, 3], b=[4, 5, 31], c=[50])
    hidden = hidden_states(4)
    logits, vocabulary = draft.logits(hidden, np.array([0, 1, 2, 0]))
    high, low = [0, 1, *range(30, 36)], [0, 1, *range(2, 12)]
    assert [columns(vocabulary, row) for row in range(4)] == [high, low, low, high]
    assert_are_the_heads_own(head, hidden, logits, vocabulary)
    # Decided once: what is written later does not move a request to another list.
    begin(draft, b=[4, 5, 31, 32, 33, 34, 35])
    assert columns(draft.logits(hidden[:1], np.array([0]))[1], 0) == low


def test_the_prompt_alone_chooses_where_it_is_known(two_lists: str) -> None:
    draft = draft_head(TorchHead(), two_lists)
    history = np.array([[4, 31, 32, 33]], np.int32)
    arrays = (history, np.array([0]), np.array([4]))
    draft.begin(["returned"], *arrays, np.array([1]))
    assert columns(draft.logits(hidden_states(1), np.array([0]))[1], 0)[-1] == 11


def test_lists_and_dynamic_tokens_together(two_lists: str) -> None:
    head = TorchHead()
    draft = draft_head(head, two_lists, dynamic_tokens=2)
    begin(draft, a=[31, 32, 33, 3, 40], b=[4, 5, 31])
    hidden = hidden_states(2)
    logits, vocabulary = draft.logits(hidden, torch.tensor([0, 1]))
    # 3 is outside the list of `a`, and 31 outside the list of `b`.
    assert columns(vocabulary, 0) == [0, 1, 3, *range(30, 36), 40]
    assert columns(vocabulary, 1) == [0, 1, *range(2, 12), 31]
    assert_are_the_heads_own(head, hidden, logits, vocabulary)


@pytest.mark.parametrize("dynamic_tokens", [0, 3])
@pytest.mark.parametrize("lists", ["one_list", "two_lists"])
def test_what_a_request_can_be_drafted(
    request: pytest.FixtureRequest, lists: str, dynamic_tokens: int
) -> None:
    draft = draft_head(TorchHead(), request.getfixturevalue(lists), dynamic_tokens=dynamic_tokens)
    begin(draft, a=[31, 32, 33, 3, 50], b=[4, 5, 31])
    _, vocabulary = draft.logits(hidden_states(2), np.array([0, 1]))
    vocabulary = vocabulary.expand(2, -1)

    def allowed(*names: str) -> list[list[int]]:
        return [row.nonzero().flatten().tolist() for row in draft.can_draft(names)]

    assert allowed("b", "a") == [columns(vocabulary, 1), columns(vocabulary, 0)]
    # Of a request not drafted for yet, and of one that is gone: what is in any list.
    draft.finish(["a"])
    ranked = (
        {0, 1, 10, 20, 30, 40} if lists == "one_list" else {0, 1, *range(2, 12), *range(30, 36)}
    )
    assert allowed("a", "new", "b") == [sorted(ranked)] * 2 + [columns(vocabulary, 1)]


# --- what becomes of the logits --------------------------------------------------------------


def test_compact_laws_are_the_dense_ones(two_lists: str) -> None:
    head = TorchHead()
    draft = draft_head(head, two_lists, dynamic_tokens=2)
    begin(draft, a=[31, 32, 33, 3, 40], b=[4, 5, 31])
    hidden = hidden_states(2)
    logits, vocabulary = draft.logits(hidden, np.array([0, 1]))
    compact = DraftProbabilities(torch.softmax(logits, dim=1), vocabulary)

    full = head.logits(hidden)
    inside = torch.zeros_like(full, dtype=torch.bool)
    for row in range(2):
        inside[row, columns(vocabulary, row)] = True
    expected = torch.softmax(full.masked_fill(~inside, -torch.inf), dim=1)
    dense = compact.dense(torch.arange(2), torch.tensor([31, 4]), VOCAB_SIZE)
    torch.testing.assert_close(dense, expected)
    for token in (0, 3, 4, 31, 40, 50):
        torch.testing.assert_close(compact.of(torch.full((2,), token)), expected[:, token])
    assert compact.of(torch.tensor([-1, -1])).tolist() == [0, 0]


def test_a_restricted_draft_keeps_the_targets_law() -> None:
    """By enumeration: tokens the draft can never make appear at their target probability."""
    vocabulary = torch.tensor([0, 2, 3])
    problems = [
        within_vocabulary(random_problem(seed, vocab_size=5, num_draft=2), vocabulary)
        for seed in range(4)
    ]
    verifier = Lossless(Lossless.Options(), toy_context(vocab_size=5))
    assert enumeration_error(verifier, problems, vocabulary) < 1e-12


def law_after_verification(
    q: DraftProbabilities, target_logits: Tensor, claimed: DraftProbabilities | None = None
) -> Tensor:
    """`[T, V]` exact law of the next token when row t drafts one token from its q.

    `claimed` is what the verifier is told, if not q.
    """
    verifier = Lossless(Lossless.Options(), toy_context(vocab_size=VOCAB_SIZE))
    count, width = q.values.shape
    assert q.vocabulary is not None
    rows = torch.arange(count).repeat_interleave(width)  # every token each row may draft
    ones = torch.ones(len(rows), dtype=torch.int64)
    batch = VerifyInput(
        [str(row) for row in range(len(rows))],
        target_logits[rows],
        target_logits[rows],
        q.vocabulary.expand(count, -1).flatten(),
        ones,
        (claimed or q).take(rows),
        ones.double(),
        torch.arange(len(rows)),
        ones,
        max_num_draft=1,
        all_greedy=False,
        any_greedy=False,
    )
    accepted = verifier.accepted_law(batch)[:, 1:]
    residual = verifier.residual(batch, torch.arange(len(rows)))
    residual = residual / residual.sum(dim=1, keepdim=True)
    drafted = torch.nn.functional.one_hot(batch.draft_token_ids.clamp(min=0), VOCAB_SIZE)
    law = accepted * drafted + (1 - accepted) * residual
    return (q.values.unsqueeze(2) * law.view(count, width, VOCAB_SIZE)).sum(dim=1)


@pytest.mark.parametrize("lists", ["one_list", "two_lists"])
@pytest.mark.parametrize("dynamic_tokens", [0, 2])
def test_what_is_drafted_from_the_head_keeps_the_targets_law(
    lists: str, dynamic_tokens: int, request: pytest.FixtureRequest
) -> None:
    """Every draft token of every request enumerated, each request with tokens of its own."""
    head = TorchHead()
    draft = draft_head(head, request.getfixturevalue(lists), dynamic_tokens=dynamic_tokens)
    begin(draft, a=[50, 51, 31], b=[10], c=[5, 6, 7])
    logits, vocabulary = draft.logits(hidden_states(3), np.arange(3))
    q = DraftProbabilities(torch.softmax(logits.double(), dim=1), vocabulary)
    target_logits = head.logits(hidden_states(3, seed=9)).double()
    target = torch.softmax(target_logits, dim=1)
    error = (law_after_verification(q, target_logits) - target).abs().max()
    assert error < 1e-12

    # Negative control: with probabilities other than those that were drawn from, it does not.
    uniform = (q.values > 0) / (q.values > 0).sum(dim=1, keepdim=True)
    claimed = DraftProbabilities(uniform.double(), vocabulary)
    biased = law_after_verification(q, target_logits, claimed)
    assert (biased - target).abs().max() > 1e-2
