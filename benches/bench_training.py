"""What a training step takes: direct, latent self-forcing, chain of thought, and GRPO, on one backbone and sample.

    python -m benches.bench_training [--shapes tiny] [--rounds 3]

The recipe of Video-R1 (arXiv 2503.21776) is fine-tuning on written chains, then GRPO: per question 8 sampled chains of
384 tokens, their likelihood under the policy with gradient, and under a frozen reference without. It is compared as the
sum of a step of each. Steps take turns, round by round; all are one sample of 16 frames, fp32, the vision tower frozen
and computed anew each time, layers recomputed in the backward pass. Weights are random: nothing is learned here.
"""

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from benches import machine, material
from vlrt.answer import peak_host_memory_bytes
from vlrt.checkpoint import Checkpoint
from vlrt.models.decoder import FullAttention
from vlrt.quantiles import quantiles
from vlrt.train import rollout
from vlrt.train.batch import Batch, collate
from vlrt.train.data import System, VideoQuestions
from vlrt.train.learner import build
from vlrt.train.settings import Settings
from vlrt.train.system import Draw, Trainee
from vlrt.train.triplets import Triplet

GROUP, CHAIN_TOKENS, KL_WEIGHT = 8, 384, 0.04
SYSTEMS: tuple[System, ...] = ("direct", "latent", "cot")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benches.bench_training", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shapes", nargs="+", default=["tiny"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = list(argv if argv is not None else sys.argv[1:])
    args = parser.parse_args(given)
    rows = [row for shape in args.shapes for row in measure(shape, args.rounds)]
    out = machine.write_result("training", given, args.out, group=GROUP, chain_tokens=CHAIN_TOKENS, rows=rows)
    Console(width=120).print(_table(rows))
    print(out)


def measure(shape: str, rounds: int) -> list[dict[str, Any]]:
    """Return a row per kind of step, and one for Video-R1's recipe."""
    checkpoint = Checkpoint.open(material.checkpoint(shape))
    model = build(checkpoint, Settings(gradient_checkpointing=True))
    batches = {system: _batch(checkpoint, system) for system in SYSTEMS}
    steps: dict[str, Callable[[], Tensor]] = {
        system: lambda system=system: _trained(model, system, batches[system]) for system in SYSTEMS
    }
    steps["grpo"] = lambda: grpo(model, batches["direct"])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(shape, total=(rounds + 1) * len(steps))
        for i in range(rounds + 1):  # the first round warms up
            for name, step in steps.items():
                start = time.perf_counter()
                loss = step()
                loss.backward()
                took = time.perf_counter() - start
                assert loss.isfinite(), f"{name} has no finite loss"
                model.zero_grad()
                del loss
                gc.collect()
                if i:
                    seconds[name].append(took)
                progress.advance(task)
    seconds["video-r1: cot + grpo"] = [a + b for a, b in zip(seconds["cot"], seconds["grpo"], strict=True)]
    base = quantiles(seconds["latent"])["median"]
    return [
        {
            "shape": shape,
            "step": name,
            "rounds": rounds,
            "seconds": quantiles(values),
            "times_latent": quantiles(values)["median"] / base,
            "tokens": int(batches[name].lengths[0]) if name in batches else None,
            "peak_host_memory_bytes": peak_host_memory_bytes(),
        }
        for name, values in seconds.items()
    ]


def _batch(checkpoint: Checkpoint, system: System) -> Batch:
    """Return one sample: 16 frames of the clip, a question, a letter, and a chain of about CHAIN_TOKENS tokens."""
    video = dataclasses.replace(checkpoint.model.video, num_frames=16)
    model = dataclasses.replace(checkpoint.model, video=video)
    row = Triplet(
        line=1,
        number=1,
        video=material.clip(),
        question="What moves first?",
        answer="the square",
        choices=("the square", "the circle"),
        cot="0123456789 " * (CHAIN_TOKENS // 11),  # a byte is a token of the tokenizer of fresh checkpoints
    )
    return collate([VideoQuestions([row], checkpoint.path, model, system, material.cache() / "frames")[0]])


def _trained(model: Any, system: System, batch: Batch) -> Tensor:
    """Return the loss of a step as `vlrt train` takes it."""
    trainee = Trainee(model, Settings(system=system, gradient_checkpointing=True))
    return trainee(batch, Draw(1, False)).loss.total


def grpo(model: Any, batch: Batch) -> Tensor:
    """Return GRPO's loss (arXiv 2402.03300) for one question: GROUP chains, sampled and then weighed by advantage."""
    cfg = model.cfg
    trainee = Trainee(model, Settings(system="direct"))
    length = int(batch.prompt_lengths[0])
    with torch.no_grad():
        embeds = trainee._embed(batch, trainee._video_tokens(batch))[:, :length].expand(GROUP, -1, -1)
        at = batch.at[:, :, :length].expand(GROUP, -1, -1)
        position = int(batch.next_positions[0])
        ids = sample(model, embeds, at, length, position)
        more = torch.arange(position, position + CHAIN_TOKENS).expand(GROUP, 3, -1)
        whole = torch.cat([at, more], dim=2)
    attend = FullAttention(*rollout.cos_sin(whole, cfg.decoder, embeds))

    def likelihood() -> Tensor:
        inputs = torch.cat([embeds, model.model.embed_tokens(ids)], dim=1)
        hidden = model.model(inputs, attend)[:, length - 1 : -1]
        return torch.stack([_log_likelihood(model, h, i) for h, i in zip(hidden, ids, strict=True)])

    with torch.no_grad():
        reference = likelihood()
    own = likelihood()
    rewards = torch.arange(GROUP, dtype=torch.float32) % 2  # half of the chains end in the right answer
    advantage = (rewards - rewards.mean()) / rewards.std()
    gap = reference - own
    kl = gap.exp() - gap - 1
    return -(((own - own.detach()).exp() * advantage[:, None]) - KL_WEIGHT * kl).mean()


@torch.no_grad()
def sample(model: Any, embeds: Tensor, at: Tensor, length: int, position: int) -> Tensor:
    """Return GROUP sampled continuations of a prompt, [GROUP, CHAIN_TOKENS] int64, with a KV cache."""
    steps = rollout.BatchSteps(model, embeds, at, [length] * GROUP, [position] * GROUP, None)
    generator = torch.Generator().manual_seed(0)
    hidden, found = steps.start_hidden, []
    for _ in range(CHAIN_TOKENS):
        chances = model.lm_head(hidden[-1]).softmax(-1)
        found.append(torch.multinomial(chances, 1, generator=generator)[:, 0])
        hidden = steps.feed(model.model.embed_tokens(found[-1])[None])
    return torch.stack(found, dim=1)


def _log_likelihood(model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    """Log-likelihood [S] of ids [S] after states [S, C]; the logits of one chain are held at a time."""
    return functional.log_softmax(model.lm_head(hidden), dim=-1).gather(1, ids[:, None])[:, 0]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="seconds per step of one sample, forward and backward")
    for name in ("shape", "step", "tokens", "median", "p20", "p80", "times latent"):
        table.add_column(name, justify="left" if name in ("shape", "step") else "right")
    for row in rows:
        seconds = [f"{row['seconds'][q]:.3f}" for q in ("median", "p20", "p80")]
        table.add_row(row["shape"], row["step"], str(row["tokens"] or ""), *seconds, f"{row['times_latent']:.2f}")
    return table


if __name__ == "__main__":
    main()
