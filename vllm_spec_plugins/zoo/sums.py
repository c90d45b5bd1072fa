"""Sums worked out in words: a text task whose outcome can be checked, for the judge verifier.

    start 5 8 code 7 =
    next 5 plus 8 equals 13 ( note 7 ) ; next 8 plus 13 equals 1 ; next 13 plus 1 equals 14
    ( note 7 ) ; next 1 plus 14 equals 15 ; answer 15

Four steps, each adding the last two numbers modulo 20. Only these numbers decide the answer.
Which word opens a step, which says "equals" and which number stands in a note are habits that
the prompt settles nearly always, and nothing depends on them: a draft that misses a habit is
unlikely, and harmless. That is what a judge has to tell from a wrong number, which may be just
as likely.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .tokenizer import BEGIN, BEGIN_ID, SPECIAL_TOKENS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Numbers run from 0 to below this.
NUMBERS = 20
#: Additions in each task.
STEPS = 4

_OPENINGS = ("first", "then", "next", "now", "so")
_EQUALS = ("is", "makes", "gives", "equals", "yields")
_NOTES = tuple(map(str, range(10)))
_WORDS = ("start", "code", "plus", "=", "(", "note", ")", ";", "answer", *_OPENINGS, *_EQUALS)
#: How often a habit is kept.
_HABIT = 0.99


@dataclass(frozen=True, slots=True)
class Sum:
    """One task.

    Attributes:
        prompt: What to work out.
        solution: One way to write it down.
        answer: The number it ends in.
    """

    prompt: str
    solution: str
    answer: str


def sums(seed: int, count: int) -> Iterator[Sum]:
    """So many tasks, the same for the same seed.

    Args:
        seed: 0 is what the zoo's models learn from; take another for tasks of your own.
        count: How many.
    """
    draw = random.Random(seed)
    for _ in range(count):
        yield _sum(draw)


def final_answer(prompt: str, completion: str) -> str:
    """What a completion answers: the checker of this task. `""` where it gives no answer."""
    del prompt
    words = completion.split()
    if "answer" not in words[:-1]:
        return ""
    return words[words.index("answer") + 1]


def solve(prompt: str) -> str:
    """The right answer to a prompt."""
    a, b = (int(word) for word in prompt.split()[1:3])
    for _ in range(STEPS):
        a, b = b, (a + b) % NUMBERS
    return str(b)


def digest() -> str:
    """SHA-256 of the first tasks, in hexadecimal: changes when what models learn from does."""
    text = "\n".join(f"{task.prompt} {task.solution}" for task in sums(0, 100))
    return hashlib.sha256(text.encode()).hexdigest()


def train_word_tokenizer(vocabulary: int) -> Tokenizer:
    """One token for each word and number of the task; ids up to `vocabulary` stay without one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [*SPECIAL_TOKENS, *_WORDS, *map(str, range(NUMBERS))]
    if len(words) > vocabulary:
        raise ValueError(f"{len(words)} words do not fit in a vocabulary of {vocabulary}")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, BEGIN_ID)]
    )
    return tokenizer


def _sum(draw: random.Random) -> Sum:
    a, b, code = draw.randrange(NUMBERS), draw.randrange(NUMBERS), draw.randrange(len(_NOTES))
    prompt = f"start {a} {b} code {code} ="
    opening, note = _OPENINGS[code % len(_OPENINGS)], _NOTES[code]
    equals = _EQUALS[b % len(_EQUALS)]
    lines: list[str] = []
    for step in range(STEPS):
        total = (a + b) % NUMBERS
        line = (
            f"{_habitual(draw, opening, _OPENINGS)} {a} plus {b} "
            f"{_habitual(draw, equals, _EQUALS)} {total}"
        )
        if (step % 2 == 0) == (draw.random() < _HABIT):
            line += f" ( note {_habitual(draw, note, _NOTES)} )"
        lines.append(line)
        a, b = b, total
    return Sum(prompt, " ; ".join([*lines, f"answer {b}"]), str(b))


def _habitual(draw: random.Random, habit: str, choices: Sequence[str]) -> str:
    return habit if draw.random() < _HABIT else draw.choice(choices)
