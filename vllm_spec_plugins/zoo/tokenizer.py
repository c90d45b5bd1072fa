"""Byte-level BPE trained on the corpus, saved as the folder vLLM and transformers load."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

PADDING, BEGIN, END, MASK = "<pad>", "<s>", "</s>", "<mask>"
#: In the order of their ids, 0 to 3. The mask is for diffusion drafters.
SPECIAL_TOKENS = (PADDING, BEGIN, END, MASK)
PADDING_ID, BEGIN_ID, END_ID = 0, 1, 2

#: A newline keeps its indentation, an identifier or operator its leading space.
_PIECES = r"\n[ \t]*|[ ]{2,}| ?[A-Za-z_]+| ?\d{1,3}| ?[^\sA-Za-z_\d]+|\s"


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocabulary` tokens; every byte string round-trips.

    Raises:
        ValueError: The texts are too few for that many tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"the texts give {tokenizer.get_vocab_size()} tokens, not {vocabulary}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`.

    Args:
        tokenizer: From `train_tokenizer`.
        folder: An existing folder.
        longest: Most tokens the model beside it can take.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PADDING,
        "mask_token": MASK,
        "clean_up_tokenization_spaces": False,  # it would join "x ." to "x." when decoding code
        "model_max_length": longest,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode_files(tokenizer: Tokenizer, texts: Iterable[str]) -> NDArray[np.int64]:
    """The token ids of all texts, each between begin and end: one long array."""
    import numpy as np

    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        ids += [BEGIN_ID, *encoding.ids, END_ID]
    return np.array(ids, dtype=np.int64)
