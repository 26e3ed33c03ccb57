"""Client processes as a run sees them: started, killed, told to stop and to finish."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

from chaos.processes.cluster import environment

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

OUTPUT_SHOWN: Final = 1_500
"""Characters of what a client said before it died."""


class ClientProcess:
    """One group of clients. After a kill, its next process is a client that nobody knew before."""

    def __init__(self, party: str, settings: Path, options: Mapping[str, Any], seed: int) -> None:
        self.party = party
        self.errors: list[str] = []
        self._settings = settings
        self._options = options
        self._seed = seed
        self._generation = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def _output(self) -> Path:
        return self._settings.parent / f"{self.party}.{self._generation}.out"

    def start(self) -> None:
        """Start it if it does not run."""
        if self._process is not None:
            return
        self._generation += 1
        options = {
            **self._options,
            "party": self.party,
            "name": f"{self.party[-1]}{self._generation}",
            "seed": self._seed + self._generation,
            "parent": os.getpid(),
        }
        with self._output.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "chaos.processes.client", json.dumps(options)],
                env=environment(self._settings),
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._check()
            self._process.kill()
            self._end()

    def pause(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def say(self, line: str) -> None:
        """One line to its standard input; nothing to one that has died."""
        process = self._process
        if process is not None and process.stdin is not None and process.poll() is None:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()

    def is_writing(self) -> bool:
        """Whether a write of its was acknowledged."""
        self._check()
        return self._process is None or b"writing" in self._output.read_bytes()

    def has_stopped(self) -> bool:
        """Whether all of its writes have an outcome; so it is with one that has died."""
        self._check()
        return self._process is None or b"stopped" in self._output.read_bytes()

    def has_ended(self) -> bool:
        """Whether its process has ended, by itself or otherwise."""
        self._check()
        return self._process is None

    def _signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _check(self) -> None:
        """Notice an end, and write down one that nobody asked for."""
        process = self._process
        code = None if process is None else process.poll()
        if code is None:
            return
        if code != 0:
            said = self._output.read_text(errors="replace")[-OUTPUT_SHOWN:]
            self.errors.append(f"{self.party} ended with code {code}: {said}")
        self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
