"""Four ways to reason, on one backbone, data and budget: direct, pause, chain of thought, latents. And their ablations.

Usage: python examples/reproduce.py OUT [--plan quick|small] [--only NAME ...] [--jobs N]

Makes data and an untrained backbone and teaches the backbone to see: captions, and questions that need no second
thought. Then trains each variant from it on the same rows, in the same order of difficulty, for the same number of
steps, exports each, asks the test set through its bundle, and writes OUT/report.md and OUT/report.json. Every stage is
kept: run it again after an interruption, and it goes on. What comes out is what is written, hoped for or not.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

import vlrt
from vlrt import evaluate, fresh, prompt
from vlrt.checkpoint import Checkpoint
from vlrt.export import exporter
from vlrt.train import loop, prepare, synthetic, triplets
from vlrt.train.settings import Objective, Settings

LATENTS = {"num_latents": 8, "num_heads": 4}
# A temporal patch of a frame of 56 x 56 is one token: 4 x 4 patches of 14, merged.
MODEL = {"video.fps": 4.0, "vision.spatial_merge_size": 4, "decoder.vocab_size": 1024}
MAX_MERGES = 740
TEMPLATE = (  # one turn after the other, without a system turn and names of roles: fewer tokens
    "{%- for message in messages -%}<|im_start|>{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}{%- if part.type in ('image', 'video') -%}"
    "<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}"
    "{%- endif -%}<|im_end|>{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>{%- endif -%}"
)
EASY_SWAPS = 1  # cups that are swapped no more often than this are part of learning to see


@dataclass(frozen=True)
class Part:
    """One made-up data set of a split."""

    split: synthetic.Split
    num: int
    families: tuple[str, ...] = tuple(synthetic.FAMILIES)
    num_swaps: tuple[int, int] = (3, 8)
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """Sizes of everything."""

    train: tuple[Part, ...]
    test: tuple[Part, ...]
    pretraining: Settings
    training: Settings
    seeds: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Variant:
    """One row of the table.

    Attributes:
        name: of the row.
        settings: what differs from the plan's training.
        latent: what differs from LATENTS; None: a checkpoint without.
        ask: options of `Runtime.ask`.
        same_as: a variant whose model is asked otherwise, in place of training one.
        is_main: trained with every seed of the plan; else with the first alone.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    latent: Mapping[str, Any] | None = None
    ask: Mapping[str, Any] = field(default_factory=dict)
    same_as: str | None = None
    is_main: bool = False


def _latent(**values: Any) -> dict[str, Any]:
    return {"system": "latent", "objective": Objective(**{"bptt": "full", **values})}


ASK_COT = {"reasoning": "cot", "max_tokens": 160}
VARIANTS = (
    Variant("direct", {"system": "direct"}, ask={"reasoning": "direct"}, is_main=True),
    Variant("pause", {"system": "pause"}, LATENTS, {"latents": "dummy"}, is_main=True),
    Variant("cot", {"system": "cot"}, ask=ASK_COT, is_main=True),
    Variant("latent", _latent(), LATENTS, is_main=True),
    Variant("asked with L = 0", ask={"latents": "none"}, same_as="latent", is_main=True),
    Variant("asked with dummy latents", ask={"latents": "dummy"}, same_as="latent", is_main=True),
    Variant("asked with noise", ask={"latents": "noise"}, same_as="latent", is_main=True),
    Variant("asked with shuffled latents", ask={"latents": "shuffled"}, same_as="latent", is_main=True),
    Variant("trained with bptt 0", _latent(bptt="0"), LATENTS),
    Variant("trained without alignment", _latent(alignment=0.0), LATENTS),
    Variant("trained without diversity", _latent(diversity=0.0), LATENTS),
    Variant("trained without bottleneck", _latent(bottleneck=0.0), LATENTS),
    Variant("parallel, R = 1", _latent(), {**LATENTS, "rollout": "parallel", "rounds": 1}),
    Variant("parallel, R = 2", _latent(), {**LATENTS, "rollout": "parallel", "rounds": 2}),
    Variant("parallel, R = 4", _latent(), {**LATENTS, "rollout": "parallel", "rounds": 4}),
    Variant("L = 2", _latent(), {**LATENTS, "num_latents": 2}),
    Variant("L = 4", _latent(), {**LATENTS, "num_latents": 4}),
    Variant("L = 16", _latent(), {**LATENTS, "num_latents": 16}),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}

SMALL = Settings(steps=400, batch_size=32, learning_rate=1e-3, warmup=30, workers=0, curriculum="num_swaps")
QUICK = Settings(steps=2, batch_size=4, learning_rate=1e-3, warmup=1, workers=0)
CUPS = ("cups",)
PLANS = {
    # Shows that every stage runs; learns nothing.
    "quick": Plan((Part("train", 14),), (Part("test", 14),), QUICK, QUICK, (0,)),
    "small": Plan(
        (
            Part("train", 7000, num_swaps=(1, 8)),
            Part("train", 3000, CUPS, (1, 3), seed=1),
            Part("train", 4000, CUPS, (3, 8), seed=2),
        ),
        (Part("test", 420),),
        dataclasses.replace(SMALL, steps=1800, curriculum="", workers=1),
        SMALL,
        (0, 1, 2),
    ),
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


def make_data(out: Path, plan: Plan, console: Console) -> None:
    """Write the clips, and OUT/data/ pretraining.jsonl, train.jsonl and test.jsonl over them."""
    found: dict[str, list[dict[str, Any]]] = {"pretraining": [], "train": [], "test": []}
    for number, part in enumerate((*plan.train, *plan.test)):
        settings = synthetic.Synthetic(
            seed=part.seed, split=part.split, families=part.families, forms=("free",), num_swaps=part.num_swaps
        )
        folder = f"{part.split}-{number}"
        with Progress(console=console, transient=True) as progress:
            show = functools.partial(progress.update, progress.add_task(f"clips: {folder}"))
            synthetic.write(
                out / "data" / folder, settings, part.num, progress=lambda a, b, f=show: f(completed=a, total=b)
            )
        rows = _rows(out / "data", folder, synthetic.TRIPLETS)
        found[part.split] += rows
        if part.split == "train":
            found["train"] += _rows(out / "data", folder, synthetic.STEPS)
            found["pretraining"] += _rows(out / "data", folder, synthetic.CAPTIONS)
            easy = (row for row in rows if row["metadata"].get("num_swaps", 0) <= EASY_SWAPS)
            found["pretraining"] += easy
    for name, rows in found.items():
        (out / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _rows(data: Path, folder: str, name: str) -> list[dict[str, Any]]:
    """Read a file of a part; its videos' paths become relative to the folder above."""
    lines = (data / folder / name).read_text(encoding="utf-8").splitlines()
    return [{**row, "video": f"{folder}/{row['video']}"} for row in map(json.loads, lines)]


def make_fresh(out: Path) -> Path:
    """Write an untrained plain checkpoint whose tokenizer has the words of the clips as tokens."""
    if not out.exists():
        texts = [prompt.COT_INSTRUCTIONS]
        for split in synthetic.SPLITS:  # the words, and their order in which answers and chains have them
            for i in range(1400):
                made = synthetic.clip(synthetic.Synthetic(split=split, num_swaps=(1, 8)), i)
                texts += [str(made.row[name]) for name in ("question", "answer", "cot")] + [made.caption["answer"]]
                texts += [f"<think>{made.row['cot']}</think><answer>{made.row['answer']}</answer>"]
        merges = fresh.learn_merges(texts, MAX_MERGES)
        fresh.write_checkpoint(out, shape="tiny", latent=None, overrides=MODEL, merges=merges, chat_template=TEMPLATE)
    return out


def make_backbone(out: Path, plan: Plan, console: Console) -> Path:
    """Return a plain checkpoint that has learned to see."""
    settings = dataclasses.replace(plan.pretraining, system="direct", train_vision=True)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("backbone", total=settings.steps)

        def report(step: int, measured: dict[str, float]) -> None:
            progress.update(task, completed=step, description=f"backbone: loss {measured['total']:.2f}")

        start = make_fresh(out / "fresh")
        return loop.train(
            start, out / "data" / "pretraining.jsonl", out / "backbone", settings, cache=out / "cache", report=report
        )


def job_folder(out: Path, variant: Variant, seed: int) -> Path:
    """Return where a trained variant and its answers are."""
    return out / _slug((variant.same_as and BY_NAME[variant.same_as].name) or variant.name) / str(seed)


def seeds_of(variant: Variant, plan: Plan) -> tuple[int, ...]:
    """Return the seeds with which a variant is trained."""
    return plan.seeds if variant.is_main else plan.seeds[:1]


def train_one(out: Path, name: str, seed: int, training: Settings) -> None:
    """Train one variant with one seed and export it, in one thread: what a worker process does."""
    import torch

    torch.set_num_threads(1)
    variant, backbone = BY_NAME[name], out / "backbone" / loop.MODEL
    folder, start = job_folder(out, variant, seed), backbone
    if variant.latent is not None:
        start = out / "starts" / f"{_slug(name)}-{seed}"
        if not start.exists():
            prepare.add_latents(Checkpoint.open(backbone), start, variant.latent, seed=seed)
    settings = dataclasses.replace(training, seed=seed, **variant.settings)
    model = loop.train(start, out / "data" / "train.jsonl", folder / "run", settings, cache=out / "cache")
    if not (folder / "bundle.vlrt").exists():
        exporter.export(model, folder / "bundle.vlrt")


def train_all(out: Path, plan: Plan, chosen: Iterable[Variant], jobs: int, console: Console) -> None:
    """Train all variants that are not there yet, some at a time; the bar counts their steps."""
    trained = dict.fromkeys(BY_NAME[variant.same_as or variant.name] for variant in chosen)
    wanted = [(variant, seed) for variant in trained for seed in seeds_of(variant, plan)]
    logs = [job_folder(out, variant, seed) / "run" / loop.METRICS for variant, seed in wanted]
    bar = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
        Progress(*bar, console=console, transient=True) as progress,
    ):
        task = progress.add_task(f"{len(wanted)} models, {jobs} at a time", total=len(wanted) * plan.training.steps)
        waiting = {pool.submit(train_one, out, v.name, seed, plan.training): (v.name, seed) for v, seed in wanted}
        try:
            while waiting:
                time.sleep(0.5)
                steps = sum(log.read_bytes().count(b"\n") for log in logs if log.exists())
                progress.update(task, completed=steps)
                for future in [future for future in waiting if future.done()]:
                    future.result()
                    name, seed = waiting.pop(future)
                    console.print(f"trained: {name}, seed {seed}")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def score(out: Path, variant: Variant, seed: int) -> list[evaluate.Group]:
    """Ask the test set through a variant's bundle; return the means."""
    folder = job_folder(out, variant, seed)
    settings = {"model": _slug(variant.same_as or variant.name), "seed": seed, "ask": dict(variant.ask)}
    with vlrt.Runtime.open(folder / "bundle.vlrt") as runtime:
        rows = triplets.read(out / "data" / "test.jsonl").rows
        found = evaluate.run(Asker(runtime), rows, folder / f"{_slug(variant.name)}.jsonl", settings)
    return evaluate.summarise(found)


def run(
    out: Path, plan: Plan, chosen: tuple[Variant, ...], jobs: int, console: Console
) -> dict[str, list[list[evaluate.Group]]]:
    """Train and ask every variant with its seeds; return means by variant and seed."""
    make_data(out, plan, console)
    make_backbone(out, plan, console)
    train_all(out, plan, chosen, jobs, console)
    table: dict[str, list[list[evaluate.Group]]] = {}
    for variant in chosen:
        for seed in seeds_of(variant, plan):
            table.setdefault(variant.name, []).append(score(out, variant, seed))
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
            spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
            cells.append(f"{statistics.mean(scores):.3f}{spread}")
        cells.append(f"{statistics.mean(means[0].answer_tokens for means in seeds):.1f}")
        cells.append(f"{statistics.mean(means[0].seconds for means in seeds):.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    note = f"{len(plan.seeds)} seeds (those without ±: one); mean ± standard deviation of the score on the test split."
    return "\n".join([*lines, "", note, ""])


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--plan", choices=list(PLANS), default="small")
    parser.add_argument("--only", nargs="+", choices=[v.name for v in VARIANTS], metavar="NAME")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="models trained at a time")
    args = parser.parse_args()
    console = Console(stderr=True)
    plan = PLANS[args.plan]
    chosen = tuple(v for v in VARIANTS if args.only is None or v.name in args.only)
    table = run(args.out, plan, chosen, args.jobs, console)
    text = report(table, plan)
    (args.out / "report.md").write_text(text, encoding="utf-8")
    values = {name: [[vars(group) for group in means] for means in seeds] for name, seeds in table.items()}
    (args.out / "report.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
