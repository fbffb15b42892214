"""vlrt answers questions about videos with vision-language models that reason in a few latent vectors.

    with vlrt.Runtime.open("model.vlrt") as runtime:
        print(runtime.ask("clip.mp4", "What happens?").text)

Importing vlrt loads no engine (onnxruntime, torch, ...): `Runtime`, `Answer` and `Frames` are imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vlrt.errors import (
    BackendUnavailable,
    BundleError,
    Busy,
    CheckpointError,
    ClipError,
    ConfigError,
    ExportError,
    Stopped,
    VideoError,
    VlrtError,
)

if TYPE_CHECKING:
    from vlrt.aio import AsyncRuntime
    from vlrt.answer import Answer
    from vlrt.live import LiveClip
    from vlrt.reduction import Reduction
    from vlrt.runtime import Runtime
    from vlrt.session import Clip
    from vlrt.video import Frames

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AsyncRuntime",
    "BackendUnavailable",
    "BundleError",
    "Busy",
    "CheckpointError",
    "Clip",
    "ClipError",
    "ConfigError",
    "ExportError",
    "Frames",
    "LiveClip",
    "Reduction",
    "Runtime",
    "Stopped",
    "VideoError",
    "VlrtError",
    "__version__",
]

_HOMES = {
    "Answer": "vlrt.answer",
    "AsyncRuntime": "vlrt.aio",
    "Clip": "vlrt.session",
    "Frames": "vlrt.video",
    "LiveClip": "vlrt.live",
    "Reduction": "vlrt.reduction",
    "Runtime": "vlrt.runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
