"""What an explanation is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason, or one thing worth knowing.

    code: for scripts. what: what is so, who holds what. do: what a person can do about it; may be
    empty. blocks: nothing moves, or some of it does not, as long as this is so. who: names of the
    nodes or members concerned.
    """

    code: str
    what: str
    do: str = ""
    blocks: bool = False
    who: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "what": self.what,
            "do": self.do,
            "blocks": self.blocks,
            "who": list(self.who),
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """kind and name: of what was asked about. findings: those that block first."""

    kind: str
    name: str
    findings: tuple[Finding, ...]

    @property
    def blocked(self) -> bool:
        """Something stands in the way."""
        return any(finding.blocks for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "blocked": self.blocked,
            "summary": self.findings[0].what if self.findings else "",
            "findings": [finding.as_json() for finding in self.findings],
        }


def explanation(kind: str, name: str, findings: Iterable[Finding]) -> Explanation:
    """In the order of importance."""
    return Explanation(kind, name, tuple(sorted(findings, key=lambda one: not one.blocks)))


def listed(names: Iterable[str], at_most: int = 5) -> str:
    """As "a", "a and b", "a, b and c", "a, b and 7 more"."""
    found = list(names)
    if len(found) > at_most:
        found = [*found[: at_most - 1], f"{len(found) - at_most + 1} more"]
    if len(found) < 2:
        return "".join(found)
    return f"{', '.join(found[:-1])} and {found[-1]}"


def counted(count: int, what: str, verb: str = "") -> str:
    """As "1 message waits" and "2 messages wait"."""
    if count == 1:
        return f"1 {what} {verb}s" if verb else f"1 {what}"
    return f"{count} {what}s {verb}" if verb else f"{count} {what}s"


def seconds(ms: int) -> str:
    """As people say it."""
    if ms < 10_000:
        return f"{ms / 1000:.1f} s"
    if ms < 120_000:
        return f"{ms // 1000} s"
    return f"{ms // 60_000} min" if ms < 7_200_000 else f"{ms // 3_600_000} h"
