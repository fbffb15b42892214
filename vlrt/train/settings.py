"""Every setting of a training run, from flags or a YAML file. Knows ranges, nothing else."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlrt import config
from vlrt.errors import ConfigError
from vlrt.train.data import System

Teacher = Literal["none", "ema"]
Bptt = Literal["0", "1", "full"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Objective:
    """Latent self-forcing, see docs/latents.md.

    Attributes:
        alignment: weight of the alignment term; 0 leaves it out.
        diversity: weight of the diversity term.
        uniform_targets: weigh the tokens of a part equally instead of by their likeness to the question.
        bottleneck: share of steps in which the answer may not look at the video.
        bptt: gradient through the rollout: "0" none, "1" its last step, "full" all of it.
        teacher: where the targets come from: "none" the parts of the video, "ema" the latents of a slow copy of the
            trained weights, which is told the right answer.
        teacher_decay: d of the slow copy, `w' <- d w' + (1 - d) w` after each step.
    """

    alignment: float = 0.1
    diversity: float = 0.05
    uniform_targets: bool = False
    bottleneck: float = 0.3
    bptt: Bptt = "0"
    teacher: Teacher = "none"
    teacher_decay: float = 0.99

    def __post_init__(self) -> None:
        """Refuse weights and shares out of range."""
        for name in ("alignment", "diversity"):
            _within(f"objective.{name}", getattr(self, name), 0, 1e6)
        _within("objective.bottleneck", self.bottleneck, 0, 1)
        _within("objective.teacher_decay", self.teacher_decay, 0, 1)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685) on the decoder's linear layers; merged when the model is saved."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse ranks and shares out of range."""
        _within("lora.rank", self.rank, 1, 4096)
        _within("lora.alpha", self.alpha, 1, 1e6)
        _within("lora.dropout", self.dropout, 0, 0.99)


@dataclass(frozen=True)
class Settings:
    """A training run.

    Attributes:
        system: what is trained: latents, the answer alone, a written chain, or L plain tokens without feedback.
        steps: optimizer steps.
        batch_size: samples per device and forward pass.
        accumulation: forward passes per optimizer step; it changes nothing but memory: the loss is that of one batch.
        learning_rate: peak of a cosine schedule that ends at a tenth of it.
        injection_learning_rate: the same for the latent injection module; None: as the rest.
        warmup: optimizer steps of linear warm-up.
        weight_decay: of AdamW, on matrices only.
        max_grad_norm: gradients are scaled down to this norm.
        precision: of the forward pass; parameters and optimizer stay fp32.
        lora: None trains all weights of the decoder.
        train_vision: also train the vision tower; else its video tokens are computed once and kept.
        gradient_checkpointing: recompute each decoder layer in the backward pass.
        min_rounds: of the parallel rollout, drawn per step from here to the config's R; None: always R.
        min_latents: drawn per step, for all samples alike, from here to the config's L; None: always L.
        rollouts: drawn per step from these; None: always the config's.
        curriculum: a number in the rows' metadata, e.g. "num_swaps": rows with low ones are asked first; "": none.
        curriculum_share: of the steps, after which rows of all levels are asked.
        curriculum_exact: add a level when this share of the newest one's rows is answered right; None: by the clock.
        objective: terms of the loss beside the cross-entropy.
        seed: of everything drawn.
        eval_every: steps between evaluations; 0: only at the end.
        save_every: steps between saved states, from which a run that was stopped goes on.
        workers: processes that decode videos.
        max_token_bytes: of what a frozen vision tower made of videos, kept on disk; 0: videos are encoded each time.
        max_bad_rows: bad rows of the data that are skipped before the run is refused.
    """

    system: System = "latent"
    steps: int = 1000
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-4
    injection_learning_rate: float | None = None
    warmup: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    precision: Precision = "fp32"
    lora: Lora | None = None
    train_vision: bool = False
    gradient_checkpointing: bool = False
    min_rounds: int | None = None
    min_latents: int | None = None
    rollouts: tuple[config.Rollout, ...] | None = None
    curriculum: str = ""
    curriculum_share: float = 0.5
    curriculum_exact: float | None = None
    objective: Objective = field(default_factory=Objective)
    seed: int = 0
    eval_every: int = 0
    save_every: int = 200
    workers: int = 2
    max_token_bytes: int = 8 * 1024**3
    max_bad_rows: int = 20

    def __post_init__(self) -> None:
        """Refuse settings that no run can follow."""
        for name, low, high in (
            ("steps", 1, 1e9),
            ("batch_size", 1, 65536),
            ("accumulation", 1, 65536),
            ("learning_rate", 1e-12, 10),
            ("warmup", 0, 1e9),
            ("weight_decay", 0, 10),
            ("max_grad_norm", 1e-9, 1e9),
            ("seed", 0, 2**32),
            ("eval_every", 0, 1e9),
            ("save_every", 1, 1e9),
            ("workers", 0, 1024),
            ("max_token_bytes", 0, 2**62),
            ("max_bad_rows", 0, 1e9),
            ("curriculum_share", 0, 1),
        ):
            _within(name, getattr(self, name), low, high)
        if self.curriculum_exact is not None:
            _within("curriculum_exact", self.curriculum_exact, 0, 1)
        for name in ("min_rounds", "min_latents"):
            if getattr(self, name) is not None:
                _within(name, getattr(self, name), 1, 1024)
        if self.rollouts is not None and not self.rollouts:
            raise ConfigError("rollouts is empty; accepted: recurrent, parallel, or both")
        if self.gradient_checkpointing and self.objective.bptt == "full":
            raise ConfigError("gradient_checkpointing recomputes layers, which the rollout of bptt 'full' cannot redo")


def read(path: Path | None, changes: Sequence[str] = ()) -> Settings:
    """Return the defaults, changed by a YAML file and then by `name=value` pairs such as "objective.bptt=full".

    Raises:
        ConfigError: no such file, no YAML object, an unknown setting, or one out of range.
    """
    values = {} if path is None else _yaml(path, "")
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"the setting {change!r} has no value; accepted: name=value")
        *outer, last = name.split(".")
        part = values
        for key in outer:
            part = part.setdefault(key, {})
            if not isinstance(part, dict):
                raise ConfigError(f"the setting {name} is inside of a value; accepted: fields of the settings")
        part[last] = _yaml(None, text)["value"]
    terms = values.get("objective")
    if isinstance(terms, dict) and isinstance(terms.get("bptt"), int):
        terms["bptt"] = str(terms["bptt"])  # YAML reads 0 and 1 as numbers
    return config.from_dict(Settings, values)


def _yaml(path: Path | None, text: str) -> dict[str, Any]:
    """Read a file, or one value as {"value": ...}."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML ships no annotations
        """YAML 1.2's numbers: to PyYAML, which follows 1.1, 1e-3 is a word."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), None)
    try:
        found = yaml.load(path.read_text(encoding="utf-8") if path else text, Loader)
        values = found if path else {"value": found}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path or text!r} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; accepted: fields of the settings, one per line")
    return values


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; accepted: {low:g} to {high:g}")
