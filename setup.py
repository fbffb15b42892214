"""Where the packages lie, and how the C++ library is built; everything else is in pyproject.toml.

`kernels/` and `export/` are top-level folders that import as `vlrt.kernels` and `vlrt.export` through the relative
symlinks `vlrt/kernels` and `vlrt/export`. A checkout without symlinks (a zip, Windows) holds two small text files in
their place: there the folders are mapped instead.

The library (kernels/ort/) is optional. It is built where CMake, a C++ compiler and the headers of ONNX Runtime are;
elsewhere one line says what was missing, vlrt is installed without it, and `vlrt doctor` repeats that line.
"""

import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent.resolve()
LINKED = ("kernels", "export")
LIBRARY = "libvlrt_ort" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
REASON = "not_built.txt"


def build_library(directory):
    """Build the library into a directory; return None, or why that cannot be done here, as a sentence."""
    if (cmake := shutil.which("cmake")) is None:
        return "CMake was not found"
    with tempfile.TemporaryDirectory() as room:
        for arguments in (("-S", str(HERE), "-B", room), ("--build", room, "--parallel", "2")):
            done = subprocess.run([cmake, *arguments], capture_output=True, text=True)
            if done.returncode:
                return _reason(done.stdout + done.stderr)
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy2(Path(room) / LIBRARY, directory / LIBRARY)
    return None


def _reason(log):
    """Return what went wrong as one line."""
    if "onnxruntime_c_api.h was not found" in log:
        return "the headers of ONNX Runtime were not found (ORT_INCLUDE_DIR names their directory)"
    if "No CMAKE_CXX_COMPILER" in log:
        return "no C++ compiler was found"
    errors = [line.strip() for line in log.splitlines() if "error" in line.lower()]
    return f"its build failed: {(errors or ['no message'])[0]}"


@functools.cache
def built():
    """Build the library once per run; return the directory with it, or with the reason why not."""
    directory = HERE / "build" / "ort"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    reason = build_library(directory)
    if reason is not None:
        (directory / REASON).write_text(reason + "\n", encoding="utf-8")
        print(f"vlrt: libvlrt_ort is left out: {reason}. vlrt works without it.", file=sys.stderr)  # noqa: T201  # the build log
    return directory


class BuildPy(build_py):
    """Also places the library, or the reason why there is none, in vlrt/kernels/ort."""

    def run(self):
        """Copy the modules, then the library: beside its sources where the installation is editable."""
        super().run()
        place = HERE / "kernels" / "ort" if self.editable_mode else Path(self.build_lib) / "vlrt" / "kernels" / "ort"
        place.mkdir(parents=True, exist_ok=True)
        for name in (LIBRARY, REASON):
            (place / name).unlink(missing_ok=True)  # of an earlier installation
            if (built() / name).exists():
                shutil.copy2(built() / name, place / name)


class BdistWheel(bdist_wheel):
    """A wheel with the library is for one platform and any Python 3; one without it is for all."""

    def finalize_options(self):
        """Find out which of the two it is."""
        self.distribution.has_ext_modules = (built() / LIBRARY).exists  # no Extension: it is no module of Python
        super().finalize_options()

    def get_tag(self):
        """Return python, ABI and platform tags."""
        return super().get_tag() if self.root_is_pure else ("py3", "none", super().get_tag()[2])


def main():
    """Describe the package to setuptools."""
    package_dir = {"": "."}
    nested = {f"vlrt.{path.parent.name}" for path in HERE.glob("vlrt/*/*.py")}
    for name in LINKED:
        if not (HERE / "vlrt" / name).is_dir():
            package_dir[f"vlrt.{name}"] = name
    setup(
        package_dir=package_dir,
        packages=["vlrt", *sorted(nested | {f"vlrt.{name}" for name in LINKED})],
        package_data={
            "vlrt": ["py.typed"],
            "vlrt.pretrained": ["*/*"],
            "vlrt.kernels": ["README.md", "configs/*.json"],
            "vlrt.export": ["README.md"],
        },
        cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel},
    )


if __name__ == "__main__":
    main()
