"""Labels for a judge without people: AutoJudge (2504.20039).

The target answers a prompt. Where the draft model would have written another token, that token
is put in its place and the target goes on from there. If the outcome is the same the token is
harmless and stays, so that harmless ones add up as they will when served; else it is an error
and the text stays as it was. So on to the end of the answer. Everything is greedy.

What the target wrote and what the checker said is kept: a killed run walks the same way again,
and asks nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.vocabulary_passes import first_argmax

from .generations import Engine, offline_engine
from .hugging_face import LocalModel
from .judge_labels import ERROR, HARMLESS, UNKNOWN, LabelledText
from .memo import Memo, memo_key
from .outcome_checker import Checker
from .texts import TextTokenizer

if TYPE_CHECKING:
    from vllm import LLM

#: Texts given to the target at a time: what a killed run may lose.
_CHUNK = 64

#: Texts the draft model reads at a time.
_DRAFT_BATCH = 32


class Writer(Protocol):
    """The target, writing greedily."""

    def __call__(self, contexts: Sequence[tuple[int, ...]], ends: Sequence[int]) -> list[list[int]]:
        """What follows each context, up to so many tokens with it; ends in end of text if short."""
        ...


@dataclass(slots=True)
class Walk:
    """One prompt on its way.

    Attributes:
        prompt: Its number.
        text: As it was given.
        token_ids: Of the prompt and the answer as it stands.
        num_prompt: Tokens of the prompt.
        outcome: Of the target's own answer.
        position: First token not yet compared with the draft.
        labelled: What was found.
    """

    prompt: int
    text: str
    token_ids: tuple[int, ...]
    num_prompt: int
    outcome: Any
    position: int
    labelled: list[LabelledText] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Mined:
    """What mining gives.

    Attributes:
        texts: A text for each mismatch, whose last token is labelled.
        prompts: Prompts whose own answer came to something.
        passed_over: Prompts whose own answer came to nothing.
    """

    texts: list[LabelledText]
    prompts: int
    passed_over: int


class Target:
    """The target in vLLM, started when something is asked that the memo does not know.

    Args:
        folder: Of the model.
        longest: Tokens of prompt and answer, at most.
        engine: How it runs.
        memo: What it wrote before.
    """

    def __init__(self, folder: Path, longest: int, engine: Engine, memo: Memo) -> None:
        self._folder, self._longest, self._engine, self._memo = folder, longest, engine, memo
        self._stack = ExitStack()
        self._llm: LLM | None = None

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __call__(self, contexts: Sequence[tuple[int, ...]], ends: Sequence[int]) -> list[list[int]]:
        keys = [memo_key(c, end) for c, end in zip(contexts, ends, strict=True)]
        missing = [i for i, key in enumerate(keys) if key not in self._memo]
        for start in range(0, len(missing), _CHUNK):
            chunk = missing[start : start + _CHUNK]
            written = self._write([contexts[i] for i in chunk], [ends[i] for i in chunk])
            self._memo.add({keys[i]: ids for i, ids in zip(chunk, written, strict=True)})
        return [self._memo[key] for key in keys]

    def _write(self, contexts: list[tuple[int, ...]], ends: list[int]) -> list[list[int]]:
        if self._llm is None:
            engine = offline_engine(self._folder, self._longest, self._engine, seed=0)
            self._llm = self._stack.enter_context(engine)
        from vllm import SamplingParams

        outputs = self._llm.generate(
            [{"prompt_token_ids": list(context)} for context in contexts],
            [
                SamplingParams(temperature=0, max_tokens=end - len(context), detokenize=False)
                for context, end in zip(contexts, ends, strict=True)
            ],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


class Miner:
    """Finds mismatches and what they come to.

    Args:
        write: The target.
        draft: The model whose tokens are tried.
        tokenizer: Of both.
        checker: Gives outcomes.
        outcomes: What it said before.
        never: Tokens a judge has no say in.
        max_tokens: Of an answer.
    """

    def __init__(
        self,
        write: Writer,
        draft: LocalModel,
        tokenizer: TextTokenizer,
        checker: Checker,
        outcomes: Memo,
        never: Sequence[int],
        max_tokens: int,
    ) -> None:
        self._write, self._draft, self._tokenizer = write, draft, tokenizer
        self._checker, self._outcomes = checker, outcomes
        self._never = frozenset(never)
        self._max_tokens = max_tokens

    def mine(
        self, prompts: Sequence[str], on_progress: Callable[[int, int], object] = lambda *_: None
    ) -> Mined:
        """Walk through the answers to all prompts.

        Args:
            prompts: Texts.
            on_progress: Told how many prompts are done, and how many mismatches were found.
        """
        walks = active = self._begin(prompts)
        found = 0
        while tried := self._next_mismatches(active):
            active = [walk for walk, _ in tried]
            found += len(tried)
            on_progress(len(prompts) - len(active), found)
            self._try(tried)
        on_progress(len(prompts), found)
        texts = [text for walk in walks for text in walk.labelled]
        return Mined(texts, len(walks), len(prompts) - len(walks))

    def _begin(self, prompts: Sequence[str]) -> list[Walk]:
        """Have the target answer every prompt; those whose answer comes to nothing are left out."""
        encoded = [
            tuple(ids.tolist()) for ids in self._tokenizer.encode(prompts, special_tokens=True)
        ]
        ends = [len(ids) + self._max_tokens for ids in encoded]
        answers = self._write(encoded, ends)
        walks: list[Walk] = []
        for number, (text, before, answer) in enumerate(
            zip(prompts, encoded, answers, strict=True)
        ):
            outcome = self._outcome(text, answer)
            if outcome:
                token_ids = (*before, *answer)
                walks.append(Walk(number, text, token_ids, len(before), outcome, len(before)))
        return walks

    def _outcome(self, prompt: str, answer: Sequence[int]) -> Any:
        completion = self._tokenizer.decode(answer)
        key = memo_key(self._checker.name, prompt, completion)
        if key not in self._outcomes:
            outcome = self._checker.outcome(prompt, completion)
            try:
                self._outcomes.add({key: outcome})
            except TypeError:
                raise SpecPluginsError(
                    f'the checker "{self._checker.name}" gave {outcome!r}; an outcome must be a '
                    "text, a number, true, false or a list of those."
                ) from None
        return self._outcomes[key]

    def _next_mismatches(self, walks: Sequence[Walk]) -> list[tuple[Walk, int]]:
        """The draft's token at each walk's next mismatch, whose position it moves to."""
        found: list[tuple[Walk, int]] = []
        for start in range(0, len(walks), _DRAFT_BATCH):
            batch = walks[start : start + _DRAFT_BATCH]
            for walk, choices in zip(batch, self._choices(batch), strict=True):
                for place in range(walk.position, len(walk.token_ids)):
                    drafted, own = choices[place - 1], walk.token_ids[place]
                    if drafted != own and drafted not in self._never:
                        walk.position = place
                        found.append((walk, drafted))
                        break
        return found

    @torch.no_grad()
    def _choices(self, walks: Sequence[Walk]) -> list[list[int]]:
        """For each walk, the draft's most likely token after every token."""
        longest = max(len(walk.token_ids) for walk in walks)
        # Padding stands behind the text: what comes before does not see it.
        rows = torch.zeros(len(walks), longest, dtype=torch.int64)
        for row, walk in zip(rows, walks, strict=True):
            row[: len(walk.token_ids)] = torch.tensor(walk.token_ids)
        last = self._draft.num_layers
        states = self._draft.layer_states(rows, [last])[last]
        choices = [
            first_argmax(self._draft.logits(self._draft.final_norm(row[: len(walk.token_ids)])))
            for row, walk in zip(states, walks, strict=True)
        ]
        return [row.tolist() for row in choices]

    def _try(self, tried: Sequence[tuple[Walk, int]]) -> None:
        """Put the draft's tokens in place, have the target go on, label them."""
        contexts = [(*walk.token_ids[: walk.position], token) for walk, token in tried]
        ends = [walk.num_prompt + self._max_tokens for walk, _ in tried]
        open_ended = [i for i, c in enumerate(contexts) if len(c) < ends[i]]
        written = self._write([contexts[i] for i in open_ended], [ends[i] for i in open_ended])
        rest = dict(zip(open_ended, written, strict=True))
        for i, (walk, _) in enumerate(tried):
            token_ids = (*contexts[i], *rest.get(i, ()))
            outcome = self._outcome(walk.text, token_ids[walk.num_prompt :])
            same = outcome == walk.outcome
            labels = (*[UNKNOWN] * walk.position, HARMLESS if same else ERROR)
            walk.labelled.append(LabelledText(contexts[i], labels, walk.prompt))
            if same:
                walk.token_ids = token_ids
            walk.position += 1
