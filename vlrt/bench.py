"""Times one bundle on one machine: answering directly, after latents, and after written chains of several lengths.

Every case is asked in turn, round by round, so that what disturbs the machine disturbs all; lengths are forced, so that
weights that are not trained take as long as those that are. Knows the runtime and the clock; prints nothing.
"""

import contextlib
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlrt.answer import Answer
from vlrt.content import Source
from vlrt.errors import ConfigError
from vlrt.quantiles import quantiles
from vlrt.runtime import Runtime

QUESTION = "What moves first, and which way does it go?"
STAGES = ("decode", "preprocess", "vision", "prefill", "latents", "answer", "total")


@dataclass(frozen=True)
class Case:
    """One way to an answer: how it is reasoned, and how many tokens of chain are written before the answer."""

    reasoning: str
    chain_tokens: int = 0

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"chain of {self.chain_tokens}" if self.reasoning == "cot" else self.reasoning


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        num_frames: of the video; None: as the bundle samples it.
        chain_tokens: lengths of the written chains.
        answer_tokens: of every answer.
        rounds: that are counted; one more warms up.
        chain_rounds: of those, in how many chains are written too: they take long.
    """

    num_frames: int | None = 16
    chain_tokens: Sequence[int] = (384,)
    answer_tokens: int = 4
    rounds: int = 5
    chain_rounds: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        numbers = (
            1 if self.num_frames is None else self.num_frames,
            self.answer_tokens,
            self.rounds,
            self.chain_rounds,
            *self.chain_tokens,
        )
        if not all(isinstance(number, int) and number >= 1 for number in numbers) or self.chain_rounds > self.rounds:
            raise ConfigError(f"{self} cannot be measured; accepted: whole numbers from 1, chain_rounds up to rounds")


@dataclass
class Result:
    """Seconds per case and stage, one per round; and the answer that was timed last."""

    seconds: dict[Case, dict[str, list[float]]] = field(default_factory=dict)
    answers: dict[Case, Answer] = field(default_factory=dict)

    def add(self, case: Case, answer: Answer) -> None:
        """Count one round."""
        stages = self.seconds.setdefault(case, {stage: [] for stage in STAGES})
        for stage in STAGES:
            stages[stage].append(answer.timings[stage])
        self.answers[case] = answer

    def median(self, case: Case, stage: str = "total") -> float:
        """Return seconds of a stage."""
        return statistics.median(self.seconds[case][stage])

    def reasoning_seconds(self, case: Case) -> float:
        """Return what reasoning takes: latents, or what is written beyond what an answer without it has."""
        if case.reasoning == "latent":
            return self.median(case, "latents")
        return max(self.median(case, "answer") - self.median(Case("direct"), "answer"), 0.0)

    def to_dict(self) -> list[dict[str, Any]]:
        """Return JSON values: a row per case, with quantiles per stage and ratios to latents, where there are any."""
        latent = next((case for case in self.seconds if case.reasoning == "latent"), None)
        return [self._row(case, latent) for case in self.seconds]

    def _row(self, case: Case, latent: Case | None) -> dict[str, Any]:
        row: dict[str, Any] = {
            "case": case.name,
            "reasoning": case.reasoning,
            "chain_tokens": case.chain_tokens,
            "rounds": len(self.seconds[case]["total"]),
            "seconds": {stage: quantiles(values) for stage, values in self.seconds[case].items()},
            "usage": dict(vars(self.answers[case].usage)),
        }
        if case.reasoning == "cot" and latent is not None:
            row["end_to_end_ratio"] = self.median(case) / self.median(latent)
            row["reasoning_ratio"] = self.reasoning_seconds(case) / self.reasoning_seconds(latent)
        return row


def cases(runtime: Runtime, chain_tokens: Sequence[int]) -> list[Case]:
    """Return what a model can be asked: directly, after latents where it has some, after chains."""
    ways = [Case("direct"), *([Case("latent")] if runtime.model.latent is not None else [])]
    return [*ways, *(Case("cot", count) for count in chain_tokens)]


def run(
    runtime: Runtime, video: Source, plan: Plan, *, progress: Callable[[int, int, str], None] | None = None
) -> Result:
    """Ask a runtime in every way, in turn.

    Args:
        runtime: that remembers no video (`video_cache_bytes=0`).
        video: what it is asked about.
        plan: how often.
        progress: told how many questions are answered, how many there are, and what is asked next.

    Raises:
        ConfigError: an answer did not repeat itself: what is timed would not be one thing.
    """
    asked = cases(runtime, plan.chain_tokens)
    order = [(number, case) for number in range(plan.rounds + 1) for case in asked]
    order = [(number, case) for number, case in order if case.reasoning != "cot" or number <= plan.chain_rounds]
    result, known = Result(), dict[Case, tuple[int, ...]]()
    for done, (number, case) in enumerate(order):
        if progress is not None:
            progress(done, len(order), case.name)
        tokens = plan.answer_tokens + case.chain_tokens
        answer = runtime.ask(
            video,
            QUESTION,
            reasoning=case.reasoning,  # type: ignore[arg-type]  # one of the three by `cases`
            num_frames=plan.num_frames,
            max_tokens=tokens,
            min_tokens=tokens,
        )
        if known.setdefault(case, answer.token_ids) != answer.token_ids:
            raise ConfigError(f"the answer after {case.name} did not repeat itself; report this bundle")
        if number:
            result.add(case, answer)
    return result


def write_clip(path: Path, *, seconds: int = 40, fps: int = 8, size: int = 224) -> Path:
    """Write an mp4 in which a square moves over a gradient, with some noise; return its path.

    Args:
        path: the file.
        seconds: of video.
        fps: frames per second.
        size: pixels of both sides.
    """
    import av

    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0:size, 0:size]
    partial = path.with_suffix(".partial.mp4")
    with av.open(str(partial), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(seconds * fps):
            gradient = np.stack([rows, columns, np.full_like(rows, i % 256)], axis=-1)
            frame = gradient + random.integers(0, 24, (size, size, 3))
            left = (i * 3) % (size - 40)
            frame[90:130, left : left + 40] = (220, 60, 40)
            image = av.VideoFrame.from_ndarray(frame.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    partial.rename(path)
    return path


def markdown(rows: Sequence[Mapping[str, Any]], described: Mapping[str, Any]) -> str:
    """Return a report: what was measured on, a row per case, and how to read it.

    Args:
        rows: as `Result.to_dict` gives them.
        described: facts about bundle and machine, a line each.
    """
    head = ["", *STAGES, "tokens in", "peak memory", "chain / latents, end to end", "reasoning alone"]
    lines = ["# Time to answer", "", *(f"- {name}: {value}" for name, value in described.items()), ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["case"], *(f"{row['seconds'][stage]['median']:.3f}" for stage in STAGES)]
        cells += [str(row["usage"]["prompt_tokens"]), f"{row['usage']['peak_host_memory_bytes'] / 1e6:.0f} MB"]
        cells += [f"{row[name]:.1f}" if name in row else "" for name in ("end_to_end_ratio", "reasoning_ratio")]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Medians in seconds of rounds taken in turn; lengths are forced. Reasoning alone: what a chain takes beyond an",
        "answer without it, over what the latents take. Peak memory is that of the process up to then.",
        "",
    ]
    return "\n".join(lines)


def save(directory: Path, report: str, values: Mapping[str, Any]) -> None:
    """Write report.md and bench.json; what stood there before is replaced by whole files only.

    Args:
        directory: made where it is not there.
        report: as `markdown` returns it.
        values: JSON values.

    Raises:
        ConfigError: they cannot be written.
    """
    texts = {"report.md": report, "bench.json": json.dumps(values, indent=1) + "\n"}
    partial = {directory / f".{name}.{os.getpid()}.partial": name for name in texts}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, name in partial.items():
            path.write_text(texts[name], encoding="utf-8")
        for path, name in partial.items():
            path.replace(directory / name)
    except OSError as error:
        raise ConfigError(f"cannot write {directory}: {error.strerror}; choose another -o") from error
    finally:
        for path in partial:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
