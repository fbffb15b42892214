"""The process of one engine: `python -m benches.engines.worker ENGINE SETTINGS`, requests on stdin, replies on stdout.

The first line that it writes describes the engine, or says in `absent` why it cannot run. What libraries print goes to
stderr. Imports the module of the engine that is named, and no other.
"""

import importlib
import json
import os
import sys
import time
from typing import Any

from benches.engines.protocol import Answering, Request, peak_memory_bytes


def main() -> None:
    """Serve until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints, C++ included

    def put(values: dict[str, Any]) -> None:
        out.write(json.dumps(values) + "\n")
        out.flush()

    name, settings = sys.argv[1], json.loads(sys.argv[2])
    start = time.perf_counter()
    try:
        engine: Answering = importlib.import_module(f"benches.engines.{name}").Engine(**settings)
    except Exception as error:  # whatever an engine raises is the reason that the report gives
        put({"absent": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"})
        raise
    put({"open_seconds": time.perf_counter() - start, **engine.describe()})
    for line in sys.stdin:
        try:
            reply = engine.answer(Request(**json.loads(line)))
        except Exception as error:
            put({"error": f"{type(error).__name__}: {error}"})
            raise
        put({**reply, "peak_host_memory_bytes": peak_memory_bytes()})


if __name__ == "__main__":
    main()
