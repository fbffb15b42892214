"""The command line's grammar: verbs, arguments, what they accept. Knows no command's work."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Command = Callable[[argparse.Namespace], None]


def _number(kind: type[int] | type[float], low: float, accepted: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r}; accepted: {accepted}")
        return value

    return parse


def _size(text: str) -> tuple[int, int]:
    """Return (width, height)."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()) or 0 in (int(width), int(height)):
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: width and height in pixels, as in 224x224")
    return int(width), int(height)


def parser(commands: Mapping[str, Command], version: str) -> argparse.ArgumentParser:
    """Return the parser of a command line whose verbs are `commands`, by name; a verb's help is its docstring."""
    parser = argparse.ArgumentParser(
        prog="vlrt",
        description="Answers questions about videos with models that reason in latents.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vlrt {version}")
    count = _number(int, 1, "a whole number, 1 or more")
    count_or_zero = _number(int, 0, "a whole number, 0 or more")
    rate = _number(float, 1e-9, "a number above 0")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def engine(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--backend",
            default="auto",
            choices=["auto", "ort", "torch"],
            help="the engine to run in (default: the one that the bundle was written for)",
        )
        sub.add_argument(
            "--device",
            default="auto",
            choices=["auto", "cpu", "cuda"],
            help="where to run it (default: a GPU where the engine can use one)",
        )

    def reduction(sub: argparse.ArgumentParser) -> None:
        levels = _number(float, 0, "a number, 0 or more")
        sub.add_argument(
            "--drop-unchanged",
            type=levels,
            metavar="LEVELS",
            help="do not show the model patches that differ by no more, 0 to 255, from what it saw there last",
        )
        sub.add_argument("--keep", type=rate, metavar="SHARE", help="show it this share of the rest, by the question")
        sub.add_argument(
            "--early-exit", type=rate, metavar="P", help="make no more latents once a choice is so probable"
        )

    def verb(name: str, *, under: Any = verbs, **arguments: dict[str, Any]) -> argparse.ArgumentParser:
        summary = (commands[name].__doc__ or "").strip()
        sub: argparse.ArgumentParser = under.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(command=commands[name], parser=sub)
        for argument, options in arguments.items():
            sub.add_argument(argument, **options)
        return sub

    sub = verb(
        "export",
        checkpoint={"metavar": "CHECKPOINT", "help": "a Hugging Face checkpoint directory, or a name: shapes-latent"},
    )
    sub.add_argument("-o", "--output", help="the bundle to write or replace (default: <checkpoint name>.vlrt)")
    sub.add_argument(
        "--backend", choices=["ort", "torch"], default="ort", help="the engine to write for (default: ort)"
    )
    sub.add_argument(
        "--precision",
        choices=["fp32", "int8", "int4", "bf16", "fp16", "fp8"],
        default="fp32",
        help="of the weights (default: fp32); int8 and int4: ort alone; bf16, fp16 and fp8: torch alone",
    )

    sub = verb(
        "ask",
        bundle={"metavar": "BUNDLE", "help": "a directory that `vlrt export` wrote"},
        video={"metavar": "VIDEO", "help": "a video or image file"},
        question={"metavar": "QUESTION", "help": "the question, in one argument"},
    )
    sub.add_argument("--choices", nargs="+", metavar="CHOICE", help="answer with the likeliest of these")
    sub.add_argument(
        "--reasoning", choices=["latent", "direct", "cot"], help="default: latent where the model has latents"
    )
    sub.add_argument("--max-tokens", type=count, metavar="N", help="end the answer after so many tokens")
    sub.add_argument(
        "--min-tokens", type=count_or_zero, default=0, metavar="N", help="do not end it before (default: 0)"
    )
    frames = sub.add_mutually_exclusive_group()
    frames.add_argument("--num-frames", type=count, metavar="N", help="sample so many frames, evenly")
    frames.add_argument("--fps", type=rate, metavar="F", help="sample so many frames per second of video")
    reduction(sub)
    sub.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: the engine's choice)")
    engine(sub)
    sub.add_argument("--json", action="store_true", help="print the Answer as one JSON object")
    sub.add_argument("--stream", action="store_true", help="print the answer as it comes")

    sub = verb("info", path={"metavar": "BUNDLE_OR_CHECKPOINT", "help": "a directory"})
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.add_argument("--frames", type=count, metavar="N", help="predict the memory of a question about so many frames")
    sub.add_argument("--video", type=Path, help="predict it for this video, sampled as the bundle does or at --frames")
    sub.add_argument("--size", type=_size, metavar="WxH", help="of the frames, in pixels (default: 224x224)")
    sub.add_argument(
        "--question-tokens", type=count, default=32, metavar="N", help="length of the question (default: 32)"
    )
    sub.add_argument(
        "--reasoning", choices=["latent", "direct", "cot"], help="before the answer (default: latent where there is)"
    )
    sub = verb("doctor")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = verb("init", output={"metavar": "OUT", "help": "the directory to make"})
    sub.add_argument("--shape", choices=["tiny", "small", "3b", "7b"], default="tiny", help="its size (default: tiny)")
    sub.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")

    summary = "Make data to train and to evaluate with."
    data = verbs.add_parser("data", help=summary, description=summary, allow_abbrev=False)
    sub = verb(
        "synth",
        under=data.add_subparsers(title="commands", required=True, metavar="COMMAND"),
        output={"metavar": "OUT", "help": "the directory to write, or to go on with"},
    )
    sub.add_argument("--n", type=count, required=True, metavar="N", help="so many clips, one question each")
    sub.add_argument("--seed", type=count_or_zero, default=0, help="of everything (default: 0)")
    sub.add_argument(
        "--split", choices=["train", "validation", "test"], default="train", help="they share nothing (default: train)"
    )
    sub.add_argument("--families", nargs="+", metavar="FAMILY", help="of questions (default: all)")
    sub.add_argument("--forms", nargs="+", metavar="FORM", help="choice, free (default: both)")
    sub.add_argument("--size", type=count, default=56, metavar="PIXELS", help="of both sides (default: 56)")
    sub.add_argument("--fps", type=rate, default=4.0, metavar="F", help="frames per second (default: 4)")
    sub.add_argument("--grid", type=count, metavar="N", help="shapes are in one of N x N places (default: anywhere)")
    span: dict[str, Any] = {"nargs": 2, "type": count}
    sub.add_argument("--num-frames", metavar=("LOW", "HIGH"), help="of a clip (default: 16 24)", **span)
    sub.add_argument("--num-swaps", metavar=("LOW", "HIGH"), help="of cups (default: 3 8)", **span)
    sub.add_argument("--move-chance", type=float, metavar="P", help="of a swap to move the ball (default: 2/3)")
    sub.add_argument("--workers", type=count, metavar="N", help="processes (default: one per core)")

    sub = verb(
        "eval",
        bundle={"metavar": "BUNDLE", "help": "a directory that `vlrt export` wrote"},
        data={"type": Path, "metavar": "FILE", "help": "triplets: JSON lines, or Video-R1's json"},
    )
    sub.add_argument("-o", "--output", type=Path, metavar="FILE", help="results, a line each (default: by both names)")
    sub.add_argument("--reasoning", choices=["latent", "direct", "cot"], help="default: as `vlrt ask`")
    frames = sub.add_mutually_exclusive_group()
    frames.add_argument("--num-frames", type=count, metavar="N", help="sample so many frames, evenly")
    frames.add_argument("--fps", type=rate, metavar="F", help="sample so many frames per second of video")
    reduction(sub)
    sub.add_argument(
        "--candidates", action="store_true", help="choose among the candidates that rows without options name"
    )
    sub.add_argument(
        "--calibrate", action="store_true", help="fit the temperature of choices, and write it into the bundle"
    )
    engine(sub)
    sub.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: the engine's choice)")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = verb(
        "bench",
        bundle={"metavar": "BUNDLE", "help": "a directory that `vlrt export` wrote"},
        video={"nargs": "?", "metavar": "VIDEO", "help": "a video file (default: 40 seconds that are made for it)"},
    )
    sub.add_argument(
        "--num-frames",
        type=count,
        metavar="N",
        help="sampled of the video (default: as the bundle does; of a made one 16)",
    )
    sub.add_argument("--rounds", type=count, default=5, metavar="N", help="of questions in turn (default: 5)")
    sub.add_argument(
        "--cot-tokens", type=count, nargs="+", default=[384], metavar="N", help="lengths of chains (default: 384)"
    )
    sub.add_argument(
        "--cot-rounds", type=count, default=1, metavar="N", help="rounds that write chains too: they take long"
    )
    engine(sub)
    sub.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: the engine's choice)")
    sub.add_argument("-o", "--output", type=Path, metavar="DIR", help="write report.md and bench.json there")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = verb("train")
    sub.add_argument("--model", type=Path, required=True, metavar="CHECKPOINT", help="what to train")
    sub.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="triplets: JSON lines, or Video-R1's json"
    )
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the directory of the run")
    sub.add_argument("--validation", type=Path, metavar="FILE", help="triplets to measure by")
    sub.add_argument(
        "--cache", type=Path, metavar="DIR", help="where runs on the same videos share frames and tokens (default: RUN)"
    )
    sub.add_argument("--system", choices=["latent", "direct", "cot", "pause"], help="what to train (default: latent)")
    sub.add_argument("--config", type=Path, metavar="FILE", help="settings as YAML")
    sub.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, such as steps=500 or lora.rank=8"
    )
    sub.add_argument(
        "--latents", type=count, default=8, metavar="L", help="given to a checkpoint that has none (default: 8)"
    )
    return parser
