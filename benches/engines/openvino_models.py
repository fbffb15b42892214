"""Finds a Python with OpenVINO GenAI, and has optimum-intel export a checkpoint there.

optimum-intel wants an older transformers than vlrt's export does, so it lives in an environment of its own, which
`tools/setup-peers` makes.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benches.engines.client import ROOT, Absent

VARIABLE = "VLRT_BENCH_OPENVINO_PYTHON"
VENV = ROOT / ".venv-peers"
RUNS, EXPORTS = "openvino_genai", "optimum.intel"
EXPORT = "from optimum.commands.optimum_cli import main; main()"


def python(given: str | None, *modules: str) -> str:
    """Return the first interpreter that finds modules: the one given, else $VARIABLE, .venv-peers, this one.

    Raises:
        Absent: there is none.
    """
    tried = []
    for interpreter in _candidates(given):
        if not Path(interpreter).exists():
            tried.append(f"{interpreter} is not there")
        elif lacking := [module for module in modules if not _finds(interpreter, module)]:
            tried.append(f"{Path(interpreter).parent.parent.name}/{Path(interpreter).name} lacks {', '.join(lacking)}")
        else:
            return interpreter
    raise Absent(f"{'; '.join(tried)}: run tools/setup-peers, or name an interpreter (--python-openvino, ${VARIABLE})")


def model(checkpoint: Path, weights: str, out: Path, given: str | None, log: Path) -> Path:
    """Return a directory that GenAI opens, exported where it is not there yet.

    Args:
        checkpoint: Hugging Face directory.
        weights: optimum-intel's weight format: fp32, fp16, int8 or int4.
        out: the directory.
        given: interpreter; see `python`.
        log: a file that gets what the export prints.

    Raises:
        Absent: nothing here exports it, or the export fails.
    """
    if (out / "openvino_language_model.xml").is_file():
        return out
    interpreter = python(given, RUNS, EXPORTS)
    partial = out.with_name(out.name + ".partial")
    command = [interpreter, "-c", EXPORT, "export", "openvino", "--model", str(checkpoint)]
    command += ["--task", "image-text-to-text", "--weight-format", weights, str(partial)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        done = subprocess.run(
            command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False
        )
    if done.returncode:
        last = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise Absent(f"optimum-intel does not export it: {last[-1].strip()[:300] if last else done.returncode}")
    partial.rename(out)
    return out


def _candidates(given: str | None) -> Iterator[str]:
    named = given or os.environ.get(VARIABLE)
    if named:
        yield named
        return
    yield str(VENV / "bin" / "python")
    yield sys.executable


def _finds(interpreter: str, module: str) -> bool:
    top = module.partition(".")[0]  # finding a submodule imports its package
    program = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({top!r}) is None)"
    return subprocess.run([interpreter, "-c", program], capture_output=True, check=False).returncode == 0
