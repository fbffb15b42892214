"""Families of questions that need time, each a way of making clips whose single frames do not tell the answer.

Why they do not: in every family the distribution of each single frame is the same whatever the answer is. Shapes
move on a torus from a place drawn evenly, so that they are anywhere at any time; states that events flip start either
way; of two shapes that meet, either is on the left at first; cups look alike. And the answer is drawn before the clip,
evenly among the candidates, so that the question does not tell it either.

Knows words and places; no pixels and no files.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlrt.train.scenes import COLOURS, GREY, SHAPES, Asked, Scene, Sprite

Look = tuple[str, str]  # colour, shape
Facts = dict[str, int | float | str]
Path = list[tuple[float, float]]  # (x, y) per frame

RADIUS = 0.1
LANES = (0.2, 0.5, 0.8)
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PLACES = ("left", "middle", "right")
SWAPS = ((0, 1), (1, 2), (0, 2))
MIN_FRAMES = 12  # so that four events find room
FRAMES_BEFORE_SWAPS, FRAMES_PER_SWAP, FRAMES_AFTER_SWAPS = 4, 2, 2  # even: a swap fills one temporal patch of two


@dataclass(frozen=True)
class Cast:
    """What a clip is made with: its random numbers, the looks of its split, and its length."""

    rng: np.random.Generator
    looks: tuple[Look, ...]
    num_frames: int
    num_swaps: int
    move_chance: float

    def pick(self, count: int) -> list[Look]:
        """Return looks that share neither colour nor shape, in random order."""
        while True:
            found = [self.looks[i] for i in self.rng.permutation(len(self.looks))[:count]]
            if all(len(set(part)) == count for part in zip(*found, strict=True)):
                return found

    def shuffled(self, things: Sequence[int]) -> list[int]:
        """Return things in random order."""
        return [things[i] for i in self.rng.permutation(len(things))]

    def sign(self) -> int:
        """Return 1 or -1."""
        return int(self.rng.choice((-1, 1)))

    def times(self, count: int) -> list[int]:
        """Return frames, in order, at which events happen: two or more apart, and away from both ends."""
        room = self.num_frames - 3 - (count - 1)
        return [int(t) + 2 + i for i, t in enumerate(sorted(self.rng.choice(room, count, replace=False)))]


@dataclass(frozen=True)
class Family:
    """One family of questions.

    Attributes:
        kinds: how many answers each kind of its questions has.
        make: makes a clip of a kind and an answer.
        roams: whether its shapes may be anywhere, so that they can be put on a grid.
    """

    kinds: Mapping[str, int]
    make: Callable[[Cast, str, int], Scene]
    roams: bool = True


def direction(cast: Cast, kind: str, slot: int) -> Scene:
    """Which way does a shape move, beside another that moves some other way?"""
    named, other = cast.pick(2)
    names = list(DIRECTIONS)
    ways = [names[slot], names[cast.shuffled([i for i in range(4) if i != slot])[0]]]
    paths = [_straight(cast, DIRECTIONS[way], float(cast.rng.uniform(0.035, 0.06))) for way in ways]
    frames = [(_sprite(other, *there), _sprite(named, *here)) for here, there in zip(*paths, strict=True)]
    seen = " ".join(f"({int(10 * x)},{int(10 * y)})" for x, y in paths[0][:: max(1, cast.num_frames // 5)])
    cot = f"The {_name(named)} is at {seen}: {ways[0]}."
    moves = zip((named, other), ways, strict=True)
    caption = " ".join(sorted(f"The {_name(look)} moves {way}." for look, way in moves))
    return _scene(cast, f"Which way does the {_name(named)} move?", slot, names, caption, cot, frames)


def speed(cast: Cast, kind: str, slot: int) -> Scene:
    """Which of three shapes, each in its lane, is the fastest or the slowest?"""
    looks = cast.pick(3)
    rates = [rate * float(cast.rng.uniform(0.9, 1.1)) for rate in (0.065, 0.033, 0.014)]
    first = rates.pop(0 if kind == "fastest" else -1)
    others = iter(cast.shuffled([0, 1]))
    speeds = [first if i == slot else rates[next(others)] for i in range(3)]
    lanes = cast.shuffled([0, 1, 2])
    paths = [_straight(cast, (cast.sign(), 0), s, LANES[lane]) for s, lane in zip(speeds, lanes, strict=True)]
    frames = [
        tuple(_sprite(look, *at) for look, at in zip(looks, now, strict=True)) for now in zip(*paths, strict=True)
    ]
    colours = [colour for colour, _ in looks]
    seen = ", ".join(f"{c} {round(100 * s)}" for c, s in zip(colours, speeds, strict=True))
    cot = f"Steps: {seen}. The {kind} is {colours[slot]}."
    by_lane = (f"{_name(looks[i])} {round(100 * speeds[i])}" for i in sorted(range(3), key=lanes.__getitem__))
    caption = f"Steps from top to bottom: {', '.join(by_lane)}."
    return _scene(cast, f"Which shape is the {kind}?", slot, colours, caption, cot, frames)


def counting(cast: Cast, kind: str, slot: int) -> Scene:
    """How often does something happen to a shape: it switches between full and hollow, jumps, or turns back?"""
    (look,) = cast.pick(1)
    times = cast.times(slot + 1)
    y = float(cast.rng.uniform())
    frames = [(_sprite(look, x, y, hollow),) for x, hollow in _track(cast, kind, times)]
    ask = {"switch": "switch between full and hollow", "jump": "jump", "turn": "turn back"}[kind]
    seen = " ".join(f"{i} at {t}," for i, t in enumerate(times, 1))
    cot = f"Events: {seen} so {len(times)}."
    caption = f"The {_name(look)}: {', '.join(f'{kind} at {t // 2}' for t in times)}."
    return _scene(cast, f"How often does the {_name(look)} {ask}?", slot, "1234", caption, cot, frames)


def first(cast: Cast, kind: str, slot: int) -> Scene:
    """Which of three shapes is the first to switch, jump or turn back?"""
    looks = cast.pick(3)
    times = cast.times(3)
    others = iter(cast.shuffled([1, 2]))
    turns = [times[0] if i == slot else times[next(others)] for i in range(3)]
    lanes = cast.shuffled([0, 1, 2])
    tracks = [_track(cast, kind, [turn]) for turn in turns]
    frames = [
        tuple(_sprite(look, x, LANES[lane], full) for look, lane, (x, full) in zip(looks, lanes, now, strict=True))
        for now in zip(*tracks, strict=True)
    ]
    ask = {"switch": "switches between full and hollow", "jump": "jumps", "turn": "turns back"}[kind]
    colours = [colour for colour, _ in looks]
    seen = ", ".join(f"{colours[i]} at {turns[i]}" for i in sorted(range(3), key=turns.__getitem__))
    cot = f"Events: {seen}. First is {colours[slot]}."
    in_time = (f"the {_name(looks[i])}: {kind} at {turns[i] // 2}" for i in sorted(range(3), key=turns.__getitem__))
    caption = f"In time: {', '.join(in_time)}."
    return _scene(cast, f"Which shape {ask} first?", slot, colours, caption, cot, frames)


def collision(cast: Cast, kind: str, slot: int) -> Scene:
    """Do two shapes that meet bounce off each other or pass through each other, and how often do they bounce?

    In both cases they come equally close, and the number of meetings does not depend on the answer.
    """
    looks = cast.pick(2)
    meetings = 1 if kind == "whether" else 3
    bounces = [i < slot for i in cast.shuffled(range(meetings))]
    gap = cast.num_frames / meetings
    late = int(cast.rng.integers(-2, 3)) if meetings == 1 else 0
    times = [round((i + 0.5) * gap) - 0.5 + late for i in range(meetings)]  # between two frames
    order, across, middle = cast.sign(), float(cast.rng.uniform(0.15, 0.85)), float(cast.rng.uniform(0.4, 0.6))
    upright = bool(cast.rng.integers(2))
    frames = []
    for t in range(cast.num_frames):
        passed = sum(at < t and not bounce for at, bounce in zip(times, bounces, strict=True))
        apart = min(0.5, min(abs(t - at) for at in times) / gap)
        along = [middle + side * order * (-1) ** passed * apart / 2 for side in (-1, 1)]
        places = [(across, a) if upright else (a, across) for a in along]
        frames.append(tuple(_sprite(look, *at) for look, at in zip(looks, places, strict=True)))
    both = f"the {_name(looks[0])} and the {_name(looks[1])}"
    seen = ", ".join("bounce" if bounce else "pass" for bounce in bounces)
    if kind == "whether":
        names: Sequence[str] = ("no", "yes")
        ask = f"Do {both} bounce off each other?"
    else:
        names, ask = "0123", f"How often do {both} bounce off each other?"
    pair = " and ".join(sorted(_name(look) for look in looks))
    caption = f"A {pair} meet: {seen}."
    return _scene(cast, ask, slot, names, caption, f"They meet: {seen}. So {names[slot]}.", frames)


def occlusion(cast: Cast, kind: str, slot: int) -> Scene:
    """What comes out from behind a wall, where something else went in, or the same thing looks otherwise?"""
    return _changed(cast, slot) if kind == "change" else _came_out(cast, kind, slot)


def cups(cast: Cast, kind: str, slot: int) -> Scene:
    """Under which of three cups is the ball, after swaps of two of them?

    Where the ball moves with a chance of 2/3, each swap is one of three, evenly: after it the ball is anywhere with
    chance 1/3, wherever it was, so that one swap missed loses the answer.
    """
    swaps, held = [], [slot]  # backwards
    for _ in range(cast.num_swaps):
        moving = [swap for swap in SWAPS if held[-1] in swap]
        staying = next(swap for swap in SWAPS if held[-1] not in swap)
        swaps.append(moving[cast.rng.integers(2)] if cast.rng.uniform() < cast.move_chance else staying)
        held.append(_swapped(held[-1], swaps[-1]))
    swaps.reverse()
    held.reverse()
    (cup, _), (ball, _) = cast.pick(2)
    colour, xs = COLOURS[cup], (0.18, 0.5, 0.82)
    rest = tuple(Sprite("cup", colour, x, 0.6, 0.12) for x in xs)
    lifted = tuple(Sprite("cup", colour, x, 0.25, 0.12) for x in xs)
    shown = (Sprite("circle", COLOURS[ball], xs[held[0]], 0.65, 0.07), *lifted)
    frames = [shown, shown] + [rest] * (FRAMES_BEFORE_SWAPS - 2)
    for a, b in swaps:
        for step in range(1, FRAMES_PER_SWAP + 1):
            part = step / (FRAMES_PER_SWAP + 1)
            lift = 0.25 * np.sin(np.pi * part)
            moved = {a: (xs[a] + part * (xs[b] - xs[a]), 0.6 - lift), b: (xs[b] + part * (xs[a] - xs[b]), 0.6 + lift)}
            frames.append(tuple(Sprite("cup", colour, *moved.get(i, (xs[i], 0.6)), 0.12) for i in range(3)))
    frames += [rest] * FRAMES_AFTER_SWAPS
    pairs = [f"{PLACES[a]} {PLACES[b]}" for a, b in swaps]
    caption = f"Ball {PLACES[held[0]]}. Swaps: {', '.join(pairs)}."
    followed = [f"{pair}: {PLACES[place]}" for pair, place in zip(pairs, held[1:], strict=True)]
    cots = [f"Ball {PLACES[held[0]]}. Swaps: {', '.join(followed[:n])}." for n in range(1, len(swaps) + 1)]
    steps = tuple(
        Asked(f"Where is the ball after swap {n}?", PLACES[held[n]], cots[n - 1], {"num_swaps": n})
        for n in range(1, len(swaps) + 1)
    )
    moves = sum(a != b for a, b in itertools.pairwise(held))
    facts: Facts = {"num_swaps": len(swaps), "num_moves": moves, "start": PLACES[held[0]]}
    ask = "The cups are swapped. Where is the ball at the end?"
    return _scene(cast, ask, slot, PLACES, caption, cots[-1], frames, facts, steps)


FAMILIES = {
    "direction": Family({"way": 4}, direction),
    "speed": Family({"fastest": 3, "slowest": 3}, speed),
    "counting": Family({"switch": 4, "jump": 4, "turn": 4}, counting),
    "first": Family({"switch": 3, "jump": 3, "turn": 3}, first),
    "collision": Family({"whether": 2, "count": 4}, collision),
    "occlusion": Family({"colour": 3, "shape": 3, "change": 4}, occlusion),
    "cups": Family({"place": 3}, cups, roams=False),
}


def looks_of(part: int, num_parts: int) -> tuple[Look, ...]:
    """Return the colours x shapes of one of `num_parts` parts: disjoint, yet with every colour and shape in each."""
    return tuple(
        (colour, shape)
        for c, colour in enumerate(COLOURS)
        for s, shape in enumerate(SHAPES)
        if (c + s) % num_parts == part
    )


def _came_out(cast: Cast, kind: str, slot: int) -> Scene:
    """Three shapes go behind a wall in three lanes, and come out in lanes of which any may be another."""
    looks, part = cast.pick(3), 0 if kind == "colour" else 1
    after = cast.shuffled([0, 1, 2])  # lane of each look
    asked = int(cast.rng.integers(3))
    free = iter(cast.shuffled([lane for lane in range(3) if lane != after[slot]]))
    before = [after[slot] if i == asked else next(free) for i in range(3)]
    wall, xs = _behind_wall(cast)
    frames = [
        (*(_sprite(look, x, LANES[(after if 2 * t >= len(xs) else before)[i]]) for i, look in enumerate(looks)), wall)
        for t, x in enumerate(xs)
    ]
    inn, out = ([_name(looks[lanes.index(lane)]) for lane in range(3)] for lanes in (before, after))
    caption = f"In: {', '.join(inn)}. Out: {', '.join(out)}."
    ask = f"What {kind} came out where the {_name(looks[asked])} went in?"
    cot = f"{caption} So {looks[slot][part]}."
    return _scene(cast, ask, slot, [look[part] for look in looks], caption, cot, frames)


def _changed(cast: Cast, slot: int) -> Scene:
    """One shape comes out with its colour, its shape, both or neither changed."""
    names = ("colour", "shape", "both", "nothing")
    (before,) = cast.pick(1)
    same = {"colour": (False, True), "shape": (True, False), "both": (False, False), "nothing": (True, True)}
    fits = [k for k in cast.looks if tuple(a == b for a, b in zip(before, k, strict=True)) == same[names[slot]]]
    after = fits[int(cast.rng.integers(len(fits)))]
    wall, xs = _behind_wall(cast)
    y = float(cast.rng.uniform(0.2, 0.8))
    frames = [(_sprite(after if 2 * t >= len(xs) else before, x, y), wall) for t, x in enumerate(xs)]
    caption = f"In: {_name(before)}. Out: {_name(after)}."
    cot = f"{caption} Changed: {names[slot]}."
    return _scene(cast, "What changed behind the wall?", slot, names, caption, cot, frames)


def _behind_wall(cast: Cast) -> tuple[Sprite, list[float]]:
    """Return a wall in the middle, and x per frame of what goes behind it on one side and comes out on the other."""
    xs = np.linspace(0.1, 0.9, cast.num_frames)
    return Sprite("wall", GREY, 0.5, 0.5, 0.17), [float(x) for x in (xs if cast.sign() > 0 else xs[::-1])]


def _straight(cast: Cast, way: tuple[int, int], rate: float, y: float | None = None) -> Path:
    """Return a path at one speed (widths of the frame per frame) from anywhere, or anywhere in the lane at y."""
    start, height = cast.rng.uniform(size=2)
    height = height if y is None else y
    return [((start + way[0] * rate * t) % 1, (height + way[1] * rate * t) % 1) for t in range(cast.num_frames)]


def _track(cast: Cast, kind: str, times: Sequence[int]) -> list[tuple[float, bool]]:
    """Return x and hollowness per frame of a shape to which something happens at `times`."""
    x, hollow, step = float(cast.rng.uniform()), bool(cast.rng.integers(2)), 0.0
    if kind == "turn":
        step = cast.sign() * float(cast.rng.uniform(0.04, 0.06))
    track = []
    for t in range(cast.num_frames):
        if t in times:
            hollow ^= kind == "switch"
            step = -step
            x += cast.sign() * float(cast.rng.uniform(0.25, 0.5)) if kind == "jump" else 0
        x = (x + step) % 1
        track.append((x, hollow))
    return track


def _swapped(place: int, swap: tuple[int, int]) -> int:
    return swap[1] if place == swap[0] else swap[0] if place == swap[1] else place


def _sprite(look: Look, x: float, y: float, hollow: bool = False) -> Sprite:
    return Sprite(look[1], COLOURS[look[0]], x, y, RADIUS, hollow)


def _name(look: Look) -> str:
    return f"{look[0]} {look[1]}"


def _scene(
    cast: Cast,
    question: str,
    slot: int,
    candidates: Sequence[str],
    caption: str,
    cot: str,
    frames: Sequence[tuple[Sprite, ...]],
    facts: Facts | None = None,
    steps: tuple[Asked, ...] = (),
) -> Scene:
    background = int(cast.rng.integers(15, 60))
    names = tuple(candidates)
    return Scene(question, names[slot], names, caption, cot, tuple(frames), background, facts or {}, steps)
