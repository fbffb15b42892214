"""What came of a comparison: the table, and the model that is packed from it. Trains and asks nothing."""

import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path

import vlrt
from plans import BY_NAME, Plan, job_folder, steps_of
from vlrt import evaluate
from vlrt.checkpoint import Checkpoint
from vlrt.train import loop, save

CARD = """# shapes-{name}

A small model that answers questions about clips of moving shapes, for trying vlrt out. It has been trained on nothing
but such clips, 56 x 56 pixels, of the split `train` of `vlrt data synth`. Made by `python examples/reproduce.py OUT` of
vlrt {version}: variant `{name}`, seed {seed}, which answered more of the validation questions than the other seeds,
the right answer so far being given: {validation}.

Weights are stored in bfloat16; the scores below are those of the fp32 weights through the exported bundle. The clips of
the test split, their seed and their colours x shapes are none of the training's.

| questions of the test split | rows | score |
|---|---|---|
{scores}

## Training
From the backbone, which learned from captions and easy questions:

{settings}

The backbone, from random weights:

{pretraining}

License: Apache-2.0.
"""


def report(table: Mapping[str, list[list[evaluate.Group]]], plan: Plan) -> str:
    """Return the table as Markdown: mean and spread over seeds."""
    groups = [group.name for group in next(iter(table.values()))[0] if not group.name.startswith("problem_type")]
    head = ["variant", "steps", "seeds", *(name.removeprefix("family: ") for name in groups)]
    head += ["tokens written", "ms to answer", "ms reasoning"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, seeds in table.items():
        variant = BY_NAME[name]
        cells = [str(steps_of(BY_NAME[variant.same_as or name], plan)), str(len(seeds))]
        for group in groups:
            scores = [next(g.score for g in means if g.name == group) for means in seeds]
            cells.append(_spread(scores, 3))
        cells.append(_spread([means[0].answer_tokens for means in seeds], 1))
        cells.append(_spread([1000 * means[0].seconds for means in seeds], 1))
        cells.append(_spread([1000 * means[0].reasoning_seconds for means in seeds], 1))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    rows = ", ".join(f"{group.num_rows} {group.name}" for group in next(iter(table.values()))[0])
    note = (
        "Score on the test split, mean ± standard deviation over seeds. Time from the video's path to the last token, "
        f"and of it what latents and everything written take, one thread beside other work. Rows: {rows}."
    )
    return "\n".join([*lines, "", note, ""])


def _spread(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def pack(out: Path, table: Mapping[str, list[list[evaluate.Group]]], plan: Plan, name: str) -> None:
    """Write OUT/box/, a variant's model of the seed that validated best, in bf16, with a model card."""
    folder = out / "box" / f"shapes-{name}"
    if folder.exists():
        return
    exact = {seed: _last_metrics(job_folder(out, BY_NAME[name], seed))["validation_exact"] for seed in plan.seeds}
    seed = max(exact, key=exact.__getitem__)
    source = Checkpoint.open(job_folder(out, BY_NAME[name], seed) / "run" / loop.MODEL)
    groups = table[name][plan.seeds.index(seed)]
    scores = "\n".join(f"| {g.name.removeprefix('family: ')} | {g.num_rows} | {g.score:.3f} |" for g in groups)
    settings = dataclasses.replace(plan.training, seed=seed, **BY_NAME[name].settings)
    card = CARD.format(
        name=name,
        seed=seed,
        validation=", ".join(f"{score:.3f} (seed {s})" for s, score in exact.items()),
        scores=scores,
        settings=json.dumps(dataclasses.asdict(settings), indent=2),
        pretraining=json.dumps(dataclasses.asdict(plan.pretraining), indent=2),
        version=vlrt.__version__,
    )
    weights = ((tensor, source.weight(tensor)) for tensor in source.names())
    save.write(folder, source.model, weights, source.path, texts={"README.md": card})


def _last_metrics(folder: Path) -> dict[str, float]:
    """Return what a run measured after its last step."""
    found: dict[str, float] = json.loads((folder / "run" / loop.METRICS).read_text().splitlines()[-1])
    return found
