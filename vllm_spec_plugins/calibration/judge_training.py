"""Train a judge's head on labelled tokens, and set it beside the target's own probability.

Logistic regression on the target's final hidden states, classes weighted equally (Judge Decoding,
Bachmann et al. 2501.19309; AutoJudge, 2504.20039). A quarter of the prompts is held out. On the
rest, cross-validation by prompt chooses the penalty and gives scores no head was trained on, from
which the threshold is picked for a wanted recall of errors.

Shapes: N labelled tokens, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_spec_plugins.errors import SpecPluginsError

from .hugging_face import LocalModel
from .judge_labels import HARMLESS, UNKNOWN, LabelledText

#: Weights of the penalty on the squared weights that cross-validation chooses from.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

_FOLDS = 5
_HELD_OUT = 0.25
#: Fewest errors and fewest harmless tokens, in training and held out.
_FEWEST = 10
#: Texts that one pass reads.
_BATCH = 16
_RESAMPLES = 500


@dataclass(frozen=True, slots=True)
class Tokens:
    """Labelled tokens as a head sees them.

    Attributes:
        features: `[N, H]` float32 final hidden states at the tokens, normed.
        log_probabilities: `[N]` float32, the target's log p of each token where it stands.
        harmless: `[N]` bool.
        prompts: `[N]` int64, number of the prompt of each.
    """

    features: Tensor
    log_probabilities: Tensor
    harmless: Tensor
    prompts: Tensor

    def __len__(self) -> int:
        return len(self.harmless)

    def take(self, rows: Tensor) -> Tokens:
        """Some of them: `[M]` int64 or `[N]` bool."""
        return Tokens(
            self.features[rows],
            self.log_probabilities[rows],
            self.harmless[rows],
            self.prompts[rows],
        )


@dataclass(frozen=True, slots=True)
class Head:
    """`[H]` weight and bias of a linear map to log odds, float32."""

    weight: Tensor
    bias: float

    def log_odds(self, features: Tensor) -> Tensor:
        """`[N]` of `[N, H]`."""
        return features @ self.weight + self.bias


@dataclass(frozen=True, slots=True)
class Curve:
    """A receiver operating characteristic: what every threshold lets pass.

    Attributes:
        errors: Share of errors that pass, from 0 to 1.
        harmless: Share of harmless tokens that pass.
        area: Under the curve; 0.5 is guessing.
    """

    errors: list[float]
    harmless: list[float]
    area: float


@dataclass(frozen=True, slots=True)
class Quality:
    """A score on held-out prompts.

    Attributes:
        curve: All thresholds.
        threshold: The one picked in training, in units of the score.
        recall: Share of held-out errors it catches.
        passed: Share of held-out harmless tokens it lets stand.
    """

    curve: Curve
    threshold: float
    recall: float
    passed: float


@dataclass(frozen=True, slots=True)
class Result:
    """A trained head and what it is worth.

    Attributes:
        head: Trained on all but the held-out prompts.
        penalty: Chosen among `PENALTIES`.
        threshold: Probability, in [0, 1].
        judged: Held-out quality of the head's log odds.
        baseline: Of the target's own log probability of the token.
        gain: Area under the head's curve less the baseline's.
        gain_error: Its standard error, over prompts.
        learnt: Tokens, errors and prompts learnt from.
        held_out: Tokens, errors and prompts held out.
    """

    head: Head
    penalty: float
    threshold: float
    judged: Quality
    baseline: Quality
    gain: float
    gain_error: float
    learnt: tuple[int, int, int]
    held_out: tuple[int, int, int]

    @property
    def worth_its_keep(self) -> bool:
        """Whether the head tells errors better than the target's probability, beyond chance."""
        return self.gain > 2 * self.gain_error


@torch.no_grad()
def read_tokens(
    model: LocalModel,
    texts: Sequence[LabelledText],
    on_progress: Callable[[int], object] = lambda _: None,
) -> Tokens:
    """Hidden states and probabilities of every labelled token.

    Args:
        model: The target.
        texts: With labels on tokens after the first of each text.
        on_progress: Told how many texts were read.
    """
    parts: list[Tokens] = []
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].token_ids))
    for start in range(0, len(order), _BATCH):
        batch = [texts[i] for i in order[start : start + _BATCH]]
        # Padding stands behind the texts: what comes before does not see it.
        rows = torch.zeros(len(batch), len(batch[-1].token_ids), dtype=torch.int64)
        labels = torch.full_like(rows, UNKNOWN)
        for i, text in enumerate(batch):
            rows[i, : len(text.token_ids)] = torch.tensor(text.token_ids)
            labels[i, : len(text.labels)] = torch.tensor(text.labels)
        labels[:, 0] = UNKNOWN  # nothing predicts the first token
        states = model.layer_states(rows, [model.num_layers])[model.num_layers]
        i, j = (labels != UNKNOWN).nonzero(as_tuple=True)
        normed = model.final_norm(states)
        logits = model.logits(normed[i, j - 1])
        chosen = rows[i, j].to(logits.device)
        parts.append(
            Tokens(
                normed[i, j].float().cpu(),
                torch.log_softmax(logits, dim=-1).gather(1, chosen[:, None]).squeeze(1).cpu(),
                labels[i, j] == HARMLESS,
                torch.tensor([text.prompt for text in batch])[i],
            )
        )
        on_progress(start + len(batch))
    return Tokens(
        torch.cat([part.features for part in parts]),
        torch.cat([part.log_probabilities for part in parts]),
        torch.cat([part.harmless for part in parts]),
        torch.cat([part.prompts for part in parts]),
    )


def train(tokens: Tokens, recall: float, seed: int) -> Result:
    """Train a head, pick its threshold, and judge both on held-out prompts.

    Args:
        tokens: Labelled.
        recall: Share of errors the threshold shall catch.
        seed: Of the split.

    Raises:
        SpecPluginsError: There are too few errors or harmless tokens, or too few prompts.
    """
    learnt, held_out = split(tokens, seed)
    for part, where in ((learnt, "to learn from"), (held_out, "held out")):
        check_enough(part, where)
    folds = list(_folds(learnt.prompts, seed))
    out_of_fold = {penalty: _out_of_fold(learnt, folds, penalty) for penalty in PENALTIES}
    penalty = max(PENALTIES, key=lambda p: roc(out_of_fold[p], learnt.harmless).area)
    head = fit(learnt, penalty)
    scores = head.log_odds(held_out.features)
    least = threshold_for(out_of_fold[penalty], learnt.harmless, recall)
    baseline_least = threshold_for(learnt.log_probabilities, learnt.harmless, recall)
    gain_error = _gain_error(scores, held_out, seed)
    judged = quality(scores, held_out.harmless, least)
    baseline = quality(held_out.log_probabilities, held_out.harmless, baseline_least)
    return Result(
        head=head,
        penalty=penalty,
        threshold=1 / (1 + math.exp(-least)),
        judged=judged,
        baseline=baseline,
        gain=judged.curve.area - baseline.curve.area,
        gain_error=gain_error,
        learnt=_counts(learnt),
        held_out=_counts(held_out),
    )


def split(tokens: Tokens, seed: int) -> tuple[Tokens, Tokens]:
    """Tokens to learn from and held-out ones, by prompt."""
    prompts = tokens.prompts.unique()
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    chosen = prompts[order[: round(_HELD_OUT * len(prompts))]]
    held_out = torch.isin(tokens.prompts, chosen)
    return tokens.take(~held_out), tokens.take(held_out)


def check_enough(tokens: Tokens, where: str) -> None:
    """Raises `SpecPluginsError` where there is too little to train or to judge."""
    count, errors, prompts = _counts(tokens)
    if min(errors, count - errors) < _FEWEST or prompts < _FOLDS:
        raise SpecPluginsError(
            f"too little {where}: {errors} errors and {count - errors} harmless tokens of "
            f"{prompts} prompts; {_FEWEST} of each, of {_FOLDS} prompts, are the least. Give more "
            "prompts or labels."
        )


def fit(tokens: Tokens, penalty: float) -> Head:
    """Logistic regression, both classes weighing the same, on standardised features."""
    mean, deviation = tokens.features.mean(0), tokens.features.std(0) + 1e-6
    x = (tokens.features - mean) / deviation
    y = tokens.harmless.float()
    share = y.mean()
    weights = torch.where(tokens.harmless, 0.5 / share, 0.5 / (1 - share))
    parameters = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=200, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        log_odds = x @ parameters[:-1] + parameters[-1]
        value = F.binary_cross_entropy_with_logits(log_odds, y, weights)
        value = value + penalty * parameters[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    weight = (parameters.detach()[:-1] / deviation).contiguous()
    return Head(weight, float(parameters.detach()[-1] - weight @ mean))


def roc(scores: Tensor, harmless: Tensor) -> Curve:
    """The curve of a score, higher for harmless tokens. Equal scores are one step."""
    values, order = scores.double().sort(descending=True)
    good = harmless[order].double()
    last_of_equals = torch.ones_like(harmless)
    last_of_equals[:-1] = values[1:] != values[:-1]
    passed = torch.cat([good.new_zeros(1), good.cumsum(0)[last_of_equals] / good.sum()])
    bad = 1 - good
    errors = torch.cat([bad.new_zeros(1), bad.cumsum(0)[last_of_equals] / bad.sum()])
    return Curve(errors.tolist(), passed.tolist(), float(torch.trapezoid(passed, errors)))


def threshold_for(scores: Tensor, harmless: Tensor, recall: float) -> float:
    """The least threshold that catches this share of errors: only scores from it on pass."""
    errors = scores[~harmless].double().sort().values
    highest_caught = errors[math.ceil(recall * len(errors)) - 1]
    above = scores[scores.double() > highest_caught].double()
    # Halfway to the next score, so that rounding does not decide.
    higher = above.min() if len(above) else highest_caught + 1
    return float((highest_caught + higher) / 2)


def quality(scores: Tensor, harmless: Tensor, threshold: float) -> Quality:
    """What a threshold does to these tokens."""
    passes = scores.double() >= threshold
    return Quality(
        curve=roc(scores, harmless),
        threshold=threshold,
        recall=float((~passes[~harmless]).double().mean()),
        passed=float(passes[harmless].double().mean()),
    )


def _out_of_fold(tokens: Tokens, folds: Sequence[Tensor], penalty: float) -> Tensor:
    """`[N]` log odds of each token by a head that did not learn from its prompt."""
    scores = torch.empty(len(tokens))
    for fold in folds:
        head = fit(tokens.take(~fold), penalty)
        scores[fold] = head.log_odds(tokens.features[fold])
    return scores


def _folds(prompts: Tensor, seed: int) -> Iterator[Tensor]:
    """`[N]` bool of each fold; prompts are dealt out."""
    every = prompts.unique()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed + 1))
    for fold in range(_FOLDS):
        yield torch.isin(prompts, every[order[fold::_FOLDS]])


def _gain_error(scores: Tensor, tokens: Tokens, seed: int) -> float:
    """Standard error of the gain in area, by drawing prompts with replacement."""
    generator = torch.Generator().manual_seed(seed + 2)
    rows_of = [
        (tokens.prompts == prompt).nonzero().squeeze(1) for prompt in tokens.prompts.unique()
    ]
    gains: list[float] = []
    for _ in range(_RESAMPLES):
        drawn = torch.randint(len(rows_of), (len(rows_of),), generator=generator)
        rows = torch.cat([rows_of[i] for i in drawn.tolist()])
        harmless = tokens.harmless[rows]
        if harmless.all() or not harmless.any():
            continue
        own = roc(tokens.log_probabilities[rows], harmless).area
        gains.append(roc(scores[rows], harmless).area - own)
    return float(torch.tensor(gains).std())


def _counts(tokens: Tokens) -> tuple[int, int, int]:
    """Tokens, errors, prompts."""
    return len(tokens), int((~tokens.harmless).sum()), len(tokens.prompts.unique())
