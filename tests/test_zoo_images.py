"""The image models of the zoo: digits, codes, classifier, Frechet distance, training."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vllm_spec_plugins import zoo
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.zoo import cache, digits, image_tokens
from vllm_spec_plugins.zoo.build import folder_name
from vllm_spec_plugins.zoo.digits import Digits, load_digits
from vllm_spec_plugins.zoo.image_folder import read_images, save_image_tokenizer
from vllm_spec_plugins.zoo.image_quality import (
    DigitClassifier,
    FeatureStatistics,
    train_classifier,
)
from vllm_spec_plugins.zoo.image_tokens import ImageTokens, fit, prompts_of, token_names
from vllm_spec_plugins.zoo.model import Llama
from vllm_spec_plugins.zoo.recipes import RECIPES, VisualRecipe
from vllm_spec_plugins.zoo.visual_training import cross_entropy, texts_of_step, train_visual


def recipe() -> VisualRecipe:
    tiny = RECIPES["digits-tiny"]
    assert isinstance(tiny, VisualRecipe)
    return dataclasses.replace(tiny, steps=4, batch_size=4, checkpoint_every=2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokens() -> ImageTokens:
    """A codebook of patches as they come: quick, and good enough to see digits in."""
    training, _ = load_digits()
    patches = image_tokens.patches(training.augmented(torch.arange(60), seeded()))
    distinct = (patches * 8).round().unique(dim=0) / 8
    chosen = torch.randperm(len(distinct), generator=seeded())[: image_tokens.NUM_CODES - 1]
    return ImageTokens(torch.cat([torch.zeros(1, 4), distinct[chosen]]))


def test_the_split_is_fixed_and_complete() -> None:
    training, held_out = load_digits()
    assert (len(training.images), len(held_out.images)) == (1497, 300)
    assert training.images.shape[1:] == (1, 16, 16)
    assert 0 <= float(training.images.min()) < float(training.images.max()) <= 1
    assert torch.equal(load_digits.__wrapped__()[1].images, held_out.images)
    assert set(held_out.labels.tolist()) == set(range(10))


def test_augmentations_are_those_of_their_generator_and_keep_the_digit() -> None:
    training, _ = load_digits()
    few = torch.arange(20)
    one, same, other = (training.augmented(few, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    likeness = F.cosine_similarity(one.flatten(1), training.images[few].flatten(1))
    assert float(likeness.mean()) > 0.6


def test_without_scikit_learn_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SpecPluginsError, match=r"pip install 'vllm-spec-plugins\[demo\]'"):
        digits.load_digits.__wrapped__()


def test_codes_and_images(tokens: ImageTokens) -> None:
    images = load_digits()[1].images[:8]
    ids = tokens.encode(images)
    assert ids.shape == (8, image_tokens.TOKENS_PER_IMAGE)
    first, end = image_tokens.IMAGE_TOKEN_RANGE
    assert int(ids.min()) >= first
    assert int(ids.max()) < end
    decoded = tokens.decode(ids)
    assert float((decoded - images).square().mean()) < 0.01
    # Every code is its own nearest one, or that of an equal code.
    assert torch.equal(tokens.decode(tokens.encode(decoded)), decoded)
    # In raster order: the first code is the upper left patch.
    patch = tokens.codebook[int(ids[0, 9]) - first].view(2, 2)
    assert torch.equal(decoded[0, 0, 2:4, 2:4], patch)


def test_an_id_that_is_no_code_is_blank(tokens: ImageTokens) -> None:
    ids = tokens.encode(load_digits()[1].images[:1])
    for wrong in (0, 15, 528, 10_000):
        changed = ids.clone()
        changed[0, 0] = wrong
        decoded = tokens.decode(changed)
        assert float(decoded[0, 0, :2, :2].abs().max()) == 0
        assert torch.equal(decoded[0, 0, 2:], tokens.decode(ids)[0, 0, 2:])


def test_a_codebook_that_is_fitted_has_less_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(image_tokens, "_SAMPLE", 4000)
    monkeypatch.setattr(image_tokens, "_ROUNDS", 4)
    errors: list[float] = []
    training, held_out = load_digits()
    some = Digits(training.images[:200], training.labels[:200])
    found = fit(some, seeded(), lambda _, error: errors.append(error))
    again = fit(some, seeded())
    assert torch.equal(found.codebook, again.codebook)
    assert errors == sorted(errors, reverse=True)
    assert len(errors) == 4
    images = held_out.images
    decoded = found.decode(found.encode(images))
    assert float((decoded - images).square().mean()) < 0.01


def test_texts_are_prompt_codes_end(tokens: ImageTokens) -> None:
    _, held_out = load_digits()
    texts = tokens.texts(held_out.images[:3], held_out.labels[:3])
    assert texts.shape == (3, 67)
    assert torch.equal(texts[:, :2], prompts_of(held_out.labels[:3]))
    assert texts[:, 0].tolist() == [image_tokens.BEGIN_ID] * 3
    assert texts[:, -1].tolist() == [image_tokens.END_ID] * 3
    names = token_names()
    assert names[int(texts[0, 1])] == f"<digit-{int(held_out.labels[0])}>"
    assert len(names) == len(set(names)) == 528


def test_the_tokenizer_speaks_in_names(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    save_image_tokenizer(tmp_path, 128)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("<s> <digit-3> <code-0> <code-511>").ids
    assert ids == [1, 6, 16, 527]


def test_frechet_distance_is_its_formula() -> None:
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=(300, 6)), generator.normal(1, 2, size=(200, 6))
    found = FeatureStatistics.of(torch.tensor(one)).frechet_distance(
        FeatureStatistics.of(torch.tensor(other))
    )
    c1, c2 = np.cov(one.T), np.cov(other.T)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    expected = np.sum((one.mean(0) - other.mean(0)) ** 2) + np.trace(c1 + c2 - 2 * root)
    assert found == pytest.approx(expected, rel=1e-6)
    same = FeatureStatistics.of(torch.tensor(one))
    assert same.frechet_distance(same) == pytest.approx(0, abs=1e-9)


def test_a_feature_that_is_always_off_does_no_harm() -> None:
    features = torch.randn(50, 5, generator=seeded())
    features[:, 2] = 0
    statistics = FeatureStatistics.of(features)
    # Roots of rounding errors are larger than they.
    assert statistics.frechet_distance(statistics) == pytest.approx(0, abs=1e-6)


def test_the_classifier_learns_and_is_reproducible(tokens: ImageTokens) -> None:
    training, held_out = load_digits()
    losses: list[float] = []
    one = train_classifier(training, tokens, 40, seeded(), lambda _, loss: losses.append(loss))
    assert losses[-1] < losses[0] / 2
    images = held_out.images[:50]
    short, again = (train_classifier(training, tokens, 3, seeded())(images) for _ in range(2))
    assert torch.equal(short, again)
    assert one.accuracy(held_out.images, held_out.labels) > 0.6
    assert one.features(images).shape == (50, 48)
    assert DigitClassifier().accuracy(images, held_out.labels[:50]) < 0.6


def test_training_goes_on_where_it_was_killed(tokens: ImageTokens, tmp_path: Path) -> None:
    training, _ = load_digits()
    whole = train_visual(recipe(), training, tokens, torch.float32, tmp_path / "whole.pt")

    class KilledError(Exception):
        pass

    def kill(done: int, _loss: float) -> None:
        if done == 3:
            raise KilledError

    path = tmp_path / "killed.pt"
    with pytest.raises(KilledError):
        train_visual(recipe(), training, tokens, torch.float32, path, kill)
    resumed = train_visual(recipe(), training, tokens, torch.float32, path)
    assert (whole.resumed_at, resumed.resumed_at) == (0, 2)
    assert resumed.losses == whole.losses
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_loss_is_that_of_codes_and_end(tokens: ImageTokens) -> None:
    model = Llama(recipe().architecture)
    model.initialise(seeded())
    texts = texts_of_step(load_digits()[0], tokens, 0, recipe())
    with torch.no_grad():
        logits = model(texts[:, :-1])[-1] @ model.head.T
    expected = F.cross_entropy(logits[:, 1:].flatten(0, 1), texts[:, 2:].flatten())
    assert cross_entropy(model, texts, torch.float32) == pytest.approx(float(expected), abs=1e-5)
    assert model.head.grad is None
    cross_entropy(model, texts, torch.float32, learn=True)
    assert model.head.grad is not None


def test_only_image_models_have_images() -> None:
    known = "digits, digits-distilled, digits-draft, digits-tiny"
    with pytest.raises(SpecPluginsError, match=rf"is no image model .* {known}"):
        zoo.images("nano")


def test_models_that_share_images_share_a_folder() -> None:
    target, draft, tiny = (RECIPES[name] for name in ("digits", "digits-draft", "digits-tiny"))
    assert isinstance(target, VisualRecipe)
    assert isinstance(draft, VisualRecipe)
    assert isinstance(tiny, VisualRecipe)
    from vllm_spec_plugins.zoo.build import images_folder_name

    assert images_folder_name(target) == images_folder_name(draft) != images_folder_name(tiny)
    longer = dataclasses.replace(target, classifier_steps=1)
    assert folder_name(longer) != folder_name(target)
    assert folder_name(dataclasses.replace(target, minutes=99)) == folder_name(target)


@pytest.mark.slow
def test_a_model_is_built_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path))
    folder = zoo.ensure("digits-tiny", threads=1)
    config = AutoConfig.from_pretrained(folder)
    assert config.image_token_range == [16, 528]
    # vLLM takes every safetensors file for weights.
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    card = json.loads((folder / "card.json").read_text())
    images = read_images(zoo.images("digits-tiny"))
    assert card["images"] == zoo.images("digits-tiny").name
    assert images.tokens.codebook.shape == (512, 4)
    model = LlamaForCausalLM.from_pretrained(folder)
    texts = texts_of_step(load_digits()[1], images.tokens, 0, RECIPES["digits-tiny"])
    with torch.no_grad():
        logits = model(texts[:, :-1]).logits
    loss = F.cross_entropy(logits[:, 1:].flatten(0, 1), texts[:, 2:].flatten())
    assert float(loss) == pytest.approx(card["held_out_cross_entropy"], abs=1e-3)
    assert load_file(folder / "model.safetensors")["lm_head.weight"].shape == (528, 64)
    decoded = images.tokens.decode(images.tokens.encode(load_digits()[1].images))
    assert images.frechet_distance(decoded) > 0
