"""Whose turn it is: a lock that goes from one person's work to the next one's in slices of time."""

import threading
import time
from collections.abc import Hashable
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType

SLICE_S = 0.25  # how long work goes on before it gives way to somebody who waits
POLL_S = 0.2  # how often somebody who waits looks up
_REMEMBERED_PARTIES = 1000

# On whose behalf a thread works. Turns go round among parties, however many threads each has; without one, a thread is its own.
party: ContextVar[Hashable] = ContextVar("party")


@dataclass(eq=False)
class _Ticket:
    party: Hashable
    called: threading.Event = field(default_factory=threading.Event)


class FairLock:
    """A lock that is handed to whoever of those waiting has had no turn for the longest time."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._is_held = False
        self._waiting: list[_Ticket] = []
        self._last_turns: dict[Hashable, int] = {}  # party -> number of its last turn, oldest first
        self._num_turns = 0

    def acquire(self, timeout: float | None = None) -> bool:
        """Whether the lock could be taken within `timeout` seconds; None waits for as long as it takes."""
        ticket = _Ticket(party.get(threading.get_ident()))
        with self._mutex:
            if not self._is_held:
                self._hand_to(ticket)
                return True
            self._waiting.append(ticket)
        if ticket.called.wait(timeout):
            return True
        with self._mutex:
            if ticket.called.is_set():  # it was handed over between the end of the wait and here
                return True
            self._waiting.remove(ticket)
            return False

    def release(self) -> None:
        """Hands the lock on."""
        with self._mutex:
            self._is_held = False
            if self._waiting:
                ticket = min(self._waiting, key=lambda ticket: self._last_turns.get(ticket.party, -1))
                self._waiting.remove(ticket)
                self._hand_to(ticket)

    def locked(self) -> bool:
        return self._is_held

    @property
    def num_parties(self) -> int:
        """How many parties have the lock or wait for it."""
        with self._mutex:
            holder = list(self._last_turns)[-1:] if self._is_held else []
            return len({*holder, *(ticket.party for ticket in self._waiting)})

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)

    def __enter__(self) -> "FairLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _hand_to(self, ticket: _Ticket) -> None:
        self._is_held = True
        self._num_turns += 1
        self._last_turns.pop(ticket.party, None)
        self._last_turns[ticket.party] = self._num_turns
        if len(self._last_turns) > _REMEMBERED_PARTIES:
            del self._last_turns[next(iter(self._last_turns))]
        ticket.called.set()


class Turn:
    """The turns of one piece of work, which asks before every step of it; leaving the block gives the lock back."""

    def __init__(self, lock: FairLock) -> None:
        self._lock = lock
        self._is_mine = False
        self._since = 0.0

    def __enter__(self) -> "Turn":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._give_back()

    def take(self) -> bool:
        """Whether the next step may be done; False after `POLL_S` seconds in vain, for whoever wants to give up or ask again.

        It may while the slice lasts or nobody else waits; otherwise the others come first.
        """
        if self._is_mine and self._lock.is_wanted and time.monotonic() - self._since >= SLICE_S:
            self._give_back()
        if not self._is_mine:
            self._is_mine = self._lock.acquire(POLL_S)
            self._since = time.monotonic()
        return self._is_mine

    def _give_back(self) -> None:
        if self._is_mine:
            self._is_mine = False
            self._lock.release()
