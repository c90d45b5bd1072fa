"""What each model of the zoo is, and how it is made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Architecture:
    """A Llama with its own output head (not tied to the embedding)."""

    vocabulary: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6

    @property
    def num_parameters(self) -> int:
        """All weights, embedding and head included."""
        queries, keys = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        per_unit = 2 * queries + 2 * keys + 3 * self.intermediate_size + 2  # 2: the norms
        return self.hidden_size * (self.num_layers * per_unit + 2 * self.vocabulary + 1)


@dataclass(frozen=True, slots=True)
class TextRecipe:
    """A model trained from scratch on the corpus.

    Attributes:
        name: What `ensure` is asked for.
        summary: One sentence for people.
        architecture: The model.
        exits: Layer counts after which a usable draft comes out, in rising order.
        steps: Updates.
        batch_size: Windows per step.
        sequence_length: Tokens per window.
        lr: Peak of AdamW's learning rate, for embedding, head and norms.
        matrix_lr: Peak of Muon's, for the matrices inside the layers.
        minutes: Expected time to build on four cores, nothing else running.
        weight_decay: Of Muon.
        exit_weight: Of the exit's loss beside the last layer's.
        exit_stride: The exit learns from every so-manieth position.
        training_bytes: Text to learn from, in whole files; None is all of it.
        checkpoint_every: Steps between checkpoints.
        seed: Of weights and order of text.
    """

    name: str
    summary: str
    architecture: Architecture
    exits: tuple[int, ...]
    steps: int
    batch_size: int
    sequence_length: int
    lr: float
    matrix_lr: float
    minutes: float
    weight_decay: float = 0.1
    exit_weight: float = 0.5
    exit_stride: int = 2
    training_bytes: int | None = None
    checkpoint_every: int = 50
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SumsRecipe(TextRecipe):
    """A model that learns the task of `sums.py` instead of the corpus.

    Attributes:
        num_tasks: Tasks to learn from.
    """

    num_tasks: int = 20_000


@dataclass(frozen=True, slots=True)
class ExpandedRecipe:
    """A trained model made to cost more and compute the same: a cost device (`expansion.py`).

    Attributes:
        name: What `ensure` is asked for.
        summary: One sentence for people.
        source: Name of the recipe it is expanded from.
        architecture: What it costs.
        minutes: Expected time to build when the source is there.
        seed: Of the weights that contribute nothing.
    """

    name: str
    summary: str
    source: str
    architecture: Architecture
    minutes: float
    seed: int = 0


@dataclass(frozen=True, slots=True)
class VisualRecipe:
    """A model of image tokens, conditioned on a digit (`image_tokens.py`).

    Attributes:
        name: What `ensure` is asked for.
        summary: One sentence for people.
        architecture: The model.
        steps: Updates.
        batch_size: Images per step.
        lr: Peak of AdamW's learning rate, for embedding, head and norms.
        matrix_lr: Peak of Muon's, for the matrices inside the layers.
        minutes: Expected time to build on four cores, nothing else running.
        classifier_steps: Updates of the classifier that judges the images.
        weight_decay: Of Muon.
        checkpoint_every: Steps between checkpoints.
        seed: Of weights and order of images.
    """

    name: str
    summary: str
    architecture: Architecture
    steps: int
    batch_size: int
    lr: float
    matrix_lr: float
    minutes: float
    classifier_steps: int = 600
    weight_decay: float = 0.1
    checkpoint_every: int = 25
    seed: int = 0


@dataclass(frozen=True, slots=True)
class DistilledVisualRecipe(VisualRecipe):
    """An image model that learns what another says of images, instead of the images alone.

    Attributes:
        teacher: Name of the other model's recipe.
    """

    teacher: str = ""


#: Of any model of the zoo.
Recipe = TextRecipe | ExpandedRecipe | VisualRecipe

_NANO = Architecture(
    vocabulary=8192,
    hidden_size=256,
    intermediate_size=768,
    num_layers=4,
    num_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
_PICO = Architecture(
    vocabulary=1024,
    hidden_size=128,
    intermediate_size=256,
    num_layers=4,
    num_heads=2,
    num_key_value_heads=1,
    head_dim=64,
)
_SMALL = Architecture(
    vocabulary=8192,
    hidden_size=384,
    intermediate_size=1024,
    num_layers=8,
    num_heads=6,
    num_key_value_heads=2,
    head_dim=64,
)
_TINY = Architecture(
    vocabulary=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=2,
    num_key_value_heads=1,
    head_dim=32,
)

_SUMS = Architecture(
    vocabulary=64,
    hidden_size=96,
    intermediate_size=288,
    num_layers=2,
    num_heads=3,
    num_key_value_heads=1,
    head_dim=32,
    max_positions=256,
)
_SUMS_DRAFT = Architecture(
    vocabulary=64,
    hidden_size=64,
    intermediate_size=192,
    num_layers=1,
    num_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_positions=256,
)

_DIGITS = Architecture(
    vocabulary=528,
    hidden_size=192,
    intermediate_size=512,
    num_layers=4,
    num_heads=3,
    num_key_value_heads=3,
    head_dim=64,
    max_positions=128,
)
_DIGITS_DRAFT = Architecture(
    vocabulary=528,
    hidden_size=128,
    intermediate_size=256,
    num_layers=1,
    num_heads=2,
    num_key_value_heads=2,
    head_dim=64,
    max_positions=128,
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        TextRecipe(
            name="tiny",
            summary="for tests of the zoo itself: seconds to train, no use as a model",
            architecture=_TINY,
            exits=(1,),
            steps=20,
            batch_size=4,
            sequence_length=64,
            lr=1e-3,
            matrix_lr=0.01,
            minutes=0.1,
            training_bytes=300_000,
            checkpoint_every=5,
        ),
        TextRecipe(
            name="pico",
            summary="for tests that need a trained model: half a minute to train on one core",
            architecture=_PICO,
            exits=(2,),
            steps=200,
            batch_size=4,
            sequence_length=128,
            lr=2e-3,
            matrix_lr=0.02,
            minutes=0.5,
            training_bytes=3_000_000,
        ),
        TextRecipe(
            name="nano",
            summary="the default of the demo, and the draft model of `small`",
            architecture=_NANO,
            exits=(2,),
            steps=360,
            batch_size=4,
            sequence_length=256,
            lr=1e-3,
            matrix_lr=0.01,
            minutes=2,
        ),
        TextRecipe(
            name="small",
            summary="the better model, for measurements of acceptance",
            architecture=_SMALL,
            exits=(2, 4, 6),
            steps=500,
            batch_size=8,
            sequence_length=256,
            lr=1e-3,
            matrix_lr=0.01,
            minutes=12,
            checkpoint_every=25,
        ),
        VisualRecipe(
            name="digits",
            summary="images: handwritten digits as 64 codes, for relaxed verification",
            architecture=_DIGITS,
            steps=500,
            batch_size=64,
            lr=2e-3,
            matrix_lr=0.02,
            minutes=5,
        ),
        VisualRecipe(
            name="digits-draft",
            summary="the draft model of `digits`",
            architecture=_DIGITS_DRAFT,
            steps=300,
            batch_size=64,
            lr=2e-3,
            matrix_lr=0.02,
            minutes=0.7,
        ),
        DistilledVisualRecipe(
            name="digits-distilled",
            summary="a draft model that learnt from `digits` what it says: nine in ten accepted",
            architecture=_DIGITS_DRAFT,
            steps=1500,
            batch_size=64,
            lr=2e-3,
            matrix_lr=0.02,
            minutes=5,
            teacher="digits",
        ),
        VisualRecipe(
            name="digits-tiny",
            summary="for tests of the image models: seconds to train, no use as a model",
            architecture=Architecture(
                vocabulary=528,
                hidden_size=64,
                intermediate_size=128,
                num_layers=1,
                num_heads=2,
                num_key_value_heads=1,
                head_dim=32,
                max_positions=128,
            ),
            steps=10,
            batch_size=8,
            lr=2e-3,
            matrix_lr=0.02,
            minutes=0.2,
            classifier_steps=20,
            checkpoint_every=5,
        ),
        SumsRecipe(
            name="sums",
            summary="sums worked out in words, whose answers can be checked: for the judge",
            architecture=_SUMS,
            exits=(),
            steps=500,
            batch_size=8,
            sequence_length=128,
            lr=3e-3,
            matrix_lr=0.02,
            minutes=1,
        ),
        SumsRecipe(
            name="sums-draft",
            summary="the draft model of `sums`: it writes well and adds badly",
            architecture=_SUMS_DRAFT,
            exits=(),
            steps=220,
            batch_size=8,
            sequence_length=128,
            lr=3e-3,
            matrix_lr=0.02,
            minutes=0.2,
        ),
        ExpandedRecipe(
            name="expanded",
            summary="cost device: `small` at the cost of 0.3 billion parameters, same text",
            source="small",
            architecture=Architecture(
                vocabulary=8192,
                hidden_size=1536,
                intermediate_size=3584,
                num_layers=16,
                num_heads=24,
                num_key_value_heads=8,
                head_dim=64,
            ),
            minutes=0.5,
        ),
        ExpandedRecipe(
            name="expanded-nano",
            summary="cost device: `nano` at the cost of 0.1 billion parameters, same text",
            source="nano",
            architecture=Architecture(
                vocabulary=8192,
                hidden_size=1024,
                intermediate_size=2048,
                num_layers=8,
                num_heads=16,
                num_key_value_heads=4,
                head_dim=64,
            ),
            minutes=0.2,
        ),
        ExpandedRecipe(
            name="expanded-tiny",
            summary="for tests of the expansion itself",
            source="tiny",
            architecture=Architecture(
                vocabulary=512,
                hidden_size=256,
                intermediate_size=256,
                num_layers=4,
                num_heads=8,
                num_key_value_heads=2,
                head_dim=32,
            ),
            minutes=0.1,
        ),
    )
}
