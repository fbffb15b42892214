"""Writes a data set of made-up clips: mp4 files of moving shapes, questions about them, and captions.

Clip i of a seed and a split is the same whatever the number of clips, so that a run that was stopped goes on where it
was, and a data set grows in place. Knows files, splits and balance; what is asked and shown is families.py's.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np

from vlrt.config import MAX_INT, from_dict
from vlrt.errors import ConfigError
from vlrt.train.families import (
    FAMILIES,
    FRAMES_AFTER_SWAPS,
    FRAMES_BEFORE_SWAPS,
    FRAMES_PER_SWAP,
    MIN_FRAMES,
    Cast,
    looks_of,
)
from vlrt.train.scenes import Scene, draw, on_grid

Split = Literal["train", "validation", "test"]
Form = Literal["choice", "free"]
Progress = Callable[[int, int], None]  # clips done, clips asked for

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
FORMS: tuple[Form, ...] = ("choice", "free")
CAPTIONING = "What happens in the video?"
TRIPLETS, CAPTIONS, STEPS = "triplets.jsonl", "captions.jsonl", "steps.jsonl"
SETTINGS, VIDEOS = "synthetic.json", "videos"
MAX_CLIPS = 10_000_000
CHUNK = 16  # clips that a worker makes per task


@dataclass(frozen=True)
class Synthetic:
    """What a data set of made-up clips consists of.

    Attributes:
        seed: of everything; splits of one seed share no clip.
        split: decides colours x shapes and lengths: no combination of a colour and a shape is in two splits, nor is a
            length of a family's clips. Of a range of 4 values or more, validation has the second, test the last but
            one, training the rest; of a shorter range all have all.
        families: keys of `families.FAMILIES`, in turn.
        forms: "choice" (the question has options) and "free" (a word or a number), equally often.
        size: pixels of both sides of a frame, even.
        fps: frames per second.
        grid: shapes are at the centres of so many squares per side, which small vision towers learn to see sooner; 0:
            anywhere. Cups and walls are not moved.
        num_frames: range of the clips' lengths, both ends included, even; clips of cups are as long as their swaps.
        num_swaps: range, both ends included.
        move_chance: of a swap of cups to move the ball, 0 to 1. At 2/3 every swap is equally likely. Below, a guess
            that misses swaps is right more often than by chance: easier to begin with, no test.
    """

    seed: int = 0
    split: Split = "train"
    families: tuple[str, ...] = tuple(FAMILIES)
    forms: tuple[Form, ...] = FORMS
    size: int = 56
    fps: float = 4.0
    grid: int = 0
    num_frames: tuple[int, int] = (16, 24)
    num_swaps: tuple[int, int] = (3, 8)
    move_chance: float = 2 / 3

    def __post_init__(self) -> None:
        """Refuse settings of which no data set can be made."""
        for name, given, accepted in (
            ("split", [self.split], SPLITS),
            ("families", self.families, tuple(FAMILIES)),
            ("forms", self.forms, FORMS),
        ):
            if not given or len(set(given)) < len(given) or not set(given) <= set(accepted):
                raise ConfigError(f"{name}: {', '.join(given) or 'none'}; accepted, each once: {', '.join(accepted)}")
        if not 0 <= self.seed <= MAX_INT:
            raise ConfigError(f"seed is {self.seed}; accepted: 0 to 2**63 - 1")
        if self.size % 2 or not 28 <= self.size <= 4096:
            raise ConfigError(f"size is {self.size} pixels; accepted: an even number from 28 to 4096")
        if not 0.01 <= self.fps <= 1000:
            raise ConfigError(f"fps is {self.fps}; accepted: 0.01 to 1000")
        if self.grid != 0 and not 2 <= self.grid <= 64:
            raise ConfigError(f"grid is {self.grid}; accepted: 0 (none), or 2 to 64 squares per side")
        low, high = self.num_frames
        if low % 2 or high % 2 or not MIN_FRAMES <= low <= high <= 4096:
            raise ConfigError(f"num_frames is {low} to {high}; accepted: even numbers, from {MIN_FRAMES} to 4096")
        low, high = self.num_swaps
        if not 1 <= low <= high <= 1024:
            raise ConfigError(f"num_swaps is {low} to {high}; accepted: a range within 1 to 1024")
        if not 0 <= self.move_chance <= 1:
            raise ConfigError(f"move_chance is {self.move_chance}; accepted: 0 to 1")

    def lengths(self, low: int, high: int, step: int = 1) -> list[int]:
        """Return the values of a range that this split has."""
        values = list(range(low, high + 1, step))
        if len(values) < 4:
            return values
        held = {"validation": [values[1]], "test": [values[-2]]}
        return held.get(self.split) or [value for value in values if value not in (values[1], values[-2])]


@dataclass(frozen=True)
class Clip:
    """One clip of a data set, not drawn yet.

    Attributes:
        scene: what it shows.
        row: its line in triplets.jsonl.
        caption: its line in captions.jsonl: the answer says what there is to see, for a model to learn to see by.
        steps: its lines in steps.jsonl: easier questions that lead up to its own, freely answered.
    """

    scene: Scene
    row: dict[str, Any]
    caption: dict[str, Any]
    steps: tuple[dict[str, Any], ...]


def clip(settings: Synthetic, index: int) -> Clip:
    """Return clip `index`, 0 or more, of a data set.

    Each family goes through all its kinds, forms and answers in an order of its own before it starts anew: the answers
    of a data set are balanced to within one such round.
    """
    name = settings.families[index % len(settings.families)]
    family, turn = FAMILIES[name], index // len(settings.families)
    cells = [(k, f, slot) for k, answers in family.kinds.items() for f in settings.forms for slot in range(answers)]
    order = _random(settings, name, "round", turn // len(cells)).permutation(len(cells))
    kind, form, slot = cells[order[turn % len(cells)]]
    rng = _random(settings, name, "clip", turn)
    looks = looks_of(SPLITS.index(settings.split), len(SPLITS))
    num_swaps = int(rng.choice(settings.lengths(*settings.num_swaps)))
    num_frames = int(rng.choice(settings.lengths(*settings.num_frames, 2)))
    if name == "cups":
        num_frames = FRAMES_BEFORE_SWAPS + FRAMES_PER_SWAP * num_swaps + FRAMES_AFTER_SWAPS
    scene = family.make(Cast(rng, looks, num_frames, num_swaps, settings.move_chance), kind, slot)
    if settings.grid and family.roams:
        scene = on_grid(scene, settings.grid)
    video = f"{VIDEOS}/{settings.split}-{index:06d}-{name}.mp4"
    row: dict[str, Any] = {
        "video": video,
        "question": scene.question,
        "answer": scene.answer,
        "family": name,
        "split": settings.split,
        "cot": scene.cot,
    }
    if form == "choice":
        row["choices"] = [scene.candidates[i] for i in rng.permutation(len(scene.candidates))]
    facts = {"index": index, "seed": settings.seed, "kind": kind, "form": form, "num_frames": num_frames}
    row["metadata"] = {**facts, "candidates": list(scene.candidates), **scene.facts}
    caption = {"video": video, "question": CAPTIONING, "answer": scene.caption, "family": f"caption of {name}"}
    shared = {"video": video, "family": name, "split": settings.split}
    steps = (
        {**shared, "question": one.question, "answer": one.answer, "cot": one.cot, "metadata": {**facts, **one.facts}}
        for one in scene.steps
    )
    return Clip(scene, row, caption, tuple(steps))


def write(
    out: str | Path, settings: Synthetic, num: int, *, workers: int | None = None, progress: Progress | None = None
) -> Path:
    """Write a data set of `num` clips, or what of it is missing, and return the path of its triplets.jsonl.

    Beside it are captions.jsonl, and steps.jsonl with easier questions about the same clips (empty without cups).

    Each file is written under another name and renamed, so that whatever has its name is whole; triplets.jsonl comes
    last. Files are equal for equal settings and an equal FFmpeg.

    Args:
        out: a directory: new, empty, or of the same settings (`num` may differ).
        settings: what it consists of.
        num: clips.
        workers: processes; None: one per core that this process may use; 1: none beside this one.
        progress: called with the clips done so far and `num`.

    Raises:
        ConfigError: the directory holds something else, cannot be written, or a number is out of range.
    """
    if not 1 <= num <= MAX_CLIPS:
        raise ConfigError(f"the number of clips is {num}; accepted: 1 to {MAX_CLIPS}")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}; accepted: 1 or more")
    out = Path(out)
    try:
        _claim(out, settings)
        missing = [i for i in range(num) if not (out / clip(settings, i).row["video"]).exists()]
        chunks = [missing[i : i + CHUNK] for i in range(0, len(missing), CHUNK)]
        done = num - len(missing)
        for finished in _run(out, settings, chunks, workers or len(os.sched_getaffinity(0))):
            if progress:
                progress(done, num)
            done += finished
        clips = [clip(settings, i) for i in range(num)]
        steps = [step for made in clips for step in made.steps]
        files = ((CAPTIONS, [made.caption for made in clips]), (STEPS, steps), (TRIPLETS, [made.row for made in clips]))
        for name, rows in files:
            _replace(out / name, "".join(json.dumps(row) + "\n" for row in rows).encode())
    except (OSError, av.FFmpegError) as error:
        raise ConfigError(f"{out} cannot be written: {error}") from error
    if progress:
        progress(num, num)
    return out / TRIPLETS


def encode(path: Path, scene: Scene, settings: Synthetic) -> None:
    """Draw a scene and write it as an mp4 file (H.264), whole or not at all.

    Raises:
        OSError: the file cannot be written (av.FFmpegError where FFmpeg says so).
    """
    part = path.with_name(f".{os.getpid()}-{path.name}")
    options = {"preset": "veryfast", "crf": "16", "mbtree": "0"}  # with mbtree, x264 writes other bytes now and then
    try:
        with av.open(str(part), "w") as file:
            stream = file.add_stream("libx264", rate=Fraction(settings.fps).limit_denominator(1000), options=options)
            stream.width = stream.height = settings.size
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1  # the result depends on it
            for sprites in scene.frames:
                picture = draw(sprites, settings.size, scene.background)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _claim(out: Path, settings: Synthetic) -> None:
    """Make the directory, or check that what it holds belongs to these settings."""
    file = out / SETTINGS
    if file.exists():
        try:
            found = from_dict(Synthetic, json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, ConfigError) as error:
            raise ConfigError(f"{file} is damaged ({error}); write to a new directory") from error
        if found != settings:
            given, there = asdict(settings), asdict(found)
            name = next(name for name in given if given[name] != there[name])
            raise ConfigError(
                f"{out} holds clips of {name} {there[name]}, and {given[name]} was asked for; accepted: the same "
                "settings, or a new directory"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not a data set of made-up clips; accepted: a new or an empty directory")
    (out / VIDEOS).mkdir(parents=True, exist_ok=True)
    _replace(file, (json.dumps(asdict(settings), indent=2) + "\n").encode())


def _run(out: Path, settings: Synthetic, chunks: list[list[int]], workers: int) -> Iterator[int]:
    """Make all chunks; yield the clips of each as it is done."""
    if workers == 1 or len(chunks) < 2:
        yield from (_make(out, settings, chunk) for chunk in chunks)
        return
    # spawn: a fork would copy threads' locks of whatever the caller has loaded
    with ProcessPoolExecutor(min(workers, len(chunks)), mp_context=get_context("spawn")) as pool:
        waiting: set[Future[int]] = {pool.submit(_make, out, settings, chunk) for chunk in chunks}
        try:
            while waiting:
                ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in ready)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _make(out: Path, settings: Synthetic, chunk: list[int]) -> int:
    for index in chunk:
        made = clip(settings, index)
        encode(out / made.row["video"], made.scene, settings)
    return len(chunk)


def _replace(file: Path, content: bytes) -> None:
    part = file.with_name(f".{os.getpid()}-{file.name}")
    part.write_bytes(content)
    part.replace(file)


def _random(settings: Synthetic, *names: object) -> np.random.Generator:
    """Return the random numbers of one thing, by its name alone."""
    text = "/".join(map(str, (settings.seed, settings.split, *names)))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
