"""Decoded and resized frames on disk: a video is decoded once per content and sampling settings.

Knows files and frames; no question and no patches. Several processes may share a directory.
"""

import hashlib
import json
import os
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from vlrt import config, preprocess, video
from vlrt.errors import ConfigError, VideoError

FORMAT = 1  # of the files: raise it when what they hold, or how frames come about, changes


class FrameCache:
    """Frames as `preprocess.resized` returns them, by video file."""

    def __init__(self, directory: str | Path, model: config.Model) -> None:
        """Use a directory, made when the first frames are kept, for videos as `model` samples them."""
        self._directory = Path(directory)
        self._video, self._vision = model.video, model.vision
        sizes = (self._vision.patch_size, self._vision.temporal_patch_size, self._vision.spatial_merge_size)
        self._settings = json.dumps([FORMAT, asdict(self._video), sizes]).encode()
        self._hashes: dict[tuple[str, int, int], str] = {}  # by path, size and time: a file is hashed once per process

    def load(self, path: Path) -> video.Frames:
        """Return the frames of a video or image file: kept ones, or decoded, resized and kept.

        Raises:
            VideoError: the file cannot be read or decoded.
            ConfigError: the directory cannot be written.
        """
        kept = self.file(path)
        try:
            return _read(kept)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            pass  # not there, or cut off by a full disk: made, or made again, below
        frames = preprocess.resized(video.load(path, self._video, self._vision), self._video, self._vision)
        try:
            _write(kept, frames)
        except OSError as error:
            raise ConfigError(f"the frame cache {self._directory} cannot be written: {error}") from error
        return frames

    def file(self, path: Path) -> Path:
        """Return where the frames of a video are kept: named by what it holds, so that copies share them.

        Raises:
            VideoError: the video cannot be read.
        """
        try:
            found = os.stat(path)
            key = (str(path), found.st_size, found.st_mtime_ns)
            if key not in self._hashes:
                with open(path, "rb") as file:
                    self._hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise VideoError(f"{path} cannot be read: {error}") from error
        name = hashlib.sha256(self._settings + self._hashes[key].encode()).hexdigest()
        return self._directory / name[:2] / f"{name[2:]}.npz"


def _read(file: Path) -> video.Frames:
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as kept:
        rest = json.loads(str(kept["rest"]))
        return video.Frames(
            data=kept["data"], pts_seconds=kept["pts_seconds"], **{**rest, "warnings": tuple(rest["warnings"])}
        )


def _write(file: Path, frames: video.Frames) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rest = {name: value for name, value in vars(frames).items() if name not in ("data", "pts_seconds")}
    part = file.with_name(f".{os.getpid()}-{file.name}")
    try:
        with part.open("wb") as out:
            np.savez(out, data=frames.data, pts_seconds=frames.pts_seconds, rest=np.array(json.dumps(rest)))
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
