"""Writes what was drafted, accepted and by whom, step by step, as JSON lines. An observer.

Set `VLLM_SPEC_PLUGINS_TRACE` to a file name before the engine starts. Lines are appended:

    {"event": "ready", "proposer": "ngram_adaptive", "verifier": "lossless", "model": "..."}
    {"event": "step", "step": 7, "request_id": "cmpl-1", "proposer": "ngram_adaptive",
     "verifier": "lossless", "drafted": 3, "accepted": 2, "token_ids": [5, 8, 13],
     "sources": ["ngram_adaptive", "ngram_adaptive", "ngram_adaptive"]}
    {"event": "finished", "request_id": "cmpl-1"}

One `step` line per request and step. `token_ids` are the tokens it emitted: `accepted` draft
tokens, then the one drawn after them. `sources` names who drafted each of the `drafted` tokens.
A relaxed verifier adds `extra_acceptance`, the total-variation price of the step.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from .context import EngineContext
from .hookspecs import StepRecord, hookimpl

#: Environment variable that names the file. Unset or empty: no trace.
VARIABLE = "VLLM_SPEC_PLUGINS_TRACE"


class StepTrace:
    """Appends one line per request and step to the file named in the environment."""

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._steps = 0
        path = os.environ.get(VARIABLE)
        if path:
            # Line by line: the engine process may be stopped at any moment.
            self._file = Path(path).open("a", buffering=1, encoding="utf-8")  # noqa: SIM115
        else:
            # pluggy registers callables only: without a file no hook is ever called.
            for hook in ("spec_engine_ready", "spec_step_finished", "spec_request_finished"):
                setattr(self, hook, None)

    @hookimpl
    def spec_engine_ready(self, context: EngineContext, proposer: str, verifier: str) -> None:
        model = context.facts.model
        self._write(event="ready", proposer=proposer, verifier=verifier, model=model)

    @hookimpl
    def spec_step_finished(self, step: StepRecord) -> None:
        self._steps += 1
        for i, request_id in enumerate(step.request_ids):
            price = {}
            if step.extra_acceptance is not None:
                price["extra_acceptance"] = step.extra_acceptance[i]
            self._write(
                event="step",
                step=self._steps,
                request_id=request_id,
                proposer=step.proposer,
                verifier=step.verifiers[i],
                drafted=step.num_draft[i],
                accepted=step.num_accepted[i],
                token_ids=list(step.token_ids[i]),
                sources=step.sources_of_request(i),
                **price,
            )

    @hookimpl
    def spec_request_finished(self, request_id: str) -> None:
        self._write(event="finished", request_id=request_id)

    def _write(self, **line: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
