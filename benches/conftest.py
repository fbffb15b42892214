"""Options of `pytest benches/`, and where its results go. Tables and progress are shown as they come."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benches import machine


@dataclass(frozen=True)
class Quick:
    """What the quick set runs on.

    Attributes:
        shape: of the model; `tiny` is for trials, and its figures mean nothing.
        threads: of every engine.
        results: directory of the JSON files and the report.
        python_openvino: interpreter; None: see `benches.engines.openvino_models`.
    """

    shape: str
    threads: int
    results: Path
    python_openvino: str | None

    def arguments(self, bench: str, *words: object) -> list[str]:
        """Return a command line: words, and where the result goes."""
        return [*map(str, words), "--out", str(self.results / f"{bench}.json")]

    def pick(self, full: Any, tiny: Any) -> Any:
        """Return the size at hand."""
        return tiny if self.shape == "tiny" else full


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a trial be small, and go elsewhere."""
    parser.addoption("--shape", default="small", choices=("tiny", "small"))
    parser.addoption("--engine-threads", type=int, help="one per core that this process may use by default")
    parser.addoption("--results", type=Path, help="directory; benches/results/<machine> by default")
    parser.addoption("--python-openvino", help="a Python with OpenVINO GenAI and optimum-intel")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> Quick:
    """What the quick set runs on."""
    option = request.config.getoption
    described = machine.describe()
    threads = option("--engine-threads") or described["cpu"]["usable_cores"]
    results = option("--results") or machine.results(described["name"])
    return Quick(option("--shape"), threads, Path(results).resolve(), option("--python-openvino"))


@pytest.hookimpl(wrapper=True, trylast=True)  # within the wrapper that captures
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Show what a bench prints."""
    capture = item.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{item.nodeid}", flush=True)
        yield
