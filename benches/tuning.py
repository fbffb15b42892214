"""Searches the block sizes, warps and stages of a kernel on the card at hand, and writes its configs/<op>.json anew.

A candidate is verified before it is timed; one that does not compile or launch is passed over, with its reason. The new
file goes where it is told, never into the tree. Knows no op: `tune_<op>.py` have candidates and cases.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benches import timing
from benches.inputs import Arguments, Setting, with_own_caches
from benches.op_bench import verify
from vlrt.kernels import configs

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """One row of a config file that is searched for.

    Attributes:
        op: name of the registered op.
        file: name of the config file, without ending.
        head_dim: of the row.
        length: of the row: up to which length it serves; None: any.
        given: arguments at which candidates are timed.
        checked: smaller arguments at which they are verified.
        candidates: configs.
    """

    op: str
    file: str
    head_dim: int
    length: int | None
    given: Arguments
    checked: Arguments
    candidates: Sequence[Config]


def grid(**choices: Sequence[Any]) -> list[Config]:
    """Return every combination."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


@contextmanager
def forced(file: str, config: Config) -> Iterator[None]:
    """Let the launcher find this config, whatever the file says."""
    found = configs.lookup

    def lookup(op: str, *rest: Any) -> Config:
        return config if op == file else found(op, *rest)

    with mock.patch.object(configs, "lookup", lookup):
        yield


def search(problem: Problem, setting: Setting, expired: Callable[[], bool]) -> dict[str, Any]:
    """Return the fastest config, `config`, and what became of every candidate; the shipped one is tried first."""
    run = setting.op(problem.op)
    dtype, device = problem.given[0].dtype, torch.device(setting.device)
    arch = configs.architecture(device)
    length = problem.length or 2**30
    shipped = dict(configs.lookup(problem.file, arch, dtype, problem.head_dim, length))
    tried: list[dict[str, Any]] = []
    for config in [shipped, *(dict(c) for c in problem.candidates if dict(c) != shipped)]:
        if expired():
            break
        with forced(problem.file, config):
            tried.append({"config": config, **_attempt(problem, run, setting)})
    timed = [row for row in tried if "seconds" in row]
    best = min(timed, key=lambda row: row["seconds"]["median"]) if timed else None
    found = {"file": problem.file, "head_dim": problem.head_dim, "length": problem.length, "arch": arch}
    found |= {"tried": tried, "of": len(problem.candidates) + 1, "config": best and best["config"]}
    if best is not None and "seconds" in tried[0]:
        found["speedup"] = tried[0]["seconds"]["median"] / best["seconds"]["median"]
    return found


def _attempt(problem: Problem, run: Callable[..., Any], setting: Setting) -> dict[str, Any]:
    try:
        verify(problem.op, run, problem.checked)
        own = with_own_caches(problem.op, problem.given)
        with torch.inference_mode():
            seconds = timing.measure(lambda: run(*own), setting.device, seconds=0.1)
    except Exception as error:
        if setting.device == "cuda":
            torch.cuda.synchronize()  # raises where the device is lost: nothing more can be tried then
        return {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    return {"seconds": seconds}


def write(found: Sequence[Mapping[str, Any]], directory: Path) -> list[Path]:
    """Write config files with the rows that were found before the shipped ones; return their paths."""
    written = []
    for file in sorted({row["file"] for row in found if row["config"]}):
        own = [row for row in found if row["file"] == file and row["config"]]
        own.sort(key=lambda row: (row["head_dim"], row["length"] is None, row["length"]))
        rows = [
            {"arch": [row["arch"]], "dtype": "half", **{key: row[key] for key in ("head_dim", "length", "config")}}
            for row in own
        ]
        rows += configs.rows(file)
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{file}.json"
        path.write_text(f'{{\n  "tuned": true,\n  "rows": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
        written.append(path)
    return written


def main(op: str, problems: Callable[[Setting], Iterator[Problem]]) -> None:
    """Search the problems of one op; print what was found and write its config file."""
    parser = argparse.ArgumentParser(prog=f"benches.tune_{op}")
    parser.add_argument("--out", type=Path, required=True, help="directory of the new config files")
    args = parser.parse_args()
    setting = Setting("cuda")
    found = [search(problem, setting, lambda: False) for problem in problems(setting)]
    for row in found:
        print(json.dumps({key: value for key, value in row.items() if key != "tried"}))
    print(*write(found, args.out), sep="\n")
