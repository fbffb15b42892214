"""The directory of a run: whose it is, its log, and the state to go on from after a kill at any moment.

Every file is written beside its place and renamed, so that none is ever half there. Knows files; what is in a state is
`loop.py`'s. Only the main process writes.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlrt.errors import CheckpointError, ConfigError

MODEL, FRAMES, TOKENS, LOGS = "model", "frames", "tokens", "logs"
STATE, SETTINGS, METRICS = "state.safetensors", "settings.json", "metrics.jsonl"


def claim(out: Path, run: Mapping[str, Any]) -> None:
    """Make the directory of a run, or refuse one that belongs to another.

    Raises:
        ConfigError: it holds another run, or something else.
        CheckpointError: it cannot be written.
    """
    file = out / SETTINGS
    text = json.dumps(run, indent=1, sort_keys=True) + "\n"
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            if file.read_text(encoding="utf-8") != text:
                raise ConfigError(f"{out} holds a run with other settings; pass another -o, or the same settings")
        elif any(path != _part(file) for path in out.iterdir()):
            raise ConfigError(f"{out} is not empty and holds no run; accepted: a new path, or a run to go on with")
        else:
            _replace_text(file, text)
        for path in out.glob(f".{MODEL}.*.partial"):  # a kill while the result was written
            shutil.rmtree(path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong when a path is written into a CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def save_state(out: Path, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors on the CPU as the state after some steps, in place of the state before.

    Raises:
        CheckpointError: the disk is full, or the like; the state before stays.
    """
    part = _part(out / STATE)
    with writing(out / STATE):
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, {"step": str(step)})
            os.replace(part, out / STATE)
        except (OSError, SafetensorError):
            part.unlink(missing_ok=True)
            raise


def read_state(out: Path) -> tuple[int, Iterator[tuple[str, Tensor]]]:
    """Return the steps done, and the names and tensors of the state, one at a time; (0, none) without a state.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = out / STATE
    if not file.is_file():
        return 0, iter(())
    try:
        with safe_open(file, "pt") as opened:
            step = int((opened.metadata() or {})["step"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; remove it to start over") from error
    return step, _tensors(file)


def forget_state(out: Path) -> None:
    """Remove the state, which a finished run does not need."""
    with writing(out / STATE):
        (out / STATE).unlink(missing_ok=True)


@contextlib.contextmanager
def log(out: Path, step: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Give a function that logs a step to metrics.jsonl and TensorBoard; lines of steps that are done again go.

    Raises:
        CheckpointError: the files cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter

    path = out / METRICS
    with writing(path):
        lines = path.read_text(encoding="utf-8").splitlines()[:step] if path.is_file() else []
        _replace_text(path, "".join(f"{line}\n" for line in lines))
        file, board = path.open("a", encoding="utf-8"), SummaryWriter(str(out / LOGS), purge_step=step + 1)

    def put(step: int, measured: Mapping[str, float]) -> None:
        with writing(path):
            file.write(json.dumps({"step": step, **measured}) + "\n")
            file.flush()
            for name, value in measured.items():
                board.add_scalar(name, value, step)

    try:
        yield put
    finally:
        with writing(path):
            file.close()
            board.close()


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - no mapping: its keys come from this method alone
            yield name, opened.get_tensor(name)


def _replace_text(file: Path, text: str) -> None:
    part = _part(file)
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _part(file: Path) -> Path:
    return file.with_name(f".{file.name}.part")
