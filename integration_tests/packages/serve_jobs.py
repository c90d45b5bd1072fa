"""Serve one engine after another in a process of its own: `serve_jobs.py JOBS RESULTS [v2]`.

JOBS is a JSON list; each job has `engine` (arguments of `LLM`) and `batches`, each with
`prompts` (lists of token ids) and `sampling`. RESULTS gets a JSON list of
`{"texts", "metrics", "asynchronous", "error"}`; `texts` has one list per batch, metrics are the
first rank's. With `v2` model runner V2 serves them, in Triton's interpreter, under the scheduling that
vLLM chooses on a GPU.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any


def serve(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    gc.freeze()  # vLLM collects garbage seven times at a start: half a second each
    try:
        llm = LLM(**job["engine"])
    except Exception as error:  # noqa: BLE001 - reported to the test
        said = f"{type(error).__name__}: {error}"
        return {"texts": None, "metrics": None, "asynchronous": None, "error": said}
    texts = []
    for batch in job["batches"]:
        prompts: Any = [{"prompt_token_ids": prompt} for prompt in batch["prompts"]]
        params = SamplingParams(detokenize=False, ignore_eos=True, **batch["sampling"])
        outputs = llm.generate(prompts, params, use_tqdm=False)
        texts.append([list(output.outputs[0].token_ids) for output in outputs])
    metrics = None
    if hasattr(llm.llm_engine.vllm_config.speculative_config, "spec_plugins"):
        metrics, *_ = llm.collective_rpc("spec_plugins_metrics")
    asynchronous = llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    llm.llm_engine.engine_core.shutdown()
    return {"texts": texts, "metrics": metrics, "asynchronous": asynchronous, "error": None}


def on_v2() -> None:
    """Before anything else. Workers are forked: the interpreter is set up in this process only."""
    from vllm_spec_plugins.testing.triton_interpreter import interpret

    interpret()
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        chosen = vllm_config.scheduler_config.async_scheduling
        original(vllm_config)  # switches it off on CPUs, and has workers spawned
        vllm_config.scheduler_config.async_scheduling = chosen
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv[3:] == ["v2"]:
        on_v2()
    jobs, results = map(Path, sys.argv[1:3])
    results.write_text(json.dumps([serve(job) for job in json.loads(jobs.read_text())]))
