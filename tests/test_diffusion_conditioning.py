"""Diffusion drafters that read the target's states: which token reads which, and what is kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from vllm_spec_plugins.proposers.diffusion import Diffusion, DiffusionOptions

from vllm_spec_plugins.diffusion.conditioning import Conditioning, TargetStates, layers_of
from vllm_spec_plugins.diffusion.drafter import DiffusionDrafter
from vllm_spec_plugins.diffusion.folder import PROBE, DrafterConfig, check_folder, read_config
from vllm_spec_plugins.diffusion.state_windows import StateWindows
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.length_control import Fixed, LengthControlOptions
from vllm_spec_plugins.proposer import DraftInput, Needs, StepStates
from vllm_spec_plugins.testing import toy_context
from vllm_spec_plugins.weight_probes import read_probes

V, K, G, H = 20, 4, 6, 16
LAYERS = (1, 3)
STATES = TargetStates("some/target", "abc", num_layers=4, hidden_size=G, layers=LAYERS)
CONFIG = DrafterConfig(
    vocab_size=V,
    hidden_size=H,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_positions=64,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    attention_bias=False,
    mask_token_id=V,
    attention_pattern="block",
    predicts="next_token",
    conditioned_on=STATES,
)
CONTEXT = toy_context(vocab_size=V, num_speculative_tokens=K)
FACTS = dataclasses.replace(CONTEXT.facts, num_layers=4, hidden_size=G)
CONTEXT = dataclasses.replace(CONTEXT, facts=FACTS, max_num_requests=4)

#: `[1, T, G]` by layers run.
TextStates = dict[int, Tensor]


def random_drafter(config: DrafterConfig = CONFIG) -> DiffusionDrafter:
    drafter = DiffusionDrafter(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in drafter.parameters():
            spread, mean = (0.4, 0.0) if weight.ndim == 2 else (0.2, 1.0)
            torch.nn.init.normal_(weight, mean=mean, std=spread, generator=generator)
    return drafter.requires_grad_(False)


def write_drafter(folder: Path, drafter: DiffusionDrafter, **extra: Tensor) -> Path:
    save_file({**drafter.export(), **extra}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(drafter.config.as_json()))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drafter(tmp_path_factory.mktemp("drafter"), random_drafter())


@pytest.fixture
def proposer(folder: Path) -> Diffusion:
    return loaded(folder)


def loaded(folder: Path, **options: Any) -> Diffusion:
    options = {"context_window": 40, **options}
    made = Diffusion(DiffusionOptions(model=str(folder), **options), CONTEXT)
    made.load(None)  # type: ignore[arg-type]  # the target is not asked for anything
    return made


def text_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, V, length).tolist()


def states_of(text: list[int]) -> TextStates:
    """A toy target: each token's states follow from the text up to it, in no simple way."""
    seeds = [hash(tuple(text[: i + 1])) % 2**31 for i in range(len(text))]
    rows = [torch.randn(len(LAYERS), G, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return {layer: torch.stack([r[i] for r in rows])[None] for i, layer in enumerate(LAYERS)}


def follow(proposer: Diffusion, parts: dict[str, tuple[list[int], int, int, int]]) -> None:
    """A step of the engine, of a part of each text.

    Args:
        proposer: Told.
        parts: By request: its text with draft tokens, the place the step begins at, the tokens
            computed, and how many of those stand.
    """
    chosen = [
        {layer: s[0, begin : begin + count] for layer, s in states_of(text).items()}
        for text, begin, count, _ in parts.values()
    ]
    positions = [torch.arange(begin, begin + count) for _, begin, count, _ in parts.values()]
    scheduled, verified = (np.array([part[i] for part in parts.values()]) for i in (2, 3))
    nobody = np.zeros(len(parts))
    states = StepStates(
        request_ids=list(parts),
        rows=np.arange(len(parts)),
        num_scheduled=scheduled,
        num_verified=verified,
        num_draft=scheduled - verified,
        emitted=[[]] * len(parts),
        token_ids=torch.empty(0),
        positions=torch.cat(positions),
        layer_states={layer: torch.cat([part[layer] for part in chosen]) for layer in LAYERS},
        temperatures=nobody.astype(np.float32),
        streams=nobody.astype(np.int64),
    )
    proposer.follow(states)


def step(texts: dict[str, list[int]], most: list[int] | None = None) -> DraftInput:
    count = len(texts)
    history = np.full((count, max(map(len, texts.values())) + K), 3, dtype=np.int32)
    for row, text in enumerate(texts.values()):
        history[row, : len(text)] = text
    return DraftInput(
        request_ids=list(texts),
        token_history=history,
        rows=np.arange(count),
        num_tokens=np.array([len(text) for text in texts.values()]),
        num_prompt_tokens=np.ones(count, dtype=np.int64),
        max_draft=np.array(most or [K] * count),
        temperatures=np.zeros(count, dtype=np.float32),
        streams=np.arange(count) << 32,
        hidden_states=None,
        cache_salts=None,
        length_control=Fixed(LengthControlOptions(), CONTEXT),
    )


def dense(text: list[int], known_from: int = 0, states: TextStates | None = None) -> Tensor:
    """`[K, V]` laws after a text, in one pass over it and the masks, nothing cached.

    Args:
        text: Its last token has no state yet.
        known_from: First position whose state is known.
        states: Of its tokens; by default `states_of`.
    """
    drafter, length = random_drafter(), len(text)
    states = states or states_of(text)
    known = (torch.arange(length) >= known_from)[None]
    assert drafter.conditioning is not None
    added = drafter.conditioning.of_texts([states[layer] for layer in LAYERS], known)
    size = length + K - 1
    visible = torch.ones(size, size, dtype=torch.bool)
    visible[:length] = torch.ones(length, size, dtype=torch.bool).tril()
    tokens = torch.tensor([[*text, *[V] * (K - 1)]])
    hidden = drafter(tokens, torch.arange(size)[None], visible[None], added)
    return drafter.logits(hidden[0, length - 1 :])


# --- which token reads which state --------------------------------------------------------------


def test_a_token_reads_the_state_of_the_one_before() -> None:
    conditioning = random_drafter().conditioning
    assert conditioning is not None
    text = states_of(text_of(0, 7))
    states = [text[layer] for layer in LAYERS]
    added = conditioning.of_texts(states)
    torch.testing.assert_close(added[0, 0], conditioning.unknown)
    torch.testing.assert_close(added[:, 1:], conditioning.project(states)[:, :-1])
    changed = [state.clone() for state in states]
    changed[1][0, 3] += 1
    moved = (conditioning.of_texts(changed) != added).any(dim=-1)[0]
    assert moved.tolist() == [False] * 4 + [True] + [False] * 2
    known = torch.tensor([[False, False, True, True, True, True, True]])
    given = conditioning.of_texts(states, known)
    torch.testing.assert_close(given[0, :3], conditioning.unknown.expand(3, -1))
    torch.testing.assert_close(given[:, 3:], added[:, 3:])


def test_scale_of_a_state_does_not_matter() -> None:
    """Residual streams grow from layer to layer."""
    conditioning = Conditioning(STATES, H)
    torch.nn.init.normal_(conditioning.projection)
    states = [torch.randn(1, 3, G) for _ in LAYERS]
    torch.testing.assert_close(
        conditioning.project([states[0] * 50, states[1]]),
        conditioning.project(states),
        rtol=1e-3,
        atol=1e-3,
    )


def test_an_untrained_one_adds_nothing() -> None:
    fresh = Conditioning(STATES, H)
    assert not fresh.of_texts([torch.randn(1, 5, G) for _ in LAYERS]).any()


def test_a_state_changes_what_is_drafted_after_it_and_nothing_kept_before(folder: Path) -> None:
    text, place = text_of(3, 12), 6
    states = states_of(text)
    other = {layer: state.clone() for layer, state in states.items()}
    other[1][0, place] += 1
    found = []
    for version in (states, other):
        proposer = loaded(folder)
        windows, row = proposer._states, proposer._rows(["0"])
        assert windows is not None
        count = np.array([len(text) - 1])
        whole = [version[layer][0] for layer in LAYERS]
        windows.write(row, count, 0 * count, torch.arange(len(text)), whole)
        logits = proposer.logits(step({"0": text}), np.array([0]))
        torch.testing.assert_close(logits[0], dense(text, states=version), rtol=1e-4, atol=1e-4)
        found.append((logits, proposer._cache.keys[:, row[0]], proposer._cache.values[:, row[0]]))
    (logits, *kept), (other_logits, *other_kept) = found
    assert ((logits - other_logits).abs().amax(dim=-1) > 1e-3).all()
    for here, there in zip(kept, other_kept, strict=True):
        assert torch.equal(here[:, : place + 1], there[:, : place + 1])
        assert (here[:, place + 1] != there[:, place + 1]).any(dim=-1).all()


# --- states of running requests -----------------------------------------------------------------


def test_windows_hold_the_last_states_of_each_request() -> None:
    """Against a dictionary: parts of prompts, rejected drafts, gaps, requests that come and go."""
    conditioning = random_drafter().conditioning
    assert conditioning is not None
    windows, dice = StateWindows(conditioning, 3, 8), np.random.default_rng(0)
    wanted: list[dict[int, Tensor]] = [{} for _ in range(3)]
    ends = np.zeros(3, dtype=np.int64)
    for turn in range(60):
        rows = dice.permutation(3)[: dice.integers(1, 4)]
        scheduled = dice.integers(1, 20 if turn % 9 == 0 else 6, len(rows))
        verified = dice.integers(1, scheduled + 1)
        if turn % 13 == 5:
            windows.forget([int(rows[0])])
            wanted[rows[0]] = {}
            ends[rows[0]] = dice.integers(0, 30)  # found in the prefix cache up to here
        total = int(scheduled.sum())
        states = [torch.randn(total, G) for _ in LAYERS]
        offsets = scheduled.cumsum() - scheduled
        within = np.arange(total) - np.repeat(offsets, scheduled)
        positions = torch.from_numpy(np.repeat(ends[rows], scheduled) + within)
        windows.write(rows, verified, offsets, positions, states)
        projected = conditioning.project(states)
        for row, begin, count in zip(rows, offsets, verified, strict=True):
            for i in range(count):
                wanted[row][int(ends[row]) + i] = projected[begin + i]
            ends[row] += count
        begins = np.maximum(ends - dice.integers(0, 8, 3), 0)
        read = windows.read(np.arange(3), begins, 9)
        for row in range(3):
            for i in range(9):
                position = int(begins[row]) + i - 1
                known = position in wanted[row] and position >= ends[row] - 8
                expected = wanted[row][position] if known else conditioning.unknown
                torch.testing.assert_close(read[row, i], expected)


def test_drafting_step_by_step_gives_what_reading_the_text_anew_gives(proposer: Diffusion) -> None:
    """Prompts in parts, rejected drafts, one that pauses, one that is preempted and comes back."""
    dice = np.random.default_rng(1)
    texts = {"0": text_of(0, 9), "1": text_of(1, 4), "2": text_of(2, 14)}
    follow(proposer, {"2": (texts["2"], 0, 6, 6)})
    parts = {name: (text, 0, len(text), len(text)) for name, text in texts.items()}
    parts["2"] = (texts["2"], 6, 8, 8)
    pausing = np.array([K, 0, K])
    for turn in range(6):
        follow(proposer, parts)
        if turn == 3:
            proposer.finish(["2"])
            follow(proposer, {"2": (texts["2"], 0, len(texts["2"]), len(texts["2"]))})
        for name in texts:  # the step's bonus token
            texts[name] = [*texts[name], int(dice.integers(0, V))]
        limits = [K] * 3 if turn == 4 else pausing.tolist()
        batch = step(texts, limits)
        drafting = np.flatnonzero(batch.max_draft)
        logits = proposer.logits(batch, drafting)
        for row, request in enumerate(drafting):
            expected = dense(list(texts.values())[request])
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
        parts = {}
        for name, text in texts.items():
            drafted = int(dice.integers(0, K + 1))
            accepted = int(dice.integers(0, drafted + 1))
            good, bad = text_of(turn + 10, accepted), text_of(turn + 20, drafted - accepted)
            texts[name] = [*text, *good]
            parts[name] = ([*text, *good, *bad], len(text) - 1, 1 + drafted, 1 + accepted)
    assert max(map(len, texts.values())) <= 40


def test_what_the_prefix_cache_had_reads_text_alone(proposer: Diffusion) -> None:
    text = text_of(5, 20)
    follow(proposer, {"0": (text, 8, 11, 11)})
    logits = proposer.logits(step({"0": text}), np.array([0]))[0]
    torch.testing.assert_close(logits, dense(text, known_from=8), rtol=1e-4, atol=1e-4)
    assert (logits - dense(text)).abs().max() > 1e-2


def test_no_state_of_an_earlier_request_is_left(proposer: Diffusion) -> None:
    """Its row is given to another, whose states were all computed before."""
    text = text_of(6, 12)
    follow(proposer, {"0": (text_of(7, 12), 0, 12, 12)})
    row = proposer._row_of["0"]
    proposer.finish(["0"])
    logits = proposer.logits(step({"1": text}), np.array([0]))[0]
    assert proposer._row_of["1"] == row
    torch.testing.assert_close(logits, dense(text, known_from=99), rtol=1e-4, atol=1e-4)


def test_long_prompts_and_windows(folder: Path) -> None:
    """A prompt longer than the window, in parts that are; then drafts beside one of another."""
    proposer = loaded(folder, context_window=8)
    text = text_of(8, 50)
    follow(proposer, {"0": (text, 0, 30, 30)})
    follow(proposer, {"0": (text, 30, 19, 19), "1": (text[:5], 0, 5, 5)})
    logits = proposer.logits(step({"0": text, "1": text[:6]}), np.arange(2))
    again = loaded(folder, context_window=8)
    follow(again, {"0": (text, 41, 8, 8)})
    alone = again.logits(step({"0": text}), np.array([0]))
    torch.testing.assert_close(logits[:1], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], dense(text[:6]), rtol=1e-4, atol=1e-4)


def test_warm_up_leaves_nothing(proposer: Diffusion) -> None:
    proposer.warm_up()
    assert len(proposer._free) == 4
    assert proposer._states is not None
    assert (proposer._states.held == -1).all()


# --- folders ------------------------------------------------------------------------------------


def test_states_are_asked_for_only_where_they_are_read(folder: Path, tmp_path: Path) -> None:
    options = DiffusionOptions(model=str(folder))
    assert Diffusion.needs_for(options) == Needs.LAYER_STATES
    assert tuple(Diffusion.layers(options, FACTS)) == LAYERS
    plain = random_drafter(dataclasses.replace(CONFIG, conditioned_on=None))
    options = DiffusionOptions(model=str(write_drafter(tmp_path, plain)))
    assert Diffusion.needs_for(options) == Needs.HISTORY
    assert not Diffusion.layers(options, FACTS)
    assert loaded(tmp_path)._states is None
    assert "conditioned_on" not in plain.config.as_json()


def test_a_folder_is_read_as_it_was_written(folder: Path) -> None:
    assert read_config(folder) == CONFIG
    drafter = DiffusionDrafter.load(folder)
    for name, weight in random_drafter().state_dict().items():
        assert torch.equal(drafter.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ({"layers": [3, 1]}, "rising numbers from 1 to 4"),
        ({"layers": [1, 5]}, "rising numbers from 1 to 4"),
        ({"layers": []}, "rising numbers from 1 to 4"),
        ({"model": None, "layers": None}, "config.json"),
    ],
)
def test_bad_configs(states: dict[str, Any], said: str, tmp_path: Path) -> None:
    values = CONFIG.as_json()
    values["conditioned_on"] |= states
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(SpecPluginsError, match=said):
        read_config(tmp_path)


def test_a_pattern_that_keeps_nothing_is_refused(tmp_path: Path) -> None:
    values = CONFIG.as_json() | {"attention_pattern": "full"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(SpecPluginsError, match='conditioned_on needs attention_pattern "block"'):
        read_config(tmp_path)


def test_weights_without_the_projection_are_refused(tmp_path: Path) -> None:
    write_drafter(tmp_path, random_drafter(dataclasses.replace(CONFIG, conditioned_on=None)))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.as_json()))
    with pytest.raises(SpecPluginsError, match=r"its weights lack target_states\.projection"):
        check_folder(tmp_path, FACTS)


def test_a_target_of_other_sizes_is_refused(folder: Path) -> None:
    for other in ({"hidden_size": 7}, {"num_layers": 5}):
        with pytest.raises(SpecPluginsError) as raised:
            Diffusion.check(
                DiffusionOptions(model=str(folder)), dataclasses.replace(FACTS, **other)
            )
        said = str(raised.value)
        assert 'trained for another model ("some/target")' in said
        assert "calibrate diffusion-drafter" in said
    check_folder(folder, FACTS)


@pytest.fixture
def target_of(tmp_path: Path) -> Callable[[int], Path]:
    """`target_of(seed)`: a model's folder with the weights that are sampled."""

    def target_of(seed: int) -> Path:
        generator = torch.Generator().manual_seed(seed)
        weights = {
            "model.embed_tokens.weight": torch.randn(V, G, generator=generator),
            "model.layers.3.mlp.down_proj.weight": torch.randn(G, 9, generator=generator),
        }
        target = tmp_path / f"target {seed}"
        target.mkdir()
        save_file(weights, target / "model.safetensors")
        return target

    return target_of


def test_a_target_with_other_weights_is_refused(
    tmp_path: Path, target_of: Callable[[int], Path]
) -> None:
    own, other = target_of(0), target_of(1)
    probes = {PROBE + name: probe for name, probe in read_probes(own, 4).items()}
    drafter = tmp_path / "drafter"
    drafter.mkdir()
    write_drafter(drafter, random_drafter(), **probes)
    check_folder(drafter, dataclasses.replace(FACTS, model=str(own)))
    with pytest.raises(SpecPluginsError, match=r"reads hidden states of another model.*differ"):
        check_folder(drafter, dataclasses.replace(FACTS, model=str(other)))


@pytest.mark.parametrize(
    ("text", "layers", "wanted"),
    [
        ("none", 8, ()),
        ("spread", 8, (2, 4, 6)),
        ("spread", 32, (2, 16, 30)),
        ("spread", 2, (1, 2)),
        ("spread", 1, (1,)),
        ("6,2,4,2", 8, (2, 4, 6)),
        ("8", 8, (8,)),
    ],
)
def test_layers(text: str, layers: int, wanted: tuple[int, ...]) -> None:
    assert layers_of(text, layers) == wanted


@pytest.mark.parametrize("text", ["0", "2,9", "two", "", "2,,4", "-1"])
def test_layers_that_are_not_there(text: str) -> None:
    with pytest.raises(SpecPluginsError, match="--condition-on-layers takes numbers"):
        layers_of(text, 8)


def places(known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """First known place of each window."""
    return np.where(known.any(axis=1), known.argmax(axis=1), known.shape[1])


def test_training_withholds_first_parts() -> None:
    from vllm_spec_plugins.calibration.diffusion_training import known_states

    known = known_states((4000, 32), np.random.default_rng(0))
    first = places(known)
    assert (known == (np.arange(32) >= first[:, None])).all()
    assert abs((first > 0).mean() - 0.25) < 0.03
    assert set(first) == set(range(33))
