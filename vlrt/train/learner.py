"""What learns: a model, its optimizer and its teacher; a step, the state and the result. Knows no run."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from vlrt.checkpoint import Checkpoint, expected_tensors
from vlrt.errors import ConfigError
from vlrt.hf_config import DType
from vlrt.models import registry
from vlrt.train import run_directory, save, sharding, triplets
from vlrt.train.batch import Batch, shorten
from vlrt.train.objective import IGNORED
from vlrt.train.order import Curriculum
from vlrt.train.run_directory import MODEL
from vlrt.train.settings import Lora, Settings
from vlrt.train.system import Draw, Trainee, draw
from vlrt.train.teacher import Teacher
from vlrt.train.token_cache import TokenCache

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FINAL_SHARE = 0.1  # of the learning rate's peak, at the end of the cosine


class Learner:
    """A model, its optimizer and its teacher, in this process's share of them."""

    def __init__(
        self, checkpoint: Checkpoint, settings: Settings, processes: PartialState, tokens: TokenCache | None = None
    ) -> None:
        self._checkpoint, self._settings, self._processes = checkpoint, settings, processes
        self.trainee = Trainee(build(checkpoint, settings), settings, tokens).to(processes.device).train()
        sharding.shard(self.trainee, processes.device)
        self._trained = {name: p for name, p in self.trainee.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(groups(self._trained, settings), lr=settings.learning_rate)
        self._teacher = Teacher(self._trained, settings.objective.teacher_decay) if has_teacher(settings) else None

    def step(
        self, step: int, batches: Iterator[Batch], bad: triplets.BadRows, curriculum: Curriculum | None = None
    ) -> dict[str, float]:
        """Run optimizer step `step` over the next batches; return its losses and gradient norm, over all processes.

        The curriculum hears which rows were answered right, and decides about the batches of the next step.

        The cross-entropy is the mean over the labelled tokens of all its batches in all processes, the other terms are
        means over samples: how a step is divided into batches does not matter.

        Raises:
            ConfigError: the loss or its gradient is no number; the weights are as before.
        """
        settings, device = self._settings, self._processes.device
        schedule(self._optimizer, settings, step)
        drawn = draw(settings, self._checkpoint.model.latent, step)
        given = [next(batches) for _ in range(settings.accumulation)]
        for batch in given:
            bad.add(batch.bad)
        parts = [(shorten(b, drawn.num_latents) if drawn.num_latents else b).to(device) for b in given]
        labels = torch.tensor([float((part.labels[:, 1:] != IGNORED).sum()) for part in parts], device=device)
        count = len(parts) * sharding.processes()[1]
        shares = count * labels / sharding.total(labels.sum())
        aims = self._aims(parts, drawn)
        sums: dict[str, Tensor] = {}
        answered: list[Tensor] = []
        for i, (part, share) in enumerate(zip(parts, shares, strict=True)):
            if settings.lora is not None and settings.lora.dropout:
                torch.manual_seed((settings.seed * 1_000_003 + step) * count + sharding.processes()[0] * len(parts) + i)
            with autocast(settings, device):
                found, right = self.trainee(part, drawn, aims[i])
            found = found._replace(
                total=found.total + (share - 1) * found.cross_entropy, cross_entropy=share * found.cross_entropy
            )
            (found.total / len(parts)).backward()
            answered.append(right)
            for name, value in (*found._asdict().items(), ("exact", right.float().mean())):
                sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach().float() / count
        values = sharding.total(torch.stack(list(sums.values())))
        measured = dict(zip(sums, values.tolist(), strict=True))
        norm = sharding.clip(list(self._trained.values()), settings.max_grad_norm)
        if not (math.isfinite(measured["total"]) and math.isfinite(norm)):
            raise ConfigError(
                f"in step {step + 1} the loss is {measured['total']} and its gradient's norm {norm}; use a lower "
                "learning_rate, or precision fp32. The last saved state is as it was"
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._teacher is not None:
            self._teacher.follow()
        if curriculum is not None:
            levels = [row.metadata.get(settings.curriculum) for part in parts for row in part.rows]
            curriculum.learn(levels, torch.cat(answered))
            measured["level"] = float(curriculum.highest((step + 1) * settings.accumulation))
        return measured | {"grad_norm": norm, "learning_rate": self._optimizer.param_groups[0]["lr"]}

    def save(self, out: Path, step: int, beside: Mapping[str, Tensor]) -> None:
        """Save what a run goes on from, and tensors beside it, by the main process; every process must call this."""
        tensors = {f"beside/{name}": tensor for name, tensor in beside.items()}
        for name, tensor in self._state():
            gathered = sharding.whole(tensor)
            if self._processes.is_main_process:
                tensors[name] = gathered
        if self._processes.is_main_process:
            run_directory.save_state(out, step, tensors)

    def load(self, out: Path) -> tuple[int, dict[str, Tensor]]:
        """Take over the newest state, if any, in however many processes; return its step and what is beside it."""
        step, tensors = run_directory.read_state(out)
        beside: dict[str, Tensor] = {}
        for name, tensor in tensors:
            kind, _, rest = name.partition("/")
            if kind == "beside":
                beside[rest] = tensor
                continue
            weight = self._trained[rest.partition("/")[0]]
            if kind == "optimizer":
                key = rest.partition("/")[2]
                kept = tensor if key == "step" else sharding.share(tensor, weight.detach())
                self._optimizer.state[weight][key] = kept
            else:
                place = weight if kind == "weight" or self._teacher is None else self._teacher.slow[rest]
                with torch.no_grad():
                    place.copy_(sharding.share(tensor, place.detach()))
        return step, beside

    def write(self, out: Path) -> None:
        """Write the trained checkpoint, by the main process; every process must call this."""
        state = {name: sharding.whole(p) for name, p in self._trained.items()}
        if not self._processes.is_main_process:
            return
        model = self.trainee.model
        if sharding.processes()[1] > 1:
            model = build(self._checkpoint, self._settings)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(state.pop(f"model.{name}").reshape(parameter.shape))
        named = save.merged_state(model)
        shapes = expected_tensors(self._checkpoint.model)
        dtype: DType = "float32" if self._checkpoint.dtype == "float32" else "bfloat16"
        with run_directory.writing(out / MODEL):
            tensors = ((name, named[name].reshape(shape)) for name, shape in shapes.items())
            save.write(out / MODEL, self._checkpoint.model, tensors, self._checkpoint.path, dtype=dtype)
        run_directory.forget_state(out)

    def _aims(self, parts: list[Batch], drawn: Draw) -> list[Tensor | None]:
        """Return what the teacher sees in the latents of each batch."""
        if self._teacher is None:
            return [None] * len(parts)
        with self._teacher.in_place(), autocast(self._settings, self._processes.device):
            return [self.trainee.roll_out_told(part, drawn) for part in parts]

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self._trained.items():
            yield f"weight/{name}", weight
            for key, value in self._optimizer.state.get(weight, {}).items():
                yield f"optimizer/{name}/{key}", value
            if self._teacher is not None:
                yield f"teacher/{name}", self._teacher.slow[name]


def autocast(settings: Settings, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass: matrix products in bf16 where the settings say so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")


def has_teacher(settings: Settings) -> bool:
    """Whether a slow copy of the weights is kept."""
    return settings.system == "latent" and settings.objective.teacher == "ema"


def build(checkpoint: Checkpoint, settings: Settings) -> registry.VideoLatent:
    """Load the weights in fp32 and mark those that are trained."""
    model = registry.build(checkpoint.model)
    registry.load(
        model, lambda name: checkpoint.weight(name).clone()
    )  # else steps are taken in the checkpoint's memory
    model.requires_grad_(True)
    model.visual.requires_grad_(settings.train_vision)
    model.model.checkpointing = settings.gradient_checkpointing
    rho = getattr(model.latent_injection, "rho", None)
    if rho is not None and settings.objective.bptt == "0":
        rho.requires_grad_(False)  # cosines ignore lengths: its gradient is rounding, of which Adam makes whole steps
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


def groups(trained: Mapping[str, nn.Parameter], settings: Settings) -> list[dict[str, Any]]:
    """Return parameter groups: matrices decay, others do not; the injection module may have a rate of its own."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
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


def schedule(optimizer: Any, settings: Settings, step: int) -> None:
    """Set the learning rates of a step: linear warm-up, then a cosine down to FINAL_SHARE."""
    if step < settings.warmup:
        share = (step + 1) / settings.warmup
    else:
        done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        share = FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
