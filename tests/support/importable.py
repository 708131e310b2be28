"""Makes `import bench` work in tests.

The repository's root is not on sys.path in tests, on purpose: it would make kernels/ a package of that name, which
belongs to another project.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make_bench_importable() -> None:
    if importlib.util.find_spec("bench") is None:
        spec = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
        assert spec is not None and spec.loader is not None
        sys.modules["bench"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["bench"])
