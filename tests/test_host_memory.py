"""Memory of the machine and of control groups."""

import mmap
import re
from pathlib import Path

import pytest

from vlrt import host_memory

GIB = 2**30


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def machine(root, available=16 * GIB, swap=0, groups=""):
    write(root, "proc/meminfo", f"MemTotal: 1 kB\nMemAvailable: {available // 1024} kB\nSwapFree: {swap // 1024} kB\n")
    write(root, "proc/self/cgroup", groups)


def test_without_groups_it_is_what_the_machine_has(tmp_path):
    machine(tmp_path, swap=GIB)
    assert host_memory.available_bytes(tmp_path) == 17 * GIB


def test_the_tightest_group_counts_and_droppable_pages_are_free(tmp_path):
    machine(tmp_path, groups="0::/outer/inner\n")
    for name, limit in (("outer", 4 * GIB), ("outer/inner", "max")):
        write(tmp_path, f"sys/fs/cgroup/{name}/memory.max", f"{limit}\n")
        write(tmp_path, f"sys/fs/cgroup/{name}/memory.current", f"{3 * GIB}\n")
        write(tmp_path, f"sys/fs/cgroup/{name}/memory.stat", f"anon 5\ninactive_file {GIB}\n")
    assert host_memory.available_bytes(tmp_path) == 2 * GIB


def test_a_group_of_version_1_that_only_its_mount_shows(tmp_path):
    machine(tmp_path, groups="9:cpu:/x\n4:memory:/not/visible/here\n0::/\n")
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{3 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/memory/memory.stat", "total_inactive_file 7\n")
    assert host_memory.available_bytes(tmp_path) == 0


def test_a_system_that_does_not_tell(tmp_path):
    assert host_memory.available_bytes(tmp_path) is None
    write(tmp_path, "proc/meminfo", "MemTotal: 1 kB\n")  # Linux before 3.14
    assert host_memory.available_bytes(tmp_path) is None


def test_giving_back_is_harmless():
    kept = bytearray(2**20)
    host_memory.give_back()
    assert not any(kept)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not tell what a mapping holds")
def test_pages_of_a_mapped_file_go_and_come_back(tmp_path):
    """Catches pages that stay, and bytes that do not come back."""
    path, content = tmp_path / "a.bin", bytes(range(256)) * 4096
    path.write_bytes(content)

    def held() -> int:
        maps = Path("/proc/self/smaps").read_text()
        return int(re.search(rf"{re.escape(str(path))}\n.*?Rss: +(\d+) kB", maps, re.DOTALL)[1])

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == content
        before = held()
        host_memory.let_go(path)
        assert (before, held()) == (1024, 0)
        assert mapped[:] == content
