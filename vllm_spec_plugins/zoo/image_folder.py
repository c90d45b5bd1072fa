"""What all image models share, in one folder: codebook, classifier, statistics of real images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .digits import load_digits
from .image_quality import DigitClassifier, FeatureStatistics, train_classifier
from .image_tokens import PADDING_ID, ImageTokens, fit, token_names
from .progress import training_progress
from .tokenizer import BEGIN, END, PADDING

#: safetensors with the tensor `codebook`, `[512, 4]`. Not beside the models: vLLM reads every
#: safetensors file of a model's folder as its weights.
CODEBOOK = "codebook.safetensors"
_CLASSIFIER = "classifier.safetensors"
_STATISTICS = "statistics.safetensors"

#: Augmentations of every training image behind the statistics of real images.
_PASSES = 8


@dataclass(frozen=True, slots=True)
class DigitImages:
    """From token ids to images, and how good they are.

    Attributes:
        tokens: Encodes and decodes.
        classifier: Tells digits apart, and gives features.
        real: Statistics of real images, as their codes show them.
    """

    tokens: ImageTokens
    classifier: DigitClassifier
    real: FeatureStatistics

    def frechet_distance(self, images: Tensor) -> float:
        """Between `[N, 1, 16, 16]` images and the real ones."""
        features = self.classifier.features(images)
        return FeatureStatistics.of(features).frechet_distance(self.real)


def make_images(folder: Path, classifier_steps: int) -> Mapping[str, object]:
    """Fill `folder`; returns what was measured on the way, for its card."""
    from safetensors.torch import save_file

    training, held_out = load_digits()
    generator = torch.Generator().manual_seed(0)
    with training_progress("codebook", 30) as on_round:
        tokens = fit(training, generator, on_round)
    with training_progress("classifier", classifier_steps) as on_step:
        classifier = train_classifier(training, tokens, classifier_steps, generator, on_step)
    every = torch.arange(len(training.images)).repeat(_PASSES)
    shown = tokens.decode(tokens.encode(training.augmented(every, generator)))
    real = FeatureStatistics.of(classifier.features(shown))
    save_file({"codebook": tokens.codebook}, folder / CODEBOOK)
    save_file(classifier.state_dict(), folder / _CLASSIFIER)
    save_file({"mean": real.mean, "covariance": real.covariance}, folder / _STATISTICS)
    unseen = torch.arange(len(held_out.images)).repeat(_PASSES)
    original = held_out.augmented(unseen, generator)
    decoded = tokens.decode(tokens.encode(original))
    features = FeatureStatistics.of(classifier.features(decoded))
    labels = held_out.labels[unseen]
    return {
        "name": "codebook and classifier of the image models",
        "pixel_error": float((decoded - original).square().mean()),
        "held_out_accuracy": classifier.accuracy(original, labels),
        "held_out_accuracy_of_decoded": classifier.accuracy(decoded, labels),
        "held_out_frechet_distance": features.frechet_distance(real),
        "held_out_images": len(unseen),
    }


def read_images(folder: Path) -> DigitImages:
    """Read back what `make_images` wrote."""
    from safetensors.torch import load_file

    classifier = DigitClassifier()
    classifier.load_state_dict(load_file(folder / _CLASSIFIER))
    return DigitImages(
        ImageTokens(load_file(folder / CODEBOOK)["codebook"]),
        classifier.eval().requires_grad_(False),
        FeatureStatistics(**load_file(folder / _STATISTICS)),
    )


def save_image_tokenizer(folder: Path, longest: int) -> None:
    """Write a tokenizer whose text is the tokens' names, separated by spaces: `<s> <digit-3>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = {name: id_ for id_, name in enumerate(token_names())}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token=token_names()[PADDING_ID]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PADDING,
        "model_max_length": longest,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
