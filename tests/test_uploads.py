"""Frames on their way to a device, with the CPU for one: patches are those of `preprocess.py`, to the bit."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.bundles import QUESTION, QUICK, square
from tests.videos import make
from vlrt import preprocess, video
from vlrt.backends import uploads
from vlrt.backends.uploads import Cutter, FrameUpload
from vlrt.export import exporter
from vlrt.runtime import Runtime

CPU = torch.device("cpu")
FORCED = {"min_tokens": 6, "max_tokens": 6}


@pytest.fixture(scope="module")
def model(make_checkpoint):
    return make_checkpoint(overrides=QUICK).model


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=60)


@pytest.fixture(scope="module")
def pictures(clip, model, tmp_path_factory):
    """The frames of the clip as image files."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{i}.png" for i in range(8)]
    for path, picture in zip(paths, video.load(clip, model.video, model.vision, num_frames=8).data, strict=True):
        Image.fromarray(picture).save(path)
    return paths


def upload(model, dtype=torch.float32):
    return FrameUpload(Cutter(model.vision, model.video, dtype, CPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_patches_are_those_of_the_host(model, dtype):
    """Catches mean and deviation that are rounded before they are used, and chunks that begin elsewhere."""
    frames = preprocess.resized(square(), model.video, model.vision)
    made = upload(model, dtype)
    for start, stop in ((0, 4), (1, 3), (3, 4)):
        ref = preprocess.patchify(frames, model.video, model.vision, start, stop).pixels
        assert torch.equal(made.patches(frames.data, start, stop), torch.from_numpy(ref).to(dtype))


class Recorded(FrameUpload):
    """Notes what is copied, and when: how many frames were written by then."""

    def begin(self, shape):
        self.copies, self.waited = [], []
        return super().begin(shape)

    def written(self, count):
        super().written(count)
        self.waited.append(count - self._num_sent)

    def _send(self):
        self.copies.append((self._num_sent, self._written))
        super()._send()


@pytest.mark.parametrize("piece", [1, 3, 1000])
@pytest.mark.parametrize("kind", ["clip", "pictures"])
def test_frames_are_sent_while_others_are_decoded(model, kind, piece, request, monkeypatch):
    """Catches a video that waits for its last frame, a frame sent twice or before it is there, a rest left behind."""
    source = request.getfixturevalue(kind)
    whole = video.load(source, model.video, model.vision, num_frames=8)
    monkeypatch.setattr(uploads, "PIECE_BYTES", piece * whole.data[0].nbytes)
    made = Recorded(Cutter(model.vision, model.video, torch.float32, CPU))
    frames = video.load(source, model.video, model.vision, num_frames=8, target=made)
    np.testing.assert_array_equal(frames.data, whole.data)
    assert len(made.waited) == 8
    assert max(made.waited) < piece
    made._sent[made._num_sent :] = 77
    frames = preprocess.resized(frames, model.video, model.vision)
    ref = preprocess.patchify(frames, model.video, model.vision, 1, 3).pixels
    assert torch.equal(made.patches(frames.data, 1, 3), torch.from_numpy(ref))
    assert [start for start, _ in made.copies] == [0, *(stop for _, stop in made.copies[:-1])]
    assert made.copies[-1][1] == 8


class Alone(Recorded):
    """Notes whether two threads send at once; each takes its time."""

    def begin(self, shape):
        self.inside, self.together = 0, False
        return super().begin(shape)

    def _send(self):
        self.together |= self.inside > 0
        self.inside += 1
        threading.Event().wait(0.001)
        super()._send()
        self.inside -= 1


def test_frames_are_written_by_one_thread_and_asked_for_by_another(model, monkeypatch):
    """Catches frames that both threads send, or neither."""
    monkeypatch.setattr(uploads, "PIECE_BYTES", 1)
    made = Alone(Cutter(model.vision, model.video, torch.float32, CPU))
    data, ready = made.begin((40, 28, 28, 3)), threading.Semaphore(0)

    def write():
        for i in range(len(data)):
            data[i] = i
            made.written(i + 1)
            if i % 2:
                ready.release()

    writer = threading.Thread(target=write)
    writer.start()
    for step in range(20):
        assert ready.acquire(timeout=20)
        out = made.patches(data, step, step + 1)
        ref = preprocess.cut(data, model.video, model.vision, step, step + 1)
        assert torch.equal(out, torch.from_numpy(ref))
    writer.join()
    assert [start for start, _ in made.copies] == [0, *(stop for _, stop in made.copies[:-1])]
    assert made.copies[-1][1] == 40
    assert not made.together


def test_frames_that_were_changed_are_sent_anew(model, clip):
    """Catches the decoder's frames in the place of those that were made of them: some left out, or one repeated."""
    made = upload(model)
    frames = video.load(clip, model.video, model.vision, num_frames=8, target=made)
    data = frames.data[[0, 1, 4, 5]]
    ref = preprocess.patchify(replace(frames, data=data), model.video, model.vision).pixels
    assert torch.equal(made.patches(data, 0, 2), torch.from_numpy(ref))


def test_long_videos_are_not_pinned(model, clip, monkeypatch):
    """Catches a machine without memory that it can swap."""
    monkeypatch.setattr(uploads, "MAX_PINNED_BYTES", 1000)
    made = upload(model)
    frames = video.load(clip, model.video, model.vision, num_frames=8, target=made)
    ref = preprocess.patchify(frames, model.video, model.vision).pixels
    assert torch.equal(made.patches(frames.data, 0, 4), torch.from_numpy(ref))
    assert made._host.numel() == 0


def test_answers_are_those_of_patches_cut_on_the_host(make_checkpoint, tmp_path, clip, monkeypatch):
    """Catches a runtime that mixes up frames, chunks and grids on the way of a GPU."""
    bundle = exporter.export(make_checkpoint(overrides=QUICK).path, tmp_path / "b", backend="torch")
    with Runtime.open(bundle, video_cache_bytes=0) as opened:
        backend = opened._backend
        sources = [(clip, {"num_frames": 8}), (square(7), {}), (square(2), {})]
        refs = [opened.ask(source, QUESTION, **given, **FORCED) for source, given in sources]
        made = []

        def frame_upload():
            made.append(FrameUpload(backend._cutter))
            return made[-1]

        monkeypatch.setattr(backend, "frame_upload", frame_upload)
        monkeypatch.setattr(preprocess, "cut", None)
        for chunk in (backend.vision_chunk, 1):
            backend.vision_chunk = chunk
            for (source, given), ref in zip(sources, refs, strict=True):
                out = opened.ask(source, QUESTION, **given, **FORCED)
                assert out.token_ids == ref.token_ids
                np.testing.assert_allclose(out.latents, ref.latents, rtol=1e-3, atol=1e-5)
        with opened.open_video(clip, num_frames=8) as held:
            assert held.ask(QUESTION, **FORCED).token_ids == refs[0].token_ids
    assert len(made) == 7
