"""The main job, from nothing to an answer: what `make demo` runs.

Makes a tiny checkpoint with random weights and a short video in ./demo/, exports the checkpoint, asks the bundle about
the video, and sets the times of reasoning in latents beside those of a written chain of thought of the same model.
"""

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
CHAIN_TOKENS, ANSWER_TOKENS = 128, 4  # forced: a model that has learned nothing does not end on its own
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


def main() -> None:
    console = Console()
    HERE.mkdir(exist_ok=True)
    console.print("A tiny checkpoint with random weights, and a video of a moving square:")
    if not CHECKPOINT.exists():
        write_checkpoint(CHECKPOINT, shape="tiny", seed=0)
    write_video(VIDEO)
    console.print(f"  {CHECKPOINT}, {VIDEO}\n")

    console.print(f"$ vlrt export {CHECKPOINT} -o {BUNDLE}", highlight=False)
    subprocess.run([sys.executable, "-m", "vlrt", "export", str(CHECKPOINT), "-o", str(BUNDLE)], check=True)

    answers = {}
    with vlrt.Runtime.open(BUNDLE) as runtime:
        for reasoning in ("latent", "direct", "cot"):
            tokens = CHAIN_TOKENS + ANSWER_TOKENS if reasoning == "cot" else ANSWER_TOKENS
            forced = {"reasoning": reasoning, "min_tokens": tokens, "max_tokens": tokens}
            runtime.ask(VIDEO, QUESTION, **forced)  # the first answer also pays for loading
            answers[reasoning] = runtime.ask(VIDEO, QUESTION, **forced)

    latent, chain = answers["latent"], answers["cot"]
    console.print(f"\n$ vlrt ask {BUNDLE} {VIDEO} {QUESTION!r}", highlight=False)
    console.print(repr(latent.text), markup=False)
    console.print(
        "[bold]The model is untrained: its weights are random and its answer means nothing.[/bold] "
        "What the demo shows is the way from a checkpoint to an answer, and where the time goes.\n"
    )
    table = Table(title="milliseconds per stage", title_justify="left", show_edge=False)
    for name in ("stage", "direct", f"{latent.usage.latents} latents", f"chain of {CHAIN_TOKENS} tokens"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in STAGES:
        row = (answers[name].timings.get(stage, 0.0) * 1000 for name in ("direct", "latent", "cot"))
        table.add_row(stage, *(f"{value:.1f}" for value in row), end_section=stage == "answer")
    console.print(table)
    ratio = chain.timings["total"] / latent.timings["total"]
    console.print(
        f"\nFrom the video's path to the answer the chain takes {ratio:.1f} times as long as the latents. Lengths are "
        f"forced: {CHAIN_TOKENS} tokens of chain, {ANSWER_TOKENS} of answer. One run of a tiny model: the benches "
        "measure with care.\n"
    )
    console.print("Next:", highlight=False)
    for command in (
        f"vlrt info {BUNDLE}",
        f"vlrt ask {BUNDLE} {VIDEO} {QUESTION!r} --choices left right",
        "vlrt doctor",
    ):
        console.print(f"  .venv/bin/{command}", highlight=False)


if __name__ == "__main__":
    main()
