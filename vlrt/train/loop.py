"""The training loop: triplets and a checkpoint in, a checkpoint out, going on after any interruption where it was.

Built on accelerate. What is drawn depends on seed and step alone, and state is saved whole or not at all, so that a run
that was killed ends as one that was not. Knows files and schedules; `system.py` knows what a step computes.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Sampler

from vlrt.checkpoint import Checkpoint, expected_tensors
from vlrt.errors import ConfigError
from vlrt.hf_config import DType
from vlrt.models import registry
from vlrt.train import save, triplets
from vlrt.train.data import Batch, VideoQuestions, loader
from vlrt.train.settings import Lora, Settings
from vlrt.train.system import Draw, Trainee, draw

MODEL, STATE, SETTINGS, METRICS, FRAMES = "model", "state", "settings.json", "metrics.jsonl", "frames"
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FINAL_SHARE = 0.1  # of the learning rate's peak, at the end of the cosine

Report = Callable[[int, dict[str, float]], None]  # steps done, and what was measured


@dataclass(frozen=True)
class Evaluation:
    """How a model does on held-out triplets, the right answer so far being given: mean loss, share of answers right."""

    loss: float
    exact: float


def train(
    checkpoint_path: Path,
    data: Path,
    out: Path,
    settings: Settings,
    *,
    validation: Path | None = None,
    report: Report | None = None,
) -> Path:
    """Train a checkpoint on triplets; return the directory of the trained one, `out`/model.

    `out` also holds the settings, a line of metrics per step, TensorBoard logs, cached frames and, until the run ends,
    the state to go on from. Calling it again with the same arguments goes on; a finished run returns at once.

    Raises:
        CheckpointError: the checkpoint cannot be used, or the result cannot be written.
        ConfigError: the data cannot be used, or `out` is of a run with other settings.
    """
    if (out / MODEL).is_dir():
        return out / MODEL
    checkpoint = Checkpoint.open(checkpoint_path)
    _claim(out, {"settings": asdict(settings), "checkpoint": str(checkpoint_path), "data": str(data)})
    found = triplets.read(data, max_bad_rows=settings.max_bad_rows)
    bad = triplets.BadRows(data, settings.max_bad_rows)
    bad.add(found.bad)
    questions = _dataset(found.rows, checkpoint, settings, out)
    held_out = None
    if validation is not None:
        held_out = _dataset(triplets.read(validation).rows, checkpoint, settings, out)
    accelerator = Accelerator(mixed_precision="bf16" if settings.precision == "bf16" else "no")
    trainee = Trainee(_model(checkpoint, settings), settings)
    optimizer = torch.optim.AdamW(_groups(trainee, settings), lr=settings.learning_rate)
    wrapped, optimizer = accelerator.prepare(trainee, optimizer)
    step = _resume(accelerator, out)
    batches = _batches(questions, settings, step, accelerator)
    with _log(out, step) as log:
        while step < settings.steps:
            _schedule(optimizer, settings, step)
            drawn = draw(settings, checkpoint.model.latent, step)
            measured = _step(accelerator, wrapped, optimizer, batches, settings, drawn, bad)
            step += 1
            last = step == settings.steps
            if held_out is not None and (last or (settings.eval_every and step % settings.eval_every == 0)):
                scores = evaluate(wrapped, held_out, settings)
                measured |= {"validation_loss": scores.loss, "validation_exact": scores.exact}
            if accelerator.is_main_process:
                log(step, measured)
            if report is not None:
                report(step, measured)
            if not last and step % settings.save_every == 0:
                _save_state(accelerator, out, step)
    state = save.merged_state(accelerator.unwrap_model(wrapped).model)
    if accelerator.is_main_process:
        tensors = ((name, state[name].reshape(shape)) for name, shape in expected_tensors(checkpoint.model).items())
        dtype: DType = "float32" if checkpoint.dtype == "float32" else "bfloat16"
        save.write(out / MODEL, checkpoint.model, tensors, checkpoint.path, dtype=dtype)
        shutil.rmtree(out / STATE, ignore_errors=True)
    accelerator.wait_for_everyone()
    return out / MODEL


@torch.no_grad()
def evaluate(trainee: nn.Module, questions: VideoQuestions, settings: Settings) -> Evaluation:
    """Return how a model does on questions, with its own latents, the right answer so far being given."""
    module: Any = trainee
    trainee.eval()
    total = right = count = 0.0
    latent = module.cfg.latent
    plain = Draw(latent.rounds if latent else 1, False)
    for batch in loader(questions, settings.batch_size):
        step = trainee(batch, plain)
        total += float(step.loss.cross_entropy) * len(step.right)
        right += float(step.right.sum())
        count += len(step.right)
    trainee.train()
    return Evaluation(total / count, right / count)


def _dataset(
    rows: tuple[triplets.Triplet, ...], checkpoint: Checkpoint, settings: Settings, out: Path
) -> VideoQuestions:
    return VideoQuestions(rows, checkpoint.path, checkpoint.model, settings.system, out / FRAMES)


def _model(checkpoint: Checkpoint, settings: Settings) -> registry.VideoLatent:
    """Load the weights in fp32 and mark those that are trained."""
    model = registry.build(checkpoint.model)
    registry.load(model, checkpoint.weight)
    model.requires_grad_(True)
    model.visual.requires_grad_(settings.train_vision)
    model.model.checkpointing = settings.gradient_checkpointing
    if settings.lora is not None:
        model.model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
        _adapt(model, settings.lora, settings.seed)
    return model


def _adapt(model: registry.VideoLatent, lora: Lora, seed: int) -> None:
    """Put adapters on the decoder's linear layers, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    adapters = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=LORA_TARGETS)
    inject_adapter_in_model(adapters, model.model.layers)


def _groups(trainee: Trainee, settings: Settings) -> list[dict[str, Any]]:
    """Return parameter groups: matrices decay, others do not; the injection module may have a rate of its own."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in trainee.named_parameters():
        if parameter.requires_grad:
            key = ("latent_injection." in name, parameter.dim() >= 2)
            groups.setdefault(key, []).append(parameter)
    rate = settings.injection_learning_rate or settings.learning_rate
    return [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay if decays else 0.0,
            "peak": rate if is_injection else settings.learning_rate,
        }
        for (is_injection, decays), parameters in groups.items()
    ]


def _schedule(optimizer: Any, settings: Settings, step: int) -> None:
    """Set the learning rates of a step: linear warm-up, then a cosine down to FINAL_SHARE."""
    if step < settings.warmup:
        share = (step + 1) / settings.warmup
    else:
        done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        share = FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def _step(
    accelerator: Accelerator,
    trainee: nn.Module,
    optimizer: Any,
    batches: Iterator[Batch],
    settings: Settings,
    drawn: Draw,
    bad: triplets.BadRows,
) -> dict[str, float]:
    """Run one optimizer step; return its losses and gradient norm, averaged over its forward passes."""
    sums: dict[str, Tensor] = {}
    for _ in range(settings.accumulation):
        batch = next(batches)
        bad.add(batch.bad)
        step = trainee(batch.to(accelerator.device), drawn)
        accelerator.backward(step.loss.total / settings.accumulation)
        for name, value in (*vars(step.loss).items(), ("exact", step.right.float().mean())):
            sums[name] = sums.get(name, torch.zeros(())) + value.detach().float().cpu() / settings.accumulation
    norm = accelerator.clip_grad_norm_([p for p in trainee.parameters() if p.requires_grad], settings.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    measured = {name: float(value) for name, value in sums.items()}
    if not math.isfinite(measured["total"]):
        raise ConfigError(f"the loss is {measured['total']}; use a lower learning_rate, or precision fp32")
    return measured | {"grad_norm": float(norm), "learning_rate": optimizer.param_groups[0]["lr"]}


def _batches(questions: VideoQuestions, settings: Settings, step: int, accelerator: Accelerator) -> Iterator[Batch]:
    """Yield this process's batches without end, from the one that optimizer step `step` begins with."""
    order = _Order(
        len(questions),
        settings.batch_size,
        settings.seed,
        step * settings.accumulation,
        accelerator.process_index,
        accelerator.num_processes,
    )
    yield from loader(questions, settings.batch_size, sampler=order, num_workers=settings.workers)


class _Order(Sampler[int]):
    """Indices without end: each epoch a permutation of its own, batches in turn over processes."""

    def __init__(self, size: int, batch_size: int, seed: int, first: int, process: int, num_processes: int) -> None:
        self._size, self._batch, self._seed, self._first = size, batch_size, seed, first
        self._process, self._processes = process, num_processes

    def __iter__(self) -> Iterator[int]:
        number = self._first
        while True:
            start = (number * self._processes + self._process) * self._batch
            yield from (self._at(start + i) for i in range(self._batch))
            number += 1

    def _at(self, place: int) -> int:
        epoch, offset = divmod(place, self._size)
        return self._permutation(epoch)[offset]

    def _permutation(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self._size, generator=generator).tolist()
        return self._order


def _claim(out: Path, run: dict[str, Any]) -> None:
    """Make the directory of a run, or refuse one that belongs to another."""
    file = out / SETTINGS
    text = json.dumps(run, indent=1, sort_keys=True) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            if file.read_text(encoding="utf-8") != text:
                raise ConfigError(f"{out} holds a run with other settings; pass another -o, or the same settings")
        elif any(out.iterdir()):
            raise ConfigError(f"{out} is not empty and holds no run; accepted: a new path, or a run to go on with")
        else:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror}") from error


def _save_state(accelerator: Accelerator, out: Path, step: int) -> None:
    """Save what a run goes on from, in place of the state before, whole or not at all."""
    part, old = out / f".{STATE}.part", out / f".{STATE}.old"
    for path in (part, old):
        shutil.rmtree(path, ignore_errors=True)
    accelerator.save_state(str(part))
    if accelerator.is_main_process:
        (part / "step").write_text(str(step), encoding="utf-8")
        if (out / STATE).is_dir():
            os.rename(out / STATE, old)
        os.rename(part, out / STATE)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _resume(accelerator: Accelerator, out: Path) -> int:
    """Load the newest state, if there is one; return the steps done."""
    for name in (STATE, f".{STATE}.old"):  # the old one: killed between two renames
        if (out / name / "step").is_file():
            accelerator.load_state(str(out / name))
            return int((out / name / "step").read_text(encoding="utf-8"))
    return 0


@contextlib.contextmanager
def _log(out: Path, step: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Give a function that logs a step to metrics.jsonl and TensorBoard; lines of steps that are done again go."""
    from torch.utils.tensorboard import SummaryWriter

    path = out / METRICS
    lines = path.read_text(encoding="utf-8").splitlines()[:step] if path.is_file() else []
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    with path.open("a", encoding="utf-8") as file, SummaryWriter(str(out / "logs"), purge_step=step + 1) as board:

        def log(step: int, measured: dict[str, float]) -> None:
            file.write(json.dumps({"step": step, **measured}) + "\n")
            file.flush()
            for name, value in measured.items():
                board.add_scalar(name, value, step)

        yield log
