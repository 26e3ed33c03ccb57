"""When shards are started, started again, asked to step aside, ended and killed: the decisions.

The idea: a plain object. Time in milliseconds and what happened to processes go in; actions come
out, in order; the shell in `supervisor` does them. So every case of a crash or a stop is tested
without a process.

    RUNNING ──stop──▶ STEPPING_ASIDE ──all done, deadline, or stop again──▶ TERMINATING
                                                      all exited ◀──────────┘   │ deadline
                                              ENDED ◀──────────── KILLING ◀─────┘

The rule it protects: a shard that crashes comes back, ever more slowly while it keeps crashing;
one whose settings are wrong does not, because a loop of restarts would hide the sentence that says
what is wrong. Half a node would hide it too, so the whole node then ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from aegis_cluster import limits
from aegis_cluster.errors import invariant
from aegis_cluster.ids import ShardId
from aegis_cluster.node.exit_codes import EXIT_CONFIG, EXIT_STORAGE


class Phase(Enum):
    """Where the node is in its life; it only moves down this list."""

    RUNNING = auto()
    STEPPING_ASIDE = auto()
    TERMINATING = auto()
    KILLING = auto()
    ENDED = auto()


@dataclass(frozen=True, slots=True)
class Start:
    """Start this shard's process."""

    shard: ShardId


@dataclass(frozen=True, slots=True)
class StepAside:
    """Ask this shard to hand over what it leads; report `stepped_aside` when it answered."""

    shard: ShardId


@dataclass(frozen=True, slots=True)
class Terminate:
    """SIGTERM."""

    shard: ShardId


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL."""

    shard: ShardId


@dataclass(frozen=True, slots=True)
class Report:
    """Write this sentence into the node's log."""

    text: str


Action = Start | StepAside | Terminate | Kill | Report


@dataclass(slots=True)
class _Shard:
    running: bool = False
    started_ms: int = 0
    due_ms: int | None = 0
    """When to start it (again); None: not to be started."""
    starts: int = 0
    failures: int = 0
    """Exits in a row, each after less than a calm life; the exponent of the back-off."""
    config_failures: int = 0
    """Exits in a row with EXIT_CONFIG."""
    aside: bool = False


@dataclass(slots=True)
class Supervision:
    """Decides for all shards of one node; see the module."""

    shard_count: int
    phase: Phase = Phase.RUNNING
    failed: bool = False
    """Whether the node ended because a shard was given up."""
    _shards: dict[ShardId, _Shard] = field(init=False)
    _deadline_ms: int = 0
    """When the phase ends by itself; only after RUNNING."""
    _actions: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        invariant(self.shard_count > 0, "a node has a shard")
        self._shards = {ShardId(number): _Shard() for number in range(self.shard_count)}

    # What goes in

    def tick(self, now_ms: int) -> None:
        """Do what is due by now."""
        if self.phase is Phase.RUNNING:
            self._start_due(now_ms)
        elif self.phase is not Phase.ENDED and now_ms >= self._deadline_ms:
            self._next_phase(now_ms)

    def exited(self, shard: ShardId, code: int, now_ms: int) -> None:
        """The process of this shard has ended; a negative code is a signal's number."""
        state = self._shards[shard]
        invariant(state.running, "a process ends once", shard=shard)
        state.running = False
        if self.phase is Phase.RUNNING:
            self._crashed(shard, state, code, now_ms)
        else:
            self._finish_step(now_ms)

    def stop(self, now_ms: int) -> None:
        """End the node in order; asked again, without waiting for leaders to hand over."""
        if self.phase is Phase.RUNNING:
            self._report("stopping: leaders hand over first")
            self.phase = Phase.STEPPING_ASIDE
            self._deadline_ms = now_ms + limits.STEP_ASIDE_MS
            self._actions += [StepAside(shard) for shard in self._running()]
            self._finish_step(now_ms)
        elif self.phase is Phase.STEPPING_ASIDE:
            self._next_phase(now_ms)

    def stepped_aside(self, shard: ShardId, now_ms: int) -> None:
        """This shard has handed over what it could, or could not be asked."""
        self._shards[shard].aside = True
        if self.phase is Phase.STEPPING_ASIDE:
            self._finish_step(now_ms)

    # What comes out

    def take_actions(self) -> list[Action]:
        """What the shell is to do now, in this order; each is handed out once."""
        taken, self._actions = self._actions, []
        return taken

    def due_in_ms(self, now_ms: int) -> int | None:
        """How long nothing is to be done unless something happens; None: for ever."""
        if self.phase is Phase.RUNNING:
            due = [state.due_ms for state in self._shards.values() if state.due_ms is not None]
        else:
            due = [] if self.phase is Phase.ENDED else [self._deadline_ms]
        return max(0, min(due) - now_ms) if due else None

    # Restarts

    def _start_due(self, now_ms: int) -> None:
        for shard, state in self._shards.items():
            if state.due_ms is not None and now_ms >= state.due_ms:
                state.due_ms = None
                state.running = True
                state.started_ms = now_ms
                state.starts += 1
                self._actions.append(Start(shard))

    def _crashed(self, shard: ShardId, state: _Shard, code: int, now_ms: int) -> None:
        lived_ms = now_ms - state.started_ms
        if lived_ms >= limits.RESTART_CALM_MS:
            state.failures = state.config_failures = 0
        state.config_failures = state.config_failures + 1 if code == EXIT_CONFIG else 0
        if self._is_hopeless(state):
            self._give_up(shard, now_ms)
            return
        delay_ms = backoff_ms(state.failures)
        state.failures += 1
        state.due_ms = now_ms + delay_ms
        self._report(
            f"shard {shard} {exit_reason(code)} after {lived_ms / 1000:.1f} s; "
            f"it starts again in {delay_ms / 1000:.1f} s"
        )

    def _is_hopeless(self, state: _Shard) -> bool:
        """Wrong from the first start, or wrong again and again although it once was right.

        The second is worth some tries: a port may be held for a moment by someone else.
        """
        first = state.starts == 1 and state.config_failures == 1
        return first or state.config_failures > limits.RESTART_CONFIG_TRIES_MAX

    def _give_up(self, shard: ShardId, now_ms: int) -> None:
        self._report(f"shard {shard} {exit_reason(EXIT_CONFIG)}; the node ends")
        self.failed = True
        self.stop(now_ms)

    # Stopping

    def _running(self) -> list[ShardId]:
        return [shard for shard, state in self._shards.items() if state.running]

    def _finish_step(self, now_ms: int) -> None:
        """End early what has nothing left to wait for."""
        running = self._running()
        if not running:
            self.phase = Phase.ENDED
        elif self.phase is Phase.STEPPING_ASIDE and all(self._shards[s].aside for s in running):
            self._next_phase(now_ms)

    def _next_phase(self, now_ms: int) -> None:
        if self.phase is Phase.STEPPING_ASIDE:
            self.phase = Phase.TERMINATING
            self._deadline_ms = now_ms + limits.SHARD_STOP_MS
            self._actions += [Terminate(shard) for shard in self._running()]
        else:
            # Repeated at every deadline: SIGKILL cannot fail, only take a busy kernel a while.
            self.phase = Phase.KILLING
            self._deadline_ms = now_ms + limits.SHARD_STOP_MS
            for shard in self._running():
                self._report(f"shard {shard} does not end by itself; it is killed")
                self._actions.append(Kill(shard))

    def _report(self, text: str) -> None:
        self._actions.append(Report(text))


def backoff_ms(failures: int) -> int:
    """The wait before the next start after so many failures before this one."""
    doublings = min(failures, 16)
    return min(limits.RESTART_BACKOFF_MS_MIN << doublings, limits.RESTART_BACKOFF_MS_MAX)


def exit_reason(code: int) -> str:
    """An exit code in words."""
    if code == EXIT_CONFIG:
        return "ended because its settings are wrong or a port is taken (see the lines above)"
    if code == EXIT_STORAGE:
        return "ended because its disk failed"
    if code < 0:
        return f"was ended by signal {-code}"
    return f"ended with code {code}"
