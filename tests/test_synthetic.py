"""Made-up clips: true answers, balance, splits, no shortcuts, and files that survive interruptions.

Shortcuts are looked for with probes (nearest neighbour, ridge regression) on one frame, and with the commonest answer
per question. A probe passes when its accuracy stays under chance + 4 standard deviations of a binomial: a fair data set
fails one of some 60 such comparisons by accident once in 500 seeds, and the seeds here are fixed.
"""

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from vlrt.errors import ConfigError
from vlrt.train import synthetic, triplets
from vlrt.train.families import FAMILIES, LANES
from vlrt.train.scenes import COLOURS, OUTLINES, SHAPES, Sprite, draw
from vlrt.train.synthetic import SPLITS, Clip, Synthetic, clip, write

NUM_PROBED = 1200  # clips per family, half to learn from, half to be tested on


def clips(num: int, **settings: object) -> list[Clip]:
    made = Synthetic(**settings)  # type: ignore[arg-type]
    return [clip(made, i) for i in range(num)]


@pytest.fixture(scope="module")
def probed() -> dict[str, list[Clip]]:
    return {name: clips(NUM_PROBED, families=(name,), seed=5) for name in FAMILIES}


def files_of(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def rows_of(triplets: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in triplets.read_text().splitlines()]


def chance(tested: list[Clip]) -> float:
    """Return the accuracy of guessing among the candidates, plus 4 standard deviations."""
    mean = np.mean([1 / len(c.scene.candidates) for c in tested])
    return float(mean + 4 * np.sqrt(mean * (1 - mean) / len(tested)))


# --- answers are true -------------------------------------------------------------------------------------------------


def moved(before: Sprite, after: Sprite) -> tuple[float, float]:
    """Return the step between two frames on the torus."""
    return (after.x - before.x + 0.5) % 1 - 0.5, (after.y - before.y + 0.5) % 1 - 0.5


def test_directions_are_those_of_the_pixels(probed: dict[str, list[Clip]]) -> None:
    # Catches an axis that points the other way (y grows downwards): "up" would be drawn as down.
    for one in probed["direction"][:40]:
        name = one.row["question"].split()[4]
        colour = np.array(COLOURS[name])
        rows, columns = [], []
        for frame in one.scene.frames[:2]:
            picture = draw(frame, 84, one.scene.background)
            y, x = np.nonzero(np.abs(picture.astype(int) - colour).sum(-1) < 40)
            rows.append(circular_mean(y / 84))
            columns.append(circular_mean(x / 84))
        dx, dy = ((b - a + 0.5) % 1 - 0.5 for a, b in (columns, rows))
        way = max({"left": -dx, "right": dx, "up": -dy, "down": dy}.items(), key=lambda item: item[1])[0]
        assert way == one.row["answer"]


def circular_mean(values: NDArray[np.float64]) -> float:
    return float(np.angle(np.exp(2j * np.pi * values).mean()) / (2 * np.pi))


def test_the_ball_is_where_the_swaps_bring_it(probed: dict[str, list[Clip]]) -> None:
    # Catches a swap drawn otherwise than counted, and one that the chain of thought leaves out.
    for one in probed["cups"][:100]:
        frames = one.scene.frames
        ball = next(s for s in frames[0] if s.shape == "circle")
        place = round((ball.x - 0.18) / 0.32)
        places = [place]
        for frame in frames[4:-2:2]:
            pair = [i for i, cup in enumerate(frame) if cup.y != 0.6]
            assert len(pair) == 2
            place = sum(pair) - place if place in pair else place
            places.append(place)
        words = [("left", "middle", "right")[p] for p in places]
        assert one.row["answer"] == words[-1]
        assert [part.split(": ")[1] for part in one.row["cot"].split("Swaps: ")[1].rstrip(".").split(", ")] == words[1:]
        swaps = one.caption["answer"].split("Swaps: ")[1].rstrip(".").split(", ")
        assert one.row["cot"].startswith(f"Ball {words[0]}. Swaps: {swaps[0]}: ")
        assert len(swaps) == len(words) - 1
        assert [step["answer"] for step in one.steps] == words[1:]
        assert [step["metadata"]["num_swaps"] for step in one.steps] == list(range(1, len(words)))
        assert one.steps[-1]["cot"] == one.row["cot"]
        assert one.row["metadata"]["num_swaps"] == len(places) - 1
        assert not any(s.shape == "circle" for frame in frames[2:] for s in frame), "the ball must stay hidden"


@pytest.mark.parametrize("chance", [0.0, 0.3, 1.0])
def test_swaps_move_the_ball_as_often_as_asked_for(chance: float) -> None:
    # Catches a chance that counts for the wrong swaps, and answers that it unbalances.
    made = clips(300, families=("cups",), num_swaps=(5, 5), move_chance=chance)
    moves = sum(one.row["metadata"]["num_moves"] for one in made) / (5 * len(made))
    assert abs(moves - chance) < 0.05  # 2.3 standard deviations of 1,500 draws at 0.3 are 0.027
    assert set(Counter(one.row["answer"] for one in made).values()) == {100}


def test_on_a_grid_shapes_are_in_the_middle_of_squares_and_all_else_is_where_it_was() -> None:
    # Catches shapes between squares or in a neighbouring one, and cups or walls that are moved with them.
    for free, made in zip(clips(70), clips(70, grid=4), strict=True):
        assert free.row == made.row
        for before, after in zip(free.scene.frames, made.scene.frames, strict=True):
            for a, b in zip(before, after, strict=True):
                if a.shape not in SHAPES or made.row["family"] == "cups":
                    assert a == b
                else:
                    for x, y in ((a.x, b.x), (a.y, b.y)):
                        assert (y * 4 - 0.5).is_integer()
                        assert abs(x % 1 - y) <= 1 / 8 + 1e-9
    shapes = [s for one in clips(70, grid=4) for frame in one.scene.frames for s in frame if s.shape in SHAPES]
    assert len(shapes) > 1000


def test_every_clip_has_a_caption_that_does_not_conclude(probed: dict[str, list[Clip]]) -> None:
    # Catches a caption of another clip, and one that tells what a model is to find out by itself.
    for name, clips in probed.items():
        for one in clips[:40]:
            assert one.caption["video"] == one.row["video"]
            assert one.caption["question"] == synthetic.CAPTIONING
            assert one.caption["answer"] == one.scene.caption
            assert not re.search(r"\b(so|first|fastest|slowest|changed)\b", one.scene.caption, re.IGNORECASE), name
    assert len({one.scene.caption for clips in probed.values() for one in clips[:40]}) > 7 * 20


def test_captions_are_written_beside_the_questions(tmp_path: Path) -> None:
    # Catches captions that `vlrt train` does not read, or in another order.
    synthetic.write(tmp_path / "clips", Synthetic(), 7, workers=1)
    captions = triplets.read(tmp_path / "clips" / synthetic.CAPTIONS).rows
    questions = triplets.read(tmp_path / "clips" / synthetic.TRIPLETS).rows
    assert [row.video for row in captions] == [row.video for row in questions]
    assert captions[0].answer == synthetic.clip(Synthetic(), 0).scene.caption
    steps = triplets.read(tmp_path / "clips" / synthetic.STEPS).rows
    assert {row.video for row in steps} == {row.video for row in questions if row.family == "cups"}


def test_events_are_as_many_as_the_answer_says(probed: dict[str, list[Clip]]) -> None:
    # Catches events that fall outside the clip or into one another.
    for one in probed["counting"][:150]:
        frames = [frame[0] for frame in one.scene.frames]
        steps = [moved(a, b)[0] for a, b in itertools.pairwise(frames)]
        found = {
            "switch": sum(a.hollow != b.hollow for a, b in itertools.pairwise(frames)),
            "jump": sum(abs(step) > 0.2 for step in steps),
            "turn": sum(a * b < 0 for a, b in itertools.pairwise(steps)),
        }
        kind = one.row["metadata"]["kind"]
        assert found[kind] == int(one.row["answer"])
        assert sum(found.values()) == found[kind], "only what is asked for happens"


def test_bounces_and_passes_differ_in_the_order_alone(probed: dict[str, list[Clip]]) -> None:
    # Catches bounces that keep a distance, which one frame would show, and a miscounted bounce.
    nearest = {True: [], False: []}
    for one in probed["collision"][:200]:
        offsets = np.array([(b.x - a.x) + (b.y - a.y) for a, b in one.scene.frames])
        gaps = np.abs(offsets)
        meets = [t for t in range(1, len(gaps)) if gaps[t] == pytest.approx(gaps[t - 1]) and gaps[t] < 0.1]
        bounces = sum(offsets[t] * offsets[t - 1] > 0 for t in meets)
        answer = one.row["answer"]
        assert {"no": 0, "yes": 1}.get(answer, answer) in (bounces, str(bounces))
        for t in meets:
            nearest[bool(offsets[t] * offsets[t - 1] > 0)].append(round(float(gaps[t]), 6))
    assert set(nearest[True]) == set(nearest[False])


def test_what_comes_out_is_what_the_answer_says(probed: dict[str, list[Clip]]) -> None:
    # Catches lanes mixed up between going in and coming out, and a change that can be seen to happen.
    names = {value: name for name, value in COLOURS.items()}
    for one in probed["occlusion"][:150]:
        kind, (first, last) = one.row["metadata"]["kind"], (one.scene.frames[0], one.scene.frames[-1])
        if kind == "change":
            colour, shape = first[0].colour != last[0].colour, first[0].shape != last[0].shape
            assert one.row["answer"] == ["nothing", "colour", "shape", "both"][colour + 2 * shape]
        else:
            went = next(s for s in first if f"{names.get(s.colour)} {s.shape} went in" in one.row["question"])
            came = next(s for s in last if s.y == went.y and s.shape != "wall")
            assert one.row["answer"] == (names[came.colour] if kind == "colour" else came.shape)
        for before, after in itertools.pairwise(one.scene.frames):
            if [(s.shape, s.y) for s in before] != [(s.shape, s.y) for s in after]:
                hidden = [abs(s.x - 0.5) + s.size < before[-1].size for s in (*before[:-1], *after[:-1])]
                assert all(hidden)


def test_the_first_and_the_fastest_are(probed: dict[str, list[Clip]]) -> None:
    # Catches ranks given to the wrong shape.
    names = {value: name for name, value in COLOURS.items()}
    for one in probed["speed"][:60]:
        steps = {names[a.colour]: abs(moved(a, b)[0]) for a, b in zip(*one.scene.frames[:2], strict=True)}
        best = max if one.row["metadata"]["kind"] == "fastest" else min
        assert one.row["answer"] == best(steps, key=steps.__getitem__)
    for one in probed["first"][:60]:
        events = {}
        for track in zip(*one.scene.frames, strict=True):
            steps = [(round(moved(a, b)[0], 6), a.hollow != b.hollow) for a, b in itertools.pairwise(track)]
            events[names[track[0].colour]] = next(t for t, step in enumerate(steps) if step != steps[0])
        assert one.row["answer"] == min(events, key=events.__getitem__)


# --- balance and splits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_balanced(family: str, split: str) -> None:
    # Catches a kind, form or answer that comes up more often: the commonest one would be a free guess.
    cells = 2 * sum(FAMILIES[family].kinds.values())
    made = clips(3 * cells, families=(family,), split=split)
    slots = Counter(
        (r["metadata"]["kind"], r["metadata"]["form"], r["metadata"]["candidates"].index(r["answer"]))
        for r in (c.row for c in made)
    )
    assert set(slots.values()) == {3}
    assert len(slots) == cells


def test_the_right_option_stands_at_any_letter(probed: dict[str, list[Clip]]) -> None:
    # Catches options in the order in which the clip was made: answer first, or counts ascending.
    for made in probed.values():
        rows = [c for c in made if "choices" in c.row]
        assert len(rows) == len(made) // 2
        for letter in range(4):
            hits = [c for c in rows if letter < len(c.row["choices"])]
            of_these = [c for c in hits if c.row["choices"].index(c.row["answer"]) == letter]
            assert not hits or len(of_these) / len(hits) <= chance(hits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_question_alone_does_not_tell(family: str, probed: dict[str, list[Clip]]) -> None:
    # Catches answers that depend on the wording or on the names in it.
    learnt, tested = probed[family][::2], probed[family][1::2]
    per_text: dict[str, Counter[str]] = {}
    for one in learnt:
        for key in (one.row["question"], one.row["metadata"]["kind"]):
            per_text.setdefault(key, Counter())[one.row["answer"]] += 1
    guesses = [per_text.get(c.row["question"]) or per_text[c.row["metadata"]["kind"]] for c in tested]
    right = [g.most_common(1)[0][0] == c.row["answer"] for g, c in zip(guesses, tested, strict=True)]
    assert np.mean(right) <= chance(tested)


def test_splits_share_no_look_no_length_and_no_clip() -> None:
    # Catches test clips that were trained on, and lengths or looks that leak from one split to another.
    looks, lengths, scenes = [], [], []
    for split in SPLITS:
        made = clips(420, split=split)
        named = [
            s
            for c in made
            for frame in c.scene.frames
            for s in frame
            if s.shape in SHAPES and c.row["family"] != "cups"
        ]
        looks.append({(s.colour, s.shape) for s in named})
        lengths.append({(c.row["family"] == "cups", c.row["metadata"]["num_frames"]) for c in made})
        scenes.append({c.scene.frames for c in made})
        assert {colour for colour, _ in looks[-1]} == set(COLOURS.values())
        assert {shape for _, shape in looks[-1]} == set(SHAPES)
        assert all(c.row["split"] == split and c.row["video"].startswith(f"videos/{split}-") for c in made)
    for group in (looks, lengths, scenes):
        assert all(group)
        assert not group[0] & group[1] | group[0] & group[2] | group[1] & group[2]
    swaps = [Synthetic(split=split).lengths(3, 8) for split in SPLITS]
    assert swaps == [[3, 5, 6, 8], [4], [7]]
    assert Synthetic(split="test").lengths(3, 5) == [3, 4, 5]


def test_clips_depend_on_seed_split_and_index_alone() -> None:
    # Catches state that runs from clip to clip, which a resumed or parallel run would not have.
    settings = Synthetic(seed=3)
    alone = clip(settings, 11)
    assert alone == [clip(settings, i) for i in range(12)][11]
    assert alone.scene != clip(Synthetic(seed=4), 11).scene


# --- one frame --------------------------------------------------------------------------------------------------------


def look_at(made: list[Clip], place: float) -> NDArray[np.float32]:
    """Return one frame of each clip as 14 x 14 x 3 values, centred."""
    pictures = np.stack([draw(c.scene.frames[round(place * (len(c.scene.frames) - 1))], 28, 0) for c in made])
    small = pictures.reshape(len(made), 14, 2, 14, 2, 3).mean((2, 4)).reshape(len(made), -1).astype(np.float32)
    centred: NDArray[np.float32] = (small - small.mean(0)) / 64
    return centred


def probe(x: NDArray[np.float32], answers: list[str]) -> tuple[float, float]:
    """Return the accuracies of ridge regression and nearest neighbour, learnt on even rows and tested on odd ones."""
    names, y = np.unique(answers, return_inverse=True)
    known, asked, labels, truth = x[::2], x[1::2], y[::2], y[1::2]
    ridge = np.linalg.solve(known.T @ known + 30 * np.eye(x.shape[1]), known.T @ np.eye(len(names))[labels])
    squares = (known**2).sum(1) - 2 * asked @ known.T
    linear, nearest = (asked @ ridge).argmax(1) == truth, labels[squares.argmin(1)] == truth
    return float(linear.mean()), float(nearest.mean())


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_frame_does_not_tell(family: str, place: float, probed: dict[str, list[Clip]]) -> None:
    # Catches clips that start, pass or end where their answer can be seen: a mover that starts at its left.
    made = probed[family]
    accuracies = probe(look_at(made, place), [c.row["answer"] for c in made])
    assert max(accuracies) <= chance(made[1::2])


def test_the_probe_finds_what_one_frame_tells(probed: dict[str, list[Clip]]) -> None:
    # Catches a probe too weak to find anything, before which every data set would look fair.
    made = probed["cups"]
    assert max(probe(look_at(made, 0.0), [c.row["metadata"]["start"] for c in made])) > 0.95
    lanes = [str(c.scene.frames[0][0].y) for c in probed["speed"]]
    assert set(lanes) == {str(y) for y in LANES}
    assert max(probe(look_at(probed["direction"], 0.0), [hint(c) for c in probed["direction"]])) > 0.5


def hint(one: Clip) -> str:
    """Return the quarter of the frame in which the named shape starts: a leak that a worse data set could have."""
    named = one.scene.frames[0][-1]
    return f"{named.x > 0.5}{named.y > 0.5}"


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_what_leaves_on_one_side_comes_back_on_the_other() -> None:
    # Catches a shape that is cut off at the border: its size would tell where it is going.
    whole = draw((Sprite("square", (255, 255, 255), 0.5, 0.5, 0.2),), 60, 0)
    split = draw((Sprite("square", (255, 255, 255), 1.0, 0.0, 0.2),), 60, 0)
    np.testing.assert_array_equal(np.roll(whole, (30, 30), (0, 1)), split)


def test_shapes_and_hollow_shapes_look_different() -> None:
    # Catches two names for one picture, which would make questions unanswerable.
    pictures = [
        draw((Sprite(shape, (255, 255, 255), 0.5, 0.5, 0.1, hollow),), 56, 0) for shape in OUTLINES for hollow in (0, 1)
    ]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert np.abs(a.astype(int) - b).sum() > 10 * 255


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_hold_what_the_rows_say(tmp_path: Path) -> None:
    # Catches wrong sizes, rates, lengths or frames: the pixels of the file are those of the scene.
    settings = Synthetic(size=84, fps=5)
    rows = rows_of(write(tmp_path / "out", settings, 14, workers=1))
    for i, row in enumerate(rows):
        with av.open(str(tmp_path / "out" / str(row["video"]))) as file:
            stream = file.streams.video[0]
            assert (stream.width, stream.height, stream.average_rate) == (84, 84, 5)
            frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in file.decode(stream)]
        made = clip(settings, i)
        assert row == made.row
        assert len(frames) == len(made.scene.frames) == row["metadata"]["num_frames"]  # type: ignore[index]
        for frame, sprites in zip(frames, made.scene.frames, strict=True):
            assert np.abs(frame - draw(sprites, 84, made.scene.background)).mean() < 6
        assert row["answer"] in row.get("choices", [row["answer"]])  # type: ignore[operator]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    # Catches half-written files taken for whole, clips made twice, and a data set that depends on interruptions.
    settings = Synthetic()
    write(tmp_path / "whole", settings, 40, workers=1)

    def stop(done: int, num: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "parts", settings, 40, workers=1, progress=stop)
    assert not (tmp_path / "parts" / synthetic.TRIPLETS).exists()
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts" / synthetic.VIDEOS).iterdir()}
    assert 0 < len(made) < 40
    seen: list[tuple[int, int]] = []
    write(tmp_path / "parts", settings, 30, workers=1, progress=lambda *step: seen.append(step))
    write(tmp_path / "parts", settings, 40, workers=1)
    assert seen[0] == (min(len(made), 30), 30)
    assert seen[-1] == (30, 30)
    assert made == {p: p.stat().st_mtime_ns for p in made}
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def test_a_clip_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    # Catches a part of a file left under any name, and an error of another package let through.
    settings = Synthetic()
    write(tmp_path, settings, 1, workers=1)
    (tmp_path / clip(settings, 1).row["video"]).mkdir()  # exists: is taken for made
    (tmp_path / synthetic.TRIPLETS).unlink()
    (tmp_path / synthetic.TRIPLETS).mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        write(tmp_path, settings, 1, workers=1)
    with pytest.raises(IsADirectoryError):
        synthetic.encode(tmp_path / clip(settings, 1).row["video"], clip(settings, 1).scene, settings)
    assert not list((tmp_path / synthetic.VIDEOS).glob(".*"))


def test_the_command_writes_in_parallel_what_one_process_writes(tmp_path: Path) -> None:
    # Catches workers that share random numbers, and a command line that passes settings on wrongly.
    command = [sys.executable, "-m", "vlrt", "data", "synth", "out", "--n", "40", "--seed", "9"]
    command += ["--split", "validation"]
    command += ["--families", "cups", "first", "--size", "28", "--num-swaps", "2", "3", "--workers", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out/triplets.jsonl\n", "")
    settings = Synthetic(seed=9, split="validation", families=("cups", "first"), size=28, num_swaps=(2, 3))
    write(tmp_path / "here", settings, 40, workers=1)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "here")
    again = subprocess.run([*command, "--fps", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (again.returncode, again.stdout) == (1, "")
    assert "fps 4.0, and 2.0 was asked for" in again.stderr


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"families": ("cup",)}, "cups"),
        ({"families": ()}, "none"),
        ({"families": ("cups", "cups")}, "once"),
        ({"forms": ("open",)}, "choice"),
        ({"split": "dev"}, "validation"),
        ({"seed": -1}, "seed"),
        ({"size": 57}, "57"),
        ({"size": 14}, "14"),
        ({"fps": 0}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"num_frames": (10, 16)}, "num_frames"),
        ({"num_frames": (16, 19)}, "num_frames"),
        ({"num_frames": (18, 16)}, "num_frames"),
        ({"num_swaps": (0, 3)}, "num_swaps"),
        ({"move_chance": 1.5}, "move_chance"),
        ({"grid": 1}, "grid"),
        ({"grid": -4}, "grid"),
    ],
)
def test_settings_of_which_nothing_can_be_made_are_refused(settings: dict[str, object], word: str) -> None:
    # Catches settings that fail in a worker, clips later, or never.
    with pytest.raises(ConfigError, match=word):
        Synthetic(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["{", "[]", '{"seed": "x"}', '{"sede": 1}'])
def test_a_damaged_settings_file_is_refused(tmp_path: Path, content: str) -> None:
    # Catches a data set gone on with under settings that nobody knows.
    (tmp_path / synthetic.SETTINGS).write_text(content)
    with pytest.raises(ConfigError, match="damaged"):
        write(tmp_path, Synthetic(), 1, workers=1)


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    # Catches clips written among somebody's files.
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ConfigError, match="accepted: a new or an empty directory"):
            write(out, Synthetic(), 1, workers=1)
    assert files_of(tmp_path) == {"notes.txt": b"mine"}
    for wrong in ({"num": 0}, {"num": 1, "workers": 0}):
        with pytest.raises(ConfigError, match="accepted: 1 "):
            write(tmp_path / "new", Synthetic(), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("num_frames", [(12, 12), (12, 40)])
def test_the_shortest_and_longest_clips_can_be_made(split: str, num_frames: tuple[int, int]) -> None:
    # Catches events that find no room.
    for one in clips(210, split=split, num_frames=num_frames, num_swaps=(1, 12), seed=1):
        assert one.row["answer"] in one.scene.candidates
        assert one.row["cot"]
