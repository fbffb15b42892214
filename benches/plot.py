"""Draws a report's plots from the results' JSON alone. Knows matplotlib, and nothing of how things were measured."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window

from matplotlib import pyplot
from matplotlib.axes import Axes

STAGES = ("decode", "preprocess", "vision", "prefill", "latents", "answer")
Found = Mapping[str, Any]


def draw(found: Found, directory: Path) -> dict[str, Path]:
    """Write a PNG for each result that is there; return name -> path."""
    made = {}
    for name, (bench, plot, width, height) in PLOTS.items():
        if bench not in found:
            continue
        figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
        try:
            plot(axes, found[bench])
            made[name] = directory / f"{name}.png"
            figure.savefig(made[name], dpi=110, metadata={"Software": ""})
        finally:
            pyplot.close(figure)
    return made


def _stages(axes: Axes, found: Found) -> None:
    rows = [row for row in found["frames"] if row["num_frames"] in (16, 64)] or found["frames"]
    names, left = [f"{row['num_frames']} frames" for row in rows], [0.0] * len(rows)
    for stage in STAGES:
        widths = [row["seconds"][stage]["median"] for row in rows]
        axes.barh(names, widths, left=left, label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.legend(ncols=6, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False)
    axes.set_title(f"Time to answer by stage, seconds ({found['shape']}, {found['precision']}, latents)")


def _latents(axes: Axes, found: Found) -> None:
    result = found["results"][0]
    rows = result["rows"]
    for engine in dict.fromkeys(row["engine"] for row in rows):
        chains = [row for row in rows if row["engine"] == engine and row["reasoning"] == "cot"]
        points = [(row["chain_tokens"], row["seconds"]["total"]["median"]) for row in chains]
        axes.plot(*zip(*points, strict=True), "o-", label=f"{engine}, chain of thought")
    styles = {"direct": ":", "latent": "--"}
    for row in rows:
        if row["engine"] == "vlrt" and row["reasoning"] in styles:
            name = f"vlrt, {found['num_latents']} latents" if row["reasoning"] == "latent" else "vlrt, direct"
            axes.axhline(row["seconds"]["total"]["median"], ls=styles[row["reasoning"]], color="black", label=name)
    axes.set_xlabel("tokens of the chain")
    axes.set_yscale("log")
    axes.set_ylabel("seconds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.set_title(f"Seconds to answer, {result['num_frames']} frames")


def _peers(axes: Axes, found: Found) -> None:
    lengths = sorted({row["num_frames"] for row in found["rows"]})
    engines = list(dict.fromkeys(row["engine"] for row in found["rows"]))
    height = 0.8 / len(lengths)
    for number, count in enumerate(lengths):
        rows = [row for row in found["rows"] if row["num_frames"] == count]
        at = [engines.index(row["engine"]) + number * height for row in rows]
        widths = [row["seconds"]["answer"]["median"] for row in rows]
        bars = axes.barh(at, widths, height, label=f"{count} frames")
        axes.bar_label(bars, fmt="%.2f", fontsize="small", padding=2)
    axes.set_yticks([i + height * (len(lengths) - 1) / 2 for i in range(len(engines))], engines)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.legend(fontsize="small")
    axes.set_title(f"Seconds to an answer of {found['answer_tokens']} tokens ({found['shape']})")


def _limits(axes: Axes, found: Found) -> None:
    names, shares = [], []
    best = found["ceilings"]["gemm"]["int8"]["best"]
    for row in found["rows"]:
        for stage in ("vision", "prefill", "vision_and_prefill"):
            names.append(f"{row['num_frames']} frames: {stage.replace('_', ' ')}, of int8 products")
            shares.append(row["flops_per_second"][stage] / best)
        names.append(f"{row['num_frames']} frames: answer steps, of reading")
        shares.append(row["step_share_of_read"])
    bars = axes.barh(names, shares)
    axes.bar_label(bars, labels=[f"{share:.0%}" for share in shares], fontsize="small", padding=2)
    axes.set_xlim(0, max(1.0, *shares) * 1.1)
    axes.invert_yaxis()
    axes.set_title(f"Share of the machine's limit ({found['shape']}, {found['precision']})")


def _scaling(axes: Axes, found: Found) -> None:
    for stage in (*STAGES, "total"):
        points = [(row["num_frames"], row["seconds"][stage]["median"]) for row in found["frames"]]
        points = [(count, seconds) for count, seconds in points if seconds > 0]
        fit = found["exponents"].get(stage)
        if points and fit is not None:
            axes.plot(*zip(*points, strict=True), "o-", label=f"{stage}: frames^{fit:.2f}")
    _logarithmic(axes, [row["num_frames"] for row in found["frames"]])
    axes.set_xlabel("frames")
    axes.set_title(f"Seconds per stage ({found['shape']}, {found['precision']})")


def _questions(axes: Axes, found: Found) -> None:
    points = [(row["questions"], row["seconds"]) for row in found["questions"]]
    fit = found["exponents"].get("questions")
    axes.plot(*zip(*points, strict=True), "o-", label="" if fit is None else f"questions^{fit:.2f}")
    _logarithmic(axes, [count for count, _ in points])
    axes.set_xlabel("questions about one open video")
    axes.set_title(f"Seconds, decoding included ({found['question_frames']} frames)")


def _logarithmic(axes: Axes, ticks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.grid(alpha=0.3)
    axes.set_ylabel("seconds")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


# name of the PNG -> bench, what draws it, inches
PLOTS: dict[str, tuple[str, Callable[[Axes, Found], None], float, float]] = {
    "stages": ("scaling", _stages, 8, 2.4),
    "latents_vs_chain": ("latent_vs_cot", _latents, 9, 4),
    "peers": ("peers", _peers, 8, 4.5),
    "limits": ("limits", _limits, 8, 3.5),
    "scaling": ("scaling", _scaling, 9, 4.5),
    "questions": ("scaling", _questions, 8, 3),
}
