"""Damaged bundles: whatever the bytes, opening one works or raises a VlrtError, and no damage reaches an engine."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bundles import QUICK
from tests.damage import damaged_json, places
from tests.small_bundle import refused, small
from vlrt import bundle
from vlrt.bundle import Bundle
from vlrt.errors import BundleError, VlrtError
from vlrt.runtime import Runtime
from vlrt.video import Frames

__all__ = ["small"]  # a fixture
MODEL = {"overrides": QUICK}
STRANGE: list[Any] = [None, True, -1, 0, 1.5, 10**18, 10**400, 1e300, float("nan"), "", "ort", "\ud800", [], {}]
STRANGE += [[1, [2]], {"a": {"b": 0}}, "\x00/../x", "x" * 5000, -(10**400), "embed.bin", 2]
NAMES = ["x", "", "file", "\ud800"]


def opens_or_says_why(path: Path) -> bool:
    """Open a bundle as far as its files; anything but a VlrtError passes through."""
    try:
        opened = Bundle.open(path)
        for table in filter(None, (opened.manifest.embed, opened.manifest.head, opened.manifest.queries)):
            opened.table(table)
        for name in opened.manifest.files:
            opened.file(name)
    except VlrtError:
        return False
    return True


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_strange_values_in_manifests(small, start):
    """Catches a KeyError, TypeError, OverflowError or encoding error from a manifest that was edited or damaged."""
    original = (small / bundle.MANIFEST).read_text()
    opened = 0
    for seed in range(start, start + 50):
        values = damaged_json(json.loads(original), random.Random(seed), STRANGE, NAMES)
        (small / bundle.MANIFEST).write_text(json.dumps(bundle.sealed(values)))
        opened += opens_or_says_why(small)
    assert opened < 45


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_broken_bytes_in_manifests(small, start):
    """Catches a decoding error, or a truncated manifest that is taken as it is."""
    original = (small / bundle.MANIFEST).read_bytes()
    for seed in range(start, start + 50):
        rng = random.Random(seed)
        data = bytearray(original)
        if seed % 3 == 0:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randint(0 if seed % 3 == 0 else 1, 6)):
            if data:
                data[rng.randrange(len(data))] = rng.choice(b'\x00"-09[{\x7f\x80\xff,:eE.')
        (small / bundle.MANIFEST).write_bytes(data)
        opens_or_says_why(small)


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"[]", b"null", b'{"a": NaN}', b"9" * 10_000, b"\xff\xfe"])
def test_manifests_that_parsers_trip_over(small, data):
    """Catches recursion limits and digits without end."""
    (small / bundle.MANIFEST).write_bytes(data)
    assert not opens_or_says_why(small)


def test_a_manifest_of_absurd_size_is_not_read(small):
    """Catches a file of gigabytes read into memory because of its name."""
    with (small / bundle.MANIFEST).open("ab") as file:
        file.truncate(bundle.MAX_MANIFEST_BYTES + 1)
    refused(small, "is larger than")


def test_a_runtime_opens_or_says_why_whatever_its_manifest(make_bundle, tmp_path):
    """Catches an engine's error where manifest and graphs do not fit: it must come before an answer, as a VlrtError."""
    path = shutil.copytree(make_bundle(**MODEL), tmp_path / "tiny.vlrt")
    original = (path / bundle.MANIFEST).read_text()
    frames = Frames.from_array(np.zeros((2, 56, 56, 3), np.uint8), fps=1)
    strange = [*STRANGE, 16, 3, 64, 256, "identity", "recurrent", "qwen2_vl"]
    model = [place for place in places(json.loads(original)) if place[0] in ("model", "graphs", "embed", "head")]
    answered = 0
    for seed in range(150):
        rng = random.Random(seed)
        values = json.loads(original)
        *outer, last = rng.choice(model)
        parent = values
        for key in outer:
            parent = parent[key]
        parent[last] = rng.choice(strange)
        (path / bundle.MANIFEST).write_text(json.dumps(bundle.sealed(values)))
        try:
            opened = Runtime.open(path, threads=1)
        except VlrtError:
            continue
        try:
            opened.ask(frames, "What?", max_tokens=2)
            answered += 1
        except VlrtError:
            pass
    assert answered > 0


@pytest.mark.parametrize("start", range(0, 60, 20))
def test_damaged_graphs_and_weights_never_reach_the_engine(make_bundle, tmp_path, start):
    """Catches flipped, cut or grown files that pass the hash."""
    path = shutil.copytree(make_bundle(**MODEL), tmp_path / "tiny.vlrt")
    names = sorted(name for name, record in Bundle.open(path).manifest.files.items() if record.num_bytes)
    for seed in range(start, start + 20):
        rng = random.Random(seed)
        file = path / names[seed % len(names)]
        whole = file.read_bytes()
        at = rng.randrange(len(whole))
        kind = rng.randrange(4)
        damaged = [
            whole[:at],
            whole + b"\0",
            whole[:at] + bytes([whole[at] ^ rng.randrange(1, 256)]) + whole[at + 1 :],
            bytes(len(whole)),
        ][kind]
        file.write_bytes(damaged)
        with pytest.raises(BundleError, match=file.name):
            Runtime.open(path)
        file.write_bytes(whole)
