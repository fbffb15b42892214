"""What a bench asks an engine's process, one JSON object a line. Knows no engine; the standard library is all it needs.

An engine may run in another Python than the bench, with other packages: nothing of vlrt is imported here.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        source: a video file, which is decoded while the clock runs; or frames [T, H, W, 3] uint8 in a .npy file,
            which are read before it starts.
        text: the rendered prompt of a direct answer, one pad for the video.
        question: what is asked; `text` holds it.
        num_tokens: of the answer, whose length is forced.
        num_frames: sampled from a video file.
        shift: pixels by which the frames of an array are rolled to the right, so that no cache knows the video.
        reasoning: "direct", "latent" or "cot"; engines but vlrt have no "latent".
        questions: how many times the question is asked about the opened video; vlrt alone takes more than one.
        logits_to: a .npy file that gets the logits [V] after the prompt; nothing is timed then.
    """

    source: str
    text: str
    question: str
    num_tokens: int
    num_frames: int = 16
    shift: int = 0
    reasoning: str = "direct"
    questions: int = 1
    logits_to: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


class Answering(Protocol):
    """What an engine's module provides as `Engine`; settings are keyword arguments of its constructor."""

    def describe(self) -> dict[str, Any]:
        """Return versions and settings worth a place in the report, as JSON values."""

    def answer(self, request: Request) -> dict[str, Any]:
        """Return `seconds` and `token_ids`, and what else the engine tells; `seconds` are those of `timed`."""


def rolled(request: Request) -> Any:
    """Return the frames of a .npy file, shifted, or None where the source is a video file."""
    if not request.source.endswith(".npy"):
        return None
    import numpy as np

    return np.ascontiguousarray(np.roll(np.load(request.source), request.shift, axis=2))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call took, and what it returned."""
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def peak_memory_bytes() -> int:
    """Return the most memory that this process has held so far, mapped files included; Linux tells in VmHWM."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
