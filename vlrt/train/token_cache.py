"""Video tokens of a frozen vision tower on disk: a video is encoded once per content, sampling settings and tower.

Knows files and tensors; no question and no model. Several processes, and several runs of one tower, may share a
directory. It holds no more than it is allowed to: what finds no room is computed anew each time.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlrt.checkpoint import Checkpoint
from vlrt.errors import ConfigError
from vlrt.train.frame_cache import FrameCache

MEMORY_BYTES = 256 * 1024**2  # of tokens that a process keeps beside those on disk
FORMAT = 1  # of the files: raise it when what they hold, or how tokens come about, changes


@dataclass(frozen=True)
class Encoded:
    """A video as the decoder reads it.

    Attributes:
        tokens: [N, C] float32.
        grid_thw: patches of the video.
        seconds_per_temporal_patch: fractional; 0 for an image.
        is_image: one still picture, without time.
    """

    tokens: Tensor
    grid_thw: tuple[int, int, int]
    seconds_per_temporal_patch: float
    is_image: bool


class TokenCache:
    """Video tokens by video file.

    Args:
        directory: made when the first tokens are kept.
        frames: names videos by what they hold and how they are sampled.
        tower: `tower_hash` of the weights.
        max_bytes: of all files of this tower, roughly where several processes write.
    """

    def __init__(self, directory: Path, frames: FrameCache, tower: str, max_bytes: int) -> None:
        self._directory = directory / f"{FORMAT}-{tower}"
        self._frames = frames
        self._held: dict[Path, Encoded] = {}  # read or made by this process
        self._memory = MEMORY_BYTES
        self._room = max_bytes - sum(file.stat().st_size for file in self._directory.glob("*/*.safetensors"))

    def load(self, video: Path) -> Encoded | None:
        """Return what is kept of a video, if anything.

        Raises:
            VideoError: the video cannot be read.
        """
        file = self._file(video)
        if file in self._held:
            return self._held[file]
        try:
            with safe_open(file, framework="pt") as kept:
                facts = json.loads(kept.metadata()["facts"])
                encoded = Encoded(kept.get_tensor("tokens"), tuple(facts[0]), facts[1], facts[2])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None  # not there, or cut off by a full disk: encoded, or encoded again
        size = encoded.tokens.numel() * encoded.tokens.element_size()
        if size <= self._memory:
            self._held[file] = encoded
            self._memory -= size
        return encoded

    def store(self, video: Path, encoded: Encoded) -> None:
        """Keep what a tower made of a video, where there is room.

        Raises:
            VideoError: the video cannot be read.
            ConfigError: the directory cannot be written.
        """
        size = encoded.tokens.numel() * 4
        if size > self._room:
            return
        file = self._file(video)
        part = file.with_name(f".{os.getpid()}-{file.name}")
        facts = json.dumps([encoded.grid_thw, encoded.seconds_per_temporal_patch, encoded.is_image])
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"tokens": encoded.tokens.detach().float().cpu().contiguous()}, part, {"facts": facts})
            part.replace(file)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise ConfigError(f"the cache of video tokens {self._directory} cannot be written: {error}") from error
        self._room -= size

    def _file(self, video: Path) -> Path:
        frames = self._frames.file(video)
        return self._directory / frames.parent.name / f"{frames.stem}.safetensors"


def tower_hash(checkpoint: Checkpoint) -> str:
    """Return a name for the vision tower of a checkpoint, by its config and its weights."""
    found = hashlib.sha256(repr(checkpoint.model.vision).encode())
    for name in sorted(checkpoint.names()):
        if name.startswith("visual."):
            found.update(name.encode())
            found.update(checkpoint.weight(name).contiguous().float().numpy().tobytes())
    return found.hexdigest()[:32]
