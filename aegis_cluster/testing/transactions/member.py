"""A simulated member of a consumer group, by the rules of `client.group_session`.

What it reads goes out, what it should read comes back. It gives up at once what it is told to, even
in the middle of a transaction: the group has to refuse the positions of that one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import AegisError, MemberFenced
from aegis_cluster.ids import GROUPS_TOPIC, TopicPartition
from aegis_cluster.testing.scheduler import MS
from aegis_cluster.wire.protocol import Api

if TYPE_CHECKING:
    from aegis_cluster.testing.transactions.client import Client, Work

SESSION_TIMEOUT_MS: Final = 1_500
BEAT_US: Final = 1_000 * MS


class GroupMember:
    """Of one client; `run` is its heartbeat."""

    def __init__(self, client: Client, group: str, topic: str, name: str) -> None:
        self.group = group
        self.name = name
        self.session = ""
        self.epoch = 0
        self.held: dict[TopicPartition, int] = {}
        """What is assigned, and the number of its assignment: what was read in an earlier one is
        somebody else's by now, perhaps."""
        self._client = client
        self._sessions = 0
        self._assignments = 0
        self._topic = topic
        self._version = 0

    @property
    def home(self) -> TopicPartition:
        """Where the group's coordinator is."""
        return self._client.home_of(GROUPS_TOPIC, self.group)

    def run(self) -> Work[None]:
        """Beat for ever."""
        self._join()
        while True:
            fields = [
                self.group,
                self.name,
                self.session,
                False,
                [self._topic],
                SESSION_TIMEOUT_MS,
                "simulated",
                self._version,
                {self._topic: sorted(place.partition for place in self.held)},
            ]
            result = yield from self._client.ask(
                self.home, Api.GROUP_BEAT, fields, within_us=BEAT_US, wait_us=BEAT_US
            )
            if isinstance(result, MemberFenced):
                self._join()
            elif not isinstance(result, AegisError):
                self.epoch, self._version, assigned = result.fields
                self._hold([TopicPartition(t, n) for t, ns in assigned.items() for n in ns])
            yield from self._client.sleep(20 * MS)

    def _join(self) -> None:
        self._sessions += 1
        self.session = f"{self.name}-{self._sessions}"
        self.epoch, self._version, self.held = 0, 0, {}

    def _hold(self, places: list[TopicPartition]) -> None:
        self._assignments += 1
        self.held = {place: self.held.get(place, self._assignments) for place in places}
