"""The `vlrt` command: one verb per function, each of which imports its part inside.

Answers and tables go to stdout, progress, warnings and errors to stderr. Exit codes: 0; 1 for a VlrtError, which is one
line on stderr; 2 for wrong usage; 130 after Ctrl-C; 141 when the reader of stdout has gone, quietly; 143 after SIGTERM.
"""

import argparse
import io
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import vlrt
from vlrt import arguments
from vlrt.errors import BackendUnavailable, BundleError, VlrtError

DECODER_WEIGHTS = {"ort": "decoder.bin", "torch": "weights-000.safetensors"}  # tell bundles apart

EXIT_ERROR, EXIT_CLOSED_PIPE = 1, 141  # after a signal: 128 + its number


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code; wrong usage raises SystemExit(2)."""
    stopped = _watch_signals()
    try:
        code = _run(argv)
    except BaseException:
        if not stopped:
            raise
        code = EXIT_ERROR
    return 128 + stopped[0] if stopped else code


def _watch_signals() -> list[int]:
    """Let Ctrl-C and SIGTERM end the work tidily; return a list that then holds the signal.

    What they raise may become another exception on its way: extensions, torch among them, put their own in its place.
    """
    stopped: list[int] = []

    def stop(number: int, _: object) -> None:
        stopped.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the parent has it ignored
            signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
    return stopped


def _run(argv: Sequence[str] | None) -> int:
    """Run one command line; return its exit code, every failure that has one in a line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer may hold what the terminal's encoding does not
    warnings.showwarning = lambda message, *_: _complain("warning", str(message))
    try:
        args = arguments.parser(COMMANDS, vlrt.__version__).parse_args(argv)
        command: Callable[[argparse.Namespace], None] = args.command
        command(args)
        sys.stdout.flush()
    except VlrtError as error:
        _complain("error", str(error))
        return EXIT_ERROR
    except ModuleNotFoundError as error:
        from vlrt.doctor import EXTRAS

        name, extra = (error.name or "").partition(".")[0], "train" if args.command is train else "export"
        if name not in EXTRAS[extra]:
            raise
        _complain("error", f"this command needs {name}, which is not installed; to do: pip install 'vlrt[{extra}]'")
        return EXIT_ERROR
    except MemoryError as error:
        _complain("error", f"memory ran out ({error}); ask with fewer or smaller frames, or close other programs")
        return EXIT_ERROR
    except OSError as error:  # of writing the answer: all others are VlrtErrors by now
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at exit
        if isinstance(error, BrokenPipeError):
            return EXIT_CLOSED_PIPE
        _complain("error", f"the output cannot be written: {error}")
        return EXIT_ERROR
    return 0


def export(args: argparse.Namespace) -> None:
    """Write a bundle from a checkpoint, with a progress bar, and print its parity record."""
    from rich.console import Console
    from rich.progress import Progress

    from vlrt import pretrained
    from vlrt.export import exporter

    notes: list[str] = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("export", total=1.0)
        path = exporter.export(
            pretrained.find(args.checkpoint),
            args.output,
            backend=args.backend,
            precision=args.precision,
            progress=lambda stage, fraction: progress.update(task, description=stage, completed=fraction),
            note=notes.append,
        )
    for text in notes:
        _complain("note", text)
    _print_parity(_bundle_facts(path)["parity"])
    _put(str(path))


def ask(args: argparse.Namespace) -> None:
    """Ask a bundle one question about one video."""
    from vlrt.reduction import Reduction

    if args.stream and (args.json or args.choices):
        args.parser.error(f"argument --stream: not allowed with {'--json' if args.json else '--choices'}")
    with vlrt.Runtime.open(args.bundle, backend=args.backend, device=args.device, threads=args.threads) as runtime:
        options = {
            "reasoning": args.reasoning,
            "max_tokens": args.max_tokens,
            "min_tokens": args.min_tokens,
            "num_frames": args.num_frames,
            "fps": args.fps,
            "reduce": Reduction(**_reduction(args)),
        }
        if args.stream:
            stream = runtime.stream(args.video, args.question, **options)
            for piece in stream:
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
            answer = stream.answer
        else:
            answer = runtime.ask(args.video, args.question, choices=args.choices, early_exit=args.early_exit, **options)
            _put(answer.to_dict() if args.json else answer.text)
    for warning in answer.warnings:
        _complain("warning", warning)


def info(args: argparse.Namespace) -> None:
    """Print what a bundle or a checkpoint holds."""
    from vlrt import pretrained

    path = pretrained.find(args.path)
    try:
        is_bundle, is_checkpoint = (path / "manifest.json").exists(), (path / "config.json").exists()
    except OSError as error:  # no permission, or a name that is too long
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    if is_bundle:
        facts = _bundle_facts(path)
    elif is_checkpoint:
        facts = _checkpoint_facts(path)
    else:
        given = "holds neither manifest.json (a bundle) nor config.json (a checkpoint)"
        raise BundleError(
            f"{path} {given if path.is_dir() else 'is not a directory'}; accepted: a bundle that `vlrt export` wrote, "
            "or a Hugging Face checkpoint"
        )
    if args.video is not None and args.size is not None:
        args.parser.error("argument --size: not allowed with --video")
    if args.frames is not None or args.video is not None:
        if not is_bundle:
            raise BundleError(f"{path} is a checkpoint; memory is predicted for bundles: export it first")
        _plan(path, args)
        return
    if args.json:
        _put(facts)
        return
    parity = facts.pop("parity", None)
    _print_table(str(path), ("what", "value"), _flat(facts))
    if parity is not None:
        _print_parity(parity)


def _plan(path: Path, args: argparse.Namespace) -> None:
    """Print what a question about a video takes."""
    from vlrt import memory_report

    facts = memory_report.report(
        path,
        num_frames=args.frames,
        size=args.size or (224, 224),
        video=args.video,
        question_tokens=args.question_tokens,
        reasoning=args.reasoning,
    )
    if args.json:
        _put(facts)
    else:
        _print_table(f"{path}: a question about a video", ("what", "value"), _flat(facts))


def doctor(args: argparse.Namespace) -> None:
    """Print which backends this machine has, and why not the others."""
    from vlrt.doctor import survey

    facts = survey()
    if args.json:
        _put(facts)
    else:
        rows = [(row["name"], "yes" if row["available"] else "no", row["reason"]) for row in facts["abilities"]]
        _print_table("this machine", ("what", "works", "with, or why not"), rows)
        facts["versions"] = {name: version or "not installed" for name, version in facts["versions"].items()}
        _print_table("details", ("what", "value"), _flat({k: v for k, v in facts.items() if k != "abilities"}))
    if not any(row["available"] for row in facts["abilities"] if "backend" in row["name"]):
        raise BackendUnavailable("no backend can run on this machine; `vlrt doctor` lists the reasons")


def init(args: argparse.Namespace) -> None:
    """Write a fresh, untrained checkpoint of a given shape."""
    from vlrt.fresh import write_checkpoint

    _put(str(write_checkpoint(args.output, shape=args.shape, seed=args.seed)))


def synth(args: argparse.Namespace) -> None:
    """Write clips of moving shapes with questions about them: mp4 files and triplets.jsonl."""
    from rich.console import Console
    from rich.progress import Progress

    from vlrt.config import from_dict
    from vlrt.train import synthetic

    names = ("seed", "split", "families", "forms", "size", "fps", "grid", "num_frames", "num_swaps", "move_chance")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    settings = from_dict(synthetic.Synthetic, given)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("clips", total=args.n)
        path = synthetic.write(
            args.output,
            settings,
            args.n,
            workers=args.workers,
            progress=lambda done, num: progress.update(task, completed=done, total=num),
        )
    _put(str(path))


def train(args: argparse.Namespace) -> None:
    """Train a checkpoint on triplets, with a progress bar; a run that was stopped goes on. Print where it went."""
    import dataclasses

    from rich.console import Console
    from rich.progress import Progress

    from vlrt import pretrained
    from vlrt.train import loop, settings

    chosen = settings.read(args.config, args.set)
    if args.system is not None:
        chosen = dataclasses.replace(chosen, system=args.system)
    is_main = loop.is_main_process()  # under torchrun the others are quiet
    base = loop.begin(pretrained.find(args.model), args.output, chosen, {"num_latents": args.latents})
    hides = not (is_main and sys.stderr.isatty())
    with Progress(console=Console(stderr=True), transient=True, disable=hides) as progress:
        task = progress.add_task(chosen.system, total=chosen.steps)

        def report(step: int, measured: dict[str, float]) -> None:
            shown = f"{chosen.system}: loss {measured['total']:.3f}, right {measured['exact']:.0%}"
            progress.update(task, completed=step, description=shown)

        files = {"validation": args.validation, "cache": args.cache}
        out = loop.train(base, args.data, args.output, chosen, **files, report=report)
    if is_main:
        _put(str(out))


def _bundle_facts(path: Path) -> dict[str, Any]:
    from vlrt import config
    from vlrt.bundle import Bundle

    bundle = Bundle.open(path)
    return {
        "kind": "bundle",
        "checkpoint": bundle.manifest.checkpoint,
        "vlrt_version": bundle.manifest.vlrt_version,
        "backend": bundle.backend,
        "precision": bundle.precision,
        "size_bytes": bundle.num_bytes,
        "model": config.to_dict(bundle.model),
        "parity": [config.to_dict(check) for check in bundle.parity],
    }


def _checkpoint_facts(path: Path) -> dict[str, Any]:
    from vlrt import config
    from vlrt.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(path)
    return {
        "kind": "checkpoint",
        "name": checkpoint.name,
        "dtype": checkpoint.dtype,
        "size_bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
        "model": config.to_dict(checkpoint.model),
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested objects as rows of (dotted name, value); a missing object is one row."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        elif "_bytes" in prefix + name and isinstance(value, int):
            rows.append((prefix + name, f"{value} ({value / 2**20:,.1f} MiB)"))
        elif isinstance(value, list | tuple):
            rows.append((prefix + name, ", ".join(map(str, value)) or "none"))
        else:
            rows.append((prefix + name, "none" if value is None else str(value)))
    return rows


def _print_parity(rows: Sequence[Mapping[str, Any]]) -> None:
    table = [
        (row["name"], f"{row['value']:.3g}", f"{'>=' if row['at_least'] else '<='} {row['limit']:.3g}", str(row["ok"]))
        for row in rows
    ]
    _print_table("parity with the torch reference", ("what", "value", "limit", "ok"), table)


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # Into a text first: rich itself turns a closed pipe into exit code 1, and main has a word for it.
    text, is_terminal = io.StringIO(), sys.stdout.isatty()
    console = Console(file=text, force_terminal=is_terminal, width=None if is_terminal else 120)
    table = Table(title=escape(title), title_justify="left", show_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    sys.stdout.write(text.getvalue())


def _put(value: Any) -> None:
    """Write a text, or an object as one line of JSON, to stdout."""
    text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    sys.stdout.write(text + "\n")


def _complain(kind: str, message: str) -> None:
    """Write one line to stderr, whatever is in the message: file names may hold newlines and escape sequences."""
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    sys.stderr.write(f"vlrt: {kind}: {line}\n")


def evaluate(args: argparse.Namespace) -> None:
    """Ask a bundle the questions of a data set and print the mean scores; a run that was stopped goes on."""
    from rich.console import Console
    from rich.progress import Progress

    from vlrt import bundle as bundles
    from vlrt import evaluate as evaluation
    from vlrt.reduction import Reduction
    from vlrt.train import triplets

    rows = triplets.read(args.data).rows
    names = ("reasoning", "num_frames", "fps", "early_exit")
    options = {name: getattr(args, name) for name in names}
    bundle, reduction = bundles.Bundle.open(args.bundle), _reduction(args)
    Reduction(**reduction)  # refuses what is out of range before anything is asked
    settings = {
        "checkpoint": bundle.manifest.checkpoint,
        "precision": bundle.precision,
        "decoder_sha256": bundle.manifest.files[DECODER_WEIGHTS[bundle.backend]].sha256,
        "choice_temperature": bundle.model.choice_temperature,
        "data": str(args.data),
        "ask": {name: value for name, value in options.items() if value is not None},
    }
    settings |= {"reduce": reduction} if reduction else {}
    settings |= {"candidates": True} if args.candidates else {}
    results = args.output or Path(f"{Path(args.bundle).name}.{args.data.stem}.results.jsonl")
    console = Console(stderr=True)
    with (
        vlrt.Runtime.open(
            args.bundle,
            backend=args.backend,
            device=args.device,
            threads=args.threads,
            video_cache_bytes=0,  # each row's seconds are those of a first question
        ) as runtime,
        Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress,
    ):
        task = progress.add_task("questions", total=len(rows))

        def report(done: int, total: int, mean: float) -> None:
            progress.update(task, completed=done, total=total, description=f"score {mean:.3f}")

        found = evaluation.run(runtime, rows, results, settings, progress=report)
    groups = evaluation.summarise(found)
    facts: dict[str, Any] = {"results": str(results), "settings": settings, "groups": [vars(group) for group in groups]}
    if args.calibrate:
        fit = evaluation.calibrate(found, bundle.model.choice_temperature)
        bundles.calibrate(bundle, fit.temperature)
        facts["calibration"] = vars(fit)
    if args.json:
        _put(facts)
        return
    table = [
        (g.name, str(g.num_rows), f"{g.score:.3f}", _shown(g.calibration_error), f"{g.answer_tokens:.1f}",
         f"{g.seconds:.3f}")
        for g in groups
    ]  # fmt: skip
    columns = ("rows", "number", "score", "calibration error", "tokens written", "seconds")
    _print_table(str(results), columns, table)
    if args.calibrate:
        _put(
            f"choice_temperature {fit.temperature:.3f} (was {bundle.model.choice_temperature:.3f}), from "
            f"{fit.num_rows} questions; their calibration error {fit.error_after:.3f} (was {fit.error_before:.3f})"
        )


def _reduction(args: argparse.Namespace) -> dict[str, float]:
    """Return the fields of a Reduction that a command line names."""
    given = {"unchanged": args.drop_unchanged, "keep": args.keep}
    return {name: value for name, value in given.items() if value is not None}


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def bench(args: argparse.Namespace) -> None:
    """Time a bundle on this machine: answers directly, after latents, and after written chains of thought."""
    import tempfile

    from rich.console import Console
    from rich.progress import Progress

    from vlrt import bench as benching
    from vlrt.bundle import Bundle
    from vlrt.doctor import survey

    plan = benching.Plan(
        args.num_frames or (None if args.video else 16),
        tuple(args.cot_tokens),
        rounds=args.rounds,
        chain_rounds=min(args.cot_rounds, args.rounds),
    )
    bundle, machine = Bundle.open(args.bundle), survey()
    described = {
        "bundle": f"{bundle.manifest.checkpoint}, {bundle.backend}, {bundle.precision}",
        "processor": f"{machine['cpu']['model']}, {machine['cpu']['usable_cores']} cores",
        "versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version),
        "video": f"{args.video or 'made for this'}, rounds: {plan.rounds}",
    }
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory() as made,
        vlrt.Runtime.open(
            args.bundle, backend=args.backend, device=args.device, threads=args.threads, video_cache_bytes=0
        ) as runtime,
        Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress,
    ):
        task = progress.add_task("making a video", total=None)
        video = args.video or benching.write_clip(Path(made) / "clip.mp4")
        rows = benching.run(
            runtime, video, plan, progress=lambda *now: progress.update(task, **dict(zip(SHOWN, now, strict=True)))
        ).to_dict()
    described["frames"] = str(rows[0]["usage"]["num_frames"])
    if args.output is not None:
        values = {"described": described, "machine": machine, "rows": rows}
        benching.save(args.output, benching.markdown(rows, described), values)
    if args.json:
        _put({"described": described, "rows": rows})
    else:
        _put(benching.markdown(rows, described))


SHOWN = ("completed", "total", "description")  # of a progress bar
COMMANDS = {command.__name__: command for command in (export, ask, info, doctor, init, synth, train, bench)}
COMMANDS["eval"] = evaluate
