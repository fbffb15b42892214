"""Finds `libvlrt_ort`, our kernels for ONNX Runtime's CPU provider, and says why there are none.

The library is optional: bundles hold the bodies of the ops that it has kernels for, and ONNX Runtime takes a kernel of
a function's name in place of its body. Knows files and the library's C functions; no graphs. Sources: kernels/ort/.
"""

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

DIRECTORY = Path(__file__).parent.parent / "kernels" / "ort"
SIMD = "vlrt.simd"  # session config entry: a level that the processor has, AUTO or AUTO_BF16
AUTO = "auto"  # the best level that computes in fp32 throughout
AUTO_BF16 = "auto-bf16"  # the best level: products of many queries may be in bf16, sums and softmax are in fp32
INT8 = "vlrt.int8"  # likewise, of linear layers with weights of 8 or 4 bits: a level, AUTO, or "none": the bodies
FP32 = "vlrt.fp32"  # likewise, of linear layers in fp32; or AUTO_BF16
MAX_HEAD_DIM = 256  # tile.h: kMaxHeadDim


@dataclass(frozen=True)
class Library:
    """A library that loads here, and what it takes on this processor.

    Attributes:
        path: of its file.
        levels: of attention, that AUTO and AUTO_BF16 mean.
        int8: level of linear layers with weights of 8 or 4 bits; "none" where the processor has no VNNI, and the bodies
            run.
        fp32: level of linear layers in fp32; "none" where the processor has no AMX, and the bodies run.
    """

    path: Path
    levels: dict[str, str]
    int8: str
    fp32: str

    def packs(self, precision: str) -> bool:
        """Return whether linear layers of a bundle of this precision keep weights of their own, in memory."""
        return (self.fp32 if precision == "fp32" else self.int8) != "none"


def find(directory: Path | None = None) -> Library | str:
    """Return the library of a directory (None: the installed one), or a sentence: why there is none."""
    directory = directory or DIRECTORY
    path = directory / file_name()
    if not path.is_file():
        return _why_not_built(directory)
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.vlrt_level.restype = loaded.vlrt_int8.restype = loaded.vlrt_fp32.restype = ctypes.c_char_p
        levels = {name: loaded.vlrt_level(name.encode()).decode() for name in (AUTO, AUTO_BF16)}
        int8, fp32 = (find_level(AUTO.encode()).decode() for find_level in (loaded.vlrt_int8, loaded.vlrt_fp32))
        _ = loaded.vlrt_resize  # which resampling.py calls: a library without it is of an older version
        return Library(path, levels, int8, fp32)
    except (OSError, AttributeError) as error:  # built for another system, or cut short
        return f"{path} does not load here ({error}); build it again: pip install --force-reinstall vlrt"


def num_kernels(library: Library) -> int:
    """Return how many kernels of the library the sessions of this process have made so far."""
    count = ctypes.CDLL(str(library.path)).vlrt_num_kernels
    count.restype = ctypes.c_int64
    return int(count())


def file_name() -> str:
    """Return the library's name on this system."""
    return "libvlrt_ort" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


def _why_not_built(directory: Path) -> str:
    """Return the reason that the installation left beside the sources, or else what an installation would need."""
    try:
        reason = (directory / "not_built.txt").read_text(encoding="utf-8").strip()
    except OSError:
        reason = "it was not built"
    return f"{reason}; without it attention takes longer. docs/design.md says how to build it"
