"""What `reproduce.py` trains and asks: the sizes of each plan, and the rows of the table. Nothing here does a thing."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlrt.train import synthetic
from vlrt.train.families import FRAMES_AFTER_SWAPS, FRAMES_BEFORE_SWAPS, FRAMES_PER_SWAP
from vlrt.train.settings import Objective, Settings

Sight = Literal["all", "blind", "frame"]  # what a model is shown: the clip, a grey picture, or the clip's middle frame

CUPS = ("cups",)
OTHERS = tuple(name for name in synthetic.FAMILIES if name != "cups")
EASY_SWAPS = 1  # cups that are swapped no more often than this are part of learning to see


@dataclass(frozen=True)
class Part:
    """One made-up data set.

    Attributes:
        split: of the data set.
        num: clips.
        families: of the clips.
        num_swaps: of cups.
        move_chance: of a swap to move the ball.
        seed: of the data set.
    """

    split: synthetic.Split
    num: int
    families: tuple[str, ...] = tuple(synthetic.FAMILIES)
    num_swaps: int = 4
    move_chance: float = 2 / 3
    seed: int = 0

    @property
    def settings(self) -> synthetic.Synthetic:
        """Clips that are all as long as those of cups are; what is not cups is on a grid."""
        num_frames = FRAMES_BEFORE_SWAPS + FRAMES_PER_SWAP * self.num_swaps + FRAMES_AFTER_SWAPS
        return synthetic.Synthetic(
            seed=self.seed,
            split=self.split,
            families=self.families,
            forms=("free",),
            num_swaps=(self.num_swaps, self.num_swaps),
            num_frames=(num_frames, num_frames),
            move_chance=self.move_chance,
            grid=4,
        )


@dataclass(frozen=True)
class Plan:
    """Sizes of everything.

    Attributes:
        model: what differs from the shape "tiny".
        parts: of the data.
        pretraining: of the backbone.
        training: of each variant that is trained with every seed.
        ablation: of each variant that is trained with the first seed alone.
        seeds: of the training.
    """

    model: Mapping[str, Any]
    parts: tuple[Part, ...]
    pretraining: Settings
    training: Settings
    ablation: Settings
    seeds: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Variant:
    """One row of the table.

    Attributes:
        name: of the row.
        settings: what differs from the plan's training.
        latent: what differs from a plain checkpoint with LATENTS; None: a checkpoint without latents.
        ask: options of `Runtime.ask`.
        same_as: a variant whose model is asked otherwise, in place of training one.
        sight: what it is shown, in training and in the test.
        is_main: trained with every seed of the plan.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    latent: Mapping[str, Any] | None = None
    ask: Mapping[str, Any] = field(default_factory=dict)
    same_as: str | None = None
    sight: Sight = "all"
    is_main: bool = False


LATENTS = {"num_latents": 8, "num_heads": 4}


def _latent(**values: Any) -> dict[str, Any]:
    return {"system": "latent", "objective": Objective(**{"bptt": "full", "bottleneck": 0.5, **values})}


def _ablation(name: str, plan: Mapping[str, Any] | None = None, **objective: Any) -> Variant:
    return Variant(name, _latent(**objective), {**LATENTS, **(plan or {})})


DIRECT: dict[str, Any] = {"settings": {"system": "direct"}, "ask": {"reasoning": "direct"}}
VARIANTS = (
    Variant("direct", is_main=True, **DIRECT),
    Variant("pause", {"system": "pause"}, LATENTS, {"latents": "dummy"}, is_main=True),
    Variant("cot", {"system": "cot"}, ask={"reasoning": "cot", "max_tokens": 160}, is_main=True),
    Variant("latent", _latent(), LATENTS, is_main=True),
    Variant("latent, asked with L = 0", ask={"latents": "none"}, same_as="latent", is_main=True),
    Variant("latent, asked with dummy latents", ask={"latents": "dummy"}, same_as="latent", is_main=True),
    Variant("latent, asked with noise", ask={"latents": "noise"}, same_as="latent", is_main=True),
    Variant("latent, asked with shuffled latents", ask={"latents": "shuffled"}, same_as="latent", is_main=True),
    Variant("blind direct", sight="blind", **DIRECT),
    Variant("one-frame direct", sight="frame", **DIRECT),
    _ablation("ablation: none"),
    _ablation("ablation: no alignment", alignment=0.0),
    _ablation("ablation: no diversity", diversity=0.0),
    _ablation("ablation: no bottleneck", bottleneck=0.0),
    _ablation("ablation: parallel, R = 1", {"rollout": "parallel", "rounds": 1}),
    _ablation("ablation: parallel, R = 2", {"rollout": "parallel", "rounds": 2}),
    _ablation("ablation: parallel, R = 4", {"rollout": "parallel", "rounds": 4}),
    _ablation("ablation: L = 2", {"num_latents": 2}),
    _ablation("ablation: L = 4", {"num_latents": 4}),
    _ablation("ablation: L = 16", {"num_latents": 16}),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}

# A temporal patch of a frame of 56 x 56 is one token: 4 x 4 patches of 14, merged.
SMALL_MODEL = {
    "video.fps": 4.0,
    "vision.spatial_merge_size": 4,
    "decoder.vocab_size": 1024,
    "decoder.num_layers": 2,
    "decoder.tie_word_embeddings": True,
}
QUICK = Settings(steps=2, batch_size=4, learning_rate=5e-4, warmup=1, workers=0)
SMALL = Settings(
    steps=2000,
    batch_size=32,
    learning_rate=5e-4,
    warmup=30,
    workers=0,
    curriculum="num_swaps",
    curriculum_exact=0.9,
    save_every=300,
)
LARGE_MODEL = {**SMALL_MODEL, "decoder.num_layers": 4, "decoder.hidden_size": 256, "decoder.intermediate_size": 512}
PLANS = {
    # Shows that every stage runs; learns nothing.
    "quick": Plan(
        SMALL_MODEL,
        (Part("train", 14), Part("validation", 7), Part("test", 14)),
        QUICK,
        QUICK,
        QUICK,
        (0,),
    ),
    # Two CPU cores, some 40 minutes: cups alone, the other families take longer to learn to see (docs/log.md).
    "small": Plan(
        SMALL_MODEL,
        (
            Part("train", 3500, CUPS, move_chance=0.35),
            Part("train", 3500, CUPS, seed=1),
            Part("validation", 100, CUPS),
            Part("test", 100, CUPS),
        ),
        dataclasses.replace(SMALL, steps=350, learning_rate=1e-3, curriculum="", workers=1),
        SMALL,
        dataclasses.replace(SMALL, steps=800),
        (0, 1, 2),
    ),
    # One GPU: `--minutes 7` as often as it takes.
    "large": Plan(
        LARGE_MODEL,
        (
            Part("train", 15000, CUPS, num_swaps=8, move_chance=0.35),
            Part("train", 15000, CUPS, num_swaps=8, seed=1),
            Part("train", 30000, OTHERS),
            Part("validation", 200, CUPS, num_swaps=8),
            Part("test", 400, CUPS, num_swaps=8),
            Part("test", 600, OTHERS),
        ),
        dataclasses.replace(SMALL, steps=6000, batch_size=64, curriculum="", workers=4),
        dataclasses.replace(SMALL, steps=6000, batch_size=64, workers=2, save_every=200),
        dataclasses.replace(SMALL, steps=3000, batch_size=64, workers=2, save_every=200),
        (0, 1, 2),
    ),
}


def job_folder(out: Path, variant: Variant, seed: int) -> Path:
    """Return where a trained variant and its answers are."""
    return out / slug((variant.same_as and BY_NAME[variant.same_as].name) or variant.name) / str(seed)


def seeds_of(variant: Variant, plan: Plan) -> tuple[int, ...]:
    """Return the seeds with which a variant is trained."""
    return plan.seeds if variant.is_main else plan.seeds[:1]


def steps_of(variant: Variant, plan: Plan) -> int:
    """Return for how many steps a variant is trained."""
    return (plan.training if variant.is_main else plan.ablation).steps


def slug(name: str) -> str:
    """Return a name as part of a path."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
