"""Golden files: bytes that were written once and must be readable for ever.

Each name carries the version of its format. A new version gets new files next to the old ones.
"""

from __future__ import annotations

from pathlib import Path

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
