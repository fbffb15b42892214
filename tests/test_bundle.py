"""Bundles: manifests there and back, files missing or damaged, and writing that leaves a whole bundle or none.

Damage is what a disk, a copy or an editor does. Not covered: an attacker, whose manifest has hashes that fit his files.
"""

import errno
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.bundles import QUICK
from tests.small_bundle import ROWS, refused, rewrite, small, write_small
from vlrt import bundle, fresh
from vlrt.bundle import Bundle, FileRecord, Table
from vlrt.errors import BundleError, ExportError
from vlrt.runtime import Runtime
from vlrt.video import Frames

__all__ = ["small"]  # a fixture
MODEL = {"overrides": QUICK}


def test_a_changed_value_is_refused(small: Path) -> None:
    """Catches a flipped digit in the config, which would change answers without a word."""
    text = (small / bundle.MANIFEST).read_text()
    assert '"rope_theta": 1000000.0' in text
    (small / bundle.MANIFEST).write_text(text.replace('"rope_theta": 1000000.0', '"rope_theta": 1000001.0'))
    refused(small, "do not fit its sha256")


# Reading


def test_a_manifest_comes_back_as_it_was_written(small):
    """Catches a field that JSON loses: tuples, None, nested dataclasses, names beyond ASCII."""
    opened = Bundle.open(small)
    assert opened.manifest == write_small(small)
    assert opened.manifest.files["notes/é.txt"] == FileRecord(4, bundle.sha256(small / "notes" / "é.txt"))
    assert opened.num_bytes == ROWS.nbytes + 4
    assert (opened.precision, opened.backend, opened.model) == (
        "int8",
        "ort",
        fresh.fresh_model(overrides=QUICK, tie=True),
    )
    assert opened.parity[1].at_least
    assert opened.file("notes/é.txt").read_text() == "vlrt"


def test_a_bundle_is_calibrated_in_place(small):
    """Catches a manifest that no longer opens, another value that changes, and a file that is left behind."""
    before = Bundle.open(small)
    assert before.model.choice_temperature == 1.0
    files = sorted(path.name for path in small.iterdir())
    bundle.calibrate(before, 1.75)
    after = Bundle.open(small)
    assert after.manifest == replace(before.manifest, model=replace(before.model, choice_temperature=1.75))
    assert sorted(path.name for path in small.iterdir()) == files


def test_a_manifest_of_before_temperatures_is_read(small):
    """Catches bundles that have to be exported again for a setting that has a default."""
    rewrite(small, lambda values: values["model"].pop("choice_temperature"))
    assert Bundle.open(small).model.choice_temperature == 1.0


def test_a_bundle_that_cannot_be_written_stays_as_it_was(small, monkeypatch):
    """Catches a manifest cut short on a full disk."""
    opened, text = Bundle.open(small), (small / bundle.MANIFEST).read_text()

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BundleError, match="No space left"):
        bundle.calibrate(opened, 2.0)
    assert (small / bundle.MANIFEST).read_text() == text


def test_a_real_manifest_comes_back_as_it_was_written(make_bundle):
    """Catches an export that writes what opening does not read, or leaves a file out of the hashes."""
    path = make_bundle(**MODEL)
    opened = Bundle.open(path)
    assert opened.manifest.files == bundle.hash_files(path)
    assert set(opened.manifest.graphs) == {"vision", "decoder", "lm_head", "latent", "latent_memory"}
    assert opened.manifest.embed == Table("embed.bin", "float32", 384, 128)
    assert len(opened.parity) == 6
    assert all(row.ok for row in opened.parity)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tables_are_read_by_rows_as_float32(tmp_path, dtype):
    """Catches bits of bfloat16 read as numbers, and a table that is copied into memory."""
    stored = {"float32": ROWS, "bfloat16": (ROWS.view(np.uint32) >> 16).astype(np.uint16), "float16": ROWS / 60_000}
    array = stored[dtype].astype({"float32": "<f4", "bfloat16": "<u2", "float16": "<f2"}[dtype])
    array.tofile(tmp_path / "table.bin")
    table = Table("table.bin", dtype, *ROWS.shape)
    manifest = replace(write_small(tmp_path / "x"), files=bundle.hash_files(tmp_path))
    mapped = Bundle(tmp_path, manifest).table(table)
    assert isinstance(mapped, np.memmap)
    rows = bundle.widen(mapped[[3, 1]])
    want = ROWS[[3, 1]] / (60_000 if dtype == "float16" else 1)
    np.testing.assert_allclose(rows, want, rtol=2**-8)
    assert rows.dtype == np.float32
    with pytest.raises(BundleError, match="does not hold 385 x 128"):
        Bundle(tmp_path, manifest).table(replace(table, rows=385))


def test_what_is_no_bundle_is_told_apart(tmp_path, small):
    """Catches one message for all: a file, a checkpoint and an empty folder need different advice."""
    refused(tmp_path / "absent", "absent is not a bundle", "vlrt export")
    refused(small / "embed.bin", "it is a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no manifest.json")
    refused(fresh.write_checkpoint(tmp_path / "ck", overrides=QUICK), "it is a checkpoint: export it first")
    (tmp_path / "odd" / bundle.MANIFEST).mkdir(parents=True)
    refused(tmp_path / "odd", "has no manifest.json")
    refused(tmp_path / ("x" * 300), "cannot be read: File name too long")


@pytest.mark.parametrize("version", [None, 0, 2, "1", [1]])
def test_other_schema_versions_are_refused_by_name(small, version):
    """Catches fields of another version read as if they were this one's."""
    refused(rewrite(small, lambda v: v.update(schema_version=version)), f"schema version {version!r}; accepted: 1")


@pytest.mark.parametrize(
    "name", ["../small.vlrt/embed.bin", "/etc/passwd", "notes/../../x", "a\0b", "\ud800", "..", "", ".", "notes"]
)
def test_files_outside_the_bundle_are_refused(small, name):
    """Catches a manifest that has files read from elsewhere, and names that the system does not take."""

    def move(values):
        values["files"][name] = values["files"].pop("notes/é.txt")

    refused(rewrite(small, move), "small.vlrt")


def test_tables_must_be_among_the_files_and_of_the_model_s_size(small):
    """Catches a KeyError at the first question, and ids that reach beyond the table."""
    for change in ({"file": "absent.bin"}, {"columns": 64}, {"rows": 0}, {"rows": 383}, {"dtype": "float64"}):
        copy = shutil.copytree(small, small.parent / "copy")
        refused(rewrite(copy, lambda v, change=change: v["embed"].update(change)), "is damaged")
        shutil.rmtree(copy)


def test_tables_must_be_those_of_the_model(small):
    """Catches choices scored with the embedding table of a model whose output head is another one."""
    for change in (
        lambda v: v.update(head=v["embed"]),
        lambda v: v.update(queries=v["embed"]),
        lambda v: v["model"]["decoder"].update(tie_word_embeddings=False),
        lambda v: v["model"]["latent"].update(rollout="parallel"),
    ):
        copy = shutil.copytree(small, small.parent / "copy")
        refused(rewrite(copy, change), "is damaged", "the table")
        shutil.rmtree(copy)


def test_a_missing_or_cut_file_is_named_on_open(small):
    """Catches a half-copied bundle that opens."""
    (small / "notes" / "é.txt").write_text("vlr")
    refused(small, "é.txt has 3 bytes, the manifest says 4")
    (small / "notes" / "é.txt").unlink()
    refused(small, "lacks its file 'notes/é.txt'")


def test_damage_of_the_same_size_is_found_when_the_file_is_used(small):
    """Catches a hash that is never compared, and one that is remembered from before the damage."""
    opened = Bundle.open(small)
    assert opened.file("notes/é.txt")
    (small / "notes" / "é.txt").write_text("vlrT")
    with pytest.raises(BundleError, match=r"é\.txt is damaged: its sha256 is"):
        Bundle.open(small).file("notes/é.txt")
    with pytest.raises(BundleError, match="is damaged"):
        opened.file("notes/é.txt")
    with pytest.raises(BundleError, match="has no file 'other'"):
        opened.file("other")


def test_a_file_that_became_a_directory_is_refused(small):
    """Catches IsADirectoryError from the hash of a folder whose size happens to fit."""
    (small / "notes" / "é.txt").unlink()
    (small / "notes" / "é.txt").mkdir()
    size = (small / "notes" / "é.txt").stat().st_size
    refused(rewrite(small, lambda v: v["files"]["notes/é.txt"].update(num_bytes=size)), "é.txt")


def test_a_damaged_byte_in_any_file_is_found_before_an_answer(make_bundle, tmp_path):
    """Catches a file that is loaded unverified: weights, graphs, tables, tokenizer and template alike."""
    path = shutil.copytree(make_bundle(**MODEL), tmp_path / "tiny.vlrt")
    names = [name for name, record in Bundle.open(path).manifest.files.items() if record.num_bytes]
    assert {"vision.onnx", "decoder.bin", "embed.bin", "tokenizer.json", "tokenizer_config.json"} <= set(names)
    for name in names:
        whole = (path / name).read_bytes()
        damaged = bytearray(whole)
        damaged[random.Random(name).randrange(len(whole))] ^= 1 << random.Random(name).randrange(8)
        (path / name).write_bytes(damaged)
        with pytest.raises(BundleError, match=f"{name} is damaged"):
            Runtime.open(path)
        (path / name).write_bytes(whole)
    with Runtime.open(path) as opened:
        frames = Frames.from_array(np.zeros((2, 56, 56, 3), np.uint8), fps=1)
        assert opened.ask(frames, "What?", max_tokens=1, min_tokens=1).token_ids


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("vision", {"in_channels": 4}, "has a tensor pixels"),
        ("vision", {"num_heads": 8}, "has a tensor cos"),
        ("vision", {"window_size": 0}, "other inputs or outputs"),
        ("decoder", {"num_layers": 3}, "other inputs or outputs"),
        ("decoder", {"num_layers": 10**18}, "accepted: at most 1024"),
        ("decoder", {"num_kv_heads": 4}, "has a tensor past_key"),
        ("decoder", {"rope_theta": 1e300}, "rope_theta"),
        ("latent", {"injection": "mlp"}, "other inputs or outputs"),
        ("tokens", {"eos_token_ids": []}, "eos_token_ids"),
        ("video", {"std": [0.5, 0, 0.5]}, "accepted: numbers above 0"),
    ],
)
def test_a_config_that_is_not_the_graphs_is_refused_on_open(make_bundle, tmp_path, part, change, words):
    """Catches a session that fails at the first question, or memory filled with names of layers that are not there."""
    path = shutil.copytree(make_bundle(**MODEL), tmp_path / "tiny.vlrt")
    with pytest.raises(BundleError, match=words):
        Runtime.open(rewrite(path, lambda v: v["model"][part].update(change)))


# Writing


def break_off(directory: Path, error: BaseException) -> None:
    (directory / "vision.bin").write_bytes(b"half")
    raise error


def leftovers(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_bundle_appears_whole(tmp_path):
    """Catches files that are seen before the last one is written, and a directory that only its owner may read."""
    out = tmp_path / "made" / "here" / "x.vlrt"
    with bundle.writing(out) as directory:
        assert directory.parent == out.parent
        write_small(directory)
        assert not out.exists()
    assert Bundle.open(out)
    assert leftovers(out.parent) == ["x.vlrt"]
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), MemoryError(), ExportError("x")]
)
@pytest.mark.parametrize("before", [False, True])
def test_an_error_leaves_what_was_there(tmp_path, error, before):
    """Catches half a bundle left behind, and an old one lost to an export that failed or was interrupted."""
    out = tmp_path / "x.vlrt"
    if before:
        write_small(out)
    was = contents(tmp_path)
    with pytest.raises(type(error)), bundle.writing(out) as directory:
        break_off(directory, error)
    assert contents(tmp_path) == was
    assert leftovers(tmp_path) == ["x.vlrt"] * before


@pytest.mark.parametrize("before", [False, True])
def test_a_full_disk_is_told_in_a_sentence(tmp_path, before):
    """Catches a bare OSError, and its half-written files left on the full disk."""
    out = tmp_path / "x.vlrt"
    if before:
        write_small(out)
    was = contents(tmp_path)
    with pytest.raises(ExportError, match=r"x\.vlrt: No space left on device; free space"), bundle.writing(out):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert contents(tmp_path) == was


def test_a_bundle_is_replaced_on_success(tmp_path):
    """Catches files of the old bundle that stay among those of the new one."""
    out = tmp_path / "x.vlrt"
    write_small(out)
    (out / "old.bin").write_bytes(b"old")
    with bundle.writing(out) as directory:
        write_small(directory)
        assert (out / "old.bin").exists()
    assert "old.bin" not in contents(out)
    assert leftovers(tmp_path) == ["x.vlrt"]


def test_a_failed_rename_puts_the_old_bundle_back(tmp_path, monkeypatch):
    """Catches the moment between two renames, in which neither bundle is in place."""
    out = tmp_path / "x.vlrt"
    write_small(out)
    was = contents(out)
    rename = Path.rename

    def fails(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(ExportError, match="Input/output error"), bundle.writing(out) as directory:
        write_small(directory)
    assert contents(out) == was
    assert leftovers(tmp_path) == ["x.vlrt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOTEMPTY, "Directory not empty")])
@pytest.mark.parametrize("at", [".partial", "x.vlrt"])
def test_an_end_between_the_two_renames_loses_no_bundle(tmp_path, monkeypatch, error, at):
    """Catches Ctrl-C that leaves the old bundle under a hidden name, and hidden directories left behind."""
    out = tmp_path / "x.vlrt"
    write_small(out)
    was = contents(out)
    rename, left = Path.rename, [error]

    def fails_once(self, target):
        if self.name.endswith(at) and left:
            raise left.pop()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises((KeyboardInterrupt, ExportError)), bundle.writing(out) as directory:
        write_small(directory)
    assert contents(out) == was
    assert leftovers(tmp_path) == ["x.vlrt"]


def test_two_exports_that_end_at_once_leave_one_whole_bundle(tmp_path, monkeypatch):
    """Catches an old bundle kept under a hidden name because another export has filled its place meanwhile."""
    out = tmp_path / "x.vlrt"
    write_small(out)
    rename = Path.rename

    def meanwhile(self, target):
        rename(self, target)
        if self == out:
            write_small(out)
            (out / "other").write_text("from another process")

    monkeypatch.setattr(Path, "rename", meanwhile)
    with pytest.raises(ExportError, match="Directory not empty"), bundle.writing(out) as directory:
        write_small(directory)
    assert (out / "other").exists()
    assert leftovers(tmp_path) == ["x.vlrt"]


def test_what_is_no_bundle_is_never_replaced(tmp_path):
    """Catches `-o ~` or `-o model/` deleting somebody's files."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    write_small(tmp_path / "real.vlrt")
    (tmp_path / "link.vlrt").symlink_to(tmp_path / "real.vlrt")
    was = contents(tmp_path)
    for name in ("work", "file", "link.vlrt"):
        with (
            pytest.raises(ExportError, match=r"is not a bundle; accepted: a new path"),
            bundle.writing(tmp_path / name),
        ):
            raise AssertionError("never begun")
    assert contents(tmp_path) == was
    assert (tmp_path / "link.vlrt").is_symlink()


def test_an_empty_directory_is_filled(tmp_path):
    """Catches a directory that the user made for the bundle being refused."""
    (tmp_path / "x.vlrt").mkdir()
    with bundle.writing(tmp_path / "x.vlrt") as directory:
        write_small(directory)
    assert Bundle.open(tmp_path / "x.vlrt")
    assert leftovers(tmp_path) == ["x.vlrt"]


def test_a_parent_that_cannot_be_written_to_is_named(tmp_path):
    """Catches a NotADirectoryError."""
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "x.vlrt", tmp_path / ("x" * 300)):
        with pytest.raises(ExportError, match="cannot write to"), bundle.writing(path):
            raise AssertionError("never begun")
