"""Attention of trees, chains and blocks over the paged cache, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm_spec_plugins.triton_kernels.tree_attention import (
    PagedContext,
    block_ancestors,
    causal_ancestors,
    tree_ancestors,
    tree_attention,
    tree_attention_reference,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Largest difference from float64 for outputs around 1, by the query's type. The interpreter
#: cuts bfloat16 where GPUs round.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class Batch:
    query: Tensor
    context: PagedContext
    ancestors: Tensor
    query_starts: Tensor
    max_query_len: int
    scale: float

    def run(self, **options: object) -> Tensor:
        return tree_attention(
            self.query, self.context, self.ancestors, self.query_starts,
            max_query_len=self.max_query_len, scale=self.scale, **options,
        )  # type: ignore[arg-type]  # fmt: skip

    def expected(self, **options: object) -> Tensor:
        return tree_attention_reference(
            self.query.double(), self.context, self.ancestors, self.query_starts,
            scale=self.scale, **options,
        )  # type: ignore[arg-type]  # fmt: skip


def random_parents(generator: torch.Generator, num_nodes: int) -> list[int]:
    """Any tree whose parents come before their children; several may hang on the context."""
    return [
        int(torch.randint(-1, node, (), generator=generator)) if node else -1
        for node in range(num_nodes)
    ]


def make(
    query_lens: list[int],
    context_lens: list[int],
    *,
    num_kv_heads: int = 1,
    group: int = 2,
    head_size: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    masks: str = "tree",
    seed: int = 0,
) -> Batch:
    """A batch whose unused cache is NaN: what must not be read shows."""
    generator = torch.Generator().manual_seed(seed)
    num_reqs, num_tokens = len(query_lens), sum(query_lens)
    columns = max(-(-(q + c) // block_size) for q, c in zip(query_lens, context_lens, strict=True))
    columns = max(columns, 1)
    num_blocks = num_reqs * columns + 1
    shape = (num_blocks, block_size, num_kv_heads, 2 * head_size)  # vLLM's NHD
    rows = torch.randn(shape, generator=generator)
    tables = 1 + torch.randperm(num_blocks - 1, generator=generator).view(num_reqs, columns)
    used = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    for request, (q, c) in enumerate(zip(query_lens, context_lens, strict=True)):
        places = torch.arange(q + c)
        used[tables[request, places // block_size], places % block_size] = True
    rows[~used] = torch.nan
    rows = rows.to(cache_dtype or dtype).to(DEVICE).transpose(1, 2)
    keys, values = rows.split(head_size, dim=-1)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32).to(DEVICE)
    if masks == "tree":
        parents = [node for q in query_lens for node in random_parents(generator, q)]
        ancestors = tree_ancestors(torch.tensor(parents, dtype=torch.int32, device=DEVICE), starts)
    elif masks == "causal":
        ancestors = causal_ancestors(starts, num_tokens)
    else:
        ancestors = block_ancestors(starts, num_tokens)
    query = torch.randn(num_tokens, num_kv_heads * group, head_size, generator=generator)
    context = PagedContext(
        keys,
        values,
        tables.to(torch.int32).to(DEVICE),
        torch.tensor(context_lens, dtype=torch.int32, device=DEVICE),
        max(context_lens),
    )
    return Batch(
        query.to(dtype).to(DEVICE),
        context,
        ancestors,
        starts,
        max(1, *query_lens),
        head_size**-0.5,
    )


def difference(found: Tensor, expected: Tensor) -> Tensor:
    """Largest difference of each token; NaN is the largest."""
    return (found.double() - expected).abs().nan_to_num(torch.inf).amax(dim=(1, 2))


def check(batch: Batch, **options: object) -> None:
    splits = {"num_splits": options.pop("num_splits")} if "num_splits" in options else {}
    expected = batch.expected(**options)
    found = batch.run(**splits, **options)
    assert found.dtype == batch.query.dtype
    assert difference(found, expected).max() < TOLERANCE[batch.query.dtype]


RAGGED = ([5, 1, 9, 3], [37, 0, 70, 64])


@pytest.mark.parametrize("masks", ["tree", "causal", "block"])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_masks(masks: str, num_splits: int) -> None:
    check(make(*RAGGED, num_kv_heads=2, masks=masks), num_splits=num_splits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types(dtype: torch.dtype) -> None:
    check(make(*RAGGED, dtype=dtype), num_splits=2)


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_head_sizes(head_size: int) -> None:
    check(make([3, 2], [40, 5], head_size=head_size), num_splits=2)


@pytest.mark.parametrize("block_size", [1, 7, 16, 24, 64, 528])
def test_block_sizes(block_size: int) -> None:
    check(make([5, 4], [70, 3], block_size=block_size))


@pytest.mark.parametrize("group", [1, 3, 8])
def test_query_heads_that_share_a_kv_head(group: int) -> None:
    check(make([5, 2], [20, 33], group=group))


def test_64_nodes() -> None:
    """The last bit of a mask is its sign; in float32 64 nodes of 2 heads are many tiles of rows."""
    check(make([64, 63], [10, 3], num_kv_heads=2))


def test_no_context_and_no_nodes() -> None:
    check(make([4, 0, 6], [0, 9, 0]), num_splits=4)
    assert make([0, 0], [4, 5]).run().shape == (0, 2, 16)


def test_a_node_that_sees_nothing_gets_zeros() -> None:
    for num_splits in (1, 3):
        batch = make([3, 4], [0, 0])
        batch.ancestors[1] = 0
        batch.ancestors[5] = 0
        check(batch, num_splits=num_splits)
        assert (batch.run(num_splits=num_splits)[[1, 5]] == 0).all()


def test_padding_after_the_last_request() -> None:
    """Tokens of no request, as CUDA graphs have them, do not disturb the others."""
    batch = make(*RAGGED)
    padded = replace(
        batch,
        query=torch.cat([batch.query, torch.full_like(batch.query[:5], torch.nan)]),
        ancestors=torch.cat([batch.ancestors, batch.ancestors[:5]]),
    )
    for num_splits in (1, 3):
        found = padded.run(num_splits=num_splits)[:-5]
        assert torch.equal(found, batch.run(num_splits=num_splits))


def test_softcap() -> None:
    batch = make(*RAGGED)
    check(batch, softcap=0.7, num_splits=2)
    assert difference(batch.run(), batch.expected(softcap=0.7)).max() > 0.01


@pytest.mark.parametrize("window", [1, 8, 40])
def test_sliding_window(window: int) -> None:
    """Positions are those of the tree's depths, not of the cache."""
    batch = make(*RAGGED)
    depth = torch.tensor([bin(mask % 2**64).count("1") for mask in batch.ancestors.tolist()])
    context = batch.context.context_lens.repeat_interleave(batch.query_starts.diff())
    positions = context.long() + depth.to(DEVICE) - 1
    for num_splits in (1, 3):
        check(batch, sliding_window=window, positions=positions, num_splits=num_splits)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_caches(cache_dtype: torch.dtype) -> None:
    batch = make(*RAGGED, dtype=torch.float16, cache_dtype=cache_dtype)
    scales = torch.tensor([[0.5], [1.7]], device=DEVICE)
    batch.context = replace(batch.context, key_scale=scales[0], value_scale=scales[1])
    check(batch, num_splits=2)


def test_fp8_caches_without_scales() -> None:
    check(make([3], [20], dtype=torch.float16, cache_dtype=torch.float8_e5m2))


def test_other_strides() -> None:
    """Heads before slots, padded pages, and a query cut out of a wider projection."""
    batch = make([5, 4], [30, 8])
    wide = torch.randn(9, 10, 16, device=DEVICE)
    wide[:, 3:5] = batch.query
    keys = batch.context.keys.contiguous()
    values = torch.nn.functional.pad(batch.context.values, (0, 0, 0, 0, 0, 3))[:, :1]
    context = replace(batch.context, keys=keys, values=values)
    other = replace(batch, query=wide[:, 3:5], context=context)
    assert torch.equal(other.run(num_splits=2), batch.run(num_splits=2))


def test_the_same_bits_in_any_company() -> None:
    batch = make(*RAGGED)
    alone = replace(
        batch,
        query=batch.query[6:15].clone(),
        ancestors=batch.ancestors[6:15].clone(),
        query_starts=torch.tensor([0, 9], dtype=torch.int32, device=DEVICE),
        context=replace(
            batch.context,
            block_tables=batch.context.block_tables[2:3],
            context_lens=batch.context.context_lens[2:3],
        ),
    )
    assert torch.equal(alone.run(num_splits=3), batch.run(num_splits=3)[6:15])


@pytest.mark.parametrize("num_splits", [1, 2])
def test_every_wrong_bit_is_noticed(num_splits: int) -> None:
    """Control: a mask off by one bit changes its own node, and no other."""
    batch = make([6, 4], [18, 0])
    expected = batch.expected()
    for token, node in [(0, 1), (3, 3), (5, 5), (6, 1), (9, 0)]:
        batch.ancestors[token] ^= 1 << node
        wrong = difference(batch.run(num_splits=num_splits), expected)
        batch.ancestors[token] ^= 1 << node
        assert wrong[token] > 100 * TOLERANCE[torch.float32], (token, node)
        wrong[token] = 0
        assert wrong.max() < TOLERANCE[torch.float32]


def test_bits_past_the_last_node_mean_nothing() -> None:
    batch = make([6, 4], [18, 3])
    expected = batch.run()
    batch.ancestors[:6] |= -1 << 6
    batch.ancestors[6:] |= -1 << 4
    assert torch.equal(batch.run(), expected)


def test_unsigned_masks() -> None:
    batch = make([64], [3])
    unsigned = replace(batch, ancestors=batch.ancestors.view(torch.uint64))
    assert torch.equal(unsigned.run(), batch.run())
    check(unsigned)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    lens=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 80)), min_size=1, max_size=3),
    num_kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_size=st.sampled_from([8, 16, 24]),
    block_size=st.sampled_from([3, 8, 16, 32]),
    masks=st.sampled_from(["tree", "causal", "block"]),
    num_splits=st.sampled_from([None, 1, 2, 5]),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    lens: list[tuple[int, int]], masks: str, num_splits: int | None, **shape: int
) -> None:
    query_lens, context_lens = [q for q, _ in lens], [c for _, c in lens]
    if sum(query_lens) == 0:
        query_lens[0] = 1
    check(make(query_lens, context_lens, masks=masks, **shape), num_splits=num_splits)


def starts_of(*lens: int) -> Tensor:
    return torch.tensor([0, *lens]).cumsum(0).to(torch.int32)


def test_tree_masks() -> None:
    parents = torch.tensor([-1, 0, 0, 1, 3, -1, -1, 0, 1, 2])
    masks = tree_ancestors(parents, starts_of(6, 0, 4))
    expected = [0b1, 0b11, 0b101, 0b1011, 0b11011, 0b100000, 0b1, 0b11, 0b111, 0b1111]
    assert masks.tolist() == expected


def test_a_chain_is_a_tree_and_a_block_sees_all() -> None:
    starts = starts_of(64, 1, 7)
    parents = torch.cat([torch.arange(size) - 1 for size in (64, 1, 7)])
    causal = causal_ancestors(starts, 72)
    assert torch.equal(tree_ancestors(parents, starts), causal)
    block = block_ancestors(starts, 72)
    assert block.tolist() == [-1] * 64 + [1] + [127] * 7
    assert causal[63] == -1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": torch.zeros(10, 4, 12)}, "head size is 12"),
        ({"query": torch.zeros(10, 4, 16, dtype=torch.float64)}, "float64"),
        ({"query": torch.zeros(10, 2, 8)}, "a divisor of 2"),
        ({"ancestors": torch.zeros(10, dtype=torch.int32)}, "ancestors"),
        ({"query_starts": torch.zeros(2, dtype=torch.int32)}, "context_lens"),
        ({"max_query_len": 65}, "the bits of a mask"),
    ],
)
def test_wrong_arguments(change: dict, words: str) -> None:
    batch = make([6, 4], [18, 3])
    values = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=words):
        replace(batch, **values).run()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_splits": 0}, "num_splits is 0"),
        ({"sliding_window": 4}, "together"),
        ({"sliding_window": 0, "positions": torch.zeros(10)}, "at least 1"),
    ],
)
def test_wrong_options(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make([6, 4], [18, 3]).run(**options)
