"""The small kernels, interpreted, held against their specification in fp64. On GPUs: the cases of benches/."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton

from benches import interpreter
from tests.closeness import assert_close
from tests.interpreter import interpreted
from vlrt import config, preprocess
from vlrt.kernels import latent_injection, patchify, reference, rms_norm, slots, swiglu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def doubled(given):
    return [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in given]


def assert_is_the_reference(run, ref, *given):
    """Judge `run` by `ref` in fp64, and by the errors of `ref` in the given dtype."""
    outs, exact, plain = run(*given), ref(*doubled(given)), ref(*given)
    outs, exact, plain = (x if isinstance(x, tuple) else (x,) for x in (outs, exact, plain))
    for triple in zip(outs, exact, plain, strict=True):
        assert_close(*triple)
        if triple[0].numel():
            assert strides(triple[0]) == strides(torch.empty_like(triple[2]))


def strides(x):
    """Of the axes that have any: PyTorch lets the stride of an axis of size 1 be anything."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def views(width, dtype):
    """Inputs [..., width] of every layout: shifted, halves, slices of a batch, permuted, gaps inside a row."""
    whole = random(3, 7, 2 * width + 3, dtype=dtype)
    return {
        "dense": whole[..., :width].contiguous(),
        "half": whole[..., width : 2 * width],
        "shifted": whole[..., 3 : width + 3],
        "slice of a batch": whole[:, 2:5, :width],
        "last row": whole[:, -1:, :width],
        "permuted": whole[..., :width].contiguous().transpose(0, 1),
        "gaps": whole[..., : 2 * width : 2],
        "empty": whole[:0, :, :width],
    }


LAYOUTS = list(views(1, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (63, 5), (2, 3, 48), (3, 123), (2, 96), (1, 3584)])
@interpreted
def test_norms(shape, dtype):
    """Catches lanes beyond C that count in the mean, a mean over the block's size, statistics in low precision."""
    x, residual, weight = (random(*s, seed=i, dtype=dtype) for i, s in enumerate([shape, shape, shape[-1:]]))
    for scale in (1e-3, 100.0):
        assert_is_the_reference(rms_norm.rms_norm, reference.rms_norm, x * scale, weight, EPS)
        assert_is_the_reference(rms_norm.add_rms_norm, reference.add_rms_norm, x * scale, residual, weight, EPS)


@interpreted
def test_the_normalised_value_is_rounded_before_the_weight():
    """Catches another rounding than the models were trained with. In fp16: the interpreter truncates to bf16."""
    x, weight = random(63, 48, dtype=torch.float16), random(48, seed=1, dtype=torch.float16)
    out = rms_norm.rms_norm(x, weight, EPS)
    rounded_once = (weight.double() * torch.nn.functional.rms_norm(x.double(), (48,), eps=EPS)).half()
    ref = reference.rms_norm(x, weight, EPS)
    assert (out != ref).float().mean() < 0.01  # where the root's last bit decides
    assert (out != rounded_once).float().mean() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
@interpreted
def test_norms_and_swiglu_of_any_layout(layout):
    """Catches rows read at another stride, a view's offset lost, a result laid out otherwise than the fake says."""
    for width in (1, 48, 63):
        x, other = views(width, torch.float32)[layout], views(width, torch.float32)[layout] + 1
        weight = random(width, dtype=torch.float32)
        assert_is_the_reference(rms_norm.rms_norm, reference.rms_norm, x, weight, EPS)
        assert_is_the_reference(rms_norm.add_rms_norm, reference.add_rms_norm, x, other, weight, EPS)
        assert_is_the_reference(rms_norm.add_rms_norm, reference.add_rms_norm, other, x, weight, EPS)
        assert_is_the_reference(swiglu.swiglu, reference.swiglu, x, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 63, 123, 1024, 1500])
@interpreted
def test_swiglu_of_two_halves(width, dtype):
    """Catches the gate and the projection swapped, and columns at the edge of a block."""
    gate, up = random(2, 3, 2 * width, dtype=dtype).chunk(2, dim=-1)
    assert_is_the_reference(swiglu.swiglu, reference.swiglu, gate, up)
    assert_is_the_reference(swiglu.swiglu, reference.swiglu, gate * 100, up)  # exp overflows on one side


def frames_of(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(14, 2, 2), (16, 2, 2), (3, 1, 1), (2, 3, 5)])
@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 1, 3)])
@interpreted
def test_patchify(grid, sizes, dtype):
    """Catches any two axes swapped, also those of equal size, and a division that rounds otherwise."""
    size, steps, merge = sizes
    frames = frames_of(grid[0] * steps, grid[1] * merge * size, grid[2] * merge * size, 3)
    mean, std = random(3, dtype=dtype), random(3, seed=1, dtype=dtype).abs() + 0.1
    out = patchify.patchify(frames, mean, std, *sizes)
    exact = reference.patchify(frames, mean.double(), std.double(), *sizes)
    plain = reference.patchify(frames, mean, std, *sizes)
    assert_close(out, exact, plain)
    assert out.is_contiguous()
    if dtype != torch.bfloat16:  # which the interpreter truncates
        assert torch.equal(out, plain)
    wide = patchify.patchify(frames, mean.float(), std.float(), *sizes, dtype)
    exact = reference.patchify(frames, mean.double(), std.double(), *sizes)
    assert_close(wide, exact, reference.patchify(frames, mean.float(), std.float(), *sizes, dtype))
    assert wide.dtype == dtype


@interpreted
def test_patchify_of_views():
    """Catches strides of a crop, of every other frame, or of channels-first frames taken for granted."""
    whole = frames_of(8, 3, 40, 50)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    for frames in (whole.permute(0, 2, 3, 1)[:, 2:38, 1:49], whole.permute(0, 2, 3, 1)[::2, :36, :48]):
        given = (frames, mean, std, 6, 2, 2)
        assert torch.equal(patchify.patchify(*given), reference.patchify(*given))


@interpreted
def test_patchify_is_that_of_the_runtime():
    """Catches a kernel and a preprocessor that the same model would read differently."""
    vision = SimpleNamespace(patch_size=14, temporal_patch_size=2, spatial_merge_size=2, patch_dim=1176)
    video = config.Video()
    data = frames_of(4, 28, 56, 3)
    frames = SimpleNamespace(data=data.numpy(), sample_fps=2.0, is_image=False)
    ref = preprocess.patchify(frames, video, vision).pixels
    out = patchify.patchify(data, torch.tensor(video.mean), torch.tensor(video.std), 14, 2, 2)
    assert np.array_equal(out.numpy(), ref)


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


ONES = torch.ones(2, 3, 48)


MISREAD = [
    (lambda: rms_norm.rms_norm(ONES, torch.ones(47), EPS), "weight"),
    (lambda: rms_norm.rms_norm(ONES, torch.ones(48).half(), EPS), "one dtype"),
    (lambda: rms_norm.rms_norm(ONES.double(), torch.ones(48).double(), EPS), "float64"),
    (lambda: rms_norm.add_rms_norm(ONES, ONES[:1], torch.ones(48), EPS), "residual"),
    (lambda: swiglu.swiglu(ONES, ONES[:, :1]), "up"),
    (lambda: patchify.patchify(frames_of(3, 28, 28, 3), torch.ones(3), torch.ones(3), 14, 2, 2), "multiple of 2"),
    (lambda: patchify.patchify(frames_of(2, 28, 30, 3), torch.ones(3), torch.ones(3), 14, 2, 2), "H and W of 28"),
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
