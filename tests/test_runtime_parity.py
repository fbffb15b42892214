"""The same answer, token for token: bundles in ONNX Runtime against transformers and against models/ in PyTorch.

Not covered: trained weights (all are random, so answers mean nothing), several media per question (`ask` takes one).
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.bundles import QUESTION, QUICK, Oracle, plain_vision, square, torch_runtime
from tests.videos import make
from vlrt import prompt
from vlrt.runtime import Runtime

COUNT = 24  # tokens that every answer is made to have
FORCED = {"max_tokens": COUNT, "min_tokens": COUNT}
ROUNDING = 1e-4  # relative; the export gate's limit for fp32

UNTIED = {"overrides": QUICK}
SPATIAL = {"overrides": {**QUICK, "text_position_after_video": "spatial"}, "latent": None, "tie": True}
MODELS = {
    "recurrent mlp_xattn": UNTIED,
    "parallel mlp qwen2_vl tied": {
        "family": "qwen2_vl",
        "tie": True,
        "overrides": plain_vision(),
        "latent": {"num_latents": 3, "rollout": "parallel", "rounds": 2, "injection": "mlp"},
    },
    "parallel rms": {
        "overrides": QUICK,
        "latent": {"num_latents": 3, "rollout": "parallel", "rounds": 3, "injection": "rms"},
    },
    "recurrent identity": {"overrides": QUICK, "latent": {"num_latents": 5, "injection": "identity"}},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seconds: eight frames of it make four temporal patches of 1.5 seconds."""
    return make(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=180)


@pytest.mark.parametrize("reasoning", ["direct", "cot"])
@pytest.mark.parametrize("name", ["recurrent mlp_xattn", "parallel mlp qwen2_vl tied"])
def test_answers_equal_transformers_token_for_token(make_checkpoint, make_bundle, clip, name, reasoning):
    """Catches any difference on the way from a video file to its answer, positions after the video first of all."""
    asked = f"{QUESTION}\n{prompt.COT_INSTRUCTIONS}" if reasoning == "cot" else QUESTION
    ref = Oracle(make_checkpoint(**MODELS[name]), clip, asked, num_frames=8)
    with Runtime.open(make_bundle(**MODELS[name])) as opened:
        out = opened.ask(clip, QUESTION, reasoning=reasoning, num_frames=8, **FORCED)
    assert out.usage.prompt_tokens == ref.ids.shape[1]
    assert list(out.token_ids) == ref.greedy(COUNT)


@pytest.mark.parametrize("reasoning", ["direct", "cot"])
def test_spatial_checkpoints_equal_transformers_generate(make_checkpoint, make_bundle, clip, reasoning):
    """Catches a greedy search unlike that of `generate`, its bar on early ends included; and a rule that is ignored."""
    asked = f"{QUESTION}\n{prompt.COT_INSTRUCTIONS}" if reasoning == "cot" else QUESTION
    ref = Oracle(make_checkpoint(**SPATIAL), clip, asked, num_frames=8)
    with Runtime.open(make_bundle(**SPATIAL), video_cache_bytes=0) as opened:  # its model is exchanged below
        out = opened.ask(clip, QUESTION, reasoning=reasoning, num_frames=8, **FORCED)
        assert list(out.token_ids) == ref.generate(max_new_tokens=COUNT, min_new_tokens=COUNT)
        # A model that has learned nothing does not end: let it end on something that it says.
        ref.eos = (*ref.eos, out.token_ids[7])
        opened.model = replace(opened.model, tokens=replace(opened.model.tokens, eos_token_ids=ref.eos))
        for least in (0, 5, 10):
            out = opened.ask(clip, QUESTION, reasoning=reasoning, num_frames=8, max_tokens=COUNT, min_tokens=least)
            limits = {"max_new_tokens": COUNT, "min_new_tokens": least, "eos_token_id": list(ref.eos)}
            assert list(out.token_ids) == ref.generate(**limits)
            assert least <= len(out.token_ids)
            assert len(out.token_ids) <= 7 or least > 0


def test_the_repetition_penalty_is_that_of_transformers_generate(make_checkpoint, make_bundle, clip):
    """Catches a penalty that leaves the prompt out, counts a token twice, or makes negative logits likelier."""
    ref = Oracle(make_checkpoint(**SPATIAL), clip, QUESTION, num_frames=8)
    with Runtime.open(make_bundle(**SPATIAL), video_cache_bytes=0) as opened:  # its model is exchanged below
        plain = opened.ask(clip, QUESTION, num_frames=8, **FORCED).token_ids
        for penalty in (1.05, 1.3):
            opened.model = replace(opened.model, repetition_penalty=penalty)
            out = opened.ask(clip, QUESTION, num_frames=8, **FORCED).token_ids
            limits = {"max_new_tokens": COUNT, "min_new_tokens": COUNT, "repetition_penalty": penalty}
            assert list(out) == ref.generate(**limits)
    assert out != plain


def test_the_two_rules_give_different_answers(make_checkpoint, clip):
    """Catches parity tests in which the position after the video does not matter."""
    trained = make_checkpoint(overrides=QUICK, latent=None, tie=True)
    tuned = make_checkpoint(**SPATIAL)
    first, second = (torch_runtime(c).ask(clip, QUESTION, num_frames=8, **FORCED).token_ids for c in (trained, tuned))
    assert first != second


@pytest.mark.parametrize("name", MODELS)
def test_latents_and_their_answers_equal_models(make_checkpoint, make_bundle, clip, name):
    """Catches a rollout or injection that differs between graphs and models/."""
    with Runtime.open(make_bundle(**MODELS[name])) as opened, torch_runtime(make_checkpoint(**MODELS[name])) as ref:
        out = opened.ask(clip, QUESTION, num_frames=8, **FORCED)
        want = ref.ask(clip, QUESTION, num_frames=8, **FORCED)
        assert out.reasoning == want.reasoning == "latent"
        assert out.token_ids == want.token_ids
        assert len(out.token_ids) == COUNT
        assert out.latents is not None
        assert np.linalg.norm(out.latents - want.latents) <= ROUNDING * np.linalg.norm(want.latents)
        choices = ["left", "right", "up"]
        scores, wanted = (r.ask(clip, QUESTION, num_frames=8, choices=choices).scores for r in (opened, ref))
        assert scores == pytest.approx(wanted, rel=1e-3)


def test_a_full_number_of_rounds_equals_a_recurrent_rollout(make_checkpoint, make_bundle):
    """Catches slots that are off by one: with R = L the parallel rollout must give the recurrent latents."""
    parallel = MODELS["parallel rms"]
    recurrent = {**parallel, "latent": {"num_latents": 3, "injection": "rms"}}
    with Runtime.open(make_bundle(**parallel)) as first, torch_runtime(make_checkpoint(**recurrent)) as second:
        out, ref = (r.ask(square(), QUESTION, **FORCED) for r in (first, second))
    assert out.token_ids == ref.token_ids
    np.testing.assert_allclose(out.latents, ref.latents, rtol=1e-3, atol=1e-5)


def test_work_in_pieces_gives_the_same_answer(make_bundle):
    """Catches a vision tower or prefill that depends on how its input is cut: a pass per temporal patch, five ids."""
    with Runtime.open(make_bundle(**UNTIED)) as opened:
        ref = opened.ask(square(), QUESTION, **FORCED)
        opened._backend.vision_chunk, opened._backend.prefill_chunk = 1, 5
        out = opened.ask(square(), QUESTION, **FORCED)
    assert out.token_ids == ref.token_ids
    np.testing.assert_allclose(out.latents, ref.latents, rtol=1e-3, atol=1e-5)
