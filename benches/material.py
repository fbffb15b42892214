"""What benches measure with: untrained checkpoints of a shape, their bundles, and generated clips, kept in a cache.

Speed does not depend on the weights; nothing here says anything about accuracy.
"""

import os
from pathlib import Path

from vlrt import bench, fresh

SECONDS, FPS, SIZE = 40, 8, 224
PARALLEL_LATENTS = 8  # a query each, so that their number is fixed


def cache() -> Path:
    """Return the directory of checkpoints, bundles and clips: $VLRT_BENCH_CACHE or benches/.cache."""
    path = Path(os.environ.get("VLRT_BENCH_CACHE", Path(__file__).parent / ".cache"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def checkpoint(shape: str, parallel_rounds: int = 0) -> Path:
    """Return an untrained bf16 checkpoint of a shape, written where it is not in the cache yet.

    Args:
        shape: a key of `fresh.SHAPES`.
        parallel_rounds: of the parallel rollout, with queries for 8 latents; 0: latents come one after the other.
    """
    path = cache() / (f"{shape}-parallel-{parallel_rounds}" if parallel_rounds else shape)
    if not (path / "config.json").is_file():
        rollout = (
            {"rollout": "parallel", "rounds": parallel_rounds, "num_latents": PARALLEL_LATENTS}
            if parallel_rounds
            else {}
        )
        fresh.write_checkpoint(path, shape=shape, dtype="bfloat16", latent={**fresh.DEFAULT_LATENT, **rollout})
    return path


def bundle(shape: str, precision: str, parallel_rounds: int = 0) -> Path:
    """Return a bundle, exported from a fresh bf16 checkpoint where it is not in the cache yet; see `checkpoint`."""
    source = f"{shape}-parallel-{parallel_rounds}" if parallel_rounds else shape
    out = cache() / f"{source}-{precision}.vlrt"
    if not out.exists():
        from vlrt.export import exporter  # brings torch, which must not count as memory of a bench

        exporter.export(checkpoint(shape, parallel_rounds), out, precision=precision)
    return out


def clip(seconds: int = SECONDS) -> Path:
    """Return an mp4 of 8 frames per second, 224 x 224: a square that moves over a gradient, and some noise."""
    path = cache() / f"clip-{seconds}s-{FPS}fps-{SIZE}.mp4"
    if path.exists():
        return path
    return bench.write_clip(path, seconds=seconds, fps=FPS, size=SIZE)
