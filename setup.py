"""Where the packages lie; everything else is in pyproject.toml.

`kernels/` and `export/` are top-level folders that import as `vlrt.kernels` and `vlrt.export` through the relative
symlinks `vlrt/kernels` and `vlrt/export`. A checkout without symlinks (a zip, Windows) holds two small text files in
their place: there the folders are mapped instead.
"""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
LINKED = ("kernels", "export")

package_dir = {"": "."}
packages = [
    "vlrt",
    *sorted({f"vlrt.{path.parent.name}" for path in HERE.glob("vlrt/*/*.py")} | {f"vlrt.{name}" for name in LINKED}),
]
for name in LINKED:
    if not (HERE / "vlrt" / name).is_dir():
        package_dir[f"vlrt.{name}"] = name

setup(
    package_dir=package_dir,
    packages=packages,
    package_data={
        "vlrt": ["py.typed"],
        "vlrt.pretrained": ["*/*"],
        "vlrt.kernels": ["README.md", "configs/*.json"],
        "vlrt.export": ["README.md"],
    },
)
