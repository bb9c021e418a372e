"""Every shape that the core's annotations promise holds at run time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_annotated_shapes_hold() -> None:
    script = Path(__file__).with_name("checked_shapes.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "shapes hold" in done.stdout
