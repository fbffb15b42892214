"""Training end to end on tiny models: systems, resuming, adapters, what is written, and what is refused."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.closeness import assert_close
from tests.training import one_thread  # noqa: F401 - for every test here
from tests.videos import make, picture
from vlrt.checkpoint import Checkpoint, expected_tensors
from vlrt.errors import CheckpointError, ConfigError
from vlrt.models import registry
from vlrt.train import learner, loop, order, prepare, save, settings, triplets
from vlrt.train.data import VideoQuestions, collate
from vlrt.train.settings import Lora, Objective, Settings
from vlrt.train.system import Draw, Trainee, attention_mask, draw

SMALL = {
    "overrides": {"decoder.num_layers": 2, "vision.depth": 2, "vision.full_attention_layers": [1]},
    "latent": {"num_latents": 3, "num_heads": 4},
}
QUICK = Settings(steps=4, batch_size=2, learning_rate=3e-3, warmup=1, workers=0, save_every=2)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips, each with a question, a letter to answer and a chain of thought."""
    folder = tmp_path_factory.mktemp("triplets")
    rows = []
    for i in range(4):
        pictures = [picture(10 * i + t, 56, 56) for t in range(4)]
        make(folder / f"{i}.mp4", frames=4, height=56, width=56, pictures=pictures)
        row = {"video": f"{i}.mp4", "question": f"Which way {i}?", "answer": "ab"[i % 2], "choices": ["a", "b"]}
        rows.append(json.dumps({**row, "cot": f"First {i}. Then {i}."}))
    (folder / "triplets.jsonl").write_text("\n".join(rows))
    return folder / "triplets.jsonl"


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint):
    return make_checkpoint(**SMALL)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["total"] for line in (out / loop.METRICS).read_text().splitlines()]


def a_batch(checkpoint, data, system, tmp_path):
    rows = triplets.read(data).rows
    questions = VideoQuestions(rows, checkpoint.path, checkpoint.model, system, tmp_path / "frames")
    return collate([questions[0], questions[3]])


def a_trainee(checkpoint, chosen=QUICK):
    return Trainee(learner.build(checkpoint, chosen), chosen)


@pytest.mark.parametrize("system", ["latent", "direct", "cot", "pause"])
def test_every_system_learns_four_answers(checkpoint, data, tmp_path, system):
    """Catches a loss that reaches no weight: four samples must be learned by heart."""
    chosen = replace(QUICK, system=system, steps=30, batch_size=4, save_every=100)
    loop.train(checkpoint.path, data, tmp_path / "run", chosen)
    found = [json.loads(line) for line in (tmp_path / "run" / loop.METRICS).read_text().splitlines()]
    assert found[-1]["cross_entropy"] < 0.3 * found[0]["cross_entropy"]


def test_a_run_that_was_killed_ends_as_one_that_was_not(checkpoint, data, tmp_path):
    """Catches lost optimizer state, data that start over, and anything drawn from a clock."""
    loop.train(checkpoint.path, data, tmp_path / "whole", QUICK)

    class Killed(BaseException):
        pass

    def die(step, measured):
        if step == 3:  # one step beyond the saved state
            raise Killed

    with pytest.raises(Killed):
        loop.train(checkpoint.path, data, tmp_path / "cut", QUICK, report=die)
    steps = []
    out = loop.train(checkpoint.path, data, tmp_path / "cut", QUICK, report=lambda step, _: steps.append(step))
    assert steps == [3, 4]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    ref = Checkpoint.open(tmp_path / "whole" / loop.MODEL)
    for name in ref.names():
        assert torch.equal(Checkpoint.open(out).tensor(name), ref.tensor(name)), name


@pytest.mark.parametrize("workers", [0, 1])
def test_a_level_is_added_at_once_and_after_a_kill_when_it_would_have_been(
    checkpoint, data, tmp_path, monkeypatch, workers
):
    """Catches batches that workers had read ahead, at the old level, and a level that is lost with the process."""
    monkeypatch.setattr(order.Curriculum, "MIN_ROWS", 8)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    levels = "".join(json.dumps({**row, "metadata": {"n": i // 2}}) + "\n" for i, row in enumerate(rows))
    data = data.with_name(f"levels-{workers}.jsonl")
    data.write_text(levels)
    chosen = replace(QUICK, steps=8, save_every=3, curriculum="n", curriculum_exact=0.0, workers=workers)
    asked, step = [], learner.Learner.step

    def spy(self, number, batches, *rest):
        def seen():
            for batch in batches:
                asked.append((number, {row.metadata["n"] for row in batch.rows}))
                yield batch

        return step(self, number, seen(), *rest)

    monkeypatch.setattr(learner.Learner, "step", spy)
    loop.train(checkpoint.path, data, tmp_path / "whole", chosen)
    assert all(levels == {0} for number, levels in asked if number < 4)
    assert any(1 in levels for number, levels in asked if number >= 4)
    whole = [*asked]

    def die(step, measured):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(checkpoint.path, data, tmp_path / "cut", chosen, report=die)
    asked.clear()
    loop.train(checkpoint.path, data, tmp_path / "cut", chosen)
    assert asked == whole[3:]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_finished_run_returns_at_once_and_another_is_refused(checkpoint, data, tmp_path):
    """Catches a run that overwrites another's result."""
    out = loop.train(checkpoint.path, data, tmp_path / "run", QUICK)
    assert loop.train(checkpoint.path, data, tmp_path / "run", QUICK, report=lambda *_: pytest.fail("again")) == out
    shutil.rmtree(out)
    with pytest.raises(ConfigError, match="other settings"):
        loop.train(checkpoint.path, data, tmp_path / "run", replace(QUICK, seed=1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        loop.train(checkpoint.path, data, tmp_path / "mine", QUICK)


def test_what_comes_out_loads_in_transformers_and_exports(checkpoint, data, tmp_path):
    """Catches names or config keys that only vlrt reads, and weights that training did not change."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from vlrt.export.exporter import export

    out = loop.train(checkpoint.path, data, tmp_path / "run", QUICK)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(out, dtype=torch.float32).state_dict()
    ours = Checkpoint.open(out)
    name = "layers.1.mlp.up_proj.weight"
    assert torch.equal(theirs[f"model.language_model.{name}"], ours.tensor(f"model.{name}"))
    assert not torch.equal(ours.tensor(f"model.{name}"), checkpoint.tensor(f"model.{name}"))
    frozen = "visual.blocks.0.attn.qkv.weight"
    assert torch.equal(ours.tensor(frozen), checkpoint.tensor(frozen))
    assert (export(out, tmp_path / "run.vlrt") / "manifest.json").is_file()


def test_adapters_are_merged_and_nothing_else_of_the_decoder_moves(checkpoint, data, tmp_path):
    """Catches adapters that are lost, scaled wrongly, or beside which the base is trained too."""
    chosen = replace(QUICK, lora=Lora(rank=2, alpha=4))
    trainee = a_trainee(checkpoint, chosen)
    for name, parameter in trainee.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(0))
    batch = a_batch(checkpoint, data, "latent", tmp_path)
    with torch.no_grad():
        adapted = trainee(batch, Draw(1, False)).loss.total
    merged = registry.build(checkpoint.model)
    state = save.merged_state(trainee.model)
    registry.load(merged, lambda name: state[name])
    with torch.no_grad():
        assert_close(Trainee(merged, chosen)(batch, Draw(1, False)).loss.total, adapted)
    out = Checkpoint.open(loop.train(checkpoint.path, data, tmp_path / "run", chosen))
    changed = {n for n in out.names() if not torch.equal(out.tensor(n), checkpoint.tensor(n))}
    assert all("_proj" in name or name.startswith("latent_injection.") for name in changed)
    assert any(name.startswith("model.layers.") for name in changed)


def test_no_gradient_reaches_rollout_targets_and_vision_unless_asked(checkpoint, data, tmp_path):
    """Catches a gradient through the rollout at bptt 0, which makes a step three times as dear."""
    batch = a_batch(checkpoint, data, "latent", tmp_path)
    grads = {}
    for bptt in ("0", "1", "full"):
        objective = Objective(bptt=bptt, alignment=0, diversity=0)
        trainee = a_trainee(checkpoint, replace(QUICK, objective=objective))
        trainee(batch, Draw(1, False)).loss.total.backward()
        injection = trainee.model.latent_injection.fc1.weight.grad
        grads[bptt] = 0.0 if injection is None else float(injection.norm())
        assert all(p.grad is None for p in trainee.model.visual.parameters())
    assert grads["0"] == 0  # the answer sees latents without gradient: the module learns by its own terms alone
    assert grads["1"] > 0
    assert grads["full"] > 0
    assert grads["1"] != grads["full"]


def test_self_forcing_sees_its_own_latents(checkpoint, data, tmp_path):
    """Catches a forward pass that leaves the pads in the slots: their embedding must not matter."""
    batch = a_batch(checkpoint, data, "latent", tmp_path)
    trainee = a_trainee(checkpoint)
    with torch.no_grad():
        before = trainee(batch, Draw(1, False)).loss.total
        trainee.model.model.embed_tokens.weight[checkpoint.model.latent.pad_token_id] += 1
        assert trainee(batch, Draw(1, False)).loss.total == before


def test_one_sample_does_not_matter_to_another(checkpoint, data, tmp_path):
    """Catches padding that leaks: a batch's losses are those of its samples."""
    rows = triplets.read(data).rows
    rows = (replace(rows[0], question="A much longer question, so that the other is padded?"), rows[1])
    questions = VideoQuestions(rows, checkpoint.path, checkpoint.model, "latent", tmp_path / "frames")
    trainee = a_trainee(checkpoint).double()
    with torch.no_grad():
        for_all = trainee(_double(collate([questions[0], questions[1]])), Draw(1, True)).loss
        alone = [trainee(_double(collate([questions[i]])), Draw(1, True)).loss for i in range(2)]
    for name in ("alignment", "diversity"):
        assert_close(1 + getattr(for_all, name), 1 + (getattr(alone[0], name) + getattr(alone[1], name)) / 2)


def _double(batch):
    return replace(batch, pixels=batch.pixels.double())


def test_the_bottleneck_hides_the_video_from_the_answer_and_nothing_else(checkpoint, data, tmp_path):
    """Catches a token that predicts the answer and still sees the video, and latents that no longer do."""
    batch = a_batch(checkpoint, data, "latent", tmp_path)
    open_, closed = (attention_mask(batch, hides_video=hides)[:, 0] for hides in (False, True))
    for b in range(len(batch.ids)):
        (video, video_end), (answer, end) = batch.video[b].tolist(), batch.answer[b].tolist()
        hidden = (open_[b] & ~closed[b]).nonzero()
        assert set(hidden[:, 1].tolist()) == set(range(video, video_end))
        predicting = set(range(answer - 1, batch.ids.shape[1]))
        assert set(hidden[:, 0].tolist()) == predicting
        assert int(batch.slots[b, -1]) < answer - 1
        assert open_[b, :end].equal(torch.ones(end, open_.shape[-1], dtype=torch.bool).tril())


def test_draws_depend_on_seed_and_step_and_follow_their_shares(checkpoint):
    """Catches a draw that a resumed run would repeat otherwise."""
    plan = replace(checkpoint.model.latent, rollout="parallel", rounds=3)
    chosen = replace(QUICK, min_rounds=1)
    found = [draw(chosen, plan, step) for step in range(2000)]
    assert found == [draw(chosen, plan, step) for step in range(2000)]
    assert {d.rounds for d in found} == {1, 2, 3}
    share, expected = np.mean([d.hides_video for d in found]), chosen.objective.bottleneck
    assert abs(share - expected) < 5 * (expected * (1 - expected) / len(found)) ** 0.5
    assert draw(replace(chosen, system="direct"), plan, 0) == Draw(1, False)


def test_checkpointing_changes_no_gradient(checkpoint, data, tmp_path):
    """Catches a layer that is recomputed from other inputs."""
    batch = a_batch(checkpoint, data, "latent", tmp_path)
    grads = []
    for flag in (False, True):
        trainee = a_trainee(checkpoint, replace(QUICK, gradient_checkpointing=flag))
        trainee(batch, Draw(1, False)).loss.total.backward()
        grads.append(trainee.model.model.layers[0].mlp.up_proj.weight.grad)
    assert_close(grads[1], grads[0])


def test_validation_is_measured_in_the_loop(checkpoint, data, tmp_path):
    found = {}
    loop.train(
        checkpoint.path, data, tmp_path / "run", QUICK, validation=data, report=lambda step, m: found.update({step: m})
    )
    assert 0 <= found[4]["validation_exact"] <= 1
    assert found[4]["validation_loss"] > 0
    assert "validation_loss" not in found[1]


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    group = {"peak": 2.0}
    optimizer = type("Fake", (), {"param_groups": [group]})
    rates = []
    for step in range(10):
        learner.schedule(optimizer, replace(QUICK, steps=10, warmup=4), step)
        rates.append(group["lr"])
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0.2 <= rates[-1] < 0.4


def test_latents_are_added_to_a_checkpoint_without_any(plain_checkpoint, tmp_path):
    """Catches tokens that are taken, tables that lack rows, and weights that change on the way."""
    out = prepare.add_latents(plain_checkpoint, tmp_path / "out", {"num_latents": 4, "num_heads": 2})
    new = Checkpoint.open(out)
    assert new.model.latent.num_latents == 4
    assert set(new.names()) >= set(expected_tensors(plain_checkpoint.model))
    for name in plain_checkpoint.names():
        rows = plain_checkpoint.shape(name)[0] if plain_checkpoint.shape(name) else None
        assert torch.equal(new.tensor(name)[:rows], plain_checkpoint.tensor(name)), name
    q, k = (new.tensor(f"latent_injection.{n}_proj.weight") for n in "qk")
    assert not torch.equal(q, k)
    assert not new.tensor("latent_injection.alpha").any()
    with pytest.raises(CheckpointError, match="has latents already"):
        prepare.add_latents(new, tmp_path / "again", {"num_latents": 4})
    with pytest.raises(CheckpointError, match="exists"):
        prepare.add_latents(plain_checkpoint, out, {"num_latents": 4})


def test_large_models_are_saved_in_shards(checkpoint, tmp_path):
    """Catches an index that names the wrong file."""
    tensors = ((name, checkpoint.tensor(name)) for name in checkpoint.names())
    out = save.write(tmp_path / "out", checkpoint.model, tensors, checkpoint.path, dtype="float32", shard_bytes=100_000)
    again = Checkpoint.open(out)
    assert len(list(out.glob("*.safetensors"))) > 3
    assert all(torch.equal(again.tensor(n), checkpoint.tensor(n)) for n in checkpoint.names())


def test_settings_from_yaml_and_pairs(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("steps: 7\nlearning_rate: 2e-5\nobjective:\n  bptt: 1\n  alignment: 0.5\nlora:\n  rank: 4\n")
    found = settings.read(file, ["objective.alignment=0.2", "system=cot", "lora.alpha=8"])
    assert found == Settings(
        system="cot", steps=7, learning_rate=2e-5, objective=Objective(bptt="1", alignment=0.2), lora=Lora(4, 8)
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["speed=3"], "unknown setting speed"),
        (["steps"], "has no value"),
        (["steps=0"], "steps is 0"),
        (["steps=2", "steps.more=1"], "steps.more is inside"),
        (["objective.bptt=2"], "objective.bptt is '2'"),
        (["objective.bottleneck=1.5"], "objective.bottleneck is 1.5"),
        (["gradient_checkpointing=true", "objective.bptt=full"], "bptt 'full'"),
        (["system=[1"], "cannot be read as YAML"),
    ],
)
def test_bad_settings_are_refused_by_name(changes, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        settings.read(None, changes)
