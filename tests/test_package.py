"""The package as its users import it: lazily, typed, with kernels/ and export/ in it; from a checkout or a wheel."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import vlrt
from vlrt import pretrained

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "triton", "onnxruntime", "tensorrt", "transformers", "onnx", "numpy", "av", "PIL", "rich")


def modules_loaded_by(code: str, cwd: Path) -> set[str]:
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"]
    loaded = subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout
    return {name.split(".")[0] for name in loaded.split()}


@pytest.mark.parametrize(
    "code", ["import vlrt", "import vlrt.cli as c; c.arguments.parser(c.COMMANDS, '')", "from vlrt import VideoError"]
)
def test_importing_loads_no_engine(code: str, tmp_path: Path) -> None:
    assert modules_loaded_by(code, tmp_path).isdisjoint(HEAVY)


def test_the_runtime_loads_without_what_only_an_export_needs(tmp_path: Path) -> None:
    code = "from vlrt import Answer, Frames, Runtime; import vlrt.generate, vlrt.backends.ort"
    assert modules_loaded_by(code, tmp_path).isdisjoint(("torch", "triton", "onnx", "transformers", "safetensors"))


def test_every_public_name_exists_and_a_wrong_one_is_an_attribute_error() -> None:
    for name in vlrt.__all__:
        assert getattr(vlrt, name) is not None
    assert set(vlrt.__all__) <= set(dir(vlrt))
    with pytest.raises(AttributeError, match="no attribute 'Runtimes'"):
        vlrt.Runtimes  # noqa: B018  # reading it is the test


def test_version_is_the_one_that_was_installed() -> None:
    assert vlrt.__version__ == importlib.metadata.version("vlrt")


def test_the_package_says_that_it_is_typed() -> None:
    assert Path(vlrt.__file__).with_name("py.typed").exists()


def test_trained_models_come_with_the_package() -> None:
    # Catches weights or model cards that a wheel leaves out, and a package that grows beyond what was agreed on.
    assert pretrained.names() == ("shapes-cot", "shapes-latent")
    for name in pretrained.names():
        directory = pretrained.find(name)
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {
            f.name for f in directory.iterdir()
        }
        assert sum(file.stat().st_size for file in directory.iterdir()) <= 16 * 10**6


def test_a_name_gives_way_to_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert pretrained.find("shapes-latent").is_absolute()
    assert pretrained.find("shapes") == Path("shapes")
    Path("shapes-latent").mkdir()
    assert pretrained.find("shapes-latent") == Path("shapes-latent")


@pytest.mark.parametrize("name", ["kernels", "export"])
def test_kernels_and_export_are_namespace_packages(name: str) -> None:
    # transformers looks for the package `kernels` of PyPI by that name, and from a checkout our folder answers to it.
    # With an __init__.py ours would be imported in its place, and transformers would crash on what it lacks.
    spec = importlib.util.find_spec(f"vlrt.{name}")
    assert spec is not None
    assert spec.origin is None, f"{name}/ has an __init__.py"


@pytest.mark.parametrize("name", ["kernels", "export"])
def test_links_of_a_checkout_are_relative_and_lead_to_the_top_level(name: str) -> None:
    link = ROOT / "vlrt" / name
    if not (ROOT / "setup.py").exists():
        pytest.skip("holds for a checkout; this is an installed wheel")
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == (ROOT / name).resolve()
    assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.parametrize(
    ("architecture", "features", "slow"),
    [
        ("x86_64", ["avx2"], True),
        ("x86_64", ["avx2", "avx_vnni"], False),
        ("AMD64", ["avx2", "avx512_vnni"], False),
        ("x86_64", None, True),
        ("aarch64", ["asimddp"], False),
    ],
)
def test_the_doctor_tells_where_int8_is_slow(architecture, features, slow):
    """Catches an old laptop on which int8 bundles disappoint, without a word."""
    from vlrt import doctor, processor

    found = doctor.exact_int8(architecture, features)
    assert found.available
    assert processor.may_saturate(architecture, features) == slow
    assert ("slower" in found.reason) == slow


@pytest.mark.parametrize(
    ("setting", "available", "words"),
    [
        ("[always] madvise never\n", True, "always"),
        ("always [madvise] never\n", True, "madvise"),
        ("always madvise [never]\n", False, "as root: echo madvise > "),
        ("", False, "is ''"),
        (None, False, "does not tell"),
    ],
)
def test_the_doctor_tells_where_there_are_no_huge_pages(tmp_path, setting, available, words):
    """Catches a machine that reads weights more slowly than it could, without a word."""
    from vlrt import doctor

    path = tmp_path / "enabled"
    if setting is not None:
        path.write_text(setting)
    found = doctor.huge_pages(path)
    assert (found.available, words in found.reason) == (available, True)


def test_kernels_that_do_not_saturate_are_taken_where_others_may(make_bundle, monkeypatch):
    """Catches the slow kernels on processors that need none: with VNNI they took int8 five times as long."""
    import onnxruntime

    from vlrt import processor
    from vlrt.runtime import Runtime

    entries, add = [], onnxruntime.SessionOptions.add_session_config_entry
    monkeypatch.setattr(
        onnxruntime.SessionOptions,
        "add_session_config_entry",
        lambda options, *entry: entries.append(entry) or add(options, *entry),
    )
    for saturates in (True, False):
        monkeypatch.setattr(processor, "may_saturate", lambda *_, saturates=saturates: saturates)
        entries.clear()
        Runtime.open(make_bundle(), threads=1).close()
        assert (("session.x64quantprecision", "1") in entries) == saturates
