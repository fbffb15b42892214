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
    CheckpointError,
    ConfigError,
    ExportError,
    VideoError,
    VlrtError,
)

if TYPE_CHECKING:
    from vlrt.answer import Answer
    from vlrt.runtime import Runtime
    from vlrt.video import Frames

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "BackendUnavailable",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "ExportError",
    "Frames",
    "Runtime",
    "VideoError",
    "VlrtError",
    "__version__",
]

_HOMES = {"Answer": "vlrt.answer", "Runtime": "vlrt.runtime", "Frames": "vlrt.video"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
