"""The registration of the ops: schemas, fakes and gradients, as torch.compile and torch.export see them."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from tests.closeness import assert_close
from vlrt import ops
from vlrt.kernels import reference, schema

SIZES = [1, 63, 123]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def floats(shapes, dtype):
    return [random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def video_attention(size, dtype, batch=1):
    past, capacity = 2, size + 5
    shapes = [(batch, size, 4, 8), (batch, size, 2, 8), (batch, size, 2, 8), (capacity, 4), (capacity, 4)]
    shapes += [(batch, 2, capacity, 8)] * 2
    return [*floats(shapes, dtype), torch.tensor(past, dtype=torch.int32)]


def segment_attention(size, dtype):
    """q, k and v as the tower gives them: thirds of one tensor, so not contiguous."""
    qkv = (part.unflatten(-1, (3, 8)) for part in random(size, 72, dtype=dtype).chunk(3, dim=-1))
    bounds = torch.tensor(sorted({0, size // 2, size}), dtype=torch.int32)
    return [*qkv, *floats([(size, 4), (size, 4)], dtype), bounds]


def latent_injection(size, dtype):
    shapes = [(2, size, 8), (8,), (6, 8), (8, 6), (8, 8), (2, 3, 8), (2, 3, 8), (), (8,), ()]
    return [*floats(shapes, dtype), 2, 1e-6]


def rms_norm(size, dtype):
    return [*floats([(2, size, 8), (8,)], dtype), 1e-6]


def add_rms_norm(size, dtype):
    return [*floats([(2, size, 8), (2, size, 8), (8,)], dtype), 1e-6]


def swiglu(size, dtype):
    return floats([(2, size, 8), (2, size, 8)], dtype)


def patchify(size, dtype):
    frames = torch.randint(256, (4, 8, 4 * size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [frames, *(x.abs() + 0.1 for x in floats([(3,), (3,)], dtype)), 2, 2, 2]


def video_attention_(size, dtype):
    return video_attention(size, dtype)


LEARNED = {
    f.__name__: f for f in (video_attention, segment_attention, latent_injection, rms_norm, add_rms_norm, swiglu)
}
GIVEN = LEARNED | {f.__name__: f for f in (video_attention_, patchify)}


def op_of(name):
    return getattr(torch.ops.vlrt, name).default


def test_every_op_is_tested_here():
    """Catches an op that is registered and never checked."""
    assert set(GIVEN) == set(schema.SCHEMAS) == set(ops.OPS)
    assert set(GIVEN) - set(LEARNED) == set(schema.WITHOUT_BACKWARD)


@pytest.mark.parametrize("name", GIVEN)
def test_ops_are_registered_as_pytorch_wants_them(name):
    """Catches schemas that hide mutation or aliasing, fakes of other strides, a backward that cannot be traced."""
    given = [
        x.requires_grad_() if torch.is_tensor(x) and x.is_floating_point() and name in LEARNED else x
        for x in GIVEN[name](63, torch.float32)
    ]
    opcheck(op_of(name), tuple(given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", GIVEN)
def test_fakes_tell_shape_dtype_and_strides(name, size, dtype):
    """Catches a graph exported or compiled for a layout that the op does not return."""
    given = GIVEN[name](size, dtype)
    outs = op_of(name)(*given)
    with torch.device("meta"):
        fakes = op_of(name)(*(x.to("meta") if torch.is_tensor(x) else x for x in given))
    pairs = zip(outs, fakes, strict=True) if isinstance(outs, tuple) else [(outs, fakes)]
    for out, fake in pairs:
        assert (fake.shape, fake.dtype) == (out.shape, out.dtype)
        assert strides(fake) == strides(out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_patches_have_the_dtype_that_is_asked_for(dtype):
    """Catches a result, or a fake of it, in the dtype of the mean; and one that was rounded before its end."""
    given = patchify(3, torch.float32)
    opcheck(op_of("patchify"), (*given, dtype))
    assert torch.equal(op_of("patchify")(*given, dtype), op_of("patchify")(*given).to(dtype))


def strides(x):
    """Of the axes that have any: PyTorch lets the stride of an axis of size 1 be anything."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@pytest.mark.parametrize("name", GIVEN)
def test_the_op_is_the_reference(name):
    """Catches an op registered with another op's implementation, or arguments in another order."""
    given, again = GIVEN[name](63, torch.float64), GIVEN[name](63, torch.float64)
    outs, refs = op_of(name)(*given), getattr(reference, name)(*again)
    assert all(torch.equal(x, y) for x, y in zip(given, again, strict=True) if torch.is_tensor(x))
    pairs = zip(outs, refs, strict=True) if isinstance(outs, tuple) else [(outs, refs)]
    for out, ref in pairs:
        assert_close(out, ref)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", LEARNED)
def test_gradients_by_finite_differences(name, size):
    """Catches a gradient that is missing, in another argument's place, or of another formula."""
    given = [
        x.detach().clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x
        for x in GIVEN[name](size, torch.float64)
    ]
    assert gradcheck(op_of(name), tuple(given))


def test_a_gradient_is_asked_of_some_inputs_only():
    """Catches a backward that returns gradients in the wrong places when weights are frozen, as a rollout's are."""
    given = latent_injection(3, torch.float64)
    wanted = (0, 7)  # h and alpha
    outs = []
    for function in (op_of("latent_injection"), reference.latent_injection):
        args = [x.clone().requires_grad_() if i in wanted else x for i, x in enumerate(given)]
        function(*args).square().sum().backward()
        assert [i for i, x in enumerate(args) if torch.is_tensor(x) and x.grad is not None] == list(wanted)
        outs.append([args[i].grad for i in wanted])
    for out, ref in zip(*outs, strict=True):
        assert_close(out, ref)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("rms_norm", "cpu", torch.float32, (1, 8)), None),
        (("softmax", "cpu", torch.float32, (1, 8)), "no op is named 'softmax'"),
        (("rms_norm", "mps", torch.float32, (1, 8)), "'mps'"),
        (("patchify", "cpu", torch.uint8, (2, 28, 28, 3)), None),
        (("patchify", "cpu", torch.float32, (2, 28, 28, 3)), "torch.uint8"),
        (("rms_norm", "cuda", torch.bfloat16, (1, 8)), None),
        (("rms_norm", "cuda", torch.float64, (1, 8)), "torch.float64"),
        (("add_rms_norm", "cuda", torch.float32, (1, 40_000)), "40000"),
        (("swiglu", "cuda", torch.float16, (1, 8)), None),
        (("patchify", "cuda", torch.uint8, (2, 28, 28, 4)), "[T, H, W, 3]"),
        (("latent_injection", "cuda", torch.float32, (1, 4, 8)), None),
        (("latent_injection", "cuda", torch.float32, (4, 8)), "[B, L, C]"),
        (("video_attention_", "cuda", torch.bfloat16, (1, 5, 4, 128)), None),
        (("video_attention", "cuda", torch.float64, (1, 5, 4, 128)), "not torch.float64"),
        (("segment_attention", "cuda", torch.float16, (5, 4, 80)), None),
        (("segment_attention", "cuda", torch.float16, (5, 4, 48)), "head dims 64, 72, 80, 96, 128, not 48"),
        (("rms_norm", "cpu", torch.int32, (1, 8)), "torch.int32"),
        (("rms_norm", "cpu", torch.float32, (8,)), "2 axes"),
    ],
)
def test_what_an_op_supports_is_said_in_words(given, reason):
    """Catches a `supported` that says yes to what fails, or gives no reason."""
    answer = ops.supported(*given)
    assert answer is None if reason is None else reason in answer
