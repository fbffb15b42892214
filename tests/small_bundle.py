"""A bundle without graphs, for tests of manifests and files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bundles import QUICK
from vlrt import bundle, fresh, names
from vlrt.bundle import Bundle, Check, Manifest, Table
from vlrt.errors import BundleError

ROWS = np.arange(384 * 128, dtype=np.float32).reshape(384, 128)


def write_small(directory: Path) -> Manifest:
    """Write a bundle that has no graphs but a table and a text file, and return its manifest."""
    directory.mkdir(exist_ok=True)
    ROWS.tofile(directory / "embed.bin")
    (directory / "notes").mkdir(exist_ok=True)
    (directory / "notes" / "é.txt").write_text("vlrt")
    manifest = Manifest(
        schema_version=bundle.SCHEMA_VERSION,
        vlrt_version="0.1.0",
        checkpoint="tiny",
        backend="ort",
        precision="int8",
        model=fresh.fresh_model(overrides=QUICK, tie=True),
        graphs={"vision": names.vision(windowed=True), "decoder": names.decoder(2)},
        embed=Table("embed.bin", "float32", *ROWS.shape),
        head=None,
        queries=None,
        parity=(Check("logits: relative error", 1e-6, 1e-4, True), Check("agreed", 0.5, 1.0, False, at_least=True)),
        files=bundle.hash_files(directory),
    )
    bundle.save_manifest(directory, manifest)
    return manifest


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write_small(tmp_path / "small.vlrt")
    return tmp_path / "small.vlrt"


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the JSON of a bundle's manifest in place."""
    values = json.loads((path / bundle.MANIFEST).read_text())
    change(values)
    (path / bundle.MANIFEST).write_text(json.dumps(bundle.sealed(values)))
    return path


def refused(path: Path, *words: str) -> None:
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    for word in words:
        assert word in str(caught.value)
