"""Damages JSON documents at random, for tests that only errors of ours come out."""

import random
from collections.abc import Sequence
from typing import Any


def places(values: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value within a JSON document."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [at] * bool(at) + [place for key, value in inner for place in places(value, (*at, key))]


def damaged_json(values: Any, rng: random.Random, strange: Sequence[Any], names: Sequence[str]) -> Any:
    """Return a JSON document with one to three values replaced by `strange` ones, removed, or given other `names`."""
    for _ in range(rng.randint(1, 3)):
        *outer, last = rng.choice(places(values))
        parent = values
        for key in outer:
            parent = parent[key]
        how = rng.random()
        if how < 0.7:
            parent[last] = rng.choice(strange)
        elif isinstance(parent, dict) and how < 0.85:
            parent[rng.choice(names)] = parent.pop(last)
        else:
            del parent[last]
        if not places(values):
            break
    return values
