"""Shared fixtures: tiny checkpoints, written once per session from seeds. They are read-only by convention."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import native
from vlrt import fresh
from vlrt.backends import ort_library
from vlrt.checkpoint import Checkpoint

# What takes longest comes first, so that at the end no worker is left alone with it.
LONGEST = [
    "pretrained",
    "export",
    "smooth",
    "reproduce",
    "train_loop",
    "benches",
    "cli",
    "kernels_compile",
    "train_kills",
    "train_cli",
    "together",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a machine that should have the C++ library, or a browser, say so."""
    parser.addoption("--require-ort-library", action="store_true", help="fail where libvlrt_ort cannot be built")
    parser.addoption("--require-browser", action="store_true", help="fail where Chromium is not installed")
    parser.addoption("--soak", action="store_true", help="run what takes minutes too: load, leaks and kills at length")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first; leave out what takes minutes unless `--soak` asks for it.

    Of what is left out, a short version always runs.
    """
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    if not config.getoption("--soak"):
        long = [item for item in items if "soak" in item.keywords]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if "soak" not in item.keywords]


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ort_library.Library:
    """libvlrt_ort: the installed one, or one that is built for these tests."""
    found = ort_library.find()
    if isinstance(found, str):
        found = native.build(tmp_path_factory.mktemp("library"))
    if isinstance(found, str):
        if request.config.getoption("--require-ort-library"):
            pytest.fail(found)
        pytest.skip(f"libvlrt_ort cannot be built here: {found}")
    return found


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """Write and open a fresh checkpoint, by the arguments of `fresh.write_checkpoint`; equal ones share a directory."""
    written: dict[str, Checkpoint] = {}

    def make(**settings: Any) -> Checkpoint:
        key = repr(sorted(settings.items()))
        if key not in written:
            path = tmp_path_factory.mktemp("checkpoints") / "tiny"
            written[key] = Checkpoint.open(fresh.write_checkpoint(path, **{"randomize_all": True, **settings}))
        return written[key]

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: Callable[..., Checkpoint]) -> Checkpoint:
    """Qwen2.5-VL, float32, flat names, 4 recurrent latents through "mlp_xattn", no weight left at 0 or 1."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def tiny_qwen2_checkpoint(make_checkpoint: Callable[..., Checkpoint]) -> Checkpoint:
    """Qwen2-VL: LayerNorm, no windows, no clock."""
    return make_checkpoint(family="qwen2_vl")


@pytest.fixture(scope="session")
def plain_checkpoint(make_checkpoint: Callable[..., Checkpoint]) -> Checkpoint:
    """Qwen2.5-VL without latents."""
    return make_checkpoint(latent=None)


@pytest.fixture(scope="session")
def tiny_path(tiny_checkpoint: Checkpoint) -> Path:
    """The directory of `tiny_checkpoint`."""
    return tiny_checkpoint.path


@pytest.fixture(scope="session")
def make_bundle(
    make_checkpoint: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Export a fresh checkpoint, by precision and the arguments of `make_checkpoint`; equal ones share a bundle."""
    exported: dict[str, Path] = {}

    def make(precision: str = "fp32", **settings: Any) -> Path:
        from vlrt.export.exporter import export  # loads torch, which most tests do without

        key = repr((precision, sorted(settings.items())))
        if key not in exported:
            checkpoint = make_checkpoint(**settings)
            out = tmp_path_factory.mktemp("bundles") / "tiny.vlrt"
            exported[key] = export(checkpoint.path, out, precision=precision)
        return exported[key]

    return make
