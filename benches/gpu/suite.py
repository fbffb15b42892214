"""Starts workers, phase by phase, within the time: whatever one does, the next phase runs. Imports no engine."""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benches.gpu import parts
from benches.gpu.phases import PHASES

ROOT = Path(__file__).parent.parent.parent
GRACE_SECONDS = 10.0  # for an item that does not look at the clock; then its worker is ended
LEAST_SECONDS = 5.0  # below it no worker is worth its start


@dataclass(frozen=True)
class Suite:
    """How to run.

    Attributes:
        out: directory of results.
        device: "cuda" or "cpu".
        tiny: sizes of a trial run.
        seconds: of everything.
        phases: names, in order.
    """

    out: Path
    device: str
    tiny: bool
    seconds: float
    phases: Sequence[str]

    def run(self) -> None:
        """Run all phases; what they found lies in `parts`."""
        end = time.monotonic() + self.seconds
        chosen = [phase for phase in PHASES if phase.name in self.phases]
        if self.device == "cpu":  # nothing can be lost there, and starting Python is most of the work
            specs = [f"{phase.name}/{item}" for phase in chosen for item in phase.items]
            self._until_done(specs, end - time.monotonic(), "trial")
            return
        for number, phase in enumerate(chosen):
            left = end - time.monotonic()
            shares = sum(other.share for other in chosen[number:])
            seconds = left * phase.share / shares if shares else left
            specs = [f"{phase.name}/{item}" for item in phase.items]
            print(f"{phase.name}: up to {seconds:.0f} s of {left:.0f} s", flush=True)
            if phase.at_once:
                self._at_once(specs, seconds)
            else:
                self._until_done(specs, seconds, phase.name)

    def _at_once(self, specs: Sequence[str], seconds: float) -> None:
        end = time.monotonic() + seconds
        started = [(spec, self._start([spec], seconds, spec.replace("/", "-"))) for spec in specs]
        for spec, process in started:
            self._wait(process, max(end - time.monotonic(), 0) + GRACE_SECONDS)
            if not self._has(spec):
                self._blame(spec, process, spec.replace("/", "-"))

    def _until_done(self, specs: Sequence[str], seconds: float, log: str) -> None:
        """Run items in one worker; where it dies, blame the item it was at, and go on with the others in a new one."""
        end = time.monotonic() + seconds
        pending = list(specs)
        while pending:
            left = end - time.monotonic()
            if left < LEAST_SECONDS:
                for spec in pending:
                    parts.write(self.out, *spec.split("/"), skipped="out of time", seconds=0.0)
                return
            process = self._start(pending, left, log)
            self._wait(process, left + GRACE_SECONDS)
            pending = [spec for spec in pending if not self._has(spec)]
            if pending and process.returncode != 3:  # 3: the culprit has written its own error
                self._blame(pending.pop(0), process, log)

    def _start(self, specs: Sequence[str], seconds: float, log: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "benches.gpu.worker", "--out", str(self.out), "--device", self.device]
        command += ["--seconds", f"{seconds:.1f}", *(["--tiny"] if self.tiny else []), *specs]
        file = self._log(log)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as stream:
            return subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)

    def _wait(self, process: "subprocess.Popen[bytes]", seconds: float) -> None:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _has(self, spec: str) -> bool:
        return parts.path(self.out, *spec.split("/")).exists()

    def _blame(self, spec: str, process: "subprocess.Popen[bytes]", log: str) -> None:
        last = self._log(log).read_text(errors="replace").splitlines()[-15:]
        why = f"its process ended with status {process.returncode} (below 0: a signal; -9: it was out of time)"
        parts.write(self.out, *spec.split("/"), error="\n".join([why, *last]), seconds=0.0)

    def _log(self, name: str) -> Path:
        return self.out / "logs" / f"{name}.log"
