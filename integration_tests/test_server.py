"""`vllm-spec serve` with a trained model: HTTP in front, the engine in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from vllm_spec_plugins.cli.server import Server, ServerError, free_ports

pytestmark = pytest.mark.engine

NUM_SPECULATIVE_TOKENS = 5
CONFIG = {"method": "ngram_adaptive", "num_speculative_tokens": NUM_SPECULATIVE_TOKENS}
ENGINE = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 256}
#: Model name in requests.
NAME = "pico"
MAX_TOKENS = 64

#: Of the kind the zoo's models were trained on: Python.
PROMPTS = [
    "import os\nimport sys\n\n\ndef main(argv):\n    ",
    "class Stack:\n    def push(self, item):\n        self.items.append(item)\n\n    def pop(self",
    "for i in range(10):\n    print(i)\n\nfor i in range(10):\n    ",
    "try:\n    import json\nexcept ImportError:\n    json = None\n\ntry:\n    import ",
    "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a",
    'if __name__ == "__main__":\n    ',
]


@pytest.fixture(scope="module")
def plain_texts(serve_offline: Callable[..., Any], pico_model: Path) -> list[str]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    with serve_offline(model=str(pico_model), **ENGINE) as llm:
        return [o.outputs[0].text for o in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def server(
    pico_model: Path,
    plain_texts: list[str],
    engine_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    del plain_texts  # decoded first: one engine at a time
    arguments = [
        str(pico_model),
        "--served-model-name",
        NAME,
        "--dtype",
        "float32",
        "--enforce-eager",
        "--speculative-config",
        json.dumps(CONFIG),
    ]
    for option, value in ENGINE.items():
        arguments += [f"--{option.replace('_', '-')}", str(value)]
    environment = {**engine_environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = tmp_path_factory.mktemp("server") / "log.txt"
    [port] = free_ports(1)
    with Server(arguments, port=port, log=log, environment=environment) as server:
        server.wait_until_ready(300)
        yield server


def body(prompt: str, **what: Any) -> dict[str, Any]:
    return {
        "model": NAME,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        **what,
    }


def complete(server: Server, prompt: str, **what: Any) -> str:
    answer = server.post("/v1/completions", body(prompt, **what))
    return answer["choices"][0]["text"]


def stream(server: Server, prompt: str, **what: Any) -> Iterator[str]:
    """Pieces of a text as they arrive."""
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        data=json.dumps(body(prompt, stream=True, **what)).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                yield json.loads(data)["choices"][0]["text"]


def draft_tokens(server: Server) -> tuple[float, float]:
    """Drafted and accepted tokens so far, by vLLM's own counters."""
    counters = server.counters()
    return (
        counters["vllm:spec_decode_num_draft_tokens_total"],
        counters["vllm:spec_decode_num_accepted_tokens_total"],
    )


def test_the_engine_runs_in_a_process_of_its_own(server: Server) -> None:
    children = psutil.Process(server.pid).children(recursive=True)
    assert any("EngineCore" in " ".join(child.cmdline()) for child in children)


def test_texts_are_plain_decodings(server: Server, plain_texts: list[str]) -> None:
    """All at once; vLLM's counters see the drafts."""
    before = draft_tokens(server)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        texts = list(pool.map(lambda prompt: complete(server, prompt), PROMPTS))
    drafted, accepted = (now - then for now, then in zip(draft_tokens(server), before, strict=True))
    assert texts == plain_texts
    assert drafted > accepted > 10


def test_our_counters_come_from_the_engines_process(server: Server) -> None:
    """The worker counts, this server tells; vLLM's scheduler counted the same drafts."""
    complete(server, PROMPTS[2])
    found = server.counters()
    drafted, accepted = draft_tokens(server)
    assert found["vllm_spec_plugins:draft_tokens_total"] == drafted > 0
    assert found["vllm_spec_plugins:accepted_tokens_total"] == accepted > 0
    assert found["vllm_spec_plugins:total_variation_total"] == 0  # lossless


def test_a_streamed_text_is_the_same(server: Server, plain_texts: list[str]) -> None:
    pieces = list(stream(server, PROMPTS[2]))
    assert "".join(pieces) == plain_texts[2]
    # Several accepted tokens come at once.
    assert 1 < len(pieces) < MAX_TOKENS


def test_a_request_may_decline_drafts(server: Server, plain_texts: list[str]) -> None:
    before = draft_tokens(server)
    assert complete(server, PROMPTS[2], vllm_xargs={"spec_decode.enabled": False}) == plain_texts[2]
    assert draft_tokens(server) == before
    assert complete(server, PROMPTS[2], vllm_xargs={"spec_decode.enabled": True}) == plain_texts[2]
    assert draft_tokens(server) > before


def test_a_request_may_ask_for_shorter_drafts(server: Server, plain_texts: list[str]) -> None:
    def per_draft(**what: Any) -> float:
        before = server.counters()
        assert complete(server, PROMPTS[2], **what) == plain_texts[2]
        after = server.counters()
        tokens, drafts = (
            after[name] - before[name]
            for name in (
                "vllm:spec_decode_num_draft_tokens_total",
                "vllm:spec_decode_num_drafts_total",
            )
        )
        return tokens / drafts

    one = {"spec_decode.num_speculative_tokens": 1, "spec_decode.verifier": "lossless"}
    assert per_draft(vllm_xargs=one) == 1
    assert per_draft() > 1


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        (
            {"spec_decode.verifier": "losless"},
            'does not allow the verifier "losless". Did you mean "lossless"?',
        ),
        ({"spec_decode.enabeld": False}, 'unknown option "enabeld". Did you mean "enabled"?'),
        (
            {"spec_decode.num_speculative_tokens": 6},
            "num_speculative_tokens is 6, and this server drafts at most 5",
        ),
        ({"spec_decode.num_speculative_tokens": -1}, '"num_speculative_tokens"'),
        ({"spec_decode": "off"}, '"spec_decode" must be an object'),
    ],
    ids=["verifier", "key", "too many", "negative", "no object"],
)
def test_what_the_server_does_not_allow_is_a_400_for_that_request_alone(
    xargs: dict[str, Any], message: str, server: Server, plain_texts: list[str]
) -> None:
    other = stream(server, PROMPTS[2])
    pieces = [next(other)]  # it is running
    with pytest.raises(ServerError) as refused:
        complete(server, PROMPTS[0], vllm_xargs=xargs)
    assert "HTTP 400" in str(refused.value)
    assert message in json.loads(str(refused.value).split("HTTP 400: ")[1])["error"]["message"]
    assert "".join([*pieces, *other]) == plain_texts[2]


def test_a_seed_gives_the_same_text_in_any_company(server: Server) -> None:
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 11}
    alone = complete(server, PROMPTS[2], **sampling)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        others = [pool.submit(complete, server, p, temperature=1.0) for p in PROMPTS]
        assert complete(server, PROMPTS[2], **sampling) == alone
        assert all(other.result() for other in others)
    assert complete(server, PROMPTS[2], **{**sampling, "seed": 12}) != alone


def test_the_server_stops_when_told_to(server: Server) -> None:
    """The last test of this server: by its own process id, with exit code 0, nothing left."""
    process = psutil.Process(server.pid)
    children = process.children(recursive=True)
    os.kill(server.pid, signal.SIGTERM)
    assert process.wait(60) == 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
