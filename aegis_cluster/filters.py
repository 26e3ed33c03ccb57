"""Which messages a subscription hands out; the others are read and passed over.

The filter runs in the client, on the messages that arrive: it saves a program its own `if`, not
the way over the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aegis_cluster import arguments
from aegis_cluster.errors import Misuse

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.message import ReceivedMessage


@dataclass(frozen=True, slots=True)
class EventFilter:
    """All that is given must hold.

    keys: the message's key is one of these. key_prefix: its key is text that begins so.
    headers: it has these headers with these values. where: any function of the message.
    Raises `Misuse` for anything else.
    """

    keys: frozenset[str | bytes] | None = None
    key_prefix: str | None = None
    headers: Mapping[str, str | bytes] = field(default_factory=dict)
    where: Callable[[ReceivedMessage], bool] | None = None

    def __post_init__(self) -> None:
        if self.keys is not None:
            keys = arguments.many(self.keys, "keys", "give a set of keys; key_prefix takes one")
            object.__setattr__(self, "keys", frozenset(keys))
        if self.key_prefix is not None:
            arguments.instance(self.key_prefix, str, "key_prefix", "give text")
        hint = "give a mapping of names to str or bytes"
        arguments.instance(self.headers, Mapping, "headers", hint)
        if self.where is not None and not callable(self.where):
            raise Misuse(f"where is {self.where!r}; give a function of a message.")

    def matches(self, message: ReceivedMessage) -> bool:
        """Whether the message is handed out; raises what `where` raises."""
        if self.keys is not None and message.key not in self.keys:
            return False
        if self.key_prefix is not None:
            key = message.key
            if not isinstance(key, str) or not key.startswith(self.key_prefix):
                return False
        if any(message.headers.get(name) != value for name, value in self.headers.items()):
            return False
        return self.where is None or bool(self.where(message))
