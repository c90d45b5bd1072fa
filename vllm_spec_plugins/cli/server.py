"""A `vllm-spec serve` process on this machine, started, asked and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

#: Only this machine can reach the server.
HOST = "127.0.0.1"

#: Seconds a server is given to end by itself before it is killed.
_PATIENCE = 20.0


class ServerError(RuntimeError):
    """A server did not start, died, or refused a request."""


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on. All are held until the last is found: no two are the same."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


class Server:
    """One server. Use as a context manager: it is stopped however the block is left.

    Args:
        arguments: What follows `vllm-spec serve`, without host and port.
        port: Where to listen.
        log: File for everything it prints.
        environment: Variables beside this process's own.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        port: int,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.url = f"http://{HOST}:{port}"
        self.log = log
        self._command = [sys.executable, "-m", "vllm_spec_plugins.cli", "serve", *arguments]
        self._command += ["--host", HOST, "--port", str(port)]
        # Safe path: with -m the current folder would come first on sys.path, and vLLM looks
        # for modules whose names may lie there.
        self._environment = {**os.environ, "PYTHONSAFEPATH": "1", **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    def __enter__(self) -> Server:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._output = self.log.open("wb")
        # A session of its own: Ctrl-C reaches this process alone, which then stops the server.
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the server's first process, which is also its process group."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """End the process, its children with it. Does nothing the second time."""
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_PATIENCE)
            # Whatever is left of its group: a child that outlived it, or itself.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self._output is not None:
            self._output.close()
            self._output = None

    def is_ready(self) -> bool:
        """Whether it answers.

        Raises:
            ServerError: If it has ended instead, with the end of its log.
        """
        if self._process is None or self._process.poll() is not None:
            raise ServerError(f"the server ended while starting.\n{self.last_words()}")
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def wait_until_ready(self, seconds: float) -> None:
        """Raises `ServerError` when it takes longer, or ends."""
        deadline = time.monotonic() + seconds
        while not self.is_ready():
            if time.monotonic() > deadline:
                raise ServerError(
                    f"the server was not ready after {seconds:.0f} s.\n{self.last_words()}"
                )
            time.sleep(0.2)

    def last_words(self, lines: int = 15) -> str:
        """The end of its log, for error messages."""
        text = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        return "\n".join([f"The end of {self.log}:", *(f"  {line}" for line in text)])

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """One JSON request, one JSON answer."""
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ServerError(
                f"{path}: HTTP {error.code}: {error.read().decode(errors='replace')}"
            ) from None
        except OSError as error:
            raise ServerError(f"{path}: {error}\n{self.last_words()}") from None

    def counters(self) -> dict[str, float]:
        """Prometheus samples by name, summed over their labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            return parse_counters(answer.read().decode())


def parse_counters(text: str) -> dict[str, float]:
    """Samples of a Prometheus page by name, summed over their labels."""
    totals: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            sample, _, value = line.rpartition(" ")
            name = sample.partition("{")[0]
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals
