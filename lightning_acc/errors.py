"""What the package raises when something given to it cannot be used.

Every message is one sentence or two: the thing, the number, and what to do next.
"""

from __future__ import annotations


class InfluenceError(Exception):
    """Base of everything this package raises on purpose; the command line prints it as one line."""


class RunError(InfluenceError):
    """A run directory cannot be read or written: missing, unfinished, damaged, or of a newer schema."""


class RequestError(InfluenceError, ValueError):
    """A call asks for something that does not exist here: a method, a query, a sample id, a readout."""
