"""vlrt beside its peers: one checkpoint, the same frames, prompt, answer length and threads, in turn in one run.

    python -m benches.bench_peers [--shape small] [--engines ...] [--frames 16 64] [--rounds 5] [--chain-tokens 300]

Every engine lives in a process of its own; the processes answer in turn, round by round. The clock runs from frames in
memory to the last token. A time to the first token is that of an answer of one token. The frames are shifted by
another number of pixels in each request, so that no prefix cache knows them, and alike for all engines, so that their
tokens can be compared. What cannot run is reported with the reason. Weights are random: lengths are forced, and
agreement says how close the arithmetic is, not how good the answers are.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benches import machine, material
from benches.engines import openvino_models
from benches.engines.client import Absent, Client
from benches.engines.peers import PEERS, start
from benches.engines.protocol import Request
from vlrt import config, prompt, video
from vlrt.bench import QUESTION
from vlrt.checkpoint import Checkpoint
from vlrt.quantiles import quantiles

ANSWER_TOKENS = 6
REFERENCES = ("hf-fp32", "vlrt-fp32")  # the first that runs is what the others' tokens are held against
KINDS = ("first_token", "answer", "latent", "chain")


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, print a table, write JSON; return its path."""
    args = _arguments(argv)
    console = Console(stderr=True, width=150)
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        asked = _Asked(args.shape, args.frames, directory)
        engines, absent = _start(args, directory, console)
        try:
            samples = _measure(args, asked, engines, absent, console)
            errors = _logits(asked, engines, directory)
            described = {name: engine.described for name, engine in engines.items()}
        finally:
            for engine in engines.values():
                engine.close()
    rows = [row for name in PEERS if name in samples for row in _rows(name, samples, args.frames)]
    for row in rows:
        row["relative_error_of_logits"] = errors.get(row["engine"])
    out = machine.write_result(
        "peers",
        argv if argv is not None else sys.argv[1:],
        args.out,
        shape=args.shape,
        threads=args.threads,
        answer_tokens=ANSWER_TOKENS,
        chain_tokens=args.chain_tokens,
        reference=_reference(samples),
        rows=rows,
        engines=described,
        absent=absent,
    )
    console.print(table(rows, absent))
    console.print(str(out))
    return out


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benches.bench_peers", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", default="small")
    parser.add_argument("--engines", nargs="+", default=list(PEERS), choices=PEERS, metavar="ENGINE")
    parser.add_argument("--frames", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chain-tokens", type=int, default=300, help="0: no chain")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--python-openvino", help=f"a Python with OpenVINO GenAI and optimum-intel; else ${openvino_models.VARIABLE}"
    )
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


class _Asked:
    """The requests: frames on disk, and the prompt's text."""

    def __init__(self, shape: str, frames: Sequence[int], directory: Path) -> None:
        checkpoint = material.checkpoint(shape)
        model = Checkpoint.open(checkpoint).model
        media = [prompt.Media(False, (1, 16, 16), 1.0)]
        tokenizer = prompt.Tokenizer.open(checkpoint)
        self._text = prompt.build(tokenizer, model, QUESTION, media, reasoning="direct").text
        self._sources = {count: _save(model, count, directory) for count in frames}
        self.shortest = min(frames)

    def request(self, frames: int, tokens: int, **more: Any) -> Request:
        return Request(str(self._sources[frames]), self._text, QUESTION, tokens, num_frames=frames, **more)


def _save(model: config.Model, count: int, directory: Path) -> Path:
    path = directory / f"frames-{count}.npy"
    np.save(path, video.load(material.clip(), model.video, model.vision, num_frames=count).data)
    return path


def _start(args: argparse.Namespace, logs: Path, console: Console) -> tuple[dict[str, Client], dict[str, str]]:
    """Start what runs here; return the engines, and why the others are absent."""
    engines: dict[str, Client] = {}
    absent: dict[str, str] = {}
    for name in args.engines:
        console.print(f"starting {name} (the first time, what it runs is exported, which takes minutes)")
        try:
            engines[name] = start(
                PEERS[name], args.shape, threads=args.threads, log=logs / f"{name}.log", python=args.python_openvino
            )
        except Absent as reason:
            absent[name] = str(reason)
            console.print(f"{name} is absent: {reason}")
    return engines, absent


Samples = dict[str, dict[tuple[int, str], list[dict[str, Any]]]]


def _measure(
    args: argparse.Namespace, asked: _Asked, engines: dict[str, Client], absent: dict[str, str], console: Console
) -> Samples:
    """Ask all engines in turn; one that fails is absent from then on, with what it has answered."""
    plan: list[tuple[int, int, str, Callable[[int], Request]]] = []
    for count in args.frames:
        for number in range(args.rounds + 1):  # the first round warms up
            if count == min(args.frames):
                plan.append((number, count, "first_token", lambda s, c=count: asked.request(c, 1, shift=s)))
            plan.append((number, count, "answer", lambda s, c=count: asked.request(c, ANSWER_TOKENS, shift=s)))
            plan.append(
                (
                    number,
                    count,
                    "latent",
                    lambda s, c=count: asked.request(c, ANSWER_TOKENS, shift=s, reasoning="latent"),
                )
            )
        if args.chain_tokens and count == min(args.frames):
            plan.append((1, count, "chain", lambda s, c=count: asked.request(c, args.chain_tokens, shift=s)))
    samples: Samples = {name: {} for name in engines}
    with Progress(console=console) as progress:
        task = progress.add_task("asking", total=len(plan) * len(engines))
        for shift, (number, count, kind, request) in enumerate(plan):
            for name in list(engines):
                progress.update(task, description=f"{name}: {kind}, {count} frames", advance=1)
                if kind == "latent" and PEERS[name].engine != "vlrt":
                    continue
                try:
                    reply = engines[name].ask(request(shift))
                except Absent as reason:
                    absent[name] = f"it failed at {kind}, {count} frames: {reason}"
                    del engines[name]
                    continue
                if number:
                    samples[name].setdefault((count, kind), []).append(reply)
    return samples


def _logits(asked: _Asked, engines: dict[str, Client], directory: Path) -> dict[str, float]:
    """Return the distance of each engine's first logits from fp32's, over their length, where it gives logits."""
    found: dict[str, Any] = {}
    for name, engine in engines.items():
        if PEERS[name].engine == "openvino":
            continue
        path = directory / f"{name}.npy"
        try:
            engine.ask(asked.request(asked.shortest, 1, logits_to=str(path)))
        except Absent:  # what it answered before counts
            continue
        found[name] = np.load(path).astype(np.float64)
    reference = next((found[name] for name in REFERENCES if name in found), None)
    if reference is None:
        return {}
    return {name: float(np.linalg.norm(x - reference) / np.linalg.norm(reference)) for name, x in found.items()}


def _reference(samples: Samples) -> str | None:
    return next((name for name in REFERENCES if samples.get(name)), None)


def _rows(name: str, samples: Samples, frames: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row per length of video: quantiles of seconds, memory, agreement with fp32."""
    rows, reference = [], _reference(samples)
    for count in frames:
        own = {kind: samples[name].get((count, kind), []) for kind in KINDS}
        if not own["answer"]:
            continue
        row: dict[str, Any] = {
            "engine": name,
            "precision": PEERS[name].precision,
            "num_frames": count,
            "rounds": len(own["answer"]),
            "seconds": {kind: quantiles([r["seconds"] for r in found]) for kind, found in own.items() if found},
            "peak_host_memory_bytes": max(r["peak_host_memory_bytes"] for found in own.values() for r in found),
        }
        if reference is not None:
            for kind in ("answer", "chain"):
                wanted = samples[reference].get((count, kind), [])
                pairs = list(zip(own[kind], wanted, strict=False))
                if pairs:
                    row[f"{kind}_agreement"] = agreement([(a["token_ids"], b["token_ids"]) for a, b in pairs])
        rows.append(row)
    return rows


def agreement(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
    """Return the share of tokens that agree up to the first that does not, over pairs of equally long answers."""
    same = total = 0
    for ours, theirs in pairs:
        total += len(theirs)
        same += next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(theirs))
    return same / total


def table(rows: Sequence[dict[str, Any]], absent: dict[str, str]) -> Table:
    """Return the rows as a table."""
    made = Table(title="seconds (medians); peak memory; tokens that agree with fp32", caption=_absent(absent))
    for column in ("engine", "precision", "frames", "first token", "answer", "with latents", "chain", "peak MB"):
        made.add_column(column, justify="left" if column in ("engine", "precision") else "right")
    for column in ("agreement: answer", "chain", "logits off by"):
        made.add_column(column, justify="right")
    for row in rows:
        seconds = [f"{row['seconds'][k]['median']:.2f}" if k in row["seconds"] else "-" for k in KINDS]
        shares = [f"{row[k]:.0%}" if k in row else "-" for k in ("answer_agreement", "chain_agreement")]
        error = row.get("relative_error_of_logits")
        made.add_row(
            row["engine"],
            row["precision"],
            str(row["num_frames"]),
            *seconds,
            f"{row['peak_host_memory_bytes'] / 1e6:.0f}",
            *shares,
            "-" if error is None else f"{error:.2g}",
        )
    return made


def _absent(absent: dict[str, str]) -> str | None:
    return "\n".join(f"absent: {name}: {reason}" for name, reason in absent.items()) or None


if __name__ == "__main__":
    main()
