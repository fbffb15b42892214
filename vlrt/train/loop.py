"""The training loop: triplets and a checkpoint in, a checkpoint out, going on after any interruption where it was.

accelerate starts the processes and chooses the device. What is drawn depends on seed and step alone, and
state is saved whole or not at all, so that a run that was killed ends as one that was not. Knows files and when things
are done; `learner.py` does them.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from vlrt.checkpoint import Checkpoint
from vlrt.train import order, prepare, run_directory, sharding, triplets
from vlrt.train.data import VideoQuestions, loader
from vlrt.train.frame_cache import FrameCache
from vlrt.train.learner import Learner, autocast, has_teacher
from vlrt.train.objective import IGNORED
from vlrt.train.run_directory import FRAMES, METRICS, MODEL, SETTINGS, STATE, TOKENS
from vlrt.train.settings import Settings
from vlrt.train.system import Draw, Trainee, check
from vlrt.train.token_cache import TokenCache, tower_hash

__all__ = ["FRAMES", "METRICS", "MODEL", "SETTINGS", "STATE", "TOKENS", "Evaluation", "begin", "evaluate", "train"]

CURRICULUM = "curriculum"  # name of its state among that of a run
Report = Callable[[int, dict[str, float]], None]  # steps done, and what was measured


@dataclass(frozen=True)
class Evaluation:
    """How a model does on held-out triplets, the right answer so far being given: mean loss, share of answers right."""

    loss: float
    exact: float


def is_main_process() -> bool:
    """Whether this is the process that writes and prints; starts the others' group where torchrun started them."""
    return bool(PartialState(cpu=_on_cpu()).is_main_process)


def begin(model: Path, out: Path, settings: Settings, latent: Mapping[str, Any]) -> Path:
    """Return the checkpoint to train: the given one, or a copy beside `out` that has latents where it has none.

    Raises:
        CheckpointError: the checkpoint cannot be used, or the copy cannot be written.
    """
    checkpoint = Checkpoint.open(model)
    if settings.system not in ("latent", "pause") or checkpoint.model.latent is not None:
        return model
    copy = out.with_name(f"{out.name}.start")
    with PartialState(cpu=_on_cpu()).main_process_first():
        if not copy.exists():
            prepare.add_latents(checkpoint, copy, latent, seed=settings.seed)
    return copy


def train(
    checkpoint_path: Path,
    data: Path,
    out: Path,
    settings: Settings,
    *,
    validation: Path | None = None,
    cache: Path | None = None,
    report: Report | None = None,
) -> Path:
    """Train a checkpoint on triplets; return the directory of the trained one, `out`/model.

    `out` also holds the settings, a line of metrics per step, TensorBoard logs, cached frames and, until the run ends,
    the state to go on from. Calling it again with the same arguments goes on; a finished run returns at once. Processes
    that torchrun started train together, each with `batch_size` samples at a time. Runs on the same videos may share
    their frames, and video tokens where the tower is frozen: `cache` is a directory for them, in place of `out`.

    Raises:
        CheckpointError: the checkpoint cannot be used, or `out` cannot be written.
        ConfigError: the data cannot be used, `out` is of a run with other settings, or the loss is no number.
    """
    if (out / MODEL).is_dir():
        if is_main_process():
            run_directory.forget_state(out)  # killed after the result was written
        return out / MODEL
    processes = PartialState(cpu=_on_cpu())
    checkpoint = Checkpoint.open(checkpoint_path)
    check(settings, checkpoint.model.latent)
    found = triplets.read(data, max_bad_rows=settings.max_bad_rows)
    held_out_rows = () if validation is None else triplets.read(validation).rows
    run = {"settings": asdict(settings), "checkpoint": str(checkpoint_path), "data": str(data)}
    if processes.is_main_process:
        run_directory.claim(out, run | {"processes": processes.num_processes})
    processes.wait_for_everyone()
    bad = triplets.BadRows(data, settings.max_bad_rows)
    bad.add(found.bad)
    frames, tokens = (cache or out) / FRAMES, None
    if settings.max_token_bytes and not settings.train_vision:
        named = FrameCache(frames, checkpoint.model)
        tokens = TokenCache((cache or out) / TOKENS, named, tower_hash(checkpoint), settings.max_token_bytes)
    base = (checkpoint.path, checkpoint.model, settings.system, frames)
    questions = VideoQuestions(found.rows, *base, tokens=tokens, tells_answer=has_teacher(settings))
    held_out = VideoQuestions(held_out_rows, *base, tokens=tokens) if held_out_rows else None
    learner = Learner(checkpoint, settings, processes, tokens)
    curriculum = order.Curriculum.of(found.rows, settings) if settings.curriculum else None
    step, kept = learner.load(out)
    if curriculum is not None and CURRICULUM in kept:
        curriculum.state = kept[CURRICULUM]
    batches = order.batches(questions, settings, step, curriculum)
    with run_directory.log(out, step) if processes.is_main_process else contextlib.nullcontext() as log:
        while step < settings.steps:
            measured = learner.step(step, batches, bad, curriculum)
            step += 1
            last = step == settings.steps
            if held_out is not None and (last or (settings.eval_every and step % settings.eval_every == 0)):
                scores = evaluate(learner.trainee, held_out, settings)
                measured |= {"validation_loss": scores.loss, "validation_exact": scores.exact}
            if log is not None:
                log(step, measured)
            if report is not None:
                report(step, measured)
            if not last and step % settings.save_every == 0:
                learner.save(out, step, {} if curriculum is None else {CURRICULUM: curriculum.state})
    learner.write(out)
    processes.wait_for_everyone()
    return out / MODEL


@torch.no_grad()
def evaluate(trainee: Trainee, questions: VideoQuestions, settings: Settings) -> Evaluation:
    """Return how a model does on questions, with its own latents, the right answer so far being given.

    Processes share the questions and all return the result of all; every process must call this.
    """
    trainee.eval()
    latent = trainee.cfg.latent
    plain = Draw(latent.rounds if latent else 1, False)
    device = next(trainee.parameters()).device
    indices, count = order.held_out(len(questions), settings.batch_size)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for number, batch in enumerate(loader(questions, settings.batch_size, sampler=indices)):
        with autocast(settings, device):
            step = trainee(batch.to(device), plain)
        if number < count:
            labels = float((batch.labels[:, 1:] != IGNORED).sum())
            found = [float(step.loss.cross_entropy) * labels, labels, float(step.right.sum()), len(step.right)]
            sums += torch.tensor(found, dtype=torch.float64, device=device)
    loss, labels, right, samples = sharding.total(sums).tolist()
    trainee.train()
    return Evaluation(loss / labels, right / samples)


def _on_cpu() -> bool:
    """Whether there is no GPU: accelerate must be told, or it starts no group for processes on CPUs."""
    return not torch.accelerator.is_available()
