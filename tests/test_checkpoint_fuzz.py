"""Damaged checkpoint directories: whatever the bytes, opening one works or raises CheckpointError."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.damage import damaged_json
from vlrt import fresh
from vlrt.checkpoint import INDEX, WEIGHTS, Checkpoint
from vlrt.errors import CheckpointError

NAMES = ["x", "latent_size", "lvr_id", "rope_scaling"]
STRANGE: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    10**17,
    10**18,
    1e300,
    "",
    "silu",
    "\ud800",
    [],
    {},
    [1, [2]],
    {"a": {"b": 0}},
    "\x00/../x",
]
DEEP = b"[" * 100_000
SMALL = {"decoder.num_layers": 1, "vision.depth": 2, "decoder.hidden_size": 32, "decoder.head_dim": 32}
SMALL |= {"decoder.num_heads": 1, "decoder.num_kv_heads": 1, "vision.out_hidden_size": 32, "vision.hidden_size": 32}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint per layout, as small as they come: the damage is to what is parsed, not to the weights."""
    home = tmp_path_factory.mktemp("originals")
    return {
        "flat": fresh.write_checkpoint(home / "flat", overrides=SMALL),
        "nested": fresh.write_checkpoint(home / "nested", overrides=SMALL, layout="nested", shard_bytes=100_000),
    }


def opens_or_says_why(path: Path) -> bool:
    try:
        opened = Checkpoint.open(path)
        for name in opened.names()[:3]:
            opened.tensor(name)
    except CheckpointError:
        return False
    return True


def damaged_bytes(data: bytes, rng: random.Random, within: int) -> bytes:
    """Return a file cut off, or with bytes of its first `within` changed."""
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(min(within, len(data)))] = rng.choice(
            [0, 1, 0x22, 0x2D, 0x30, 0x39, 0x5B, 0x7B, 0x7F, 0x80, 0xFF]
        )
    return bytes(changed)


JSON_FILES = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.mark.parametrize("layout", ["flat", "nested"])
@pytest.mark.parametrize("seed", range(40))
def test_strange_values_in_json(originals, tmp_path, layout, seed):
    """Catches a KeyError, TypeError or OverflowError from a config that somebody else wrote."""
    rng = random.Random(f"{layout}{seed}")
    path = shutil.copytree(originals[layout], tmp_path / "ck")
    names = ["config.json"] * 4 + JSON_FILES + [INDEX] * (layout == "nested")
    file = path / rng.choice(names)
    file.write_text(json.dumps(damaged_json(json.loads(file.read_text()), rng, STRANGE, NAMES)))
    opens_or_says_why(path)


@pytest.mark.parametrize("seed", range(40))
def test_broken_bytes_in_json(originals, tmp_path, seed):
    """Catches a UnicodeDecodeError or JSONDecodeError that escapes."""
    rng = random.Random(seed)
    path = shutil.copytree(originals["nested"], tmp_path / "ck")
    file = path / rng.choice([*JSON_FILES, INDEX])
    file.write_bytes(damaged_bytes(file.read_bytes(), rng, 400))
    opens_or_says_why(path)


@pytest.mark.parametrize("seed", range(60))
def test_broken_safetensors_headers(originals, tmp_path, seed):
    """Catches a crash, or a read outside the file, from a header that lies."""
    rng = random.Random(seed)
    path = shutil.copytree(originals["flat"], tmp_path / "ck")
    data = (path / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    if seed % 2:
        data = damaged_bytes(data, rng, 8 + size)
    else:
        header = json.dumps(damaged_json(json.loads(data[8 : 8 + size]), rng, STRANGE, NAMES)).encode()
        data = len(header).to_bytes(8, "little") + header + data[8 + size :]
    (path / WEIGHTS).write_bytes(data)
    opens_or_says_why(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX])
@pytest.mark.parametrize(
    "data", [b"", DEEP, b"[]", b"null", b'{"a": NaN}', b'{"a": 1e999}', b"9" * 10_000, b"\xff\xfe"]
)
def test_json_that_parsers_trip_over(originals, tmp_path, name, data):
    """Catches recursion limits, infinite numbers and digits without end."""
    path = shutil.copytree(originals["nested"], tmp_path / "ck")
    (path / name).write_bytes(data)
    assert not opens_or_says_why(path)


@pytest.mark.parametrize("size", [0, 7, 2**31, 2**63, 2**64 - 1])
def test_safetensors_sizes_that_lie(originals, tmp_path, size):
    """Catches an allocation of whatever a header asks for."""
    path = shutil.copytree(originals["flat"], tmp_path / "ck")
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(size.to_bytes(8, "little") + data[8:])
    assert not opens_or_says_why(path)


def test_the_originals_open(originals):
    """Catches a fuzz that passes because nothing opens at all."""
    assert all(opens_or_says_why(path) for path in originals.values())


def test_a_file_in_place_of_a_json_and_a_directory_in_place_of_weights(originals, tmp_path):
    """Catches IsADirectoryError."""
    path = shutil.copytree(originals["flat"], tmp_path / "ck")
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).mkdir()
    assert not opens_or_says_why(path)
    (path / "config.json").unlink()
    (path / "config.json").mkdir()
    assert not opens_or_says_why(path)
