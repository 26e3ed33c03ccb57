"""Exit codes by which a shard process tells its supervisor what to do.

The rule they protect: a supervisor never guesses from words; 0 is an end that was asked for, and
any code but these is a crash.
"""

from __future__ import annotations

from typing import Final

EXIT_CONFIG: Final = 3
"""The settings are wrong or a port is taken; waiting alone mends neither."""

EXIT_STORAGE: Final = 4
"""The disk refused a write or a sync; the files are to be recovered by a new start."""
