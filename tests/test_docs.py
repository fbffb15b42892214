"""The guide's programs run as they stand, page by page, and its links lead somewhere."""

import re
import shutil
from pathlib import Path

import pytest

from vlrt import pretrained
from vlrt.export import exporter
from vlrt.train import synthetic

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [page for page in [DOCS / "index.md", *sorted((DOCS / "guide").glob("*.md"))] if BLOCK.search(page.read_text())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the guide's programs speak of: model.vlrt, and clips of cups as clip.mp4, a.mp4 and b.mp4."""
    root = tmp_path_factory.mktemp("guide")
    settings = synthetic.Synthetic(seed=99_000, split="test", families=("cups",), forms=("free",), num_swaps=(4, 4))
    synthetic.write(root / "clips", settings, 3, workers=1)
    videos = sorted((root / "clips" / "videos").glob("*.mp4"))
    for video, name in zip(videos, ("clip.mp4", "a.mp4", "b.mp4"), strict=True):
        shutil.copy(video, root / name)
    exporter.export(pretrained.find("shapes-latent"), root / "model.vlrt")
    return root


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_programs_of_a_page_run_one_after_the_other(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"__name__": page.stem}
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), names)
    assert capsys.readouterr().out


def test_there_are_programs_in_the_guide() -> None:
    assert {"index", "ask", "sessions", "concurrency", "errors"} <= {page.stem for page in PAGES}
