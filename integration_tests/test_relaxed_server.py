"""Prices over HTTP: at `/metrics`, in the answers of single requests, and in the start-up log."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vllm_spec_plugins.cli.server import Server, ServerError, free_ports

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CONFIG = {
    "method": "ngram_adaptive",
    "num_speculative_tokens": 4,
    "verifier": "lossless",
    "verifiers_allowed": [{"name": "typical", "epsilon": 0.01, "delta": 0.05}, "top_k_relaxed"],
}
NAME = "pico"
PROMPT = "for i in range(10):\n    print(i)\n\nfor i in range(10):\n    "


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "log.txt"


@pytest.fixture(scope="module")
def server(pico_model: Path, engine_environment: dict[str, str], log: Path) -> Iterator[Server]:
    arguments = [
        str(pico_model),
        *("--served-model-name", NAME, "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "256"),
        *("--per-request-spec-decode-metrics", "summary"),
        *("--speculative-config", json.dumps(CONFIG)),
    ]
    environment = {
        **engine_environment,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    [port] = free_ports(1)
    with Server(arguments, port=port, log=log, environment=environment) as server:
        server.wait_until_ready(300)
        yield server


def complete(server: Server, verifier: str | None = None, **what: Any) -> dict[str, Any]:
    body = {"model": NAME, "prompt": PROMPT, "temperature": 1.0, "max_tokens": 48, **what}
    if verifier is not None:
        body["vllm_xargs"] = {"spec_decode.verifier": verifier}
    return server.post("/v1/completions", body)


def counted(server: Server) -> dict[tuple[str, str], float]:
    """By counter and verifier, from the text of `/metrics`."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        page = answer.read().decode()
    lines = re.findall(
        r'^vllm_spec_plugins:(\w+)_total\{engine="0",model_name="pico",'
        r'proposer="ngram_adaptive",verifier="(\w+)"\} (\S+)$',
        page,
        re.MULTILINE,
    )
    return {(name, verifier): float(value) for name, verifier, value in lines}


def test_the_start_up_log_says_what_is_promised(server: Server, log: Path) -> None:
    del server  # has started
    [line] = [line for line in log.read_text().splitlines() if "Speculative decoding:" in line]
    assert "verifier lossless (lossless: reproduces the target's law exactly)" in line
    for promise in ("lossless [lossless]", "top_k_relaxed [heuristic]", "typical [heuristic]"):
        assert promise in line


def test_answers_and_metrics_agree_on_the_price(server: Server) -> None:
    before = counted(server)
    assert {verifier for _, verifier in before} == {"lossless", "typical", "top_k_relaxed"}
    wanted = ["typical", "lossless", "top_k_relaxed", None] * 6
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda verifier: complete(server, verifier), wanted))
    paid: dict[str, list[float]] = {}
    for verifier, answer in zip(wanted, answers, strict=True):
        report = answer["metrics"]["speculative_decoding"]
        assert report["verifier"] == (verifier or "lossless")
        price = report["total_variation_price"] * report["num_examined_draft_tokens"]
        sums = paid.setdefault(report["verifier"], [0, 0, 0])
        for i, value in enumerate(
            (report["num_draft_tokens"], report["num_accepted_draft_tokens"], price)
        ):
            sums[i] += value
    after = counted(server)
    for verifier, (drafted, accepted, price) in paid.items():

        def more(name: str, verifier: str = verifier) -> float:
            return after[name, verifier] - before[name, verifier]

        assert more("draft_tokens") == drafted > 0
        assert more("accepted_tokens") == accepted
        assert more("total_variation") == pytest.approx(price, abs=1e-6)
    assert paid["lossless"][2] == 0
    assert paid["typical"][2] > 0


def test_a_verifier_that_is_not_allowed_is_a_400(server: Server) -> None:
    with pytest.raises(ServerError, match=r"does not allow the verifier .*kl_judge"):
        complete(server, "kl_judge")
