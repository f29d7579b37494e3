"""Writing beside the training: one thread at a time, never more than one piece of work ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs one piece of work at a time in a thread of its own.

    ``run`` first waits for the piece before, so that work which comes faster than it is done holds its giver up instead of
    piling up in memory.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def run(self, work: Callable[[], None]) -> None:
        """Start ``work``; raises what the piece before raised."""
        self.wait()
        self._thread = threading.Thread(target=self._do, args=(work,), name="lightning_acc writer")
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a piece is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until nothing is under way; raises what the last piece raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # handed to whoever waits
            self._error = error
