"""What was wanted and what was reached: one row per target, from whatever the phases have found."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Found = Mapping[str, Mapping[str, Any]]
Row = dict[str, Any]


def rows(found: Found) -> list[Row]:
    """Return target, `wanted`, `reached` (None: not measured) and `met` of each."""
    made = []
    for name, at_least, wanted, measure in _targets():
        try:
            reached = measure(found)
        except (KeyError, TypeError, StopIteration, ZeroDivisionError):  # the phase did not get so far
            reached = None
        met = None if reached is None else (reached >= wanted if at_least else reached <= wanted)
        sign = ">=" if at_least else "<="
        made.append({"target": name, "wanted": f"{sign} {wanted:g}", "reached": reached, "met": met})
    return made


def table(made: list[Row], found: Found) -> str:
    """Return the targets as text, and what failed."""
    words = {True: "met", False: "NOT MET", None: "not measured"}
    lines = [f"{'target':68} {'wanted':>8} {'reached':>10}"]
    for row in made:
        reached = "-" if row["reached"] is None else f"{row['reached']:.3g}"
        lines.append(f"{row['target']:68} {row['wanted']:>8} {reached:>10}  {words[row['met']]}")
    for phase, items in found.items():
        for item, part in items.items():
            if "error" in part:
                lines.append(f"FAILED {phase}/{item}: {part['error'].strip().splitlines()[-1]}")
            elif "skipped" in part:
                lines.append(f"skipped {phase}/{item}: {part['skipped']}")
            for row in part.get("result", {}).get("rows", []):
                name = row.get("check") or f"{row.get('op')} {row.get('case')}"
                if "error" in row:
                    lines.append(f"FAILED {phase}/{item}: {name}: {row['error'].strip().splitlines()[-1][:120]}")
    return "\n".join([*facts(found), *lines])


def facts(found: Found) -> list[str]:
    """Return what was measured behind the targets, one line per phase that has something to say."""
    lines = []
    for item, part in found.get("ceilings", {}).items():
        if "result" in part:
            lines.append(f"{item}: {part['result']['best'] / 1e12:.4g} T{'B' if item == 'memory' else 'FLOP'}/s")
    for item, part in found.get("stages", {}).items():
        stages = part.get("result", {})
        times = [(name, stages[name]) for name in ("vision", "prefill") if "seconds" in stages.get(name, {})]
        words = [f"{name} {stage['seconds']['median'] * 1e3:.1f} ms" for name, stage in times]
        if "from_frames" in stages.get("vision", {}):
            words.insert(1, f"from frames {stages['vision']['from_frames']['median'] * 1e3:.1f} ms")
        steps = stages.get("steps", {})
        count = steps.get("num_latents")
        for name in ("recurrent_rollout", "answer_steps", "penalised_steps", "steps_without_head"):
            words += [f"{name} {count} x {steps[name]['median'] / count * 1e3:.2f} ms"] if name in steps else []
        for name in ("parallel_rollout", "parallel_round", "replayed_step"):
            words += [f"{name} {steps[name]['median'] * 1e3:.2f} ms"] if steps.get(name) else []
        lines.append(f"{item}: {', '.join(words)}")
    for item, part in found.get("answers", {}).items():
        seconds = part.get("result", {}).get("seconds", {})
        words = [f"{how} {t['median'] if isinstance(t, Mapping) else t:.4g} s" for how, t in seconds.items()]
        lines.append(f"{item}, from {part.get('result', {}).get('from')}: {', '.join(words)}")
    return lines


def _targets() -> Iterator[tuple[str, bool, float, Callable[[Found], float]]]:
    """Yield name, whether more is better, what is wanted, and how to read it."""
    yield "checks that failed", False, 0, _failed
    for num_new in (4096, 8192):
        case = f"S={num_new} past=0"
        yield (
            f"video_attention S={num_new}: useful TFLOP/s",
            True,
            450,
            lambda f, case=case: _case(f, "video_attention", case)["flops_per_second"] / 1e12,
        )
    for num_new in (2048, 4096, 8192):
        case = f"S={num_new} past=0"
        for kind, wanted in (("alone", 0.9), ("counted", 1.0)):
            yield (
                f"video_attention S={num_new}: over fastest SDPA {kind}",
                True,
                wanted,
                lambda f, case=case, kind=kind: _speedup(f, "video_attention", case, kind),
            )
    for total in (8192, 32_768):
        for segment in (64, 256):
            case = f"N={total} segment={segment}"
            yield (
                f"segment_attention {case}: over SDPA with rotary",
                True,
                1.0,
                lambda f, case=case: _speedup(f, "segment_attention", case, "counted"),
            )
    for item in ("latent_injection", "rms_norm", "swiglu", "patchify"):
        yield (
            f"{item}: over the fastest of torch, in its worst case",
            True,
            1.0,
            lambda f, item=item: _least_speedup(f, item),
        )
    for tokens in ("2048", "8192"):
        yield from _stage_targets(tokens)
    yield from _answer_targets()


def _stage_targets(tokens: str) -> Iterator[tuple[str, bool, float, Callable[[Found], float]]]:
    def stage(f: Found) -> Any:
        return f["stages"][tokens]["result"]

    def steps(f: Found, name: str) -> float:
        return float(stage(f)["steps"][name]["median"])

    def share(f: Found, seconds: float, num_bytes: float) -> float:
        return num_bytes / seconds / f["ceilings"]["memory"]["result"]["copy"]

    def of_gemm(f: Found, rate: float) -> float:
        return rate / float(f["ceilings"]["gemm_bf16"]["result"]["best"])

    def size(f: Found, name: str) -> float:
        return float(stage(f)["steps"]["bytes"][name]["weights"])

    def count(f: Found) -> int:
        return int(stage(f)["steps"]["num_latents"])

    yield (
        f"{tokens}: answer step, weight bytes over copy bandwidth",
        True,
        0.85,
        lambda f: share(f, steps(f, "answer_steps") / count(f), size(f, "step_with_head")),
    )
    yield (
        f"{tokens}: latent step, weight bytes over copy bandwidth",
        True,
        0.85,
        lambda f: share(
            f,
            steps(f, "recurrent_rollout") / count(f),
            size(f, "step") + stage(f)["steps"]["bytes"]["injection"],
        ),
    )
    yield (
        f"{tokens}: L recurrent latents over L steps without head",
        False,
        1.0,
        lambda f: steps(f, "recurrent_rollout") / steps(f, "steps_without_head"),
    )
    yield (
        f"{tokens}: a parallel round over an answer step",
        False,
        1.15,
        lambda f: steps(f, "parallel_round") / (steps(f, "answer_steps") / count(f)),
    )
    yield (
        f"{tokens}: prefill over GEMM rate",
        True,
        0.65,
        lambda f: of_gemm(f, stage(f)["prefill"]["flops_per_second"]),
    )
    yield (
        f"{tokens}: vision tower over GEMM rate",
        True,
        0.5,
        lambda f: of_gemm(f, stage(f)["vision"]["tower_flops_per_second"]),
    )


def _answer_targets() -> Iterator[tuple[str, bool, float, Callable[[Found], float]]]:
    def ours(f: Found, how: str) -> float:
        return float(f["answers"]["vlrt"]["result"]["seconds"][how]["median"])

    def chain(f: Found, engine: str) -> float:
        seconds = f["answers"][engine]["result"]["seconds"]["chain"]
        return float(seconds["median"] if isinstance(seconds, Mapping) else seconds)

    def direct(f: Found, engine: str) -> float:
        return float(f["answers"][engine]["result"]["seconds"]["direct"]["median"])

    def overhead(f: Found, how: str) -> float:
        seconds = ours(f, how) - direct(f, "vlrt")
        if seconds <= 0:
            raise ZeroDivisionError("latents took no time that could be told from noise")
        return seconds

    yield (
        "16 frames: relative distance of our first logits from transformers'",
        False,
        0.1,
        lambda f: float(f["answers"]["transformers"]["result"]["relative_error_of_logits"]),
    )
    for rollout in ("parallel", "recurrent"):
        for engine, end_to_end in (("transformers", 68), ("vlrt", 20)):
            yield (
                f"16 frames, {rollout}: {engine}'s chain over ours, end to end",
                True,
                end_to_end,
                lambda f, r=rollout, e=engine: chain(f, e) / ours(f, r),
            )
            yield (
                f"16 frames, {rollout}: {engine}'s reasoning overhead over ours",
                True,
                100,
                lambda f, r=rollout, e=engine: (chain(f, e) - direct(f, e)) / overhead(f, r),
            )


def _failed(found: Found) -> float:
    return sum(len(part["result"]["failed"]) if "result" in part else 1 for part in found["checks"].values())


def _case(found: Found, item: str, case: str) -> Any:
    return next(row for row in found["kernels"][item]["result"]["rows"] if row["case"] == case)


def _least_speedup(found: Found, item: str) -> float:
    return min(float(row["fastest_alone"]["speedup"]) for row in found["kernels"][item]["result"]["rows"])


def _speedup(found: Found, item: str, case: str, kind: str) -> float:
    return float(_case(found, item, case)[f"fastest_{kind}"]["speedup"])
