"""The diffusion drafter: cached passes against dense ones, its window, and what is no drafter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_spec_plugins.context import ModelFacts
from vllm_spec_plugins.diffusion.cache import NewText, PrefixCache
from vllm_spec_plugins.diffusion.drafter import DiffusionDrafter
from vllm_spec_plugins.diffusion.folder import DrafterConfig, check_folder, read_config
from vllm_spec_plugins.errors import SpecPluginsError

V, MASK, W = 40, 40, 7

CONFIG = DrafterConfig(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_positions=64,
    rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    attention_bias=False,
    mask_token_id=MASK,
    attention_pattern="block",
    predicts="next_token",
)

KINDS = [(a, p) for a in ("block", "full") for p in ("next_token", "own_token")]


def random_drafter(**changes: Any) -> DiffusionDrafter:
    """Every weight matters."""
    drafter = DiffusionDrafter(dataclasses.replace(CONFIG, **changes))
    generator = torch.Generator().manual_seed(1)
    for weight in drafter.parameters():
        spread, mean = (0.3, 0.0) if weight.ndim == 2 else (0.2, 1.0)
        torch.nn.init.normal_(weight, mean=mean, std=spread, generator=generator)
    return drafter.requires_grad_(False)


def dense(drafter: DiffusionDrafter, text: list[int], block: list[int]) -> Tensor:
    """`[B, V]` logits of a block, from one pass over text and block with the mask spelt out.

    Args:
        drafter: The drafter.
        text: Before the block.
        block: Its tokens.
    """
    config, length = drafter.config, len(text)
    causal, shifted = config.attention_pattern == "block", config.predicts == "next_token"
    read = block[: len(block) - (causal and shifted)]
    size = length + len(read)
    visible = torch.zeros(1, size, size, dtype=torch.bool)
    for i in range(size):
        for j in range(size):
            if i < length and causal:
                visible[0, i, j] = i - W <= j <= i
            else:
                visible[0, i, j] = j >= length - W
        visible[0, i, i] = True  # text no one sees: to have no empty row
    states = drafter(torch.tensor([text + read]), torch.arange(size)[None], visible)[0]
    start = length - shifted
    return drafter.logits(states[start : start + len(block)])


def new_text(rows: Any, token_ids: Any, counts: Any, longest: int = 10**9) -> NewText:
    return NewText(
        torch.as_tensor(rows), torch.as_tensor(token_ids), torch.as_tensor(counts), longest
    )


def prefilled(drafter: DiffusionDrafter, texts: list[list[int]], window: int = W) -> PrefixCache:
    cache = drafter.new_cache(len(texts), window)
    lengths = np.array([len(text) for text in texts])
    padded = np.array([text + [0] * (lengths.max() - len(text)) for text in texts])
    drafter.extend(cache, new_text(np.arange(len(texts)), padded, lengths, 0))
    return cache


def random_text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, V, length).tolist()


class TestPasses:
    @pytest.mark.parametrize(("pattern", "predicts"), KINDS)
    def test_draft_equals_a_dense_pass(self, pattern: str, predicts: str) -> None:
        """Ragged rows in changing order and company, windows filling up and sliding."""
        drafter = random_drafter(attention_pattern=pattern, predicts=predicts)
        cache = drafter.new_cache(4, W)
        texts: list[list[int]] = [[] for _ in range(4)]
        generator = np.random.default_rng(0)
        for _ in range(12):
            rows = generator.permutation(4)[: generator.integers(1, 5)]
            most = int(generator.integers(1, 12))  # more than the window at times
            lengths = generator.integers(1, most + 1, len(rows))
            new = generator.integers(0, V, (len(rows), most))
            size = int(generator.integers(1, 5))
            longest = max(len(texts[row]) for row in rows)
            logits = drafter.draft(cache, new_text(rows, new, lengths, longest), size)
            for row, tokens, length, got in zip(rows, new, lengths, logits, strict=True):
                texts[row] += tokens[:length].tolist()
                expected = dense(drafter, texts[row], [MASK] * size)
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("pattern", "predicts"), KINDS)
    def test_denoise_leaves_the_cache_as_it_is(self, pattern: str, predicts: str) -> None:
        drafter = random_drafter(attention_pattern=pattern, predicts=predicts)
        texts = [random_text(5, 1), random_text(9, 2)]
        cache = prefilled(drafter, texts)
        settled = torch.tensor([[3, MASK, 8, MASK], [MASK, 5, MASK, MASK]])
        rows = torch.arange(2)
        first = drafter.denoise(cache, rows, settled, 9)
        assert torch.equal(drafter.denoise(cache, rows, settled, 9), first)
        for text, block, got in zip(texts, settled.tolist(), first, strict=True):
            torch.testing.assert_close(got, dense(drafter, text, block), rtol=1e-4, atol=1e-4)
        # Settled tokens matter to the others, whichever side they are on.
        masks = drafter.denoise(cache, rows, torch.full((2, 4), MASK), 9)
        assert (masks[0, 1] - first[0, 1]).abs().max() > 1e-2

    def test_extending_in_parts_or_at_once(self) -> None:
        drafter = random_drafter()
        text = random_text(12)
        whole, parts = prefilled(drafter, [text]), drafter.new_cache(1, W)
        for part in (text[:1], text[1:9], text[9:]):
            drafter.extend(parts, new_text([0], [part], [len(part)]))
        masks, row = torch.full((1, 3), MASK), torch.tensor([0])
        torch.testing.assert_close(
            drafter.denoise(parts, row, masks, 12), drafter.denoise(whole, row, masks, 12)
        )

    @pytest.mark.parametrize(("pattern", "predicts"), KINDS)
    def test_rows_with_nothing_new_stay_as_they_are(self, pattern: str, predicts: str) -> None:
        """Beside others that grow; padding is written where nobody reads."""
        drafter = random_drafter(attention_pattern=pattern, predicts=predicts)
        texts = [random_text(W + 2, 1), random_text(3, 2)]
        cache = prefilled(drafter, texts)
        if pattern == "full":
            tensors = [cache.token_ids[0, :W]]
        else:
            tensors = [cache.keys[:, 0, :W], cache.values[:, 0, :W], cache.last[0]]
        before = [tensor.clone() for tensor in tensors]
        new = [random_text(4, 3), random_text(4, 4)]
        logits = drafter.draft(cache, new_text([0, 1], new, [0, 4], W + 2), 3)
        for text, got in zip((texts[0], texts[1] + new[1]), logits, strict=True):
            torch.testing.assert_close(got, dense(drafter, text, [MASK] * 3), rtol=1e-4, atol=1e-4)
        assert all(map(torch.equal, tensors, before))

    @pytest.mark.parametrize("pattern", ["block", "full"])
    def test_bounds_need_not_be_tight(self, pattern: str) -> None:
        """Wider passes than needed give the same laws."""
        drafter, text = random_drafter(attention_pattern=pattern), random_text(4)
        for longest, padding in ((3, 0), (5, 2), (99, 9)):
            cache = prefilled(drafter, [text[:3]])
            new = new_text([0], [[text[3]] + [0] * padding], [1], longest)
            got = drafter.draft(cache, new, 3)[0]
            torch.testing.assert_close(got, dense(drafter, text, [MASK] * 3), rtol=1e-4, atol=1e-4)

    def test_what_a_row_has_to_read(self) -> None:
        """What is new; of a text that is another one, or has outgrown the window, the window."""
        cache, rows = random_drafter().new_cache(5, W), torch.tensor([4, 0, 2, 3])
        cache.begin(rows, torch.full((4,), 5))
        ends, fresh = torch.tensor([7, 7, 30, 30]), torch.tensor([False, True, True, False])
        assert cache.catch_up(rows, ends, fresh).tolist() == [2, 7, W, W]
        assert cache.next[rows].tolist() == [5, 0, 30 - W, 30 - W]
        assert cache.first[rows].tolist() == [5, 0, 30 - W, 30 - W]
        assert not cache.next[1]

    @pytest.mark.parametrize("pattern", ["block", "full"])
    def test_only_distances_matter(self, pattern: str) -> None:
        """Far into a text, beyond the model's positions, as at its start."""
        drafter = random_drafter(attention_pattern=pattern)
        cache = drafter.new_cache(2, W)
        cache.begin(torch.tensor([1]), torch.tensor([123_456_789]))
        near, far = drafter.draft(cache, new_text([0, 1], [random_text(5)] * 2, [5, 5]), 3)
        torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("pattern", ["block", "full"])
    def test_a_row_is_used_again(self, pattern: str) -> None:
        drafter = random_drafter(attention_pattern=pattern)
        cache = prefilled(drafter, [random_text(30, 5)])
        cache.begin(torch.tensor([0]), torch.tensor([0]))
        text = random_text(3)
        logits = drafter.draft(cache, new_text([0], [text], [3], 0), 2)[0]
        torch.testing.assert_close(logits, dense(drafter, text, [MASK] * 2), rtol=1e-4, atol=1e-4)

    def test_the_mask_is_never_drafted(self) -> None:
        inside = random_drafter(mask_token_id=3)
        logits = inside.logits(torch.randn(2, 32))
        assert (logits[:, 3] == -torch.inf).all()
        assert logits.isfinite().sum() == 2 * (V - 1)
        beyond = random_drafter()
        assert beyond.embedding.shape == (V + 1, 32)
        assert beyond.logits(torch.randn(2, 32)).isfinite().all()

    def test_cache_takes_what_it_says(self) -> None:
        for pattern in ("block", "full"):
            config = dataclasses.replace(CONFIG, attention_pattern=pattern)
            cache = PrefixCache(config, 3, W, dtype=torch.bfloat16)
            kept = [cache.keys, cache.values, cache.token_ids, cache.last]
            tensors: list[Tensor] = [*kept, cache.next, cache.first]
            said = PrefixCache.num_bytes(config, 3, W, torch.bfloat16)
            assert sum(x.numel() * x.itemsize for x in tensors) == said


class TestAgainstTransformers:
    @pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
    def test_layers(self, architecture: str, tmp_path: Path) -> None:
        """The same weights with a mask of everything: what Dream makes of Qwen 2."""
        import transformers

        name = architecture.removesuffix("ForCausalLM")
        torch.manual_seed(0)
        model = getattr(transformers, architecture)(
            getattr(transformers, f"{name}Config")(
                vocab_size=V,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                rope_theta=5_000.0,
                tie_word_embeddings=name == "Llama",
                attn_implementation="eager",
                pad_token_id=0,
            )
        )
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.1 * torch.randn_like(weight)
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config |= {"mask_token_id": 5, "attention_pattern": "full", "predicts": "own_token"}
        config["architectures"] = ["DiffusionDrafter" if name == "Llama" else "DreamModel"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        drafter = DiffusionDrafter.load(tmp_path)
        text = random_text(6)
        tokens = torch.tensor([[*text, 5, 5]])
        everything = torch.zeros(1, 1, 8, 8)
        expected = model(input_ids=tokens, attention_mask=everything).logits[0, 6:]
        cache = prefilled(drafter, [text])
        got = drafter.denoise(cache, torch.tensor([0]), torch.tensor([[5, 5]]), 6)[0]
        expected[:, 5] = -torch.inf
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def facts(**changes: Any) -> ModelFacts:
    values: dict[str, Any] = {
        "model": "somewhere/target",
        "vocab_size": V,
        "hidden_size": 64,
        "num_layers": 2,
        "max_model_len": 512,
        "num_speculative_tokens": 4,
    }
    return ModelFacts(**(values | changes))


def tokenizer(tokens: dict[str, int]) -> str:
    return json.dumps({"model": {"vocab": tokens}, "added_tokens": []})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole drafter."""
    folder = tmp_path / "drafter"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG.as_json()))
    (folder / "tokenizer.json").write_text(tokenizer({"a": 0, "b": 1}))
    save_file(random_drafter().export(), folder / "model.safetensors")
    return folder


class TestFolder:
    def test_round_trip(self, folder: Path) -> None:
        assert check_folder(folder, facts(), context_window=60) == CONFIG
        loaded, drafter = DiffusionDrafter.load(folder), random_drafter()
        for name, weight in drafter.state_dict().items():
            assert torch.equal(weight, loaded.state_dict()[name]), name

    def test_shards(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        halves = [dict(list(weights.items())[half::2]) for half in (0, 1)]
        index: dict[str, str] = {}
        for number, half in enumerate(halves):
            save_file(half, folder / f"{number}.safetensors")
            index |= dict.fromkeys(half, f"{number}.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        assert check_folder(folder, facts()) == CONFIG
        embedding = DiffusionDrafter.load(folder).embedding
        assert torch.equal(embedding, random_drafter().embedding)
        (folder / "1.safetensors").unlink()
        with pytest.raises(SpecPluginsError, match=r"incomplete: 1\.safetensors is missing"):
            check_folder(folder, facts())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"architectures": ["LlamaForCausalLM"]}, '"LlamaForCausalLM" is not a diffusion'),
            ({"architectures": ["DreamModell"]}, 'Did you mean "DreamModel"'),
            ({"mask_token_id": None}, "has no mask_token_id"),
            ({"mask_token_id": V + 1}, "mask_token_id 41 is neither"),
            ({"attention_pattern": "banded"}, "attention_pattern must be one of block, full"),
            ({"predicts": "previous"}, "predicts must be one of next_token, own_token"),
            ({"hidden_act": "gelu"}, 'hidden_act "gelu" is not supported'),
            ({"rope_scaling": {"rope_type": "yarn"}}, 'rotary embedding "yarn"'),
            ({"hidden_size": "wide"}, "invalid literal"),
            ({"num_hidden_layers": 4}, r"weights lack model\.layers\.3"),
            ({"intermediate_size": 96}, r"gate_proj\.weight is \[48, 32\], not \[96, 32\]"),
        ],
    )
    def test_configs_we_cannot_serve(
        self, folder: Path, change: dict[str, Any], message: str
    ) -> None:
        config = CONFIG.as_json() | change
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(SpecPluginsError, match=message):
            check_folder(folder, facts())

    def test_a_key_is_missing(self, folder: Path) -> None:
        config = CONFIG.as_json()
        del config["rms_norm_eps"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(SpecPluginsError, match="lacks rms_norm_eps"):
            read_config(folder)

    @pytest.mark.parametrize(
        ("file", "message"),
        [
            ("config.json", r"it has no config\.json\. `vllm-spec calibrate diffusion-drafter`"),
            ("model.safetensors", r"incomplete: model\.safetensors is missing"),
            ("tokenizer.json", r"incomplete: tokenizer\.json is missing"),
        ],
    )
    def test_a_file_is_missing(self, folder: Path, file: str, message: str) -> None:
        (folder / file).unlink()
        with pytest.raises(SpecPluginsError, match=message):
            check_folder(folder, facts())

    def test_files_that_are_not_what_they_should_be(self, folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(SpecPluginsError, match="not a whole safetensors file"):
            check_folder(folder, facts())
        for text in ("not json", "[1]"):
            (folder / "config.json").write_text(text)
            with pytest.raises(SpecPluginsError, match="not a model's config"):
                check_folder(folder, facts())

    def test_another_vocabulary(self, folder: Path) -> None:
        with pytest.raises(SpecPluginsError, match=r"drafts from 40 tokens.*logits for 41"):
            check_folder(folder, facts(vocab_size=41))

    def test_another_tokenizer(self, folder: Path) -> None:
        target = folder.with_name("target")
        target.mkdir()
        for tokens, differing in (({"a": 0, "c": 1}, 1), ({"a": 1, "b": 0}, 2)):
            (target / "tokenizer.json").write_text(tokenizer(tokens))
            with pytest.raises(SpecPluginsError, match=f"{differing} of its 2 tokens have another"):
                check_folder(folder, facts(model=str(target)))
        # The same tokens in another file.
        (target / "tokenizer.json").write_text(tokenizer({"b": 1, "a": 0}) + "\n")
        check_folder(folder, facts(model=str(target)))
        (target / "tokenizer.json").write_text("{}")
        with pytest.raises(SpecPluginsError, match="is not a tokenizer"):
            check_folder(folder, facts(model=str(target)))

    def test_a_context_window_beyond_its_positions(self, folder: Path) -> None:
        with pytest.raises(SpecPluginsError, match="set context_window to 60 or less"):
            check_folder(folder, facts(), context_window=61)
