"""A bundle: the directory that an export writes and a Runtime opens.

manifest.json names every file with its size and sha256, and holds the config, the precision and the parity record of
the export. Bundles are written to a temporary sibling and renamed, so that a path holds a whole bundle or none.
Knows files, no engine. Format: docs/design.md.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlrt import config, names, unfinished
from vlrt.errors import BundleError, ConfigError, ExportError
from vlrt.watched import Watched

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SEAL = "sha256"  # the key of a manifest's own hash
MAX_MANIFEST_BYTES = 16 * 1024**2

Precision = Literal["fp32", "int8", "int4", "bf16", "fp16", "fp8"]
BackendName = Literal["ort", "torch"]
PRECISIONS: dict[BackendName, tuple[Precision, ...]] = {
    "ort": ("fp32", "int8", "int4"),
    "torch": ("fp32", "bf16", "fp16", "fp8"),
}
TableDtype = Literal["float32", "bfloat16", "float16"]
_STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
}


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of one file of a bundle."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Table:
    """A matrix [rows, columns] in a file of its own, row after row, little-endian: read by rows, memory-mapped."""

    file: str
    dtype: TableDtype
    rows: int
    columns: int


@dataclass(frozen=True)
class Check:
    """One row of the parity record: a bundle's output held against the PyTorch reference."""

    name: str
    value: float
    limit: float
    ok: bool
    at_least: bool = False  # whether value must be at least the limit; else at most


@dataclass(frozen=True)
class Manifest:
    """What manifest.json holds."""

    schema_version: int
    vlrt_version: str
    checkpoint: str
    backend: BackendName
    precision: Precision
    model: config.Model
    graphs: dict[str, names.Graph]  # ort: inputs and outputs of each; its file is <name>.onnx, its weights <name>.bin
    embed: Table
    head: Table | None  # rows of the output head; None: they are those of `embed`
    queries: Table | None  # of the parallel rollout
    parity: tuple[Check, ...]
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its manifest was read and checked, its other files only looked for."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Bundle":
        """Read the manifest of a bundle and look for its files.

        Raises:
            BundleError: not a bundle, written by another schema version, damaged, or files are missing or of another
                size.
        """
        directory = Path(path)
        try:
            if not directory.is_dir():
                hint = "; it is a file" if directory.exists() else ""
                hint = hint or unfinished.explain(directory)
                raise BundleError(f"{directory} is not a bundle{hint}; accepted: a directory that `vlrt export` wrote")
            if not (directory / MANIFEST).is_file():
                hint = "; it is a checkpoint: export it first" if (directory / "config.json").is_file() else ""
                raise BundleError(f"{directory} is not a bundle: it has no {MANIFEST}{hint}")
        except OSError as error:  # no permission, or a name that is too long
            raise BundleError(f"{directory} cannot be read: {error.strerror}") from error
        bundle = cls(directory, _read_manifest(directory / MANIFEST))
        for name, record in bundle.manifest.files.items():
            bundle._check_size(name, record)
        return bundle

    @property
    def model(self) -> config.Model:
        """The model's config."""
        return self.manifest.model

    @property
    def precision(self) -> str:
        """Precision of the weights, one of PRECISIONS of its backend."""
        return self.manifest.precision

    @property
    def backend(self) -> str:
        """Engine that it was written for."""
        return self.manifest.backend

    @property
    def parity(self) -> tuple[Check, ...]:
        """The parity record of the export."""
        return self.manifest.parity

    @property
    def seal(self) -> str:
        """The sha256 of its manifest, which has those of all its files: bundles that differ have different ones."""
        found: str = sealed(config.to_dict(self.manifest))[SEAL]
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(record.num_bytes for record in self.manifest.files.values())

    def file(self, name: str) -> Path:
        """Return the path of a file whose content was just found to have the hash of the manifest.

        Raises:
            BundleError: the file is not of this bundle, or is damaged.
        """
        self.verify([name])
        return self.path / name

    def verify(self, names: Iterable[str], threads: int = 1) -> None:
        """Hold the contents of files against the hashes of the manifest, several at once.

        Raises:
            BundleError: a file is not of this bundle, or is damaged: the first one in the order of the names.
        """
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(self._verify, names):
                pass

    def _verify(self, name: str) -> None:
        record = self.manifest.files.get(name)
        if record is None:
            raise BundleError(f"{self.path} has no file {name!r} in its manifest; export it again")
        self._check_size(name, record)
        try:
            found = sha256(self.path / name)
        except OSError as error:
            raise BundleError(f"{self.path / name} cannot be read: {error.strerror}") from error
        if found != record.sha256:
            raise BundleError(
                f"{self.path / name} is damaged: its sha256 is {found[:16]}..., the manifest says "
                f"{record.sha256[:16]}...; copy or export the bundle again"
            )

    def table(self, table: Table, *, verified: bool = False) -> NDArray[Any]:
        """Memory-map a table, [rows, columns] in its stored dtype (bfloat16 as uint16); `widen` makes rows float32.

        Args:
            table: of the manifest.
            verified: whether the caller had `verify` look at its file.
        """
        stored = _STORED[table.dtype]
        if self.manifest.files[table.file].num_bytes != table.rows * table.columns * stored.itemsize:
            raise BundleError(
                f"{self.path / table.file} does not hold {table.rows} x {table.columns} values of {table.dtype}; "
                "export the bundle again"
            )
        path = self.path / table.file if verified else self.file(table.file)
        return np.memmap(path, stored, mode="r", shape=(table.rows, table.columns))

    def watched(self) -> Watched:
        """Watch the files for changes.

        Raises:
            BundleError: one cannot be read.
        """
        return Watched(self.path / name for name in self.manifest.files)

    def _check_size(self, name: str, record: FileRecord) -> None:
        try:
            is_file, found = (self.path / name).is_file(), (self.path / name).stat().st_size
            inside = (self.path / name).resolve().is_relative_to(self.path.resolve())
        except (OSError, ValueError, RuntimeError):  # a name that the system cannot have, or links in a circle
            is_file, inside, found = False, True, 0
        if not inside:
            raise BundleError(
                f"{self.path / name} is a link that leads out of the bundle; copy the bundle with its links followed"
            )
        if not is_file:
            raise BundleError(f"{self.path} lacks its file {name!r}; copy or export the bundle again")
        if found != record.num_bytes:
            raise BundleError(
                f"{self.path / name} has {found} bytes, the manifest says {record.num_bytes}; copy or export the "
                "bundle again"
            )


def widen(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Return stored table rows as a new float32 array; uint16 means bfloat16."""
    if rows.dtype == np.uint16:
        bits = np.left_shift(rows, 16, dtype=np.uint32)
        wide: NDArray[np.float32] = bits.view(np.float32)
        return wide
    return rows.astype(np.float32)


def sha256(path: Path) -> str:
    """Return the sha256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def writing(out: Path) -> Iterator[Path]:
    """Give a temporary sibling of `out` to write a bundle into, and put it in place of `out` when the block ends well.

    On any error, and on an interruption, the temporary directory is removed and what was at `out` stays. What a process
    that was killed left beside `out` is put right first, with a warning: see unfinished.py.

    Raises:
        ExportError: `out` exists and is not a bundle, its parent cannot be written to, or the disk is full.
    """
    try:
        unfinished.recover(out)
        if out.is_symlink() or (out.exists() and not (out / MANIFEST).is_file() and not _is_empty(out)):
            raise ExportError(
                f"{out} exists and is not a bundle; accepted: a new path, an empty directory, or a bundle to replace"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        stack = contextlib.ExitStack()
        temporary = stack.enter_context(unfinished.held(out, unfinished.PARTIAL))
    except OSError as error:
        raise ExportError(f"cannot write to {out.parent}: {error.strerror}") from error
    with stack:
        try:
            yield temporary
            temporary.chmod(0o755)
            _replace(temporary, out)
        except OSError as error:
            raise ExportError(
                f"cannot write {out}: {error.strerror or error}; free space or choose another -o"
            ) from error


def hash_files(directory: Path) -> dict[str, FileRecord]:
    """Return the record of every file in a directory, by its path inside; manifest.json excepted."""
    names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    return {
        name: FileRecord((directory / name).stat().st_size, sha256(directory / name))
        for name in names
        if name != MANIFEST
    }


def save_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json, sealed with a hash of its own; where there is one, put it in its place.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(sealed(config.to_dict(manifest)), indent=1, sort_keys=True)
    part = directory / f".{os.getpid()}-{MANIFEST}"
    try:
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(directory / MANIFEST)
    finally:
        part.unlink(missing_ok=True)


def calibrate(bundle: Bundle, temperature: float) -> None:
    """Write another `choice_temperature` into a bundle; nothing else of it changes.

    Raises:
        BundleError: it cannot be written.
    """
    model = replace(bundle.model, choice_temperature=temperature)
    try:
        save_manifest(bundle.path, replace(bundle.manifest, model=model))
    except OSError as error:
        raise BundleError(f"{bundle.path} cannot be written: {error.strerror}") from error


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a manifest with `sha256`, the hash of all others as compact JSON with sorted keys."""
    rest = {key: value for key, value in values.items() if key != SEAL}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, SEAL: hashlib.sha256(text.encode()).hexdigest()}


def _replace(temporary: Path, out: Path) -> None:
    """Rename a directory over another: two renames, the old one kept until the new one is there."""
    if not out.exists():
        temporary.rename(out)
        return
    with unfinished.held(out, unfinished.OLD) as aside:
        old, placed = aside / out.name, False
        try:
            out.rename(old)
            temporary.rename(out)
            placed = True  # another export may move it aside at once
        except BaseException:
            if old.exists() and not out.exists():
                old.rename(out)
            raise
        finally:
            if placed or out.exists() or not old.exists():  # else the old one could not be put back: it is not deleted
                shutil.rmtree(aside, ignore_errors=True)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _read_manifest(path: Path) -> Manifest:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes; export the bundle again")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read as JSON ({error}); export the bundle again") from error
    if not isinstance(values, dict):
        raise BundleError(f"{path} holds a {type(values).__name__}; accepted: an object; export the bundle again")
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(f"{path} has schema version {version!r}; accepted: {SCHEMA_VERSION}; export the bundle again")
    try:
        if values.get(SEAL) != sealed(values)[SEAL]:
            raise ConfigError("its values do not fit its sha256")
        manifest = config.from_dict(Manifest, {key: value for key, value in values.items() if key != SEAL})
        for name in manifest.files:
            if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
                raise ConfigError(f"files names {name!r}; accepted: paths inside the bundle")
        _check_tables(manifest)
    except ConfigError as error:
        raise BundleError(f"{path} is damaged: {error}; export the bundle again") from error
    return manifest


def _check_tables(manifest: Manifest) -> None:
    """Refuse tables that are not among the files, or that the model would be read from at other rows."""
    decoder, plan = manifest.model.decoder, manifest.model.latent
    num_queries = plan.num_latents if plan is not None and plan.rollout == "parallel" else None
    for name, table, rows in (
        ("embed", manifest.embed, decoder.vocab_size),
        ("head", manifest.head, None if decoder.tie_word_embeddings else decoder.vocab_size),
        ("queries", manifest.queries, num_queries),
    ):
        if (table is None) != (rows is None):
            raise ConfigError(f"the model {'lacks' if table is None else 'has no use for'} the table {name!r}")
        if table is None:
            continue
        if (table.rows, table.columns) != (rows, decoder.hidden_size) or table.file not in manifest.files:
            raise ConfigError(
                f"table {name!r} is {table.rows} x {table.columns} in {table.file!r}; accepted: {rows} x "
                f"{decoder.hidden_size} in one of the files"
            )
