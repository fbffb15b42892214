"""What a frozen tower made of videos: kept by content and tower, within a limit, whole or not at all."""

import os
from dataclasses import replace

import pytest
import torch

from tests.training import QUICK, SMALL, one_thread, write_triplets  # noqa: F401 - one_thread: for every test here
from vlrt.checkpoint import Checkpoint
from vlrt.errors import ConfigError
from vlrt.train import learner, loop, triplets
from vlrt.train.data import VideoQuestions, collate
from vlrt.train.frame_cache import FrameCache
from vlrt.train.system import Draw, Trainee
from vlrt.train.token_cache import Encoded, TokenCache, tower_hash


@pytest.fixture
def checkpoint(make_checkpoint):
    return make_checkpoint(**SMALL)


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "data").mkdir()
    return write_triplets(tmp_path / "data")


def a_cache(checkpoint, folder, max_bytes=1 << 30):
    return TokenCache(
        folder / "tokens", FrameCache(folder / "frames", checkpoint.model), tower_hash(checkpoint), max_bytes
    )


def a_batch(checkpoint, rows, folder, cache):
    found = triplets.read(rows).rows
    questions = VideoQuestions(found, checkpoint.path, checkpoint.model, "latent", folder / "frames", tokens=cache)
    return collate([questions[i] for i in range(3)])


def test_a_step_on_kept_tokens_is_the_step_on_pixels(checkpoint, rows, tmp_path):
    """Catches tokens that go to another sample, and a video that is decoded or encoded although it is known."""
    cache = a_cache(checkpoint, tmp_path)
    trainee = Trainee(learner.build(checkpoint, QUICK), QUICK, cache)
    first = a_batch(checkpoint, rows, tmp_path, cache)
    assert not first.encoded.any()
    ref = trainee(first, Draw(1, False)).loss
    again = a_batch(checkpoint, rows, tmp_path, cache)
    assert again.encoded.all()
    assert len(again.pixels) == 0
    assert torch.equal(trainee(again, Draw(1, False)).loss.total, ref.total)
    mixed = a_batch(checkpoint, rows, tmp_path, None)
    part = a_batch(checkpoint, rows, tmp_path, cache)
    sizes = (part.grid_thw.prod(1) // 4).tolist()
    patches = mixed.pixels.split(mixed.grid_thw.prod(1).tolist())
    half = replace(
        part,
        encoded=torch.tensor([True, False, True]),
        tokens=torch.cat([part.tokens.split(sizes)[0], part.tokens.split(sizes)[2]]),
        pixels=patches[1],
    )
    assert torch.equal(trainee(half, Draw(1, False)).loss.total, ref.total)


def test_another_tower_has_tokens_of_its_own(checkpoint, make_checkpoint, rows, tmp_path):
    """Catches a run that goes on with what another model saw."""
    other = make_checkpoint(**{**SMALL, "seed": 5})
    assert tower_hash(checkpoint) == tower_hash(Checkpoint.open(checkpoint.path)) != tower_hash(other)
    video = triplets.read(rows).rows[0].video
    a_cache(checkpoint, tmp_path).store(video, Encoded(torch.ones(4, 8), (2, 4, 4), 0.5, False))
    assert a_cache(checkpoint, tmp_path).load(video).grid_thw == (2, 4, 4)
    assert a_cache(other, tmp_path).load(video) is None


def test_the_limit_holds_over_several_runs(checkpoint, rows, tmp_path):
    """Catches a cache that fills the disk, and one that forgets what is there already."""
    videos = [row.video for row in triplets.read(rows).rows[:3]]
    tokens = Encoded(torch.ones(100, 10), (2, 20, 20), 0.5, False)  # 4,000 bytes
    for video in videos:
        a_cache(checkpoint, tmp_path, max_bytes=9000).store(video, tokens)
    kept = [a_cache(checkpoint, tmp_path).load(video) is not None for video in videos]
    assert kept == [True, True, False]


def test_a_damaged_file_is_made_anew(checkpoint, rows, tmp_path):
    """Catches a run that a full disk of the past stops for good."""
    cache, video = a_cache(checkpoint, tmp_path), triplets.read(rows).rows[0].video
    cache.store(video, Encoded(torch.ones(4, 8), (2, 4, 4), 0.5, False))
    (file,) = (tmp_path / "tokens").glob("*/*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    assert cache.load(video) is None
    cache.store(video, Encoded(torch.full((4, 8), 2.0), (2, 4, 4), 0.5, False))
    assert (cache.load(video).tokens == 2).all()


def test_a_directory_that_cannot_be_written_is_said(checkpoint, rows, tmp_path):
    """Catches a traceback of the library's."""
    (tmp_path / "tokens").write_text("in the way")
    with pytest.raises(ConfigError, match="cache of video tokens"):
        a_cache(checkpoint, tmp_path).store(
            triplets.read(rows).rows[0].video, Encoded(torch.ones(4, 8), (2, 4, 4), 0.5, False)
        )


def test_runs_share_a_cache(checkpoint, rows, tmp_path):
    """Catches runs that decode what another has decoded, and a result that depends on who was first."""
    cache, found = tmp_path / "cache", []
    for name in ("first", "second"):
        out = loop.train(checkpoint.path, rows, tmp_path / name, QUICK, cache=cache)
        found.append((out / "model.safetensors").read_bytes())
        assert {loop.FRAMES, loop.TOKENS}.isdisjoint(os.listdir(tmp_path / name))
    assert found[0] == found[1]
    off = replace(QUICK, max_token_bytes=0)
    out = loop.train(checkpoint.path, rows, tmp_path / "off", off)
    assert loop.TOKENS not in os.listdir(tmp_path / "off")
    assert (out / "model.safetensors").read_bytes() == found[0]
