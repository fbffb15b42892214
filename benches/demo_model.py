"""The trained model that comes with vlrt, and questions about clips that it has not seen: what accuracy is measured on.

Clips of the test split are swapped four times. Asked is where the ball is after each swap, and at the end.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

import vlrt
from benches import material
from vlrt import calibration
from vlrt.answer import Answer
from vlrt.quantiles import quantiles
from vlrt.train import synthetic, triplets

SEED = 91_000  # of no training, validation or test set, nor of a test
CHOICES = ("left", "middle", "right")


@dataclass(frozen=True)
class Asked:
    """A question and its answer."""

    row: triplets.Triplet
    answer: Answer

    @property
    def right(self) -> bool:
        """Whether the choice is the right one."""
        return self.answer.choice == self.row.answer


def bundle() -> Path:
    """Return the bundle of the model with latents, exported where it is not in the cache yet."""
    out = material.cache() / "shapes-latent.vlrt"
    if not out.exists():
        from vlrt import pretrained
        from vlrt.export import exporter

        exporter.export(pretrained.find("shapes-latent"), out)
    return out


def questions(num_clips: int, split: synthetic.Split = "test") -> list[triplets.Triplet]:
    """Return five questions about each of so many clips, which are made where they are not in the cache yet."""
    folder = material.cache() / f"cups-{split}-{SEED}"
    made = synthetic.Synthetic(seed=SEED, split=split, families=("cups",), forms=("free",), num_swaps=(4, 4))
    file = synthetic.write(folder, made, num_clips, workers=1)
    return [*triplets.read(folder / synthetic.STEPS).rows, *triplets.read(file).rows]


def ask(
    runtime: vlrt.Runtime,
    rows: list[triplets.Triplet],
    settings: dict[str, Callable[[triplets.Triplet], dict[str, Any]]],
) -> dict[str, list[Asked]]:
    """Ask every question in every way, ways in turn and in another order each time; return the answers by way.

    Args:
        runtime: without a cache of videos, so that each answer's times are those of a first question.
        rows: the questions.
        settings: options of `Runtime.ask` for a question, by the name of the way.
    """
    found: dict[str, list[Asked]] = {name: [] for name in settings}
    order = random.Random(0)
    runtime.ask(rows[0].video, rows[0].asked, choices=CHOICES)  # warms up
    for row in track(rows, "questions", console=Console(stderr=True)):
        for name in order.sample(list(settings), len(settings)):
            answer = runtime.ask(row.video, row.asked, choices=CHOICES, **settings[name](row))
            found[name].append(Asked(row, answer))
    return found


def summary(answers: list[Asked]) -> dict[str, Any]:
    """Return shares of right answers, counts and seconds of a way to ask."""
    by_swaps: dict[str, list[bool]] = {}
    for asked in answers:
        name = "end" if "at the end" in asked.row.question else str(asked.row.metadata["num_swaps"])
        by_swaps.setdefault(name, []).append(asked.right)
    usages = [asked.answer.usage for asked in answers]
    kept, dropped = (sum(getattr(u, f"{name}_tokens") for u in usages) for name in ("video", "dropped"))
    stages = ("vision", "prefill", "latents", "answer", "total")
    times = {name: quantiles([asked.answer.timings[name] for asked in answers]) for name in stages}
    return {
        "questions": len(answers),
        "accuracy": sum(asked.right for asked in answers) / len(answers),
        "accuracy_by_swaps": {name: sum(found) / len(found) for name, found in sorted(by_swaps.items())},
        "calibration_error": calibration.expected_calibration_error(
            [asked.answer.confidence or 0.0 for asked in answers], [float(asked.right) for asked in answers]
        ),
        "video_tokens": kept / len(answers),
        "share_dropped": dropped / (kept + dropped),
        "latents": sum(usage.latents for usage in usages) / len(answers),
        "seconds": times,
    }
