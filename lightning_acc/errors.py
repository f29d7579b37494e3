"""What the package raises when something given to it cannot be used.

Every message is one sentence or two: the thing, the number, and what to do next.
"""

from __future__ import annotations


class InfluenceError(Exception):
    """Base of everything this package raises on purpose; the command line prints it as one line."""


class RunError(InfluenceError):
    """A run directory cannot be read or written: missing, unfinished, damaged, or of a newer schema."""


class ImportRefused(RunError):
    """The module of a run is in a package that is not found here, or not trusted.

    Attributes:
        missing: the package that is not found; empty where it is.
        untrusted: what would have to be trusted; empty where it is.
    """

    def __init__(self, message: str, missing: str = "", untrusted: str = "") -> None:
        super().__init__(message)
        self.missing, self.untrusted = missing, untrusted


class RequestError(InfluenceError, ValueError):
    """A call asks for something that does not exist here: a method, a query, a sample id, a readout."""


class OtherRankLost(ConnectionError):
    """A process that takes the steps of a run together with this one has ended, or cannot be reached."""
