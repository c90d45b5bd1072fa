"""Serve one engine after another in a process of its own: `serve_jobs.py JOBS RESULTS`.

JOBS is a JSON list; each job has `engine` (arguments of `LLM`) and `batches`, each with
`prompts` (lists of token ids) and `sampling`. RESULTS gets a JSON list of
`{"texts", "metrics", "error"}`; `texts` has one list per batch.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any


def serve(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    gc.freeze()  # vLLM collects garbage seven times at a start: half a second each
    try:
        llm = LLM(**job["engine"])
    except Exception as error:  # noqa: BLE001 - reported to the test
        return {"texts": None, "metrics": None, "error": f"{type(error).__name__}: {error}"}
    texts = []
    for batch in job["batches"]:
        prompts: Any = [{"prompt_token_ids": prompt} for prompt in batch["prompts"]]
        params = SamplingParams(detokenize=False, ignore_eos=True, **batch["sampling"])
        outputs = llm.generate(prompts, params, use_tqdm=False)
        texts.append([list(output.outputs[0].token_ids) for output in outputs])
    metrics = None
    if hasattr(llm.llm_engine.vllm_config.speculative_config, "spec_plugins"):
        [metrics] = llm.collective_rpc("spec_plugins_metrics")
    llm.llm_engine.engine_core.shutdown()
    return {"texts": texts, "metrics": metrics, "error": None}


if __name__ == "__main__":
    jobs, results = map(Path, sys.argv[1:])
    results.write_text(json.dumps([serve(job) for job in json.loads(jobs.read_text())]))
