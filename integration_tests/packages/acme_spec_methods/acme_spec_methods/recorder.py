"""An observer that writes what it sees to the file named by ACME_RECORD."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vllm_spec_plugins import EngineContext, hookimpl
from vllm_spec_plugins.hookspecs import StepRecord


class Recorder:
    """One JSON line per event."""

    def write(self, event: str, **what: object) -> None:
        if path := os.environ.get("ACME_RECORD"):
            with Path(path).open("a") as file:
                file.write(json.dumps({"event": event, **what}) + "\n")

    @hookimpl
    def spec_engine_ready(self, context: EngineContext, proposer: str, verifier: str) -> None:
        vocab_size = context.facts.vocab_size
        self.write("ready", proposer=proposer, verifier=verifier, vocab_size=vocab_size)

    @hookimpl
    def spec_step_finished(self, step: StepRecord) -> None:
        self.write(
            "step",
            proposer=step.proposer,
            requests=list(step.request_ids),
            drafted=list(step.num_draft),
            accepted=list(step.num_accepted),
        )

    @hookimpl
    def spec_request_finished(self, request_id: str) -> None:
        self.write("finished", request=request_id)
