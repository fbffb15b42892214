"""Files that are mapped into memory, watched for changes: a file cut short under a mapping ends the process.

A file that is removed or replaced is no concern: what was mapped stays. Knows files, not what is in them.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from vlrt.errors import BundleError


class Watched:
    """Files as they were when this was made.

    Args:
        paths: of files that are there.

    Raises:
        BundleError: one of them cannot be opened.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._open: list[tuple[Path, int, tuple[int, int]]] = []
        for path in paths:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise BundleError(f"{path} cannot be read: {error.strerror}") from error
            self._open.append((path, descriptor, _state(descriptor)))

    def check(self) -> None:
        """Return where no file was written to.

        Raises:
            BundleError: one was.
        """
        for path, descriptor, state in self._open:
            if _state(descriptor) != state:
                raise BundleError(
                    f"{path} was changed while the bundle was open; open it again, and export to a path in use rather "
                    "than copying over it"
                )

    def __del__(self) -> None:
        """Close the files."""
        for _, descriptor, _ in self._open:
            os.close(descriptor)


def _state(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
