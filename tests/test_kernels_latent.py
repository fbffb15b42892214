"""The kernels of the latent injection module, interpreted, held against their specification in fp64."""

import pytest
import torch
import triton

from benches import interpreter
from tests.closeness import assert_close
from tests.interpreter import interpreted
from tests.test_kernels_small import DTYPES, EPS, ONES, assert_is_the_reference, random
from vlrt.kernels import latent_injection, reference, slots


class Injection:
    """Random arguments of `latent_injection`; weights are scaled so that all terms of the sum are of one size."""

    def __init__(self, *, batch=2, latents=3, temporal=5, width=48, inner=40, num_heads=3, dtype=torch.float32):
        shapes = {"h": (batch, latents, width), "norm_in": (width,), "fc1": (inner, width), "fc2": (width, inner)}
        shapes |= {"q_proj": (width, width), "memory_k": (batch, temporal, width)}
        shapes |= {"memory_v": (batch, temporal, width), "alpha": (), "norm_out": (width,), "rho": ()}
        given = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
        for name, size in (("fc1", width), ("fc2", inner / 4), ("q_proj", width / 4)):
            given[name] = given[name] / size**0.5
        given |= {"h": 30 * given["h"], "alpha": given["alpha"] + 1, "rho": given["rho"] * 0 + 0.02}
        self.given = {name: x.to(dtype) for name, x in given.items()}
        self.num_heads = num_heads

    def args(self):
        return (*self.given.values(), self.num_heads, EPS)

    def check(self):
        assert_is_the_reference(latent_injection.latent_injection, reference.latent_injection, *self.args())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temporal", [1, 5, 123])
@pytest.mark.parametrize("latents", [1, 8, 17])
@interpreted
def test_latent_injection(latents, temporal, dtype):
    """Catches rows, heads or temporal patches lost at the edge of a block, and a softmax that is not renormalised."""
    Injection(latents=latents, temporal=temporal, dtype=dtype).check()


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("latents", [1, 17])
@interpreted
def test_two_launches_and_three_agree(latents, apart):
    """Catches scores of another head or sample, and a choice of launches that leaves one of the two untested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_injection, "scores_apart", lambda *sizes: apart)
        Injection(latents=latents, temporal=63).check()


@interpreted
def test_few_heads_get_a_launch_for_their_scores():
    """Catches a rule that is the wrong way round: heads of 128 and 32 patches stay with two launches at 7B."""
    assert latent_injection.scores_apart(32, 3584, 3584, 32)
    assert not latent_injection.scores_apart(32, 3584, 128, 32)


@pytest.mark.parametrize(
    "sizes",
    [
        {"width": 63, "num_heads": 7, "inner": 123},
        {"width": 96, "num_heads": 1, "inner": 1},
        {"width": 1, "num_heads": 1, "inner": 1, "latents": 1, "batch": 1, "temporal": 1},
        {"width": 6, "num_heads": 6, "latents": 1, "batch": 17},
        {"width": 96, "num_heads": 2, "latents": 63, "batch": 1},
        {"width": 544, "num_heads": 1, "inner": 63, "latents": 1, "temporal": 33, "batch": 1},
        {"width": 176, "num_heads": 1, "inner": 63, "latents": 2, "temporal": 33, "batch": 1},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@interpreted
def test_latent_injection_of_odd_sizes(sizes, dtype):
    """Catches head dims that are no multiple of a block, more rows than a block, and steps beyond the first of C."""
    Injection(**sizes, dtype=dtype).check()


@interpreted
def test_latent_injection_of_a_7b_model():
    """Catches what only full widths show: many column blocks per head, and more partial sums than fit one step."""
    Injection(width=3584, num_heads=28, inner=123, latents=1, batch=1, dtype=torch.float16).check()


@pytest.mark.parametrize("alpha", [-2.0, -1e-3, 0.0, 1e-3, 30.0])
@pytest.mark.parametrize("scale", [0.0, 300.0])
@interpreted
def test_gates_and_scores_at_their_extremes(alpha, scale):
    """Catches a gate without its sign, an exponential that overflows, and a running maximum that is never applied."""
    for latents in (1, 3):
        injection = Injection(temporal=123, latents=latents)
        injection.given["alpha"] = torch.tensor(alpha)
        injection.given["memory_k"] *= scale
        injection.check()


@interpreted
def test_inputs_may_be_views():
    """Catches strides of h, of the memory, or offsets taken for granted."""
    injection = Injection()
    memory = random(2, 9, 96, dtype=torch.float32)
    injection.given["memory_k"], injection.given["memory_v"] = memory[:, 1:6].chunk(2, dim=-1)
    injection.given["h"] = 30 * random(2, 9, 51, dtype=torch.float32)[:, 4:7, 3:]
    injection.check()
    injection.given["h"] = (30 * random(3, 2, 48, dtype=torch.float32)).transpose(0, 1)
    injection.check()


@interpreted
def test_samples_and_latents_do_not_mix():
    """Catches a row that reads another's state: masks that multiply by zero let NaN through."""
    for latents in (3, 17):
        injection = Injection(latents=latents)
        exact = latent_injection.latent_injection(*injection.args())
        injection.given["h"][0, 1] = torch.nan
        injection.given["memory_v"][1] = torch.nan
        out = latent_injection.latent_injection(*injection.args())
        others = [0, *range(2, latents)]
        assert torch.equal(out[0, others], exact[0, others])
        assert out[0, 1].isnan().all()
        assert out[1].isnan().all()


@interpreted
def test_calls_leave_nothing_behind():
    """Catches a counter that is not zero at the next call, as in the replay of a CUDA graph."""
    first, second = Injection(), Injection(latents=17, batch=1)
    outs = [latent_injection.latent_injection(*injection.args()) for injection in (first, second, first, second)]
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])


def into(mode, injection, embeds, start):
    """Run a mode of the module into embeds; return what `models.LatentInjection` gives."""
    g = injection.given
    if mode == "identity":
        slots.identity_into(g["h"], embeds, start)
        return g["h"]
    if mode == "rms":
        slots.rms_into(g["h"], g["rho"], EPS, embeds, start)
        return g["rho"] * reference.rms_norm(g["h"], torch.ones_like(g["norm_in"]), EPS)
    args = dict(g)
    if mode == "mlp":
        args |= dict.fromkeys(("q_proj", "memory_k", "memory_v", "alpha"))
    latent_injection.latent_injection_into(*args.values(), injection.num_heads, EPS, embeds, start)
    closed = g | {"alpha": g["alpha"] * (mode == "mlp_xattn")}
    return reference.latent_injection(*closed.values(), injection.num_heads, EPS)


@pytest.mark.parametrize("latents", [1, 3])
@pytest.mark.parametrize("start", [0, 4, torch.tensor(4, dtype=torch.int32)])
@pytest.mark.parametrize("mode", ["identity", "rms", "mlp", "mlp_xattn"])
@interpreted
def test_latents_go_straight_into_their_slots(mode, start, latents):
    """Catches a row written beside its slot, or another sample's."""
    injection = Injection(latents=latents)
    whole = torch.full((3, 9, 50), torch.nan)
    embeds = whole[1:, 1:, 1:49]
    ref = into(mode, injection, embeds, start)
    inside = slice(int(start), int(start) + latents)
    assert_close(embeds[:, inside], ref.double(), ref)
    embeds[:, inside] = torch.nan
    assert whole.isnan().all()


@pytest.mark.parametrize("start", [-1, 7, 100])
@pytest.mark.parametrize("mode", ["identity", "rms", "mlp", "mlp_xattn"])
@interpreted
def test_rows_beyond_the_buffer_are_dropped_or_refused(mode, start):
    """Catches writes outside of embeds where the start is known on the device alone."""
    injection = Injection(batch=1)
    whole = torch.full((3, 8, 48), torch.nan)
    ref = into(mode, injection, whole[1:2], torch.tensor(start, dtype=torch.int32))
    wanted = torch.full((120, 48), torch.nan)
    wanted[start + 1 : start + 4] = ref[0]
    assert torch.equal(whole[1].isnan(), wanted[1:9].isnan())
    assert whole[0].isnan().all()
    assert whole[2].isnan().all()
    with pytest.raises(ValueError, match=f"rows {start} to"):
        into(mode, injection, whole[1:2], start)


def replaced(**changes):
    injection = Injection()
    injection.given |= changes
    return lambda: latent_injection.latent_injection(*injection.args())


MISREAD = [
    (replaced(fc1=torch.ones(40, 96)[:, ::2]), "fc1"),
    (replaced(fc2=torch.ones(48, 41)), "fc2"),
    (replaced(q_proj=None), "all or none"),
    (replaced(memory_v=torch.ones(2, 4, 48)), "memory_v"),
    (replaced(memory_k=torch.ones(2, 0, 48)), "memory_k"),
    (replaced(h=torch.ones(2, 3, 48).half()), "one dtype"),
    (replaced(h=torch.ones(2, 3, 96)[..., ::2]), "contiguous"),
    (lambda: slots.identity_into(ONES, torch.ones(2, 9, 47), 0), "embeds"),
    (lambda: slots.identity_into(ONES, torch.ones(2, 9, 48), torch.tensor(0)), "int32"),
]


@pytest.mark.parametrize("case", range(len(MISREAD)), ids=[reason for _, reason in MISREAD])
@interpreted
def test_what_a_kernel_would_misread_is_refused(case):
    """Catches wrong results in place of an error."""
    run, reason = MISREAD[case]
    with pytest.raises(ValueError, match=reason):
        run()


@interpreted
def test_the_interpreter_of_older_triton_counts_its_loops():
    """Catches bounds of loops that NumPy 2.4 does not make integers of, as Triton 3.6 asks it to."""
    theirs = triton.runtime.interpreter
    newer = theirs._patch_lang_tensor

    def older(tensor, scope):
        newer(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "_patch_lang_tensor", older)
        with pytest.raises(triton.runtime.errors.InterpreterError, match="0-dimensional"):
            Injection().check()
        patch.setattr(triton, "__version__", "3.6.0")
        interpreter.start()
        Injection().check()
