"""Clips on disk: they answer as the clip did, are there whole or not at all, and what is none of ours is refused."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.bundles import QUICK, square
from tests.clips import ORIGIN, clip_model, remembered
from tests.fakes import FakeBackend
from tests.test_session import QUESTIONS, same
from vlrt import prompt, saved_clip
from vlrt.bundle import SEAL, sealed
from vlrt.errors import ClipError, ConfigError
from vlrt.export import exporter
from vlrt.runtime import Runtime
from vlrt.saved_clip import MAGIC, Origin

MODEL = {"overrides": {**QUICK, "decoder.max_positions": 2048}}
FORCED = {"max_tokens": 8, "min_tokens": 8}
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", params=["ort fp32", "torch fp32", "torch bf16"])
def runtime(request, make_bundle, make_checkpoint, tmp_path_factory):
    backend, precision = request.param.split()
    if backend == "ort":
        path = make_bundle(**MODEL)
    else:
        out = tmp_path_factory.mktemp("torch") / "b.vlrt"
        path = exporter.export(make_checkpoint(**MODEL).path, out, backend="torch", precision=precision)
    with Runtime.open(path, threads=1, video_cache_bytes=0) as opened:
        yield opened


@pytest.fixture
def model():
    return clip_model()


@pytest.fixture
def tokenizer(tiny_path):
    return prompt.Tokenizer.open(tiny_path)


@pytest.fixture
def memory(model, tokenizer):
    """Of a video of 3 temporal patches, on the fake backend."""
    return remembered(model, tokenizer)


@pytest.fixture
def saved(memory, tmp_path):
    return saved_clip.save(tmp_path / "a.clip", memory, ORIGIN).path


@pytest.fixture
def load(model, tokenizer):
    return lambda path, origin=ORIGIN: saved_clip.load(path, FakeBackend(model), model, tokenizer, origin)


def split(path):
    """Return the header of a clip as values, and the bytes of its parts."""
    content = path.read_bytes()
    size = int.from_bytes(content[8:16], "little")
    return json.loads(content[16 : 16 + size]), content[16 + size :]


def put(path, header, body, *, seal=True):
    text = json.dumps(sealed(header) if seal else header).encode()
    path.write_bytes(MAGIC + len(text).to_bytes(8, "little") + text + body)


def test_a_loaded_clip_answers_as_the_clip_did(runtime, tmp_path, monkeypatch):
    """Catches anything that a file loses: positions, pooled tokens, warnings, the last bits of a value."""
    with runtime.open_video(square(7)) as clip:
        before = clip.ask(**QUESTIONS[0])
        out = clip.save(tmp_path / "a.clip")
        refs = [clip.ask(**asked) for asked in QUESTIONS]
    assert (out.path, out.removed) == (tmp_path / "a.clip", ())
    assert out.num_bytes == out.path.stat().st_size
    assert list(tmp_path.iterdir()) == [out.path]
    same(refs[0], before)
    monkeypatch.setattr(runtime._backend, "encode", None)  # the vision tower has nothing to do
    with runtime.load_video(out.path) as loaded:
        for asked, ref in zip(QUESTIONS[::-1], refs[::-1], strict=True):
            found = loaded.ask(**asked)
            same(found, ref)
            assert found.usage.reused_tokens == ref.usage.reused_tokens > 0
            assert found.usage.num_frames == 7
            if ref.latents is not None:
                np.testing.assert_array_equal(found.latents, ref.latents)
        again = loaded.save(str(out.path))  # in place of the file that it came from
        assert again.num_bytes == out.num_bytes
    with runtime.load_video(out.path) as loaded, monkeypatch.context() as patched:
        patched.setattr(runtime._backend, "words", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loaded.ask(**QUESTIONS[0])
        patched.undo()
        same(loaded.ask(**QUESTIONS[0]), refs[0])  # read anew from its video tokens
        assert loaded.save(out.path).num_bytes == out.num_bytes


def test_a_stream_is_saved_as_it_is_at_the_moment(runtime, tmp_path):
    """Catches a frame that waits and is lost, and a stream that cannot go on after it was saved."""
    frames = square(8).data
    with runtime.open_stream(fps=1.5) as stream:
        with pytest.raises(ConfigError, match="no frame"):
            stream.save(tmp_path / "a.clip")
        stream.extend(frames[:5])
        stream.save(tmp_path / "a.clip")
        ref = stream.ask(**QUESTIONS[0])
        stream.extend(frames[5:])
        whole = stream.ask(**QUESTIONS[0])
    with runtime.load_video(tmp_path / "a.clip") as loaded:
        found = loaded.ask(**QUESTIONS[0])
        same(found, ref)
        assert found.usage.num_frames == 5
    same(whole, runtime.ask(square(8), **QUESTIONS[0]))


def test_a_clip_of_another_bundle_is_refused(make_bundle, tmp_path):
    """Catches keys and values of one model read by another: the answers would be garbage, said with confidence."""
    with Runtime.open(make_bundle(**MODEL), threads=1) as runtime, runtime.open_video(square()) as clip:
        clip.save(tmp_path / "a.clip")
    other = shutil.copytree(make_bundle(**MODEL), tmp_path / "other.vlrt")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(sealed({**manifest, "checkpoint": "another"})))
    with Runtime.open(other, threads=1) as runtime, pytest.raises(ClipError, match=r"computed by the bundle .* this"):
        runtime.load_video(tmp_path / "a.clip")
    with pytest.raises(ConfigError, match="closed"):
        runtime.load_video(tmp_path / "a.clip")


def test_a_clip_of_another_backend_or_precision_is_refused(saved, load):
    with pytest.raises(ClipError, match="by the backend ort in fp32; accepted: torch in bf16"):
        load(saved, Origin("a" * 64, "torch", "bf16"))


def test_clips_of_a_runtime_without_a_bundle_are_not_saved(memory, model, tokenizer, tmp_path):
    runtime = Runtime(FakeBackend(model), tokenizer)
    with runtime.open_video(square()) as clip, pytest.raises(ConfigError, match="not opened from a bundle"):
        clip.save(tmp_path / "a.clip")
    with pytest.raises(ConfigError, match="not opened from a bundle"):
        runtime.load_video(tmp_path / "a.clip")
    assert not list(tmp_path.glob("*.clip"))


def test_the_fake_s_clip_loads_too(saved, load, memory):
    """The positive control of the tests below."""
    loaded = load(saved)
    assert loaded.shown == memory.shown
    for name, array in memory.arrays().items():
        np.testing.assert_array_equal(loaded.arrays()[name], array)


def test_damage_anywhere_is_found(saved, load):
    """Catches an unverified byte: every 97th, flipped."""
    content = saved.read_bytes()
    for at in range(0, len(content), 97):
        saved.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        with pytest.raises(ClipError, match="cannot be used"):
            load(saved)
    for size in (0, 7, 15, 16, 300, len(content) - 1):
        saved.write_bytes(content[:size])
        with pytest.raises(ClipError):
            load(saved)
    saved.write_bytes(content + b"\0")
    with pytest.raises(ClipError, match="bytes"):
        load(saved)


HUGE = 2**62


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["shown"]["media"].update(grid_thw=[HUGE, 4, 6]), "cannot be shown"),
        (lambda h: h["shown"]["media"].update(grid_thw=[15, 4, 6]), "part"),
        (lambda h: h["shown"]["media"].update(grid_thw=[3, 5, 6]), "cannot be shown"),
        (lambda h: h["shown"]["media"].update(grid_thw=[-3, -4, 6]), "cannot be shown"),
        (lambda h: h["shown"]["media"].update(grid_thw=[3, 4]), "accepted: 3"),
        (lambda h: h["shown"]["media"].update(seconds_per_temporal_patch=float("nan")), "seconds per"),
        (lambda h: h["shown"]["media"].update(seconds_per_temporal_patch=1e300), "seconds per"),
        (lambda h: h["shown"].update(num_frames=HUGE), "frames"),
        (lambda h: h["shown"].update(num_frames=0), "frames"),
        (lambda h: h["shown"].update(num_frames=2**70), "accepted: at most 63"),
        (lambda h: h["shown"].update(warnings=[7]), "warnings"),
        (lambda h: h["shown"].update(path="/etc/passwd"), "unknown setting shown.path"),
        (lambda h: h["parts"]["keys.0"].update(shape=[1, 2, HUGE, 8]), "keys.0"),
        (lambda h: h["parts"]["keys.0"].update(shape=[2, 1, *h["parts"]["keys.0"]["shape"][2:]]), "keys.0"),
        (lambda h: h["parts"]["keys.0"].update(shape=[]), "keys.0"),
        (lambda h: h["parts"]["values.0"].update(dtype="object"), "values.0"),
        (lambda h: h["parts"]["values.0"].update(dtype="float64"), "values.0"),
        (lambda h: h["parts"]["tokens"].update(shape=[17, 16]), "tokens"),
        (lambda h: h["parts"]["ids"].update(sha256="0" * 64), "'ids' is damaged"),
        (lambda h: h["parts"].pop("cos"), "has no part 'cos'"),
        (lambda h: h["parts"].update({"../evil": h["parts"]["cos"]}), "has a part '../evil'"),
        (lambda h: h["parts"].update(cos=7), "parts.cos"),
        (lambda h: h.update(parts=[]), "parts"),
        (lambda h: h.update(schema_version=2), "schema version 2"),
        (lambda h: h.pop("origin"), "origin"),
    ],
)
def test_hostile_headers_are_refused(saved, load, change, message):
    """Catches memory that a file asks for and does not fill, and shapes that the model does not have."""
    header, body = split(saved)
    put(saved, header, body)
    load(saved)
    change(header)
    put(saved, header, body)
    with pytest.raises(ClipError, match=rf"a\.clip cannot be used: .*{message}"):
        load(saved)


def test_a_prompt_that_is_not_the_template_s_is_refused(saved, load):
    header, body = split(saved)
    ids = np.frombuffer(body, "<i8", header["parts"]["ids"]["shape"][0]).copy()
    ids[0] += 1
    header["parts"]["ids"]["sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()
    put(saved, header, ids.tobytes() + body[ids.nbytes :])
    with pytest.raises(ClipError, match="its prompt is not"):
        load(saved)


def test_what_is_no_clip_is_refused(saved, load, tmp_path):
    content = saved.read_bytes()
    header, _ = split(saved)
    for wrong in (
        b"",
        b"VLRTCLIP",
        MAGIC + (2**63).to_bytes(8, "little") + content[16:],
        MAGIC + len(content).to_bytes(8, "little") + content[16:],
        MAGIC + (4).to_bytes(8, "little") + b"null",
        MAGIC + (1_000_000).to_bytes(8, "little") + b"[" * 1_000_000,
        MAGIC + (2).to_bytes(8, "little") + b"\xff\xfe",
        b"\x80\x04\x95" + content,
    ):
        saved.write_bytes(wrong)
        with pytest.raises(ClipError, match="cannot be used"):
            load(saved)
    put(saved, {**header, SEAL: "0" * 64}, b"", seal=False)
    with pytest.raises(ClipError, match="sha256"):
        load(saved)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none", tmp_path / "pipe", tmp_path / ("n" * 300), "a\0b", "/dev/zero"):
        with pytest.raises(ClipError):
            load(path)


def test_nothing_but_a_clip_is_replaced(memory, tmp_path):
    """Catches a video overwritten by a slip of the hand, and a link followed to somewhere else."""
    (tmp_path / "video.mp4").write_bytes(b"precious")
    elsewhere = saved_clip.save(tmp_path / "elsewhere.clip", memory, ORIGIN).path
    (tmp_path / "link.clip").symlink_to(elsewhere)
    (tmp_path / "dangling.clip").symlink_to(tmp_path / "none")
    (tmp_path / "folder.clip").mkdir()
    content = elsewhere.read_bytes()
    for name in ("video.mp4", "link.clip", "dangling.clip", "folder.clip"):
        with pytest.raises(ClipError, match="exists and is no saved clip"):
            saved_clip.save(tmp_path / name, memory, ORIGIN)
    assert (tmp_path / "video.mp4").read_bytes() == b"precious"
    assert elsewhere.read_bytes() == content
    for name in ("none/a.clip", "video.mp4/a.clip", "n" * 300, "a\0b"):
        with pytest.raises(ClipError, match="cannot write"):
            saved_clip.save(tmp_path / name, memory, ORIGIN)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_leaves_what_was_there(memory, model, tokenizer, saved, load, monkeypatch, call, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    content = saved.read_bytes()
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ClipError, match=os.strerror(code)):
        saved_clip.save(saved, remembered(model, tokenizer, 2.0), ORIGIN)
    assert saved.read_bytes() == content
    assert list(saved.parent.iterdir()) == [saved]


KILLED = """
    import os, signal, sys
    import numpy as np
    from pathlib import Path
    from tests.clips import ORIGIN, clip_model, remembered
    from vlrt import prompt, saved_clip

    path, checkpoint, point = sys.argv[1:]
    memory = remembered(clip_model(), prompt.Tokenizer.open(checkpoint), 2.0)
    die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    if point in ("fsync", "replace"):
        setattr(os, point, die)
    elif point == "unlink":
        Path.unlink = die  # after the rename
    else:
        arrays = memory.arrays()
        class Deadly:  # dies after as many writes
            def __init__(self, file, left): self.file, self.left = file, left
            def __getattr__(self, name): return getattr(self.file, name)
            def write(self, data):
                if self.left == 0:
                    self.file.flush()
                    die()
                self.left -= 1
                self.file.write(data)
        import contextlib
        inner = saved_clip._temporary
        @contextlib.contextmanager
        def dying(out):
            with inner(out) as file:
                yield Deadly(file, int(point))
        saved_clip._temporary = dying
    saved_clip.save(path, memory, ORIGIN)
"""


@pytest.mark.parametrize(
    ("point", "before"),
    [*((point, True) for point in ("0", "1", "4", "fsync", "replace", "unlink")), ("4", False), ("unlink", False)],
)
def test_a_kill_while_saving_leaves_the_old_clip_or_none(tmp_path, tiny_path, model, tokenizer, load, point, before):
    """Catches half a file under the path, and leftovers that stay for ever or go without a word."""
    path = tmp_path / "a.clip"
    old = remembered(model, tokenizer, 1.0)
    if before:
        saved_clip.save(path, old, ORIGIN)
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), path, tiny_path, point],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    renamed = point == "unlink"
    assert path.exists() == (before or renamed)
    if path.exists():
        assert load(path)._tokens[0, 0] == (2.0 if renamed else 1.0)
    left = [found for found in tmp_path.iterdir() if found != path]
    assert len(left) == (0 if renamed else 1)
    out = saved_clip.save(path, old, ORIGIN)
    assert out.removed == tuple(left)
    assert list(tmp_path.iterdir()) == [path]
    assert load(path)._tokens[0, 0] == 1.0


def test_another_save_under_way_is_not_taken_for_a_leftover(memory, tmp_path, load):
    """Catches two processes that save to one path, and the second removes what the first is writing."""
    path = tmp_path / "a.clip"
    with saved_clip._temporary(path) as file:
        assert saved_clip.save(path, memory, ORIGIN).removed == ()
        assert Path(file.name).exists()
    other = tmp_path / ".a.clip.d"
    other.write_bytes(b"somebody's")
    (tmp_path / ".b.clip.0.partial").write_bytes(b"of another clip")
    assert saved_clip.save(path, memory, ORIGIN).removed == ()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_temporary_file_that_was_taken_for_stale_is_made_anew(tmp_path, monkeypatch):
    """Catches the moment between making the file and locking it."""
    lock, seen = saved_clip._lock, []

    def steal(file):
        if not seen:
            Path(file.name).unlink()
        seen.append(file.name)
        return lock(file)

    monkeypatch.setattr(saved_clip, "_lock", steal)
    with saved_clip._temporary(tmp_path / "a.clip") as file:
        assert Path(file.name).exists()
    assert len(set(seen)) == 2
    assert not list(tmp_path.iterdir())


def test_a_file_that_goes_while_one_looks_for_stale_ones_is_no_error(model, tokenizer, tmp_path, monkeypatch):
    """Catches a save that fails because another one put its file in place in that moment."""
    (tmp_path / ".a.clip.0.partial").touch()
    regular = saved_clip._is_regular

    def gone(path):
        path.unlink()
        return regular(path)

    monkeypatch.setattr(saved_clip, "_is_regular", gone)
    assert saved_clip.save(tmp_path / "a.clip", remembered(model, tokenizer, 1.0), ORIGIN).removed == ()


def test_many_threads_save_to_one_path(model, tokenizer, tmp_path, load):
    """Catches a file made of two."""
    path, errors = tmp_path / "a.clip", []

    def save(fill):
        try:
            memory = remembered(model, tokenizer, fill)
            for _ in range(5):
                saved_clip.save(path, memory, ORIGIN)
                assert load(path)._tokens[0, 0] in (1.0, 2.0, 3.0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(fill,)) for fill in (1.0, 2.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(tmp_path.iterdir()) == [path]
