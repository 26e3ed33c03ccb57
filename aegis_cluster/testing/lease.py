"""A lease that one client at a time should hold, given by a service that is sometimes wrong.

The idea (etcd's locks under Jepsen; DESIGN: whoever acts under a lease is fenced by the log): each
grant carries a *token*, higher than all before it. Holders write with one producer id and an epoch
made of the token, so the log refuses older ones once it has a batch of a newer one. The service
hands the lease on while the old holder may still believe in it, and does not always say so.

The rule it protects: `checkers.lease_fenced`: behind the first batch of a newer holder stands none
of an older one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import AegisError, ProducerFenced
from aegis_cluster.testing.scheduler import MS
from aegis_cluster.testing.sessions import Producer

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from aegis_cluster.client.partition_queue import PendingBatch
    from aegis_cluster.testing.scheduler import Scheduler
    from aegis_cluster.wire.protocol import Reply

EPOCHS_PER_TOKEN: Final = 1_000
"""A producer raises its epoch by itself after a failure; it must not reach the next token's."""
TOKENS_MAX: Final = 30
"""Epochs are 16 bits wide."""


class Holder(Producer):
    """A producer that writes under a lease; it ends when the log tells it that it is fenced."""

    def __init__(self, *, lease: LeaseService, token: int, **rest: Any) -> None:
        self._lease = lease
        self._token = token
        super().__init__(**rest)
        self._history.tokens[self.number] = token

    def _get_id(self) -> None:
        if self._lease.producer_id is None:
            super()._get_id()
        else:
            self._use_id(self._lease.producer_id)

    def _got_id(self, result: Reply | AegisError) -> None:
        if not isinstance(result, AegisError) and self._lease.producer_id is None:
            self._lease.producer_id = result.fields[0]
        if self._lease.producer_id is None:
            super()._got_id(result)
        else:
            self._use_id(self._lease.producer_id)

    def _use_id(self, producer_id: int) -> None:
        for queue in self.queues:
            queue.epoch = self._token * EPOCHS_PER_TOKEN
        super()._use_id(producer_id)

    def _failed(self, partition: int, batch: PendingBatch, error: AegisError) -> None:
        super()._failed(partition, batch, error)
        if isinstance(error, ProducerFenced):
            self.close()


class LeaseService:
    """Gives the lease to one new holder after the other, until it is told to stop."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        rng: random.Random,
        new_holder: Callable[[LeaseService, int], Holder],
        every_us: int,
        write: Callable[[Holder], object],
    ) -> None:
        self.producer_id: int | None = None
        """Belongs to the lease; whoever holds it first asks for one."""
        self.holders: list[Holder] = []
        """All that were ever given it, newest last."""
        self._scheduler = scheduler
        self._rng = rng
        self._new_holder = new_holder
        self._every_us = every_us
        self._write = write
        self._active = True

    def hand_on(self) -> None:
        """Give the lease to somebody new; the old holder may hear of it, late or never."""
        if not self._active or len(self.holders) >= TOKENS_MAX:
            return
        if self.holders and self._rng.random() < 0.5:
            delay_us = self._rng.randrange(300 * MS)
            self._scheduler.after(delay_us, self.holders[-1].close)
        holder = self._new_holder(self, len(self.holders) + 1)
        self.holders.append(holder)
        self._work(holder)
        pause_us = int(self._rng.expovariate(1 / self._every_us)) + MS
        self._scheduler.after(pause_us, self.hand_on)

    def _work(self, holder: Holder) -> None:
        if not self._active or holder.closed:
            return
        self._write(holder)
        self._scheduler.after(self._rng.randrange(5 * MS, 100 * MS), self._work, holder)

    def stop(self) -> None:
        """Nobody writes under the lease any more."""
        self._active = False
