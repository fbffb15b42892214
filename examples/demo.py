"""The main job, from nothing to an answer: what `make demo` runs.

Makes a tiny checkpoint with random weights and a short video in ./demo/, exports the checkpoint, asks the bundle about
the video, and sets the times of reasoning in latents beside those of a written chain of thought of the same model.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
from rich.console import Console
from rich.table import Table

import vlrt
from vlrt.fresh import write_checkpoint

HERE = Path("demo")
CHECKPOINT, BUNDLE, VIDEO = HERE / "tiny", HERE / "tiny.vlrt", HERE / "square.mp4"
QUESTION = "Where does the square go?"
CHAIN_TOKENS, ANSWER_TOKENS = 384, 4  # forced: a model that has learned nothing does not end on its own
ROUNDS = 7
STAGES = ("decode", "preprocess", "vision", "prefill", "latents", "answer", "total")


def write_video(path: Path) -> None:
    """Write four seconds of a red square that moves to the right, 224 x 224 pixels at 8 frames per second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 224
        stream.pix_fmt = "yuv420p"
        for step in range(32):
            image = np.full((224, 224, 3), 30, dtype=np.uint8)
            image[96:128, 5 * step : 5 * step + 32] = (220, 30, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def median_timings(runtime: vlrt.Runtime) -> dict[str, dict[str, float]]:
    """Return seconds per stage for each way of reasoning: medians over rounds in which they take turns."""
    rounds: dict[str, list[dict[str, float]]] = {"direct": [], "latent": [], "cot": []}
    for _ in range(1 + ROUNDS):
        for reasoning, timings in rounds.items():
            tokens = CHAIN_TOKENS + ANSWER_TOKENS if reasoning == "cot" else ANSWER_TOKENS
            answer = runtime.ask(VIDEO, QUESTION, reasoning=reasoning, min_tokens=tokens, max_tokens=tokens)
            timings.append(answer.timings)
    return {
        reasoning: {stage: float(np.median([t[stage] for t in timings[1:]])) for stage in STAGES}  # the first warms up
        for reasoning, timings in rounds.items()
    }


def print_timings(console: Console, seconds: dict[str, dict[str, float]], num_latents: int) -> None:
    """Print the stages side by side, and what the chain costs in latents."""
    table = Table(title="milliseconds per stage", title_justify="left", show_edge=False)
    for name in ("stage", "direct", f"{num_latents} latents", f"chain of {CHAIN_TOKENS} tokens"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in STAGES:
        row = (f"{timings[stage] * 1000:.1f}" for timings in seconds.values())
        table.add_row(stage, *row, end_section=stage == "answer")
    console.print(table)
    chain = seconds["cot"]["answer"] - seconds["direct"]["answer"]
    console.print(
        f"\nThe chain takes {chain / seconds['latent']['latents']:.1f} times as long as the latents, and "
        f"{seconds['cot']['total'] / seconds['latent']['total']:.1f} times from the video's path to the answer.\n"
        f"Medians of {ROUNDS} rounds. Lengths are forced: {CHAIN_TOKENS} tokens of chain, {ANSWER_TOKENS} of answer. "
        "In a model this small the engine's own overhead weighs most: benches/ measures larger ones.\n"
    )


def main() -> None:
    console = Console()
    HERE.mkdir(exist_ok=True)
    console.print("A tiny checkpoint with random weights, and a video of a moving square:")
    shutil.rmtree(CHECKPOINT, ignore_errors=True)
    write_checkpoint(CHECKPOINT, shape="tiny", seed=0)
    write_video(VIDEO)
    console.print(f"  {CHECKPOINT}, {VIDEO}\n")

    console.print(f"$ vlrt export {CHECKPOINT} -o {BUNDLE}", highlight=False)
    subprocess.run([sys.executable, "-m", "vlrt", "export", str(CHECKPOINT), "-o", str(BUNDLE)], check=True)

    with vlrt.Runtime.open(BUNDLE) as runtime:
        console.print(f"\n$ vlrt ask {BUNDLE} {VIDEO} {QUESTION!r} --max-tokens {ANSWER_TOKENS}", highlight=False)
        answer = runtime.ask(VIDEO, QUESTION, max_tokens=ANSWER_TOKENS)
        console.print(repr(answer.text), markup=False)
        console.print(
            "[bold]The model is untrained: its weights are random and its answer means nothing.[/bold] What the demo "
            "shows is the way from a checkpoint to an answer, and where the time goes.\n"
        )
        print_timings(console, median_timings(runtime), answer.usage.latents)
    console.print("Next:")
    for command in (
        f"vlrt info {BUNDLE}",
        f"vlrt ask {BUNDLE} {VIDEO} {QUESTION!r} --choices left right",
        "vlrt doctor",
    ):
        console.print(f"  .venv/bin/{command}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
