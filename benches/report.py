"""Rebuilds a machine's report.md and its plots from the JSON files of its directory, and from nothing else.

    python -m benches.report [DIRECTORY]

DIRECTORY: benches/results/<this machine> by default. What no file holds is "not measured".
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benches import machine, targets
from vlrt.bench import STAGES

BENCHES = ("peers", "latent_vs_cot", "limits", "scaling", "cold")
Found = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> Path:
    """Write the report; return its path."""
    parser = argparse.ArgumentParser(prog="benches.report", description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path, nargs="?")
    args = parser.parse_args(argv)
    path = write(args.directory or machine.results())
    print(path)
    return path


def write(directory: Path) -> Path:
    """Write report.md and the PNGs of a directory of results; return the path of the report."""
    from benches import plot  # the text alone needs no matplotlib

    found = read(directory)
    plots = plot.draw(found, directory)
    path = directory / "report.md"
    path.write_text(markdown(found, {name: drawn.name for name, drawn in plots.items()}), encoding="utf-8")
    return path


def read(directory: Path) -> dict[str, Any]:
    """Return the results that are there: name of a bench -> its JSON.

    Raises:
        SystemExit: there is none.
    """
    paths = {name: directory / f"{name}.json" for name in BENCHES}
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}
    if not found:
        raise SystemExit(f"{directory} holds none of {', '.join(f'{name}.json' for name in BENCHES)}; run make bench")
    return found


def markdown(found: Found, plots: Mapping[str, str]) -> str:
    """Return the report.

    Args:
        found: as `read` returns it.
        plots: name -> file, beside the report.
    """
    latest = max(found.values(), key=lambda result: result["date"])["machine"]
    memory = latest["memory_bytes"]
    total = memory.get("total") if isinstance(memory, Mapping) else memory
    lines = ["# What vlrt reaches on this machine", ""]
    lines += [f"{latest['cpu'].get('model')}, {latest['cpu']['usable_cores']} cores"]
    lines[-1] += f", {total / 1e9:.0f} GB of memory." if total else "."
    lines += [
        "Weights are random, so the lengths of answers and chains are forced. Seconds are medians of rounds taken in",
        "turn; p20 and p80 are in the JSON files beside this. `python -m benches.report` makes this page of them.",
        "",
        "## Targets",
        "",
    ]
    words = {True: "met", False: "**not met**", None: "not measured"}
    lines += _table(
        ("target", "wanted", "reached", "", "from"),
        (
            (
                row["target"],
                row["wanted"].replace(">=", "≥").replace("<=", "≤"),
                "" if row["reached"] is None else f"{row['reached']:.3g}",
                words[row["met"]],
                f"[{row['bench']}.json]({row['bench']}.json)" if row["bench"] in found else f"{row['bench']}.json",
            )
            for row in targets.rows(found)
        ),
    )
    for title, bench, names, section in SECTIONS:
        lines += ["", f"## {title}", ""]
        if bench not in found:
            lines.append("Not measured.")
            continue
        lines += [part for name in names if name in plots for part in (f"![{title}]({plots[name]})", "")]
        lines += section(found[bench])
        lines += ["", _origin(found[bench])]
    return "\n".join(lines) + "\n"


def _origin(result: Found) -> str:
    described = result["machine"]
    load = described.get("load_average") or [float("nan")]
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items() if version)
    return (
        f"`{result['command']}`, {result['date'][:10]}, commit {described.get('commit')}, {versions}; load average at "
        f"the end {load[0]:.1f}."
    )


def _stages(found: Found) -> Iterator[str]:
    head = ("frames", "rounds", *STAGES, "peak memory")
    rows = [
        (
            row["num_frames"],
            row["rounds"],
            *(f"{row['seconds'][stage]['median']:.3f}" for stage in STAGES),
            _megabytes(row["usage"]["peak_host_memory_bytes"]),
        )
        for row in found["frames"]
    ]
    exponents = ("exponent", "", *(_number(found["exponents"].get(stage), "{:.2f}") for stage in STAGES), "")
    yield from _table(head, [*rows, exponents])
    yield ""
    yield f"Questions about one open video of {found['question_frames']} frames, seconds from its path to the last"
    yield "answer:"
    yield ""
    yield from _table(
        ("questions", *(row["questions"] for row in found["questions"]), "exponent"),
        [
            (
                "seconds",
                *(f"{row['seconds']:.2f}" for row in found["questions"]),
                _number(found["exponents"].get("questions"), "{:.2f}"),
            )
        ],
    )


def _latents(found: Found) -> Iterator[str]:
    for result in found["results"]:
        chains = {(chain["engine"], chain["chain_tokens"]): chain for chain in result["chains"]}
        rows = []
        for row in result["rows"]:
            chain = chains.get((row["engine"], row["chain_tokens"]), {})
            seconds = f"{row['seconds']['total']['median']:.3f}"
            names = ("end_to_end_ratio", "overhead_ratio", "overhead_ratio_to_stage", "overhead_ratio_to_parallel")
            shown = [_number(chain.get(name), "{:.1f}") for name in names]
            rows.append((row["engine"], row["case"], row["rounds"], seconds, *shown))
        tokens = found["answer_tokens"]
        yield f"{result['num_frames']} frames, {found['num_latents']} latents, answers of {tokens} tokens:"
        yield ""
        yield from _table(
            ("engine", "", "rounds", "seconds", "end to end", "overhead", "over stage latents", "over parallel"), rows
        )
        yield ""
    yield "Overhead: time with reasoning less time of answering directly, chain over latents. End to end: time to"
    yield "answer, chain over latents. The prompt of a chain asks for it in some more words, which count."
    if found.get("parallel_rounds"):
        yield f"vlrt-parallel: the parallel rollout in {found['parallel_rounds']} rounds, each a pass for all latents."
    yield from _absent(found)


def _peers(found: Found) -> Iterator[str]:
    head = ("engine", "precision", "frames", "rounds", "first token", "answer", "with latents", "chain", "peak memory")
    head += ("answer agrees", "chain agrees", "logits off by")
    yield from _table(
        head,
        (
            (
                row["engine"],
                row["precision"],
                row["num_frames"],
                row["rounds"],
                *(
                    _number(row["seconds"].get(kind, {}).get("median"), "{:.2f}")
                    for kind in ("first_token", "answer", "latent", "chain")
                ),
                _megabytes(row["peak_host_memory_bytes"]),
                *(_number(row.get(f"{kind}_agreement"), "{:.0%}") for kind in ("answer", "chain")),
                _number(row.get("relative_error_of_logits"), "{:.2g}"),
            )
            for row in found["rows"]
        ),
    )
    yield ""
    reference = found["reference"] or "fp32, which did not run"
    yield f"Answers of {found['answer_tokens']} tokens without reasoning, chains of {found['chain_tokens']} (once),"
    yield f"{found['threads']} threads, from frames in memory on. Agreement: tokens equal to those of {reference}, up"
    yield "to the first that differs; logits: relative distance of the first ones. Peak memory is that of the process,"
    yield "over all that it was asked."
    yield from _absent(found)


def _limits(found: Found) -> Iterator[str]:
    gemm, memory = found["ceilings"]["gemm"], found["ceilings"]["memory"]
    rates = [f"{dtype} {part['best'] / 1e9:.0f} GFLOP/s ({part['by']})" for dtype, part in gemm.items()]
    yield f"Ceilings: products in {', '.join(rates)}; reading {memory['read'] / 1e9:.1f} GB/s ({memory['by']}), copying"
    yield f"{memory['copy'] / 1e9:.1f} GB/s, read and written."
    yield ""
    head = ("frames", "tokens", "GFLOP", "vision s", "prefill s", "GFLOP/s", *(f"of {dtype}" for dtype in gemm))
    yield from _table(
        (*head, "step ms", "step's weights, of reading", "peak memory over need"),
        (
            (
                row["num_frames"],
                row["prompt_tokens"],
                f"{sum(row['flops'].values()) / 1e9:.0f}",
                f"{row['seconds']['vision']['median']:.3f}",
                f"{row['seconds']['prefill']['median']:.3f}",
                f"{row['flops_per_second']['vision_and_prefill'] / 1e9:.0f}",
                *(f"{row['share_of_gemm'][dtype]:.0%}" for dtype in gemm),
                f"{row['step_seconds'] * 1e3:.1f}",
                f"{row['step_share_of_read']:.0%}",
                f"{_megabytes(row['memory_bytes']['peak'])} / {row['peak_over_need']:.2f}",
            )
            for row in found["rows"]
        ),
    )


def _cold(found: Found) -> Iterator[str]:
    parts = list(found["rows"][0]["seconds"])
    yield from _table(
        ("shape", "precision", "rounds", *parts, "open to first answer over warm"),
        (
            (
                row["shape"],
                row["precision"],
                row["rounds"],
                *(f"{row['seconds'][part]['median']:.3f}" for part in parts),
                _number(row.get("first_over_warm", {}).get("median"), "{:.2f}"),
            )
            for row in found["rows"]
        ),
    )
    yield ""
    yield "Seconds in a new process, files in the system's cache, 16 frames, latents."


def _absent(found: Found) -> Iterator[str]:
    for name, reason in found.get("absent", {}).items():
        yield ""
        yield f"Absent: {name}: {' '.join(reason.split())}"


def _table(head: Sequence[Any], rows: Iterator[Sequence[Any]] | Sequence[Sequence[Any]]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(str(cell) for cell in cells) + " |"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


SECTIONS: tuple[tuple[str, str, tuple[str, ...], Callable[[Found], Iterator[str]]], ...] = (
    ("Beside its peers", "peers", ("peers",), _peers),
    ("Latents against a chain of thought", "latent_vs_cot", ("latents_vs_chain",), _latents),
    ("Against the machine's limit", "limits", ("limits",), _limits),
    ("Stages, and how they grow", "scaling", ("stages", "scaling", "questions"), _stages),
    ("Cold start", "cold", (), _cold),
)


if __name__ == "__main__":
    main()
