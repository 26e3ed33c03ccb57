"""A link to one listener of one shard: hello first, then requests and their replies.

The rules it protects: a request that never left is told apart from one that may have been heard
(`RequestNotSent` against `OutcomeUnknown`), and nothing that was queued for one connection is sent
on the next: a broken link is thrown away.
"""

from __future__ import annotations

import asyncio
import itertools
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.client.socket import ClientSocket
from aegis_cluster.curve import Handshakes, needs_keys
from aegis_cluster.errors import (
    AegisError,
    ConfigError,
    OutcomeUnknown,
    PeerViolation,
    Unauthorized,
    Unavailable,
    UnsupportedVersion,
)
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.protocol import (
    PROTOCOL_VERSION,
    Api,
    Hello,
    Part,
    Reply,
    check_protocol,
    decode_reply,
    encode_request,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import zmq

    from aegis_cluster.keys import LinkKeys

    Done = Callable[[Reply | AegisError], None]

HELLO_MS: Final = 5_000
_HELLO: Final = 0
"""Correlation of the hello; requests count from 1."""


class NotAccepted(Unauthorized, Unavailable):
    """The keys of the two ends do not agree, so nothing was sent; tried again until they do."""


class Link:
    """Connects by itself, again and again until closed; `ready` waits for the present attempt."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        client_id: str,
        cluster_id: str,
        keys: LinkKeys | None = None,
        insecure: bool = False,
    ) -> None:
        """keys: encrypt with them. insecure: go without them also beyond this machine."""
        self.endpoint = endpoint
        self.hello: Hello | None = None
        self.refusal: AegisError | None = None
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._me = Hello(PROTOCOL_VERSION, "client", cluster_id, 0, "", client_id, 0)
        self._numbers = itertools.count(1)
        self._pending: dict[int, Done] = {}
        self._ready = asyncio.Event()
        self._handshakes = Handshakes(endpoint, keys, who="this client")
        self._news = asyncio.Event()
        """Set while there is something to tell who waits: ready, refused, or a failed handshake."""
        self._closed = False
        self._socket: ClientSocket | None = None
        if keys is None and not insecure and needs_keys(endpoint):
            self.fail(_needs_keys(endpoint))
        else:
            self._socket = self._open()

    # ---- for callers

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set() and self.refusal is None

    async def ready(self, deadline: float) -> None:
        """Wait until the other side has greeted back.

        Raises `Unavailable` when it does not in time, or its refusal (`WrongCluster`, …);
        `NotAccepted` as soon as that is known.
        """
        if not self._ready.is_set() and self.refusal is None:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._news.wait()
            except TimeoutError:
                raise Unavailable(f"Nothing answers at {self.endpoint}.") from None
        if self.refusal is not None:
            raise self.refusal
        if not self._ready.is_set() and self._handshakes.trouble is not None:
            raise NotAccepted(self._handshakes.trouble, endpoint=self.endpoint)

    async def request(
        self, api: Api, fields: Sequence[Any], parts: Sequence[Part] = (), *, deadline: float
    ) -> Reply:
        """Send and wait for the reply.

        Raises the error that the reply carries; `Unavailable` when nothing was sent;
        `OutcomeUnknown` when the link broke or the deadline passed with no answer.
        """
        future: asyncio.Future[Reply] = self._loop.create_future()
        number = self.send(api, fields, parts, deadline=deadline, done=partial(_resolve, future))
        try:
            async with asyncio.timeout_at(deadline):
                return await future
        except TimeoutError:
            raise OutcomeUnknown(f"No answer came from {self.endpoint} in time.") from None
        finally:
            self._pending.pop(number, None)

    def send(
        self,
        api: Api,
        fields: Sequence[Any],
        parts: Sequence[Part] = (),
        *,
        deadline: float,
        done: Done,
    ) -> int:
        """Send now; `done` hears what `request` returns or raises, but for the deadline, as soon
        as it is known: without a turn of the event loop in between. Returns the request's number.

        Raises `Unavailable`: nothing was sent, and `done` is not called.
        """
        if not self.is_ready:
            raise Unavailable(f"There is no connection to {self.endpoint} now.")
        number = next(self._numbers)
        ms_left = max(0, int((deadline - self._loop.time()) * 1000))
        message = encode_request(api, fields, parts, correlation=number, ms_left=ms_left)
        if self._socket is None or not self._socket.send(message):
            raise Unavailable(f"The connection to {self.endpoint} is full or gone.")
        self._pending[number] = done
        return number

    def fail(self, refusal: AegisError) -> None:
        """The other side is gone for good: later requests are refused, those sent are unknown."""
        self.refusal = refusal
        self._fail_pending()
        self._ready.set()
        self._news.set()

    def close(self) -> None:
        self._closed = True
        if self._socket is not None:
            self._socket.close()
        self._fail_pending()

    # ---- the connection

    def _open(self) -> ClientSocket:
        return ClientSocket(
            self._context,
            self.endpoint,
            handshakes=self._handshakes,
            on_message=self._received,
            on_connected=self._connected,
            on_lost=self._lost,
            on_failed=self._failed,
        )

    def _connected(self) -> None:
        self._handshakes.succeeded()
        if not self._ready.is_set():
            self._news.clear()
        if self._socket is None:
            return
        self._socket.send(
            encode_request(Api.HELLO, self._me.to_fields(), correlation=_HELLO, ms_left=HELLO_MS)
        )

    def _lost(self) -> None:
        """The other end is gone: whoever waits must ask elsewhere, and nothing old may follow."""
        self._ready.clear()
        self._news.clear()
        self._fail_pending()
        if self._socket is not None and not self._socket.closed:
            self._socket.close()
            self._socket = self._open()

    def _failed(self, event: int) -> None:
        """A handshake failed: another one follows, with the next key, a little later."""
        if self._socket is not None:
            self._socket.close()
        self._handshakes.failed(event)
        if self._handshakes.trouble is not None:
            self._news.set()
        self._loop.call_later(self._handshakes.rest_s, self._try_again)

    def _try_again(self) -> None:
        if not self._closed:
            self._socket = self._open()

    def _fail_pending(self) -> None:
        pending, self._pending = self._pending, {}
        for done in pending.values():
            done(OutcomeUnknown(f"The connection to {self.endpoint} broke before an answer."))

    def _received(self, message: list[Part]) -> None:
        try:
            reply = decode_reply(message)
            if reply.correlation == _HELLO:
                self._greeted(reply)
                return
            refusal = error_from_reply(reply.code, reply.fields) if reply.code else None
        except PeerViolation:
            self._lost()
            return
        done = self._pending.pop(reply.correlation, None)
        if done is None:
            return
        if refusal is not None and "hello" in refusal.details:
            self._connected()  # the process behind the address was replaced without our noticing
        done(reply if refusal is None else refusal)

    def _greeted(self, reply: Reply) -> None:
        self.refusal = error_from_reply(reply.code, reply.fields) if reply.code else None
        if self.refusal is None:
            self.hello = Hello.from_fields(reply.fields)
            try:
                check_protocol(self.hello)
            except UnsupportedVersion as refusal:
                self.refusal = refusal
        self._ready.set()
        self._news.set()


def _resolve(future: asyncio.Future[Reply], outcome: Reply | AegisError) -> None:
    if future.done():
        return  # whoever waited was cancelled
    if isinstance(outcome, AegisError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _needs_keys(endpoint: str) -> ConfigError:
    return ConfigError(
        f"{endpoint} is not on this machine, and this client has no keys. Make some with `aegis"
        " keys new` and name them in `[streaming.security]` of aegis.toml (`key`, `servers`), with"
        " --client-key and --server-keys, or with `keys=`; or say `insecure = true` there, if"
        " everybody on the network may read and change what is sent.",
        endpoint=endpoint,
    )
