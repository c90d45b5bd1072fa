"""The exit adapter's file and block, over a stand-in for the target's pages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vllm_spec_plugins.proposers.exit_adapter import ExitAdapter

from vllm_spec_plugins.adapter_file import AdapterCard, Probes, TargetShape, write_adapter
from vllm_spec_plugins.context import ModelFacts
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.target_model import LayerState

SHAPE = TargetShape(
    hidden_size=48,
    num_layers=6,
    vocab_size=100,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope={"rope_theta": 10_000.0},
)
FACTS = ModelFacts(
    model="some/model",
    vocab_size=100,
    hidden_size=48,
    num_layers=6,
    max_model_len=256,
    num_speculative_tokens=4,
)


def _rotate(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """`[T, heads, D]`, halves against each other."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * base ** (-torch.arange(half) / half)
    first, second = x.chunk(2, dim=-1)
    c, s = angles.cos(), angles.sin()
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(x.dtype)


class Pages:
    """A `PagedAttention` of one request, its keys and values in a dictionary by position."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, base: float) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.base = base
        self.positions = torch.empty(0)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def rotate(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        self.positions = positions
        split = (x.unflatten(-1, (-1, self.head_dim)) for x in (query, key))
        query, key = (_rotate(x, positions, self.base).flatten(-2) for x in split)
        return query, key

    def write(self, key: Tensor, value: Tensor) -> None:
        assert key.shape[1] == value.shape[1] == self.num_kv_heads * self.head_dim
        for position, k, v in zip(self.positions.tolist(), key, value, strict=True):
            self.keys[position], self.values[position] = k, v

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows: list[Tensor] = []
        group = self.num_heads // self.num_kv_heads
        self.write(key, value)
        for position, q in zip(self.positions.tolist(), query, strict=True):
            k, v = (
                torch.stack([kept[i] for i in range(position + 1)])
                .unflatten(-1, (-1, self.head_dim))
                .repeat_interleave(group, dim=1)
                for kept in (self.keys, self.values)
            )
            scores = torch.einsum("hd,nhd->hn", q.unflatten(-1, (-1, self.head_dim)), k)
            weights = (scores * self.head_dim**-0.5).softmax(-1)
            rows.append(torch.einsum("hn,nhd->hd", weights, v).flatten())
        return torch.stack(rows)


class Target:
    """As much of a `TargetModel` as an adapter asks for."""

    def __init__(self, rank: int = 0, ranks: int = 1, seed: int = 7, base: float = 10_000.0):
        table = torch.randn(100, 48, generator=torch.Generator().manual_seed(seed))
        self.module = nn.Embedding.from_pretrained(table)
        self.num_layers, self.dtype, self.tensor_parallel_rank = 6, torch.float32, rank
        self.head: Any = type("Head", (), {"hidden_size": 48, "vocab_size": 100})()
        self.ranks, self.base = ranks, base
        self.pages: dict[str, Pages] = {}

    def attention(self, name: str) -> Pages:
        assert name not in self.pages
        self.pages[name] = Pages(4 // self.ranks, 2 // self.ranks, 16, self.base)
        return self.pages[name]

    def embed(self, token_ids: Tensor) -> LayerState:
        return LayerState(3.0 * self.module(token_ids))

    def all_reduce(self, partial: Tensor) -> Tensor:
        return partial


def _card(ffn_size: int = 0) -> AdapterCard:
    return AdapterCard(
        model="model",
        target=SHAPE,
        exit_layer=2,
        ffn_size=ffn_size,
        norm_epsilon=1e-5,
        training={"steps": 1},
    )


def _probes(target: Target) -> Probes:
    rotated = _rotate(Probes.rotation_input(16)[:, None], Probes.positions(), target.base)
    return Probes(target.module(Probes.tokens(100)), rotated[:, 0])


@pytest.fixture(params=[0, 24], ids=["attention only", "with a feed-forward part"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    card = _card(request.param)
    weights = {
        name: torch.randn(shape, generator=generator) / (1 if len(shape) == 1 else shape[1] ** 0.5)
        for name, shape in card.tensor_shapes().items()
    }
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, card, weights, _probes(Target()))
    return path, weights


def _reference(weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """The block over a whole sequence, `[T, H]` from position 0 on, written anew."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    positions = torch.arange(len(hidden))
    h = norm(hidden, weights["attention_norm"])
    query = _rotate((h @ weights["query"].T).unflatten(-1, (4, 16)), positions).transpose(0, 1)
    key = _rotate((h @ weights["key"].T).unflatten(-1, (2, 16)), positions).transpose(0, 1)
    value = (h @ weights["value"].T).unflatten(-1, (2, 16)).transpose(0, 1)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    x = hidden + mixed.transpose(0, 1).flatten(1) @ weights["output"].T
    if "gate" in weights:
        h = norm(x, weights["ffn_norm"])
        x = x + (F.silu(h @ weights["gate"].T) * (h @ weights["up"].T)) @ weights["down"].T
    return norm(x, weights["final_norm"])


def test_step_by_step_equals_the_whole_sequence(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """Prompt written, drafts one by one, then rejected positions overwritten."""
    path, weights = saved
    adapter = ExitAdapter(path, Target())  # pyright: ignore[reportArgumentType]
    hidden = torch.randn(20, 48, generator=torch.Generator().manual_seed(1))
    expected = _reference(weights, hidden)
    positions = torch.arange(20)

    adapter.write(hidden[:9], positions[:9])
    for i in (9, 10, 11):
        torch.testing.assert_close(
            adapter.forward(hidden[i : i + 1], positions[i : i + 1]), expected[i : i + 1]
        )
    adapter.forward(torch.randn(2, 48), positions[12:14])  # rejected
    torch.testing.assert_close(adapter.forward(hidden[12:], positions[12:]), expected[12:])


def test_a_missing_write_would_be_noticed(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """Negative control: keys and values of other states at two positions."""
    path, weights = saved
    adapter = ExitAdapter(path, Target())  # pyright: ignore[reportArgumentType]
    hidden = torch.randn(12, 48, generator=torch.Generator().manual_seed(1))
    adapter.write(hidden[:9], torch.arange(9))
    adapter.write(torch.randn(2, 48), torch.arange(9, 11))
    got = adapter.forward(hidden[11:], torch.arange(11, 12))
    assert (got - _reference(weights, hidden)[11:]).abs().max() > 1e-2


def test_shards_of_two_ranks_add_up(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """Both ranks run; each sum over ranks is made by hand, in the order of the calls."""
    path, weights = saved
    hidden = torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(7)
    sums: list[Tensor] = []

    class Ranks:
        """Rank `rank` hands in its part and is given the sums known so far, or stops."""

        def __init__(self) -> None:
            self.parts: list[Tensor] = []

        def __call__(self, partial: Tensor) -> Tensor:
            self.parts.append(partial)
            return sums[len(self.parts) - 1] if len(self.parts) <= len(sums) else partial

    while True:
        outputs, parts = [], []
        for rank in (0, 1):
            target, reduce = Target(rank, ranks=2), Ranks()
            target.all_reduce = reduce
            adapter = ExitAdapter(path, target)  # pyright: ignore[reportArgumentType]
            outputs.append(adapter.forward(hidden, positions))
            parts.append(reduce.parts)
        if len(sums) == len(parts[0]):
            break
        sums.append(parts[0][len(sums)] + parts[1][len(sums)])
    assert len(sums) == (2 if "gate" in weights else 1)
    for output in outputs:
        torch.testing.assert_close(output, _reference(weights, hidden))


def test_card_is_what_was_written(saved: tuple[Path, dict[str, Tensor]]) -> None:
    path, weights = saved
    card = AdapterCard.read(path)
    assert card == _card(24 if "gate" in weights else 0)
    card.check(FACTS, exit_layer=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, "another model .*hidden_size is 48.*some/model is 64"),
        ({"num_layers": 7}, "num_layers is 6"),
        ({"vocab_size": 101}, "vocab_size is 100"),
        ({"tensor_parallel_size": 4}, "cannot be split among 4 ranks"),
    ],
)
def test_another_model_is_refused_before_it_loads(change: dict[str, int], message: str) -> None:
    with pytest.raises(SpecPluginsError, match=message):
        _card().check(dataclasses.replace(FACTS, **change), exit_layer=2)


def test_another_exit_layer_is_refused() -> None:
    with pytest.raises(SpecPluginsError, match="trained for exit_layer 2, not 3"):
        _card().check(FACTS, exit_layer=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "its embedding differs"),
        ({"base": 500_000.0}, "its rotary position embedding differs"),
    ],
)
def test_another_model_of_the_same_shape_is_refused(
    saved: tuple[Path, dict[str, Tensor]], change: dict[str, Any], message: str
) -> None:
    target = Target(**change)
    with pytest.raises(SpecPluginsError, match=f'another model \\("model"\\).*{message}'):
        ExitAdapter(saved[0], target)  # pyright: ignore[reportArgumentType]


def test_another_number_of_layers_is_refused(saved: tuple[Path, dict[str, Tensor]]) -> None:
    target = Target()
    target.num_layers = 8
    with pytest.raises(SpecPluginsError, match="it has 8 layers"):
        ExitAdapter(saved[0], target)  # pyright: ignore[reportArgumentType]


def test_rounding_to_bfloat16_is_no_other_model(saved: tuple[Path, dict[str, Tensor]]) -> None:
    target = Target()
    target.dtype = torch.bfloat16
    target.module = target.module.to(torch.bfloat16)
    adapter = ExitAdapter(saved[0], target)  # pyright: ignore[reportArgumentType]
    hidden = torch.randn(3, 48, dtype=torch.bfloat16)
    assert adapter.forward(hidden, torch.arange(3)).dtype == torch.bfloat16


def test_files_that_are_no_adapters(tmp_path: Path) -> None:
    with pytest.raises(SpecPluginsError, match=r"no adapter file .*calibrate adapter"):
        AdapterCard.read(tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("not safetensors at all")
    with pytest.raises(SpecPluginsError, match="is not an exit adapter"):
        AdapterCard.read(tmp_path / "text")
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    with pytest.raises(SpecPluginsError, match="it has no card"):
        AdapterCard.read(other)
    for card, message in (
        ('{"format_version": 1}', "bad card"),
        ("[]", "bad card"),
        ('{"format_version": 99}', "format version 99"),
    ):
        save_file({"weight": torch.zeros(2)}, other, metadata={"exit_adapter": card})
        with pytest.raises(SpecPluginsError, match=message):
            AdapterCard.read(other)


def test_a_damaged_file_is_refused(saved: tuple[Path, dict[str, Tensor]]) -> None:
    from safetensors import safe_open

    path, _ = saved
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del tensors["key"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(SpecPluginsError, match="damaged"):
        ExitAdapter(path, Target())  # pyright: ignore[reportArgumentType]


def test_only_the_weights_of_the_card_are_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not those of the card"):
        write_adapter(tmp_path / "a", _card(), {"query": torch.zeros(1)}, _probes(Target()))
