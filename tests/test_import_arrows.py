"""Who may import whom: layers that look only downwards can be read, tested and replaced one at a time."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vlrt"
BASE = ["config", "errors"]
DATA = ["container", "sampling", "video", "preprocess", "tokenizer", "prompt", "positions", "latent", "kv_cache"]
CORE = [*BASE, "bundle", "checkpoint", "names", *DATA]
ENGINES = {"torch", "triton", "transformers", "onnx", "onnxscript", "tensorrt", "safetensors"}

# module or folder -> what of vlrt it may import, itself aside; the longest name that fits a file counts
ARROWS = {
    "__init__": ["aio", "answer", "errors", "live", "reduction", "runtime", "session", "video"],
    "__main__": ["cli"],
    "errors": [],
    "names": [],
    "config": ["errors"],
    "aliases": BASE,
    "hf_config": BASE,
    "bundle": [*BASE, "names", "unfinished", "watched"],
    "checkpoint": [*BASE, "names", "aliases"],
    "fresh": [*BASE, "checkpoint", "hf_config", "tokenizer", "prompt"],
    "container": BASE,
    "sampling": BASE,
    "timeline": [*BASE, "container"],
    "decoding": [*BASE, "container", "timeline"],
    "images": [*BASE, "container"],
    "resampling": ["backends.ort_library"],
    "video": [*BASE, "container", "timeline", "decoding", "images", "resampling", "sampling"],
    "preprocess": [*BASE, "resampling", "sampling", "video"],
    "tokenizer": BASE,
    "prompt": [*BASE, "tokenizer"],
    "positions": [*BASE, "prompt"],
    "latent": BASE,
    "kv_cache": BASE,
    "packed_cache": ["kv_cache"],
    "host_memory": [],
    "memory_plan": [*BASE, "positions", "sampling"],
    "memory_report": [*CORE, "backends.ort_library", "host_memory", "memory_plan", "request"],
    "admission": [*BASE, "host_memory", "memory", "memory_plan", "prompt", "reduction", "request"],
    "kernels": [],
    "ops": ["kernels"],
    "models": [*BASE, "ops", "latent"],
    "backends": [*BASE, "bundle", "names", "kv_cache", "positions", "processor", "memory_plan", "host_memory"],
    "backends.reference": [*BASE, "memory_plan", "kv_cache", "positions", "checkpoint", "models"],
    "backends.torch": [*BASE, "memory_plan", "bundle", "kv_cache", "positions", "models", "ops"],
    "backends.uploads": ["config", "ops"],
    "backends.greedy": [],
    "backends.device_words": [],
    "encoding": [*CORE, "answer", "backends", "generate"],
    "backends.fused_decoder": [*BASE, "models", "ops"],
    "backends.device_cache": [*BASE, "kv_cache", "ops"],
    "backends.captured": [],
    "backends.fp8": [],
    "choices": BASE,
    "generate": [*BASE, "backends.base", "choices", "kv_cache", "latent", "positions", "prompt"],
    "answer": BASE,
    "request": [*BASE, "latent", "prompt"],
    "content": ["video"],
    "reduction": [*BASE, "preprocess", "video"],
    "memory": [*CORE, "answer", "backends", "calibration", "generate", "packed_cache", "reduction", "request"],
    "saved_clip": [*CORE, "backends.base", "memory"],
    "unfinished": [],
    "watched": ["errors"],
    "lanes": [*CORE, "backends", "generate"],
    "together": [*CORE, "answer", "backends", "generate", "lanes", "memory", "request"],
    "session": [*CORE, "answer", "memory", "request", "saved_clip", "together"],
    "live": [*CORE, "answer", "backends.base", "encoding", "generate", "memory", "request", "session"],
    "seeing": [*CORE, "answer", "backends.base", "content", "encoding", "generate", "memory", "reduction"],
    "runtime": [
        *CORE,
        "admission",
        "answer",
        "backends",
        "content",
        "live",
        "memory",
        "reduction",
        "request",
        "saved_clip",
        "seeing",
        "session",
        "together",
    ],
    "export": [*BASE, "bundle", "checkpoint", "kernels", "models", "names", "ops", "positions", "prompt"],
    "export.calibrate": [*CORE, "backends.reference", "generate"],
    "export.exporter": [*BASE, "bundle", "checkpoint", "models", "prompt", "backends"],
    "export.torch_weights": ["backends.fp8", "bundle", "checkpoint"],
    "export.verify": [*CORE, "backends", "generate"],
    "train": [
        *BASE,
        "checkpoint",
        "hf_config",
        "latent",
        "models",
        "ops",
        "positions",
        "preprocess",
        "prompt",
        "video",
    ],
    "train.scenes": [],
    "train.families": [],
    "train.synthetic": BASE,
    "pretrained": [],
    "aio": [*BASE, "answer", "content", "runtime"],
    "bench": [*BASE, "answer", "content", "quantiles", "runtime"],
    "quantiles": [],
    "processor": [],
    "doctor": ["errors", "backends", "processor"],
    "cli": [
        *BASE,
        "arguments",
        "bench",
        "bundle",
        "checkpoint",
        "doctor",
        "evaluate",
        "export",
        "fresh",
        "memory_report",
        "pretrained",
        "reduction",
        "runtime",
        "train",
    ],
    "arguments": [],
    "calibration": BASE,
    "scoring": [],
    "evaluate": [*BASE, "answer", "calibration", "reduction", "scoring", "train.triplets"],
}
NEEDS_AN_ENGINE = {
    "kernels",
    "ops",
    "models",
    "train",
    "export",
    "export.calibrate",
    "export.exporter",
    "export.torch_weights",
    "export.verify",
    "backends.reference",
    "backends.torch",
    "backends.fused_decoder",
    "backends.device_cache",
    "backends.captured",
    "backends.fp8",
    "backends.uploads",
    "backends.device_words",
}
LOADS_TORCH_WHEN_ASKED_FOR_A_TENSOR = {"checkpoint"}
SAYS_ITS_VERSION = {"cli", "doctor", "export.exporter"}


def within(name: str, *parents: str) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
FILES |= {f"{d}.{p.stem}": p for d in ("kernels", "export") for p in sorted((PACKAGE / d).glob("*.py"))}


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_arrows(module: str) -> None:
    home = max((name for name in ARROWS if within(module, name)), key=len, default=None)
    assert home, f"vlrt/{module} has no row in ARROWS: say there what it may import"
    for name in sorted(imports(FILES[module])):
        top, _, target = name.partition(".")
        assert top not in ("tests", "benches", "kernels", "export"), f"{module} imports {name}"
        if top == "vlrt":
            allowed = within(target, *ARROWS[home], module.partition(".")[0])  # a folder's files may import each other
            assert allowed or (home in SAYS_ITS_VERSION and not target), f"{module} may not import vlrt.{target}"
        if home not in NEEDS_AN_ENGINE | LOADS_TORCH_WHEN_ASKED_FOR_A_TENSOR:
            assert top not in ENGINES, f"{module} imports {name}: answering needs onnxruntime alone"
