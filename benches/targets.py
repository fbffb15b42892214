"""What was wanted of the CPU and what was reached: one row per target, from the results' JSON alone.

A figure that no result holds is "not measured". Targets speak of the shape `small`; other shapes reach none.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Found = Mapping[str, Any]  # name of a bench -> its JSON
Row = dict[str, Any]
CHAIN_TOKENS = 384
MISSING = (KeyError, TypeError, StopIteration, ValueError, ZeroDivisionError)  # the result does not hold it


def rows(found: Found) -> list[Row]:
    """Return of each target its name, `wanted`, `reached` (None: not measured), `met` and the bench it comes from."""
    made = []
    for name, bench, at_least, wanted, read in _targets():
        try:
            result = found[bench]
            reached = read(result) if _speaks_of_small(result) else None
        except MISSING:
            reached = None
        met = None if reached is None else (reached >= wanted if at_least else reached <= wanted)
        sign = ">=" if at_least else "<="
        made.append({"target": name, "wanted": f"{sign} {wanted:g}", "reached": reached, "met": met, "bench": bench})
    return made


def _targets() -> Iterator[tuple[str, str, bool, float, Callable[[Any], float | None]]]:
    """Yield name, bench, whether more is better, what is wanted, and how to read it."""
    for frames, wanted in ((16, 0.55), (64, 0.45)):
        yield (
            f"{frames} frames: time to answer over the best peer's at its best precision",
            "peers",
            False,
            wanted,
            lambda f, n=frames: _best(f, n, ours=True) / _best(f, n, ours=False),
        )
    yield (
        "16 frames, fp32 against fp32: time to answer over the best peer's",
        "peers",
        False,
        0.8,
        lambda f: _best(f, 16, ours=True, precision="fp32") / _best(f, 16, ours=False, precision="fp32"),
    )
    yield (
        "64 frames: vision and prefill, share of the machine's int8 products",
        "limits",
        True,
        0.65,
        lambda f: _limits(f, 64)["share_of_gemm"]["int8"],
    )
    for frames in (16, 64):
        yield (
            f"{frames} frames: answer steps, weight bytes over the rate of reading memory",
            "limits",
            True,
            0.7,
            lambda f, n=frames: _limits(f, n)["step_share_of_read"],
        )
    yield (
        f"16 frames: reasoning overhead of vlrt's chain of {CHAIN_TOKENS} over that of 8 latents",
        "latent_vs_cot",
        True,
        100,
        lambda f: _chain(f, "vlrt")["overhead_ratio"],
    )
    yield (
        "the same, over 8 latents of the parallel rollout in two rounds",
        "latent_vs_cot",
        True,
        100,
        lambda f: _chain(f, "vlrt")["overhead_ratio_to_parallel"] if f["parallel_rounds"] == 2 else None,
    )
    yield (
        f"16 frames: Hugging Face bf16's chain of {CHAIN_TOKENS} over 8 latents, end to end",
        "latent_vs_cot",
        True,
        40,
        lambda f: _chain(f, "hf-bf16")["end_to_end_ratio"],
    )
    yield (
        "small, int8: open to first answer over the warm time to answer",
        "cold",
        False,
        3,
        lambda f: next(r for r in f["rows"] if (r["shape"], r["precision"]) == ("small", "int8"))["first_over_warm"][
            "median"
        ],
    )
    yield (
        "64 frames: peak memory over weights, KV cache and largest activation",
        "limits",
        False,
        1.3,
        lambda f: _limits(f, 64)["peak_over_need"],
    )


def _speaks_of_small(result: Mapping[str, Any]) -> bool:
    return result.get("shape", "small") == "small"


def _best(found: Found, num_frames: int, *, ours: bool, precision: str | None = None) -> float:
    """Return the shortest time to answer of vlrt's engines, or of the others'."""
    return min(
        float(row["seconds"]["answer"]["median"])
        for row in found["rows"]
        if row["num_frames"] == num_frames
        and row["engine"].startswith("vlrt") == ours
        and precision in (None, row["precision"])
    )


def _limits(found: Found, num_frames: int) -> Mapping[str, Any]:
    row: Mapping[str, Any] = next(row for row in found["rows"] if row["num_frames"] == num_frames)
    return row


def _chain(found: Found, engine: str) -> Mapping[str, Any]:
    if found["num_latents"] != 8:
        raise ValueError("the target speaks of 8 latents")
    result = next(result for result in found["results"] if result["num_frames"] == 16)
    chain: Mapping[str, Any] = next(
        c for c in result["chains"] if (c["engine"], c["chain_tokens"]) == (engine, CHAIN_TOKENS)
    )
    return chain
