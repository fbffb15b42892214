"""Starts engines and asks them. Knows the protocol, no engine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benches.engines.protocol import Request

ROOT = Path(__file__).parent.parent.parent


class Absent(Exception):
    """An engine cannot run here, or stopped; the message says why."""


class Client:
    """An engine's process.

    Args:
        module: of `benches.engines`, that holds the engine.
        settings: keyword arguments of its `Engine`.
        threads: of the libraries that read OMP_NUM_THREADS.
        python: interpreter; None: this one.
        log: a file that gets what the process prints.

    Attributes:
        described: what the engine says of itself, with `open_seconds`.

    Raises:
        Absent: the engine does not start.
    """

    def __init__(
        self, module: str, settings: dict[str, Any], *, threads: int, log: Path, python: str | None = None
    ) -> None:
        command = [python or sys.executable, "-m", "benches.engines.worker", module, json.dumps(settings)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        self.described = self._reply()

    def ask(self, request: Request) -> dict[str, Any]:
        """Return the reply to a request.

        Raises:
            Absent: the engine failed; it is gone then.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request.to_json()) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reply, or its absence, says why
        return self._reply()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        reply: dict[str, Any] = json.loads(line) if line else {"absent": self._last_words()}
        for kind in ("absent", "error"):
            if kind in reply:
                self.close()
                raise Absent(reply[kind])
        return reply

    def _last_words(self) -> str:
        status = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
        return f"its process ended with status {status}: {last.strip()[:300]}"
