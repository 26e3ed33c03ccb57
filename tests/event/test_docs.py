"""The program in docs/events.md runs as it stands and prints what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "events.md"


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_the_page_tells_what_happens(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (printed,) = re.findall(r"^```console\n\$ [^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "account.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "account.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.stdout, done.returncode) == (printed, 0), done.stderr
