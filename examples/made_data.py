"""The clips of a plan, and rows about them for every sight, in OUT/data/. Knows files; trains nothing."""

import functools
import json
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import Progress

from plans import EASY_SWAPS, Part, Plan, Sight
from vlrt.train import synthetic
from vlrt.train.scenes import draw

GREY = "grey.png"


def make_data(out: Path, plan: Plan, console: Console) -> None:
    """Write the clips, and in OUT/data/ pretraining.jsonl, and train, validation and test.jsonl for every sight."""
    names = ("pretraining", *synthetic.SPLITS)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    data = out / "data"
    for number, part in enumerate(plan.parts):
        folder = f"{part.split}-{number}"
        with Progress(console=console, transient=True) as progress:
            show = functools.partial(progress.update, progress.add_task(f"clips: {folder}"))
            synthetic.write(
                data / folder, part.settings, part.num, progress=lambda a, b, f=show: f(completed=a, total=b)
            )
        _draw_stills(data, folder, part)
        rows, steps, captions = (
            _rows(data, folder, name) for name in (synthetic.TRIPLETS, synthetic.STEPS, synthetic.CAPTIONS)
        )
        for row in steps:
            row["family"] = f"cups, {row['metadata']['num_swaps']} of {part.num_swaps} swaps"
        found[part.split] += rows + steps
        if part.split == "train":
            found["pretraining"] += captions
            found["pretraining"] += [
                row for row in rows + steps if row["metadata"].get("num_swaps", EASY_SWAPS) <= EASY_SWAPS
            ]
    for name, rows in found.items():
        for sight in ("all",) if name == "pretraining" else ("all", "blind", "frame"):
            seen = [{**row, "video": _seen(row["video"], sight)} for row in rows]
            text = "".join(json.dumps(row) + "\n" for row in seen)
            rows_file(data, name, sight).write_text(text, encoding="utf-8")


def _draw_stills(data: Path, folder: str, part: Part) -> None:
    """Draw the frame in the middle of each clip of a part, and a grey one."""
    size = part.settings.size
    grey = data / GREY
    if not grey.exists():
        Image.new("RGB", (size, size), (128, 128, 128)).save(grey)
    for i in range(part.num):
        made = synthetic.clip(part.settings, i)
        still = data / folder / _seen(made.row["video"], "frame")
        if not still.exists():
            still.parent.mkdir(exist_ok=True)
            frames = made.scene.frames
            Image.fromarray(draw(frames[len(frames) // 2], size, made.scene.background)).save(still)


def _seen(video: str, sight: Sight) -> str:
    """Return what a model of a sight is shown of a clip."""
    if sight == "blind":
        return GREY
    return video if sight == "all" else video.replace(synthetic.VIDEOS, "stills").replace(".mp4", ".png")


def rows_file(data: Path, name: str, sight: Sight) -> Path:
    """Return where the rows of a split are."""
    return data / (f"{name}.jsonl" if sight == "all" else f"{name}-{sight}.jsonl")


def _rows(data: Path, folder: str, name: str) -> list[dict[str, Any]]:
    """Read a file of a part; its videos' paths become relative to the folder above."""
    lines = (data / folder / name).read_text(encoding="utf-8").splitlines()
    return [{**row, "video": f"{folder}/{row['video']}"} for row in map(json.loads, lines)]
