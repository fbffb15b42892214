"""From triplets to batches: rows read and refused, frames kept, sequences as made by hand and as inference has them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import videos
from vlrt import config, generate, prompt, video
from vlrt.checkpoint import Checkpoint
from vlrt.errors import ConfigError, VideoError
from vlrt.preprocess import Patches, patchify
from vlrt.train import data, frame_cache, synthetic
from vlrt.train.data import VideoQuestions, collate, encode, loader
from vlrt.train.frame_cache import FrameCache
from vlrt.train.objective import IGNORED
from vlrt.train.triplets import BadRow, BadRows, Triplet, read

SYSTEMS = ("direct", "pause", "cot", "latent")
LATENTS = 4  # of the tiny checkpoint


@pytest.fixture(scope="module")
def triplets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the triplets.jsonl of 14 clips, two of each family."""
    return synthetic.write(tmp_path_factory.mktemp("data") / "out", synthetic.Synthetic(), 14, workers=1)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Checkpoint) -> config.Model:
    """Return the tiny model, sampling all frames of the clips."""
    return replace(tiny_checkpoint.model, video=replace(tiny_checkpoint.model.video, fps=4.0))


@pytest.fixture(scope="module")
def tokenizer(tiny_path: Path) -> prompt.Tokenizer:
    return prompt.Tokenizer.open(tiny_path)


@pytest.fixture
def questions(triplets: Path, tiny_path: Path, model: config.Model, tmp_path: Path) -> Callable[..., VideoQuestions]:
    def make(system: data.System = "latent", rows: Any = None) -> VideoQuestions:
        return VideoQuestions(rows or read(triplets).rows, tiny_path, model, system, tmp_path / "cache")

    return make


def row(**fields: Any) -> Triplet:
    return Triplet(**{"line": 1, "number": 1, "video": Path("a.mp4"), "question": "Where?", "answer": "here", **fields})


def two_steps() -> Patches:
    """Return a video of 2 temporal patches of 2 x 2 tokens, one second each, so 2 positions apart."""
    return Patches(np.zeros((32, 1176), np.float32), (2, 4, 4), 1.0, False)


# --- rows -------------------------------------------------------------------------------------------------------------


def write_rows(folder: Path, *rows: Any) -> Path:
    videos.make(folder / "a.mp4", frames=8)
    file = folder / "rows.jsonl"
    file.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return file


GOOD = {"video": "a.mp4", "question": " Where? ", "answer": "here"}


def test_rows_of_the_synthetic_data_come_as_they_were_written(triplets: Path) -> None:
    # Catches a field lost or renamed between the writer and the reader.
    written = [json.loads(line) for line in triplets.read_text().splitlines()]
    found = read(triplets)
    assert found.bad == ()
    for line, (given, one) in enumerate(zip(written, found.rows, strict=True), 1):
        assert (one.line, one.number, one.video) == (line, line, triplets.parent / given["video"])
        assert (one.question, one.answer, one.family, one.cot) == tuple(
            given[k] for k in ("question", "answer", "family", "cot")
        )
        assert one.choices == tuple(given.get("choices", ()))
        assert one.problem_type == ("multiple choice" if one.choices else "free-form")
        assert one.metadata == given["metadata"]
    assert {bool(one.choices) for one in found.rows} == {True, False}


def test_options_are_asked_by_letter_and_answered_by_letter(tmp_path: Path) -> None:
    # Catches a letter that names another option, and options that the model never sees.
    rows = [{**GOOD, "choices": ["there", "here"]}, {**GOOD, "choices": ["A", "B"], "answer": "B"}]
    rows += [{**GOOD, "choices": ["A. there", "B. here"], "answer": "B."}]
    found = read(write_rows(tmp_path, *rows)).rows
    assert [one.target for one in found] == ["B", "B", "B"]
    assert [one.answer for one in found] == ["here", "B", "here"]
    assert found[0].asked == found[2].asked == "Where?\nA. there\nB. here"
    assert row().asked == "Where?"
    assert row().target == "here"


BAD = {
    "is not JSON": '{"video": \n',
    "accepted: an object": [1],
    "answer is empty": {**GOOD, "answer": " "},
    "answer is missing": {"video": "a.mp4", "question": "Where?"},
    "question is empty": {**GOOD, "question": None},
    "video is \\[1\\]": {**GOOD, "video": [1]},
    "answer is True": {**GOOD, "answer": True},
    "none.mp4 does not exist": {**GOOD, "video": "none.mp4"},
    "none of the choices": {**GOOD, "choices": ["x", "y"], "answer": "C"},
    "different ones": {**GOOD, "choices": ["here", "here"]},
    "a list of texts": {**GOOD, "choices": "here"},
    "metadata is 3": {**GOOD, "metadata": 3},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_reported_by_line_and_skipped(tmp_path: Path, reason: str) -> None:
    # Catches a row that stops the run, is dropped without a word, or shifts the lines of those behind it.
    file = write_rows(tmp_path, GOOD, "\n", BAD[reason], GOOD)
    found = read(file, max_bad_rows=1)
    assert [one.line for one in found.rows] == [1, 4]
    assert [one.number for one in found.rows] == [1, 3]
    assert [(bad.line, bad.number) for bad in found.bad] == [(3, 2)]
    assert found.rows[0].question == "Where?"
    with pytest.raises(ConfigError, match=f"max_bad_rows = 0. line 3, row 2: .*{reason}"):
        read(file, max_bad_rows=0)


def test_more_bad_rows_than_the_limit_list_the_first_few(tmp_path: Path) -> None:
    # Catches a message of a million lines, and a limit that is off by one.
    file = write_rows(tmp_path, GOOD, *[{**GOOD, "answer": ""}] * 9)
    assert len(read(file, max_bad_rows=9).bad) == 9
    with pytest.raises(
        ConfigError, match=r"9 bad rows or more; accepted: max_bad_rows = 8\. line 2.*line 6.*and 4 more$"
    ):
        read(file, max_bad_rows=8)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"[]", b'[{"video": 1}]', b"[1, 2", b"[1 2]", b"[\xff]", b"[,]", b"{}\n"]
)
def test_files_without_a_row_that_can_be_used_are_refused(tmp_path: Path, content: bytes) -> None:
    # Catches training on nothing, and errors of the json module.
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"rows\.json"):
        read(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize("indent", [None, 2])
def test_the_json_of_video_r1_is_read_without_its_reasoning(tmp_path: Path, indent: int | None) -> None:
    # Catches tags left in answers, letters left in options, reasoning used, and lines miscounted in a list.
    videos.make(tmp_path / "clips" / "a.mp4", frames=8) if (tmp_path / "clips").mkdir() is None else None
    base = {
        "problem_id": 7,
        "data_type": "video",
        "path": "./clips/a.mp4",
        "data_source": "some",
        "process": "<think>x</think>",
    }
    given = [
        {
            **base,
            "problem": "Which way?",
            "problem_type": "multiple choice",
            "options": ["A. left", "B. right"],
            "solution": "<answer>B</answer>",
        },
        {**base, "problem": "How many?", "problem_type": "numerical", "options": [], "solution": "<answer>3</answer>"},
        {**base, "problem": "What?", "problem_type": "free-form", "options": [], "solution": "<answer></answer>"},
    ]
    file = tmp_path / "Video-R1.json"
    file.write_text("\n" + json.dumps(given, indent=indent))
    found = read(file)
    first, second = found.rows
    assert (first.asked, first.target, first.answer) == ("Which way?\nA. left\nB. right", "B", "right")
    assert (second.asked, second.target, second.problem_type) == ("How many?", "3", "numerical")
    assert (first.cot, first.family, first.metadata["problem_id"]) == ("", "some", 7)
    assert first.video == tmp_path / "clips" / "a.mp4"
    starts = [i for i, line in enumerate(file.read_text().splitlines(), 1) if line.lstrip(" [").startswith("{")]
    lines = starts if indent else [2, 2, 2]
    assert [first.line, second.line, found.bad[0].line] == lines
    assert [first.number, second.number] == [1, 2]
    assert found.bad == (BadRow(lines[2], 3, "solution is empty"),)


def test_bad_rows_are_counted_once() -> None:
    # Catches a row that is met again in every epoch and uses the limit up.
    count = BadRows("rows.jsonl", 2)
    for _ in range(3):
        count.add([BadRow(4, 4, "x"), BadRow(2, 2, "y")])
    assert [bad.number for bad in count.rows] == [2, 4]
    with pytest.raises(ConfigError, match=r"rows\.jsonl has 3 bad rows"):
        count.add([BadRow(9, 9, "z")])


# --- sequences --------------------------------------------------------------------------------------------------------


def test_a_latent_sequence_by_hand(model: config.Model, tokenizer: prompt.Tokenizer) -> None:
    # Catches slots, labels or positions that are off by one, and a question range that takes in control tokens.
    one = encode(row(), two_steps(), tokenizer, model, "latent")
    before = len(
        tokenizer.encode(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>",
            control=True,
        )
    )
    asked, answer = tokenizer.encode("Where?"), tokenizer.encode("here")
    header = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n", control=True)
    plan, tokens = model.latent, model.tokens
    ids = one.ids.tolist()
    after_video = [tokens.vision_end_token_id, *asked, *header, plan.start_token_id]
    assert one.video == (before, before + 8)
    assert ids[before : before + 8] == [tokens.video_token_id] * 8
    assert one.prompt_length == before + 8 + len(after_video)
    assert ids[before + 8 : one.prompt_length] == after_video
    assert one.question == (before + 9, before + 9 + len(asked))
    assert one.slots == (one.prompt_length, one.prompt_length + LATENTS)
    end = tokens.eos_token_ids[0]
    assert ids[one.prompt_length :] == [plan.pad_token_id] * LATENTS + [plan.end_token_id] + answer + [end]
    assert one.answer == (one.slots[1] + 1, len(ids))
    assert one.labels.tolist() == [IGNORED] * one.answer[0] + answer + [end]
    # Time steps 0 and 1 stand 2 positions apart; text goes on at the largest position, before + 2, plus 1.
    steps = [0] * 4 + [2] * 4
    text = list(range(before + 3, before + 3 + len(ids) - before - 8))
    assert one.at[0].tolist() == [*range(before), *(before + t for t in steps), *text]
    assert one.at[1].tolist() == [*range(before), *(before + h for h in [0, 0, 1, 1] * 2), *text]
    assert one.at[2].tolist() == [*range(before), *(before + w for w in [0, 1] * 4), *text]
    assert one.next_position == one.at[0, one.slots[0]]


def test_the_four_systems_differ_where_they_should(model: config.Model, tokenizer: prompt.Tokenizer) -> None:
    # Catches a baseline that is fed or taught something else than its name says.
    given = row(choices=("there", "here"), cot="It moves.")
    one = {system: encode(given, two_steps(), tokenizer, model, system) for system in SYSTEMS}  # type: ignore[arg-type]
    assert torch.equal(one["pause"].ids, one["latent"].ids)
    assert torch.equal(one["pause"].labels, one["latent"].labels)
    plan = model.latent
    assert one["direct"].ids.tolist() == [
        i for i in one["latent"].ids.tolist() if i not in (plan.pad_token_id, plan.start_token_id, plan.end_token_id)
    ]
    for system in ("direct", "cot"):
        assert one[system].slots[0] == one[system].slots[1]
    for system in ("direct", "pause", "latent"):
        learnt = [i for i in one[system].labels.tolist() if i != IGNORED]
        assert learnt == [*tokenizer.encode("B"), model.tokens.eos_token_ids[0]]
        assert "<think>" not in tokenizer.decode(one[system].ids.tolist())
    learnt = [i for i in one["cot"].labels.tolist() if i != IGNORED]
    assert tokenizer.decode(learnt) == "<think>It moves.</think><answer>B</answer>"
    assert prompt.split_cot(tokenizer.decode(learnt)) == ("It moves.", "B")
    assert learnt[-1] == model.tokens.eos_token_ids[0]
    start, stop = one["cot"].question
    assert tokenizer.decode(one["cot"].ids[start:stop].tolist()) == f"{given.asked}\n{prompt.COT_INSTRUCTIONS}"
    with pytest.raises(ConfigError, match="no chain of thought"):
        encode(row(), two_steps(), tokenizer, model, "cot")


@pytest.mark.parametrize("rule", ["largest", "spatial"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_training_reads_what_inference_reads(
    system: data.System, rule: config.TextPosition, model: config.Model, tokenizer: prompt.Tokenizer
) -> None:
    # Catches positions or prompts of training that inference would not have.
    class Embedder:
        """Embeds ids as rows of zeros."""

        def __init__(self, cfg: config.Model) -> None:
            self.model = cfg

        def embed(self, ids: Any) -> Any:
            return np.zeros((len(ids), 4), np.float32)

        def join(self, parts: Any) -> Any:
            return np.concatenate(parts)

    model = replace(model, text_position_after_video=rule)
    given = row(cot="It moves.")
    one = encode(given, two_steps(), tokenizer, model, system)
    asked = prompt.build(
        tokenizer,
        model,
        given.asked,
        [prompt.Media(False, (2, 4, 4), 1.0)],
        reasoning={"pause": "latent"}.get(system, system),  # type: ignore[arg-type]
    )
    context = generate.read(Embedder(model), asked, np.zeros((8, 4), np.float32))  # type: ignore[arg-type]
    size = one.prompt_length
    np.testing.assert_array_equal(one.ids[:size], asked.ids)
    np.testing.assert_array_equal(one.at[:, :size], context.positions)
    assert one.next_position == context.next_position
    after = torch.arange(len(one.ids) - size) + context.next_position  # as generate.Writer.feed counts on
    assert torch.equal(one.at[:, size:], after.expand(3, -1))


def test_a_sequence_beyond_the_models_positions_is_refused(model: config.Model, tokenizer: prompt.Tokenizer) -> None:
    # Catches rows that crash, or wrap around, far into a run.
    size = len(encode(row(), two_steps(), tokenizer, model, "direct").ids)
    fits = replace(model, decoder=replace(model.decoder, max_positions=size))
    assert len(encode(row(), two_steps(), tokenizer, fits, "direct").ids) == size
    with pytest.raises(ConfigError, match=f"takes {size + 1} positions; accepted: at most {size}"):
        encode(row(answer="here!"), two_steps(), tokenizer, fits, "direct")


# --- frames -----------------------------------------------------------------------------------------------------------


def test_frames_are_decoded_once_per_content_and_settings(
    tmp_path: Path, model: config.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches a cache that is never hit, or hit by another video or by another sampling.
    decoded: list[str] = []
    load = video.load

    def counting(source: Any, *rest: Any, **options: Any) -> video.Frames:
        decoded.append(Path(source).name)
        return load(source, *rest, **options)

    monkeypatch.setattr(video, "load", counting)
    one, other = (videos.make(tmp_path / name, frames=frames) for name, frames in (("a.mp4", 12), ("b.mp4", 16)))
    cache = FrameCache(tmp_path / "cache", model)
    fresh = cache.load(one)
    kept = FrameCache(tmp_path / "cache", model).load(one)
    for name, value in vars(fresh).items():
        np.testing.assert_array_equal(getattr(kept, name), value)
        assert type(getattr(kept, name)) is type(value)
    (tmp_path / "copy.mp4").write_bytes(one.read_bytes())
    cache.load(tmp_path / "copy.mp4")
    assert decoded == ["a.mp4"]
    cache.load(other)
    fewer = replace(model, video=replace(model.video, num_frames=4))
    assert len(FrameCache(tmp_path / "cache", fewer).load(one).data) == 4
    assert decoded == ["a.mp4", "b.mp4", "a.mp4"]
    one.write_bytes(other.read_bytes())
    assert len(cache.load(one).data) == len(cache.load(other).data)
    assert decoded == ["a.mp4", "b.mp4", "a.mp4"]
    assert not list((tmp_path / "cache").rglob(".*"))


@pytest.mark.parametrize("damage", [b"", b"PK", b"x" * 500, None])
def test_a_damaged_cache_file_is_made_again(tmp_path: Path, model: config.Model, damage: bytes | None) -> None:
    # Catches a run that dies, or trains on rubbish, after a disk was full.
    clip = videos.make(tmp_path / "a.mp4", frames=8)
    cache = FrameCache(tmp_path / "cache", model)
    fresh, file = cache.load(clip), cache.file(clip)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    np.testing.assert_array_equal(cache.load(clip).data, fresh.data)
    assert file.read_bytes() == whole


def test_what_cannot_be_read_decoded_or_kept_is_said(tmp_path: Path, model: config.Model) -> None:
    # Catches an OSError let through, and a full disk taken for a bad video.
    cache = FrameCache(tmp_path / "cache", model)
    with pytest.raises(VideoError, match=r"none\.mp4"):
        cache.load(tmp_path / "none.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        cache.load(tmp_path / "bad.mp4")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cache .* cannot be written"):
        FrameCache(tmp_path / "file", model).load(videos.make(tmp_path / "a.mp4", frames=8))
    assert frame_cache.FORMAT == 1


# --- data set and batches ---------------------------------------------------------------------------------------------


def test_samples_hold_the_patches_of_their_videos(
    questions: Callable[..., VideoQuestions], model: config.Model
) -> None:
    # Catches frames left out, and pixels that inference would not see.
    samples = questions()
    assert len(samples) == 14
    for i in (0, 6):
        one = samples[i]
        frames = video.load(one.row.video, model.video, model.vision)
        assert len(frames.data) == one.row.metadata["num_frames"]
        assert one.grid_thw == (len(frames.data) // 2, 4, 4)
        assert one.seconds_per_temporal_patch == 0.5
        np.testing.assert_array_equal(one.pixels, patchify(frames, model.video, model.vision).pixels)
    with pytest.raises(IndexError):
        samples[14]


def test_an_image_is_a_video_without_time(questions: Callable[..., VideoQuestions], tmp_path: Path) -> None:
    # Catches Video-R1's images, half of its data, refused or given times.
    from PIL import Image

    Image.new("RGB", (64, 64), (9, 9, 9)).save(tmp_path / "a.png")
    one = questions(rows=[row(video=tmp_path / "a.png")])[0]
    assert (one.is_image, one.grid_thw[0]) == (True, 1)
    start, stop = one.video
    assert set(one.at[0, start:stop].tolist()) == {start}


def test_a_batch_is_its_samples_padded_on_the_right(questions: Callable[..., VideoQuestions]) -> None:
    # Catches samples that leak into each other's places, and padding that is learnt or attended to.
    samples = [questions()[i] for i in (6, 2, 5)]
    batch = collate(samples)
    size = max(len(one.ids) for one in samples)
    assert batch.ids.shape == batch.labels.shape == batch.valid.shape == (3, size)
    assert batch.at.shape == (3, 3, size)
    assert batch.slots.shape == (3, LATENTS)
    assert len({len(one.ids) for one in samples}) > 1
    pixels = 0
    for b, one in enumerate(samples):
        length = len(one.ids)
        assert batch.lengths[b] == length == batch.valid[b].sum()
        for name, padding in (("ids", 0), ("labels", IGNORED), ("valid", 0)):
            assert (getattr(batch, name)[b, length:] == padding).all()
        assert torch.equal(batch.ids[b, :length], one.ids)
        assert torch.equal(batch.at[b, :, :length], one.at)
        assert torch.equal(batch.labels[b, :length], one.labels)
        assert torch.equal(batch.pixels[pixels : pixels + len(one.pixels)], one.pixels)
        pixels += len(one.pixels)
        assert batch.grid_thw[b].prod() == len(one.pixels)
        assert batch.slots[b].tolist() == list(range(*one.slots))
        for name in ("video", "question", "answer"):
            assert tuple(getattr(batch, name)[b].tolist()) == getattr(one, name)
        for name in ("prompt_length", "next_position"):
            assert getattr(batch, f"{name}s")[b] == getattr(one, name)
        assert batch.rows[b] is one.row
        assert batch.seconds_per_temporal_patch[b] == one.seconds_per_temporal_patch
    assert pixels == len(batch.pixels)
    dtypes = {f: v.dtype for f, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    assert {f for f, d in dtypes.items() if d != torch.int64} == {
        "valid",
        "pixels",
        "tokens",
        "encoded",
        "seconds_per_temporal_patch",
        "is_image",
    }
    assert collate([questions("direct")[0]]).slots.shape == (1, 0)
    moved = batch.to("meta")
    assert moved.ids.device.type == moved.pixels.device.type == "meta"
    assert moved.rows == batch.rows


def test_workers_make_the_batches_that_one_process_makes(questions: Callable[..., VideoQuestions]) -> None:
    # Catches a data set that cannot be sent to workers, workers that hang, and batches that depend on who made them.
    samples, order = questions(), list(reversed(range(14)))
    samples[0]  # opens what cannot be sent
    alone = list(loader(samples, 5, sampler=order))
    several = list(loader(samples, 5, sampler=order, num_workers=2))
    assert [[one.number for one in b.rows] for b in alone] == [[14, 13, 12, 11, 10], [9, 8, 7, 6, 5], [4, 3, 2, 1]]
    for a, b in zip(alone, several, strict=True):
        for name, value in vars(a).items():
            other = getattr(b, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def test_a_video_that_does_not_decode_is_replaced_and_named(
    questions: Callable[..., VideoQuestions], triplets: Path, tmp_path: Path
) -> None:
    # Catches a batch that shrinks, which hangs a run of several processes, and a bad video that nobody hears of.
    rows = list(read(triplets).rows[:4])
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    for i in (1, 3):
        rows[i] = replace(rows[i], video=tmp_path / "bad.mp4")
    samples = questions(rows=rows)
    assert [samples[i].row.number for i in range(4)] == [1, 3, 3, 1]
    batch = collate([samples[i] for i in range(4)])
    assert [(bad.line, bad.number) for bad in batch.bad] == [(2, 2), (4, 4)]
    assert all("bad.mp4" in bad.reason for bad in batch.bad)
    with pytest.raises(ConfigError, match=r"1 rows one after another cannot be used\. line 2: .*bad\.mp4"):
        questions(rows=[rows[1]])[0]


def test_a_cache_that_cannot_be_written_is_no_bad_row(questions: Callable[..., VideoQuestions], tmp_path: Path) -> None:
    # Catches a full disk reported as 32 bad videos.
    (tmp_path / "cache").write_text("")
    with pytest.raises(ConfigError, match=r"^the frame cache"):
        questions()[0]


def test_settings_that_cannot_be_trained_are_refused(
    triplets: Path, tiny_path: Path, model: config.Model, tmp_path: Path
) -> None:
    # Catches a wrong setting that shows in a worker, after everything was loaded.
    rows = read(triplets).rows
    plain = replace(model, latent=None)
    for wrong, match in (
        ((rows, tiny_path, model, "both"), "accepted: direct, pause, cot, latent"),
        ((rows, tiny_path, plain, "latent"), "has no latents"),
        ((rows, tiny_path, plain, "pause"), "has no latents"),
        (((), tiny_path, model, "direct"), "no rows"),
    ):
        with pytest.raises(ConfigError, match=match):
            VideoQuestions(*wrong, tmp_path)  # type: ignore[arg-type]
