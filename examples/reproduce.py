"""Four ways to reason, on one backbone, data and budget: direct, pause, chain of thought, latents. And their ablations.

Usage: python examples/reproduce.py OUT [--plan quick|small] [--only NAME ...]

Makes data and an untrained backbone, teaches the backbone to see (direct answers, vision tower included), then trains
each variant from it on the same rows for the same number of steps with several seeds, exports each, asks the test set
through its bundle, and writes OUT/report.md and OUT/report.json. Every stage is kept: run it again after an
interruption, or with more seeds, and it goes on. What comes out is what is written, hoped for or not.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

import vlrt
from vlrt import evaluate, fresh
from vlrt.checkpoint import Checkpoint
from vlrt.export import exporter
from vlrt.train import loop, prepare, synthetic, triplets
from vlrt.train.settings import Objective, Settings

LATENTS = {"num_latents": 4, "num_heads": 4}
VIDEO = {"video.fps": 4.0, "video.min_pixels": 4 * 28 * 28}


@dataclass(frozen=True)
class Plan:
    """Sizes of everything."""

    rows: Mapping[str, int]
    pretraining: Settings
    training: Settings
    seeds: tuple[int, ...]
    families: tuple[str, ...] = tuple(synthetic.FAMILIES)
    num_swaps: tuple[int, int] = (3, 8)


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: of the row.
        settings: what differs from the plan's training.
        latent: what differs from LATENTS; None: a checkpoint without.
        ask: options of `Runtime.ask`.
        same_as: a variant whose model is asked otherwise, in place of training one.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    latent: Mapping[str, Any] | None = None
    ask: Mapping[str, Any] = field(default_factory=dict)
    same_as: str | None = None


def _objective(**values: Any) -> dict[str, Any]:
    return {"system": "latent", "objective": Objective(**values)}


ASK_COT = {"reasoning": "cot", "max_tokens": 160}
VARIANTS = (
    Variant("direct", {"system": "direct"}, ask={"reasoning": "direct"}),
    Variant("pause", {"system": "pause"}, LATENTS, {"latents": "dummy"}),
    Variant("cot", {"system": "cot"}, ask=ASK_COT),
    Variant("latent", {"system": "latent"}, LATENTS),
    Variant("latent, bptt full", _objective(bptt="full"), LATENTS),
    Variant("asked with L = 0", ask={"latents": "none"}, same_as="latent"),
    Variant("asked with dummy latents", ask={"latents": "dummy"}, same_as="latent"),
    Variant("asked with noise", ask={"latents": "noise"}, same_as="latent"),
    Variant("asked with shuffled latents", ask={"latents": "shuffled"}, same_as="latent"),
    Variant("trained without alignment", _objective(alignment=0.0), LATENTS),
    Variant("trained without diversity", _objective(diversity=0.0), LATENTS),
    Variant("trained without bottleneck", _objective(bottleneck=0.0), LATENTS),
    Variant("parallel, R = 1", {"system": "latent"}, {**LATENTS, "rollout": "parallel", "rounds": 1}),
    Variant("parallel, R = 2", {"system": "latent"}, {**LATENTS, "rollout": "parallel", "rounds": 2}),
    Variant("parallel, R = 4", {"system": "latent"}, {**LATENTS, "rollout": "parallel", "rounds": 4}),
    Variant("L = 2", {"system": "latent"}, {**LATENTS, "num_latents": 2}),
    Variant("L = 8", {"system": "latent"}, {**LATENTS, "num_latents": 8}),
    Variant("L = 16", {"system": "latent"}, {**LATENTS, "num_latents": 16}),
)

SMALL = Settings(steps=600, batch_size=32, learning_rate=1e-3, warmup=50, workers=0)
QUICK = Settings(steps=2, batch_size=4, learning_rate=1e-3, warmup=1, workers=0)
PLANS = {
    "quick": Plan({"train": 14, "test": 14}, QUICK, QUICK, (0,)),  # shows that every stage runs; learns nothing
    "small": Plan({"train": 7000, "test": 700}, dataclasses.replace(SMALL, steps=1200), SMALL, (0, 1, 2)),
}


class Asker:
    """A runtime whose latents are replaced: by none, or by those of the question asked before."""

    def __init__(self, runtime: vlrt.Runtime) -> None:
        self._runtime = runtime
        self._width = runtime.model.decoder.hidden_size
        self._before: np.ndarray | None = None

    def ask(self, video: Any, question: str, *, latents: str | None = None, **options: Any) -> vlrt.Answer:
        if latents == "none":
            return self._runtime.ask(video, question, latents=np.zeros((0, self._width), np.float32), **options)
        if latents == "shuffled":
            own = self._runtime.ask(video, question, **options)
            other, self._before = self._before, own.latents
            return self._runtime.ask(video, question, latents="noise" if other is None else other, **options)
        return self._runtime.ask(video, question, latents=latents, **options)


def make_data(out: Path, plan: Plan) -> dict[str, Path]:
    """Write the splits; return their files."""
    files = {}
    for split, count in plan.rows.items():
        settings = synthetic.Synthetic(split=split, families=plan.families, num_swaps=plan.num_swaps)
        synthetic.write(out / "data" / split, settings, count)
        files[split] = out / "data" / split / synthetic.TRIPLETS
    return files


def train(start: Path, data: Path, out: Path, settings: Settings, label: str, console: Console) -> Path:
    """Train with a progress bar; return the trained checkpoint."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(label, total=settings.steps)

        def report(step: int, measured: dict[str, float]) -> None:
            shown = f"{label}: loss {measured['total']:.2f}, right {measured['exact']:.0%}"
            progress.update(task, completed=step, description=shown)

        return loop.train(start, data, out, settings, report=report)


def make_backbone(out: Path, data: Path, plan: Plan, console: Console) -> Path:
    """Return a plain checkpoint that has learned to see."""
    if not (out / "fresh").exists():
        fresh.write_checkpoint(out / "fresh", shape="tiny", latent=None, overrides=VIDEO)
    settings = dataclasses.replace(plan.pretraining, system="direct", train_vision=True)
    return train(out / "fresh", data, out / "backbone", settings, "backbone", console)


def score(variant: Variant, model: Path, tests: Path, folder: Path) -> list[evaluate.Group]:
    """Export a trained checkpoint where that was not done, ask the test set, return the means."""
    bundle = model.parent / "bundle.vlrt"
    if not bundle.exists():
        exporter.export(model, bundle)
    settings = {"model": str(model), "ask": dict(variant.ask)}
    with vlrt.Runtime.open(bundle) as runtime:
        found = evaluate.run(Asker(runtime), triplets.read(tests).rows, folder / "results.jsonl", settings)
    return evaluate.summarise(found)


def run(out: Path, plan: Plan, chosen: tuple[Variant, ...], console: Console) -> dict[str, list[list[evaluate.Group]]]:
    """Train and ask every variant with every seed; return means by variant and seed."""
    files = make_data(out, plan)
    backbone = make_backbone(out, files["train"], plan, console)
    by_name = {variant.name: variant for variant in VARIANTS}
    table: dict[str, list[list[evaluate.Group]]] = {}
    for variant in chosen:
        trained = by_name[variant.same_as or variant.name]
        for seed in plan.seeds:
            folder = out / _slug(trained.name) / str(seed)
            start = backbone
            if trained.latent is not None:
                start = out / "starts" / f"{_slug(trained.name)}-{seed}"
                if not start.exists():
                    prepare.add_latents(Checkpoint.open(backbone), start, trained.latent, seed=seed)
            settings = dataclasses.replace(plan.training, seed=seed, **trained.settings)
            model = train(start, files["train"], folder / "run", settings, f"{trained.name}, seed {seed}", console)
            results = folder / _slug(variant.name)
            table.setdefault(variant.name, []).append(score(variant, model, files["test"], results))
            console.print(f"{variant.name}, seed {seed}: {table[variant.name][-1][0].score:.3f}")
    return table


def report(table: Mapping[str, list[list[evaluate.Group]]], plan: Plan) -> str:
    """Return the table as Markdown: mean and spread over seeds."""
    groups = [group.name for group in next(iter(table.values()))[0] if not group.name.startswith("problem_type")]
    head = ["variant", *(name.removeprefix("family: ") for name in groups), "tokens written", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, seeds in table.items():
        cells = []
        for group in groups:
            scores = [next(g.score for g in means if g.name == group) for means in seeds]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            cells.append(f"{statistics.mean(scores):.3f} ± {spread:.3f}")
        cells.append(f"{statistics.mean(means[0].answer_tokens for means in seeds):.1f}")
        cells.append(f"{statistics.mean(means[0].seconds for means in seeds):.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    note = f"{len(plan.seeds)} seeds; mean ± standard deviation of the score on the test split."
    return "\n".join([*lines, "", note, ""])


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--plan", choices=list(PLANS), default="small")
    parser.add_argument("--only", nargs="+", choices=[v.name for v in VARIANTS], metavar="NAME")
    args = parser.parse_args()
    console = Console(stderr=True)
    plan = PLANS[args.plan]
    chosen = tuple(v for v in VARIANTS if args.only is None or v.name in args.only)
    table = run(args.out, plan, chosen, console)
    text = report(table, plan)
    (args.out / "report.md").write_text(text, encoding="utf-8")
    values = {name: [[vars(group) for group in means] for means in seeds] for name, seeds in table.items()}
    (args.out / "report.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
