"""`diffusion`: its caches against reading each text anew, q beside its token, options refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor
from vllm_spec_plugins.proposers.block_draws import BlockDraws
from vllm_spec_plugins.proposers.diffusion import Diffusion, DiffusionOptions

from vllm_spec_plugins.confidence_threshold import ConfidenceThreshold, ConfidenceThresholdOptions
from vllm_spec_plugins.diffusion.drafter import DiffusionDrafter
from vllm_spec_plugins.diffusion.folder import DrafterConfig
from vllm_spec_plugins.draft_probabilities import DraftProbabilities
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.length_control import Fixed, LengthController, LengthControlOptions
from vllm_spec_plugins.proposer import Draft, DraftInput
from vllm_spec_plugins.registry import Kind, installed
from vllm_spec_plugins.testing import toy_context

VOCABULARY, K, POSITIONS = 20, 4, 64
END = 7
CONTEXT = toy_context(vocab_size=VOCABULARY, num_speculative_tokens=K)
CONTEXT = replace(CONTEXT, max_num_requests=4)
PATTERNS = [("block", "next_token"), ("block", "own_token"), ("full", "own_token")]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`folder_of(pattern, predicts)`: a drafter with random weights."""

    def folder_of(pattern: str = "block", predicts: str = "next_token", **changes: Any) -> Path:
        sizes: dict[str, Any] = {
            "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32,
            "num_layers": 2, "num_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
            "max_positions": POSITIONS, "rope_theta": 1e4, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False, "attention_bias": False,
            "mask_token_id": VOCABULARY, "attention_pattern": pattern, "predicts": predicts,
        }  # fmt: skip
        config = DrafterConfig(**{**sizes, **changes})
        drafter = DiffusionDrafter(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in drafter.parameters():
                if weight.ndim == 2:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
        folder = tmp_path_factory.mktemp("drafter")
        save_file(drafter.export(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config.as_json()))
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return folder_of


def proposer_of(folder: Path, context: Any = CONTEXT, **options: Any) -> Diffusion:
    proposer = Diffusion(DiffusionOptions(model=str(folder), **options), context)
    proposer.load(None)  # type: ignore[arg-type]  # the target is not asked for anything
    return proposer


def step(
    texts: dict[str, Sequence[int]],
    most: dict[str, int] | int = K,
    temperatures: float | Sequence[float] = 0.0,
    control: LengthController | None = None,
) -> DraftInput:
    """Texts by request, in rows that are not in order, stale tokens behind them."""
    count, room = len(texts), max(map(len, texts.values())) + K
    history = np.full((count, room), 3, dtype=np.int32)
    rows = np.arange(count)[::-1].copy()
    for row, text in zip(rows, texts.values(), strict=True):
        history[row, : len(text)] = text
    limits = [most if isinstance(most, int) else most.get(name, K) for name in texts]
    return DraftInput(
        request_ids=list(texts),
        token_history=history,
        rows=rows,
        num_tokens=np.array([len(text) for text in texts.values()]),
        num_prompt_tokens=np.ones(count, dtype=np.int64),
        max_draft=np.array(limits),
        temperatures=np.broadcast_to(np.float32(temperatures), (count,)).copy(),
        streams=np.array([int(name) << 32 for name in texts]),
        hidden_states=None,
        cache_salts=None,
        length_control=control or Fixed(LengthControlOptions(), CONTEXT),
    )


def law_of(draft: Draft) -> DraftProbabilities:
    assert draft.probabilities is not None
    return draft.probabilities


def text_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def test_registered() -> None:
    assert installed().load(Kind.PROPOSER, "diffusion") is Diffusion


# --- the caches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PATTERNS, ids=str)
def test_texts_read_step_by_step_give_what_reading_them_anew_gives(
    kind: tuple[str, str], folder_of: Callable[..., Path]
) -> None:
    """Some do not draft for a while, one is preempted, one finishes and its name comes again."""
    folder, dice = folder_of(*kind), np.random.default_rng(1)
    proposer = proposer_of(folder, context_window=40)
    texts = {"0": text_of(0, 1), "1": text_of(1, 9), "2": text_of(2, 3)}
    for turn in range(8):
        if turn == 3:
            proposer.finish(["1"])
        if turn == 5:
            proposer.finish(["2"])
            texts["2"] = text_of(9, 4)
        most = {name: int(dice.integers(0, K + 1)) for name in texts}
        most["0"] = K if turn != 4 else 0
        batch = step({name: texts[name] for name in dice.permutation(list(texts)).tolist()}, most)
        drafting = np.flatnonzero(batch.max_draft)
        seen = proposer.logits(batch, drafting)
        anew = proposer_of(folder, context_window=40).logits(batch, drafting)
        torch.testing.assert_close(seen, anew, rtol=1e-4, atol=1e-4)
        for name in texts:
            texts[name] = [*texts[name], *text_of(turn, int(dice.integers(1, K + 2)))]
    assert max(map(len, texts.values())) < 40


@pytest.mark.parametrize("kind", PATTERNS, ids=str)
def test_of_a_long_text_the_window_is_read(
    kind: tuple[str, str], folder_of: Callable[..., Path]
) -> None:
    """Laws do not depend on where a text begins, only on its last tokens."""
    proposer = proposer_of(folder_of(*kind), context_window=8)
    end = text_of(0, 8)
    long = proposer.logits(step({"0": [*text_of(1, 100), *end]}), np.array([0]))
    short = proposer.logits(step({"1": end}), np.array([0]))
    torch.testing.assert_close(long, short, rtol=1e-3, atol=1e-3)
    # A request that did not draft for longer than the window begins anew.
    later = [*text_of(1, 100), *end, *text_of(2, 30), *end]
    again = proposer.logits(step({"0": later}), np.array([0]))
    torch.testing.assert_close(again, short, rtol=1e-3, atol=1e-3)


def test_prompts_are_read_in_parts(
    folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {str(i): text_of(i, length) for i, length in enumerate((30, 2, 25, 12))}
    at_once = proposer_of(folder_of(), context_window=40)
    batch, everyone = step(texts), np.arange(4)
    wanted = at_once.logits(batch, everyone)
    monkeypatch.setattr(Diffusion, "TOKENS_PER_PASS", 26)
    in_parts = proposer_of(folder_of(), context_window=40)
    passes = []
    draft = in_parts._drafter.draft
    monkeypatch.setattr(
        in_parts._drafter, "draft", lambda *a: passes.append(a[1].token_ids.shape) or draft(*a)
    )
    torch.testing.assert_close(in_parts.logits(batch, everyone), wanted, rtol=1e-4, atol=1e-4)
    assert passes == [(1, 2), (1, 30), (1, 25), (1, 12)]


def test_a_text_that_changed_is_read_anew(folder_of: Callable[..., Path]) -> None:
    """`finish` should have said so; if it did not, nothing of the old text is left."""
    proposer = proposer_of(folder_of(), context_window=40)
    one = np.array([0])
    proposer.logits(step({"0": [1, 2, 3, 4, 5]}), one)
    for changed in ([1, 2, 3, 4, 6, 7], [1, 2, 3], [1, 2, 3]):
        fresh = proposer_of(folder_of(), context_window=40).logits(step({"0": changed}), one)
        found = proposer.logits(step({"0": changed}), one)
        torch.testing.assert_close(found, fresh, rtol=1e-4, atol=1e-4)


def test_rows_are_given_back(folder_of: Callable[..., Path]) -> None:
    proposer = proposer_of(folder_of())
    for turn in range(5):
        names = [str(10 * turn + i) for i in range(4)]
        proposer.propose(step({name: [1, 2, 3] for name in names}))
        proposer.finish([*names, "nobody"])
    proposer.warm_up()
    assert len(proposer._free) == 4
    assert not proposer._row_of


# --- drafts -------------------------------------------------------------------------------------


def test_greedy_drafts_are_the_most_likely_tokens(folder_of: Callable[..., Path]) -> None:
    texts = {"0": text_of(0, 5), "1": text_of(1, 9), "2": text_of(2, 2)}
    batch = step(texts, {"1": 0, "2": 2})
    draft = proposer_of(folder_of()).propose(batch)
    logits = proposer_of(folder_of()).logits(batch, np.array([0, 2]))
    wanted = logits.argmax(dim=2)
    assert draft.probabilities is None
    table = torch.as_tensor(draft.token_ids)
    assert table[0].tolist() == wanted[0].tolist()
    assert table[1].tolist() == [-1] * K
    assert table[2].tolist() == [*wanted[1, :2].tolist(), -1, -1]


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("top_k", [None, 6])
def test_q_belongs_to_its_token(
    steps: int, top_k: int | None, folder_of: Callable[..., Path]
) -> None:
    """In every row, whoever drafts beside it, and at the request's own temperature."""
    texts = {str(i): text_of(i, 3 + i) for i in range(4)}
    options = {"denoising_steps": steps, "draft_top_k": top_k, "block_size": 6}
    temperatures = [0.7, 0.0, 1.3, 1.0]
    proposer = proposer_of(folder_of(), **options)
    batch = step(texts, {"0": 3, "3": 0}, temperatures)
    draft = proposer.propose(batch)
    law, table = law_of(draft), torch.as_tensor(draft.token_ids)
    assert law.sampled is not None
    assert law.sampled.tolist() == [[True] * K, [False] * K, [True] * K, [False] * K]
    drafted = table >= 0
    assert drafted.sum(dim=1).tolist() == [3, K, K, 0]
    assert (law.of(table)[drafted] > 0).all()
    torch.testing.assert_close(law.values[0].sum(dim=1), torch.ones(K))
    # The same alone, in another row of the batch, at its own temperature.
    for name in ("0", "2"):
        alone = proposer_of(folder_of(), **options).propose(
            step({name: texts[name]}, batch.max_draft.tolist()[int(name)], temperatures[int(name)])
        )
        count = int(drafted[int(name)].sum())
        assert (
            torch.as_tensor(alone.token_ids)[0, :count].tolist()
            == table[int(name), :count].tolist()
        )
        own = law_of(alone)
        torch.testing.assert_close(
            own.of(torch.as_tensor(alone.token_ids))[0, :count],
            law.of(table)[int(name), :count],
        )
    if steps == 1 and top_k is None:
        logits = proposer_of(folder_of(), block_size=6).logits(batch, np.array([0]))
        torch.testing.assert_close(law.values[0], torch.softmax(logits[0, :K] / 0.7, dim=1))


def test_the_same_position_drafted_again_has_other_noise() -> None:
    """After a rejection the positions behind it come again: nothing of their draws is left."""
    streams, flat = 3000, torch.zeros(3000, K, VOCABULARY)
    tokens = []
    for length in (6, 7):
        batch = step({str(i): [1] * length for i in range(streams)}, K, 1.0)
        draws = BlockDraws.of(batch, np.arange(streams), torch.device("cpu"))
        tokens.append(draws(flat, torch.arange(K).unsqueeze(0))[0])
    same = [(tokens[0][:, i + 1] == tokens[1][:, i]).double().mean() for i in range(K - 1)]
    same += [(tokens[0][:, i] == tokens[0][:, i + 1]).double().mean() for i in range(K - 1)]
    # Of 3,000 tokens a twentieth, and 6 standard deviations.
    assert max(same) < 1 / VOCABULARY + 0.024


def test_drafts_end_with_the_text(folder_of: Callable[..., Path]) -> None:
    """The token that ends it is kept."""
    context = replace(
        CONTEXT, facts=replace(CONTEXT.facts, end_token_ids=(END, 99)), max_num_requests=99
    )
    proposer = proposer_of(folder_of(), context)
    names = {str(i): text_of(i, 4) for i in range(99)}
    table = torch.as_tensor(proposer.propose(step(names, K, 2.0)).token_ids)
    ended = (table == END).any(dim=1)
    assert 5 < ended.sum() < 80
    for row in table[ended].tolist():
        sent = [token for token in row if token >= 0]
        assert sent.index(END) == len(sent) - 1
    assert (table[~ended] >= 0).all()


@pytest.mark.parametrize("options", [{}, {"drafts": "path"}, {"denoising_steps": 2}], ids=str)
def test_a_length_controller_stops_at_tokens_it_keeps(
    options: dict[str, Any], folder_of: Callable[..., Path]
) -> None:
    control = ConfidenceThreshold(ConfidenceThresholdOptions(threshold=0.5), CONTEXT)
    batch = step({str(i): text_of(i, 5) for i in range(4)}, K, [0, 0, 1, 1], control)
    whole = torch.as_tensor(
        proposer_of(folder_of(), **options)
        .propose(replace(batch, length_control=Fixed(LengthControlOptions(), CONTEXT)))
        .token_ids
    )
    cut = torch.as_tensor(proposer_of(folder_of(), **options).propose(batch).token_ids)
    lengths = (cut >= 0).sum(dim=1)
    assert lengths.min() >= 1
    assert lengths.min() < K
    for row, length in enumerate(lengths.tolist()):
        assert cut[row, :length].tolist() == whole[row, :length].tolist()


def test_a_path_follows_the_text(folder_of: Callable[..., Path]) -> None:
    """With little say of the draft, what the text repeats is drafted; else the most likely."""
    text = [1, 2, 3, 4] * 6
    most_likely = torch.as_tensor(proposer_of(folder_of()).propose(step({"0": text})).token_ids)
    options = {"mass": 1.0, "max_candidates": VOCABULARY, "draft_weight": 0.01, "beam": 8}
    proposer = proposer_of(folder_of(), drafts="path", path=options)
    assert torch.as_tensor(proposer.propose(step({"0": text}, K, 1.0)).token_ids).tolist() == [
        [1, 2, 3, 4]
    ]
    alone = proposer_of(folder_of(), drafts="path", path={**options, "draft_weight": 1.0})
    assert torch.as_tensor(alone.propose(step({"0": text})).token_ids).tolist() == (
        most_likely.tolist()
    )


def test_chosen_tokens_are_settled_where_the_drafter_is_surest(
    folder_of: Callable[..., Path],
) -> None:
    proposer = proposer_of(folder_of(predicts="own_token"), denoising_steps=2)
    batch = step({"0": text_of(0, 6)})
    table = torch.as_tensor(proposer.propose(batch).token_ids)[0]
    anew = proposer_of(folder_of(predicts="own_token"))
    law = torch.softmax(anew.logits(batch, np.array([0]))[0], dim=1)
    surest = law.amax(dim=1).topk(2).indices
    block = torch.full((1, K), anew._drafter.config.mask_token_id)
    wanted = law.argmax(dim=1)
    for column in surest.tolist():
        block[0, column] = wanted[column]
    row = torch.tensor([anew._row_of["0"]])
    second: Tensor = anew._drafter.denoise(anew._cache, row, block, 6)[0].argmax(dim=1)
    wanted = torch.where(torch.isin(torch.arange(K), surest), wanted, second)
    assert table.tolist() == wanted.tolist()


# --- bad options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_size": 3}, "Raise block_size"),
        ({"denoising_steps": 5}, "Lower denoising_steps"),
        ({"denoising_steps": 7, "block_size": 6}, "Lower denoising_steps"),
        ({"context_window": 61}, "set context_window to 60 or less"),
        ({"context_window": 50, "block_size": 20}, "more than the 64 positions"),
        ({"path": {"mass": 0.5}}, 'set "drafts" to "path"'),
        ({"drafts": "path", "draft_top_k": 5}, 'set "drafts" to "sampled"'),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], said: str, folder_of: Callable[..., Path]
) -> None:
    with pytest.raises(SpecPluginsError) as raised:
        Diffusion.check(DiffusionOptions(model=str(folder_of()), **options), CONTEXT.facts)
    assert said in str(raised.value)


def test_good_options_pass(folder_of: Callable[..., Path]) -> None:
    for options in ({}, {"context_window": 60}, {"block_size": 16, "denoising_steps": 16}):
        Diffusion.check(DiffusionOptions(model=str(folder_of()), **options), CONTEXT.facts)


@pytest.mark.parametrize(
    "options",
    [{}, {"model": "x", "drafts": "greedy"}, {"model": "x", "path": {"lam": 0.5}}],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DiffusionOptions.model_validate(options)


def test_no_such_drafter(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SpecPluginsError, match="calibrate diffusion-drafter"):
        Diffusion.check(DiffusionOptions(model=str(tmp_path)), CONTEXT.facts)
    other = replace(CONTEXT.facts, vocab_size=99)
    with pytest.raises(SpecPluginsError, match="must share a tokenizer"):
        Diffusion.check(DiffusionOptions(model=str(folder_of())), other)
