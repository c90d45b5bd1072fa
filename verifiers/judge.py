"""`judge`: a trained head may let a draft token stand that the exact rule would reject.

Judge Decoding (Bachmann et al. 2501.19309): accept x where the exact rule does, or where a
linear head on the target's final hidden state at x finds that x does no harm. So the acceptance
probability is

    f(x) = max(min(1, p(x) / q(x)), [score(x) >= threshold]),

with the ordinary residual; greedy requests accept x if it is the most likely token or is judged
so. `vllm-spec calibrate judge` trains heads and says what they are worth.

The head has no say in end-of-text, control, chat and tool tokens, in tokens of `never_judge`,
inside tool calls, and in requests that follow a grammar.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from vllm_spec_plugins.acceptance_rule import token_acceptance
from vllm_spec_plugins.errors import ConfigError, did_you_mean
from vllm_spec_plugins.hookspecs import logger
from vllm_spec_plugins.judge_head import JudgeCard, JudgeHead
from vllm_spec_plugins.relaxed_rule import RelaxedOptions, RelaxedRule
from vllm_spec_plugins.token_spans import TokenSpans
from vllm_spec_plugins.verifier import VerifierOptions, VerifyInput
from vllm_spec_plugins.vocabulary_passes import is_single, scores_at_least

from ..triton_kernels.relaxations import Judge as Verdicts  # noqa: TID252

if TYPE_CHECKING:
    from vllm_spec_plugins.context import EngineContext, ModelFacts


class JudgeOptions(RelaxedOptions):
    head: str = Field(description="File of `vllm-spec calibrate judge`.")
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Least score of a draft token that stands; 0 judges all harmless, 1 none. "
        "Absent: the head's own, chosen in calibration.",
    )
    never_judge: list[int | str] = Field(
        default=[],
        description="More tokens the head has no say in: ids, or texts of one token each.",
    )


class Judge(RelaxedRule):
    """Accepts what the exact rule does, and what a trained head finds harmless."""

    Options = JudgeOptions
    needs_hidden_states = True

    options: JudgeOptions  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, options: JudgeOptions, context: EngineContext) -> None:
        super().__init__(options, context)
        self._head = head = JudgeHead.read(options.head, context.device)
        self._recognised = recognise(head, options.head, context.facts)
        threshold = head.card.threshold if options.threshold is None else options.threshold
        # In log odds, where 0 and 1 are exactly "every" and "none".
        self._least_log_odds = _log_odds(threshold)
        self._bias = float(head.bias)
        never = [*head.never_judge.tolist(), *token_ids_of(options.never_judge, context.facts)]
        vocab_size = context.facts.vocab_size
        judges = torch.ones(vocab_size, dtype=torch.bool, device=context.device)
        judges[torch.tensor([i for i in never if i < vocab_size], dtype=torch.int64)] = False
        #: `[V]` bool, tokens the head has a say in.
        self._judges = judges
        # What cannot be read might be a tool call: the head has no say in it.
        self._tool_calls = TokenSpans(vocab_size, head.card.tool_calls, unreadable_is_inside=True)

    @classmethod
    def check(cls, options: VerifierOptions, facts: ModelFacts) -> None:
        assert isinstance(options, JudgeOptions)
        JudgeCard.read(options.head).check(facts)
        recognise(JudgeHead.read(options.head), options.head, facts)
        token_ids_of(options.never_judge, facts)

    @classmethod
    def verifies_on_device(cls, options: VerifierOptions) -> bool:
        """Not beside tool calls, which are looked for in texts on the host."""
        assert isinstance(options, JudgeOptions)
        return not JudgeCard.read(options.head).tool_calls

    def judged(self, batch: VerifyInput, rows: Tensor | None = None) -> Tensor:
        """`[N]` bool, draft tokens the head lets stand; `[M]` of some rows.

        Of some rows, those behind a refusal in the same request may be refused unseen.
        """
        if not self._recognised:
            self._recognise_late()
        stands = self._found_harmless(batch, rows)
        if batch.constrained is not None:
            stands &= ~_of_rows(batch.constrained[batch.request_of], rows)
        if self._tool_calls:
            stands &= ~_of_rows(self._tool_calls.inside(batch), rows)
        return stands

    def _found_harmless(self, batch: VerifyInput, rows: Tensor | None) -> Tensor:
        """The same, by the head and the tokens it has a say in."""
        states, ids = batch.hidden_states, batch.draft_token_ids
        if states is None:  # warm-up
            return torch.zeros_like(_of_rows(ids, rows), dtype=torch.bool)
        if is_single(states):
            return scores_at_least(
                states, rows, batch.num_draft, ids, self._judges, self._head.weight, self._bias,
                self._least_log_odds,
            )  # fmt: skip
        stands = self._head.log_odds(_of_rows(states, rows)) >= self._least_log_odds
        ids = _of_rows(ids, rows)
        return stands & self._judges[ids.clamp(min=0)] & (ids >= 0)

    def relaxed_acceptance(self, batch: VerifyInput) -> Tensor:
        exact = token_acceptance(batch)
        return torch.where(self.judged(batch), torch.ones_like(exact), exact)

    def relaxed_greedy_acceptance(self, batch: VerifyInput, rows: Tensor) -> Tensor:
        return self.judged(batch, rows)

    def relaxation(self, batch: VerifyInput) -> tuple[None, Verdicts]:
        """The kernel accepts what is judged, and works out the exact rule itself."""
        stands, exact = self.judged(batch), self.exact_requests(batch)
        if exact is not None:
            stands = stands & ~exact[batch.request_of]
        return None, Verdicts(stands.float(), threshold=1.0)

    def finish(self, request_ids: Sequence[str]) -> None:
        super().finish(request_ids)
        self._tool_calls.finish(request_ids)

    def _recognise_late(self) -> None:
        """Once the weights are there: those of a model on the Hub come after the verifier.

        Raises:
            SpecPluginsError: They are another model's.
        """
        self._recognised = True
        if not recognise(self._head, self.options.head, self.context.facts):
            logger.warning(
                'judge: whether %s has the weights of "%s", which %s was trained for, cannot be '
                "told: they are not in safetensors files on this machine",
                self.context.facts.model,
                self._head.card.model,
                self.options.head,
            )


def _of_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values[rows]


def recognise(head: JudgeHead, path: str, facts: ModelFacts) -> bool:
    """Whether the target's weights could be compared with those the head was trained for.

    Raises:
        SpecPluginsError: They could, and are another model's.
    """
    folder = _folder_of(facts)
    return folder is not None and head.recognise(folder, path)


def token_ids_of(tokens: Sequence[int | str], facts: ModelFacts) -> list[int]:
    """Ids of what stands in `never_judge`.

    Raises:
        ConfigError: An id outside the vocabulary, or a text that is not one token of the
            target's tokenizer.
    """
    for token in tokens:
        if isinstance(token, int) and not 0 <= token < facts.vocab_size:
            raise ConfigError(
                f"judge: never_judge names token {token}, but the ids of {facts.model} are 0 to "
                f"{facts.vocab_size - 1}."
            )
    texts = [token for token in tokens if isinstance(token, str)]
    if not texts:
        return [token for token in tokens if isinstance(token, int)]
    from vllm_spec_plugins.calibration.texts import TextTokenizer

    folder = _folder_of(facts)
    if folder is None:
        raise ConfigError(
            f"judge: never_judge names {texts[0]!r}, but {facts.model} is not on this machine yet, "
            "nor its tokenizer: name tokens by their ids."
        )
    tokenizer = TextTokenizer(folder)
    added = {content: token_id for token_id, content in tokenizer.added_tokens().items()}
    ids = [token for token in tokens if isinstance(token, int)]
    for text, encoded in zip(texts, tokenizer.encode(texts), strict=True):
        if text in added:
            ids.append(added[text])
        elif len(encoded) == 1:
            ids.append(int(encoded[0]))
        else:
            raise ConfigError(
                f"judge: never_judge names {text!r}, which is {len(encoded)} tokens of "
                f"{facts.model}'s tokenizer, not one.{did_you_mean(text, added)} Name tokens one "
                "by one, by text or id."
            )
    return ids


def _folder_of(facts: ModelFacts) -> Path | None:
    """The folder of a model: itself, or where the Hugging Face cache has the revision served."""
    if Path(facts.model).is_dir():
        return Path(facts.model)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(facts.model, revision=facts.revision, local_files_only=True))
    except (ImportError, OSError, ValueError):
        return None


def _log_odds(probability: float) -> float:
    if probability in (0.0, 1.0):
        return -math.inf if probability == 0 else math.inf
    return math.log(probability / (1 - probability))
