"""The example programs, run as their readers run them; the page in a real browser.

The browser is Debian's Chromium with its driver, or another of that name on the PATH. Where there is none the test of
the page is skipped with that reason; `pytest --require-browser` makes it fail instead.
"""

import csv
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlrt import pretrained
from vlrt.export import exporter
from vlrt.train import synthetic, triplets

EXAMPLES = Path(__file__).parent.parent / "examples"
QUESTION = "Where is the ball after swap 2?"
WAIT_SECONDS = 120
Model = tuple[Path, Path, dict[str, str]]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The trained model's bundle, a folder with two clips, and the right answer about each to QUESTION."""
    root = tmp_path_factory.mktemp("examples")
    settings = synthetic.Synthetic(seed=88_000, split="test", families=("cups",), forms=("free",), num_swaps=(4, 4))
    synthetic.write(root / "clips", settings, 2, workers=1)
    rows = triplets.read(root / "clips" / synthetic.STEPS).rows
    answers = {Path(str(row.video)).name: row.answer for row in rows if row.asked == QUESTION}
    return exporter.export(pretrained.find("shapes-latent"), root / "shapes.vlrt"), root / "clips" / "videos", answers


def run(program: str, *arguments: object, fails: bool = False) -> str:
    command = [sys.executable, str(EXAMPLES / program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert (done.returncode != 0) == fails, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if fails else done.stdout


def test_ask_and_choices_answer(shapes: Model) -> None:
    bundle, clips, answers = shapes
    name, answer = next(iter(answers.items()))
    assert run("ask.py", bundle, clips / name, QUESTION).splitlines()[0] == answer
    assert run("choices.py", bundle).splitlines()[0] in ("left", "right", "nowhere")


def test_a_folder_becomes_a_table_that_is_gone_on_with(shapes: Model, tmp_path: Path) -> None:
    bundle, clips, answers = shapes
    folder, out = tmp_path / "clips", tmp_path / "answers.csv"
    shutil.copytree(clips, folder / "of today")
    (folder / "broken.mp4").write_bytes(b"broken")
    (folder / "notes.txt").write_text("no video")
    arguments = (bundle, folder, QUESTION, out, "left", "middle", "right")
    run("folder_to_csv.py", *arguments)
    rows = {row["file"]: row for row in csv.DictReader(out.open(encoding="utf-8"))}
    assert {Path(name).name: row["answer"] for name, row in rows.items() if not row["error"]} == answers
    assert "cannot be read as a video" in rows["broken.mp4"]["error"]
    assert all(0.5 < float(row["probability"]) <= 1 for row in rows.values() if not row["error"])
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:-1]) + "\n")  # as if it had been stopped
    run("folder_to_csv.py", *arguments)
    assert [line.split(",")[:2] for line in out.read_text().splitlines()] == [line.split(",")[:2] for line in lines]


def test_a_folder_without_videos_is_said(tmp_path: Path) -> None:
    assert "holds no video" in run("folder_to_csv.py", "none.vlrt", tmp_path, "Why?", tmp_path / "a.csv", fails=True)
    assert not (tmp_path / "a.csv").exists()


@pytest.fixture
def address(shapes: Model, tmp_path: Path) -> Iterator[str]:
    """The page, served."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-u", str(EXAMPLES / "web_page.py"), str(shapes[0]), "--port", str(port)]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(tmp_path / "uploads"), "HOME": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as server:
        assert server.stdout is not None
        said = ""
        for line in server.stdout:
            said += line
            if "Running on local URL" in line:
                break
        else:
            pytest.fail(f"the page did not come up: {said}")
        yield f"http://127.0.0.1:{port}"
        server.terminate()


@pytest.fixture
def browser(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A headless Chromium."""
    from selenium import webdriver

    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        reason = "Chromium and its driver are not installed (Debian: apt install chromium chromium-driver)"
        (pytest.fail if request.config.getoption("--require-browser") else pytest.skip)(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = str(paths[0])
    quiet = ("background-networking", "component-update", "sync", "gpu", "quic", "dev-shm-usage")
    for argument in ("headless", "no-sandbox", "no-first-run", *(f"disable-{name}" for name in quiet)):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={tmp_path / 'chromium'}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(paths[1])))
    try:
        yield driver
    finally:
        driver.quit()


def test_one_drops_a_video_on_the_page_and_asks(shapes: Model, browser: Any, address: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    _, clips, answers = shapes
    name, answer = next(iter(answers.items()))

    def wait(condition: Callable[[Any], Any]) -> Any:
        return WebDriverWait(browser, WAIT_SECONDS).until(condition)

    def find(selector: str) -> Any:
        return browser.find_element("css selector", selector)

    browser.get(address)
    wait(lambda _: browser.find_elements("css selector", "#ask"))
    find("#ask").click()
    wait(lambda _: "Drop a video and write a question first." in find("body").text)
    find("input[type=file]").send_keys(str(clips / name))
    wait(lambda _: browser.find_elements("css selector", "video[src], video source"))
    find("#question textarea").send_keys(QUESTION)
    find("#choices textarea").send_keys("left, middle, right")
    find("#ask").click()
    assert wait(lambda _: find("#answer textarea").get_attribute("value")) == answer
    assert "frames" in find("#details").text
