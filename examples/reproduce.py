"""Four ways to reason, on one backbone, data and budget: direct, pause, chain of thought, latents. And their ablations.

Usage: python examples/reproduce.py OUT [--plan quick|small|large] [--only NAME ...] [--jobs N] [--minutes M]

Makes data and an untrained backbone and teaches the backbone to see: captions, and questions that need no second
thought. Then trains each variant from it on the same rows, in the same order of difficulty, for the same number of
steps, exports each, asks the test set through its bundle, and writes OUT/report.md and OUT/report.json. Every stage is
kept: run it again after an interruption, and it goes on. With --minutes it interrupts itself, and exits with 75 until
all is done. What comes out is what is written, hoped for or not.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

import vlrt
from made_data import make_data, rows_file
from plans import BY_NAME, PLANS, VARIANTS, Plan, Variant, job_folder, seeds_of, slug, steps_of
from tables import pack, report
from vlrt import evaluate, fresh, prompt
from vlrt.checkpoint import Checkpoint
from vlrt.export import exporter
from vlrt.train import loop, prepare, synthetic, triplets

MAX_MERGES = 740
UNFINISHED = 75  # exit code where --minutes were over: run it again
TEMPLATE = (  # one turn after the other, without a system turn and names of roles: fewer tokens
    "{%- for message in messages -%}<|im_start|>{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}{%- if part.type in ('image', 'video') -%}"
    "<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}"
    "{%- endif -%}<|im_end|>{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>{%- endif -%}"
)


class Asker:
    """A runtime whose latents are replaced: by none, or by those of a question about another video, asked before."""

    def __init__(self, runtime: vlrt.Runtime) -> None:
        self._runtime = runtime
        self._width = runtime.model.decoder.hidden_size
        self._last: tuple[Any, Any] = (None, "noise")  # a video, and latents of a question about it
        self._other: Any = "noise"  # latents of a question about another video

    def ask(self, video: Any, question: str, *, latents: str | None = None, **options: Any) -> vlrt.Answer:
        if latents == "none":
            return self._runtime.ask(video, question, latents=np.zeros((0, self._width), np.float32), **options)
        if latents == "shuffled":
            if video != self._last[0]:
                self._other = self._last[1]
            self._last = video, self._runtime.ask(video, question, **options).latents
            return self._runtime.ask(video, question, latents=self._other, **options)
        return self._runtime.ask(video, question, latents=latents, **options)


def make_fresh(out: Path, plan: Plan) -> Path:
    """Write an untrained plain checkpoint whose tokenizer has the words of the clips as tokens."""
    if not out.exists():
        texts = [prompt.COT_INSTRUCTIONS]
        for split in synthetic.SPLITS:  # the words, and their order in which answers and chains have them
            for i in range(1400):
                made = synthetic.clip(synthetic.Synthetic(split=split, num_swaps=(1, 8)), i)
                rows = (made.row, made.caption, *made.steps)
                texts += [str(row[name]) for row in rows for name in ("question", "answer", "cot") if name in row]
                texts += [f"<think>{made.row['cot']}</think><answer>{made.row['answer']}</answer>"]
        merges = fresh.learn_merges(texts, MAX_MERGES)
        fresh.write_checkpoint(
            out, shape="tiny", latent=None, overrides=plan.model, merges=merges, chat_template=TEMPLATE
        )
    return out


def make_backbone(out: Path, plan: Plan, console: Console) -> Path:
    """Return a plain checkpoint that has learned to see."""
    settings = dataclasses.replace(plan.pretraining, system="direct", train_vision=True)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("backbone", total=settings.steps)

        def report(step: int, measured: dict[str, float]) -> None:
            progress.update(task, completed=step, description=f"backbone: loss {measured['total']:.2f}")

        start = make_fresh(out / "fresh", plan)
        return loop.train(
            start, out / "data" / "pretraining.jsonl", out / "backbone", settings, cache=out / "cache", report=report
        )


def end_with(parent: int) -> None:
    """End this process soon after its parent, even where that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def train_one(out: Path, name: str, seed: int, plan: Plan) -> None:
    """Train one variant with one seed, export it and ask it: what a worker process does, in one thread."""
    import torch

    torch.set_num_threads(1)
    variant, backbone = BY_NAME[name], out / "backbone" / loop.MODEL
    folder, start = job_folder(out, variant, seed), backbone
    if variant.latent is not None:
        start = out / "starts" / f"{slug(name)}-{seed}"
        if not start.exists():
            prepare.add_latents(Checkpoint.open(backbone), start, variant.latent, seed=seed)
    training = plan.training if variant.is_main else plan.ablation
    if variant.sight != "all":
        training = dataclasses.replace(training, max_token_bytes=0)
    settings = dataclasses.replace(training, seed=seed, **variant.settings)
    train, validation = (rows_file(out / "data", split, variant.sight) for split in ("train", "validation"))
    model = loop.train(start, train, folder / "run", settings, validation=validation, cache=out / "cache")
    if not (folder / "bundle.vlrt").exists():
        exporter.export(model, folder / "bundle.vlrt")
    for asked in VARIANTS:
        if asked is variant or asked.same_as == name:
            score(out, asked, seed, threads=1)


def train_all(out: Path, plan: Plan, chosen: Iterable[Variant], jobs: int, console: Console) -> None:
    """Train all variants that are not there yet, some at a time; the bar counts their steps."""
    trained = dict.fromkeys(BY_NAME[variant.same_as or variant.name] for variant in chosen)
    wanted = [(variant, seed) for variant in trained for seed in seeds_of(variant, plan)]
    logs = [job_folder(out, variant, seed) / "run" / loop.METRICS for variant, seed in wanted]
    bar = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        ProcessPoolExecutor(jobs, get_context("spawn"), initializer=end_with, initargs=(os.getpid(),)) as pool,
        Progress(*bar, console=console, transient=True) as progress,
    ):
        task = progress.add_task(
            f"{len(wanted)} models, {jobs} at a time", total=sum(steps_of(v, plan) for v, _ in wanted)
        )
        waiting = {pool.submit(train_one, out, v.name, seed, plan): (v.name, seed) for v, seed in wanted}
        try:
            while waiting:
                time.sleep(2)
                steps = sum(log.read_bytes().count(b"\n") for log in logs if log.exists())
                progress.update(task, completed=steps)
                for future in [future for future in waiting if future.done()]:
                    future.result()
                    name, seed = waiting.pop(future)
                    console.print(f"trained: {name}, seed {seed}")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def score(out: Path, variant: Variant, seed: int, threads: int | None = None) -> list[evaluate.Group]:
    """Ask the test set through a variant's bundle; return the means."""
    folder = job_folder(out, variant, seed)
    settings = {"model": slug(variant.same_as or variant.name), "seed": seed, "ask": dict(variant.ask)}
    with vlrt.Runtime.open(folder / "bundle.vlrt", threads=threads, video_cache_bytes=0) as runtime:
        rows = triplets.read(rows_file(out / "data", "test", variant.sight)).rows
        found = evaluate.run(Asker(runtime), rows, folder / f"{slug(variant.name)}.jsonl", settings)
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


def run_for(minutes: float) -> int:
    """Run this command without --minutes, and end it and all its processes when they are over; return its exit code.

    Every stage goes on after a kill at any moment.
    """
    at = sys.argv.index("--minutes")
    command = [sys.executable, *sys.argv[:at], *sys.argv[at + 2 :]]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            return process.wait(timeout=60 * minutes)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(process.pid, signal.SIGKILL)
            print(f"stopped after {minutes:g} minutes: run it again, and it goes on", file=sys.stderr)
            return UNFINISHED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("out", type=Path)
    parser.add_argument("--plan", choices=list(PLANS), default="small")
    parser.add_argument("--only", nargs="+", choices=[v.name for v in VARIANTS], metavar="NAME")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="models trained at a time")
    parser.add_argument("--minutes", type=float, metavar="M", help="end after so many, to be run again")
    args = parser.parse_args()
    if args.minutes is not None:
        sys.exit(run_for(args.minutes))
    started = time.monotonic()
    console = Console(stderr=True)
    plan = PLANS[args.plan]
    chosen = tuple(v for v in VARIANTS if args.only is None or v.name in args.only)
    table = run(args.out, plan, chosen, args.jobs, console)
    text = report(table, plan)
    (args.out / "report.md").write_text(text, encoding="utf-8")
    values = {name: [[vars(group) for group in means] for means in seeds] for name, seeds in table.items()}
    (args.out / "report.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    for name in ("latent", "cot"):
        if name in table:
            pack(args.out, table, plan, name)
    print(text)
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes in this run")


if __name__ == "__main__":
    main()
