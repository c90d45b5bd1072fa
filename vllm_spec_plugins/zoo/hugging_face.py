"""Write and read the folder that vLLM and transformers call a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .model import Llama
from .recipes import Architecture
from .tokenizer import BEGIN_ID, END_ID, PADDING_ID


def save_model(model: Llama, folder: Path, also: Mapping[str, object] | None = None) -> None:
    """Write `config.json` and `model.safetensors`, float32. `also`: more keys of the config."""
    from safetensors.torch import save_file

    config = {**llama_config(model.shape), **(also or {})}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(model.export(), folder / "model.safetensors", metadata={"format": "pt"})


def load_model(shape: Architecture, folder: Path) -> Llama:
    """Read back what `save_model` wrote for a model of this shape."""
    from safetensors.torch import load_file

    model = Llama(shape)
    model.load(load_file(folder / "model.safetensors"))
    return model


def llama_config(shape: Architecture) -> dict[str, object]:
    """What transformers' LlamaConfig reads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BEGIN_ID,
        "eos_token_id": END_ID,
        "pad_token_id": PADDING_ID,
        "dtype": "float32",
    }
