"""What a data-parallel replica finds when it starts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine


def test_replicas_of_a_dense_model_count_apart(random_model: Path) -> None:
    """vLLM tells each of them that it is the only one, and keeps its index."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    from vllm_spec_plugins.engine.carrier import PluginSpeculativeConfig
    from vllm_spec_plugins.engine.front_end import counters_writer
    from vllm_spec_plugins.hookspecs import StepRecord

    load_general_plugins()
    config = EngineArgs(
        model=str(random_model),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        data_parallel_size=2,
        distributed_executor_backend="mp",
        speculative_config={
            "method": "ngram_adaptive",
            "num_speculative_tokens": 3,
            "verifier": "typical",
        },
    ).create_engine_config()
    step = StepRecord(
        "ngram_adaptive", ["a"], ["typical"], [3], [1], [[0, 0]], ("ngram_adaptive",), None, [0.5]
    )
    for index in (0, 1):
        replica = copy.deepcopy(config)  # arrives by pickling
        replica.parallel_config.data_parallel_index = index
        replica.parallel_config.reconfigure_for_independent_dp_rank()
        spec = replica.speculative_config
        assert isinstance(spec, PluginSpeculativeConfig)
        writer = counters_writer(spec, replica)
        assert writer is not None
        for _ in range(index + 1):
            writer.spec_step_finished(step)
    spec = config.speculative_config
    assert isinstance(spec, PluginSpeculativeConfig)
    counters = spec.counters.counters
    assert counters is not None
    typical = spec.counters.verifiers.index("typical")
    assert counters.methods[:, typical, 0].tolist() == [1, 2]
