"""Which phases there are, of which items, and how much of the time each may take. Imports none of them."""

from dataclasses import dataclass

OPS = (
    "video_attention",
    "decode_attention",
    "segment_attention",
    "latent_injection",
    "rms_norm",
    "swiglu",
    "patchify",
)
TUNED = ("video_attention", "decode_attention", "segment_attention")


@dataclass(frozen=True)
class Phase:
    """One part of the suite: a module of benches/gpu whose `run(item, setting, expired)` returns JSON values.

    Attributes:
        name: of the module.
        share: of the whole time.
        items: in order; a crash ends one item, never a phase.
        at_once: each item in a process of its own, all at the same time: for what is not timed.
    """

    name: str
    share: float
    items: tuple[str, ...]
    at_once: bool = False


PHASES = (
    Phase("machine", 0.04, ("card",)),
    Phase("checks", 0.19, (*OPS, "backend"), at_once=True),
    Phase("ceilings", 0.05, ("gemm_bf16", "gemm_fp8", "memory")),
    Phase("kernels", 0.25, OPS),
    Phase("stages", 0.20, ("2048", "8192", "2048_fp8")),
    Phase("answers", 0.27, ("vlrt", "transformers")),
    Phase("tune", 0.0, TUNED),  # takes what the others leave, and is run only when asked for
)
NAMES = tuple(phase.name for phase in PHASES)
