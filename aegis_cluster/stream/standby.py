"""Copies of tasks' state that other workers hold, so that a task moves without a long restore.

The idea: a worker brings files of its own up to the changelogs of tasks that are elsewhere, again
and again. A task that comes here finds its file, and restores what is new since.

Who copies what is drawn by lot from the members of the group (rendezvous hashing), so workers agree
without a word, and a member that comes or goes moves few copies.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def copied_here(
    tasks: Iterable[str],
    owners: dict[str, str],
    members: Iterable[str],
    me: str | None,
    replicas: int,
) -> list[str]:
    """Names of the tasks that the member `me` keeps a copy of.

    owners: member by task, as far as known; the owner of a task keeps no copy of it.
    """
    everyone = sorted(set(members))
    found = []
    for task in tasks:
        others = [member for member in everyone if member != owners.get(task)]
        others.sort(key=lambda member: _lot(task, member))
        if me in others[:replicas]:
            found.append(task)
    return found


def _lot(task: str, member: str) -> bytes:
    return blake2b(f"{task} {member}".encode(), digest_size=8).digest()
