"""The closeness rule of the tests, loaded by its path: other packages may be installed under the name `tests`."""

import importlib.util
from pathlib import Path
from typing import Any

_SPEC = importlib.util.spec_from_file_location(
    "vlrt_tests_closeness", Path(__file__).parent.parent / "tests" / "closeness.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
_MODULE: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)

assert_close = _MODULE.assert_close
