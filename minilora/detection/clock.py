"""A budget of seconds: work is cut into parts, and no part begins after the budget has ended."""

import math
import time

PART = 64  # rows of a part


class OutOfTime(Exception):
    """The budget ended in the middle of work whose parts mean nothing by themselves."""


class Clock:
    """`seconds` from now; None: without end."""

    def __init__(self, seconds=None):
        self.seconds = math.inf if seconds is None else seconds
        self.start = time.monotonic()

    @property
    def over(self):
        return time.monotonic() - self.start > self.seconds

    def parts(self, count, size=PART):
        """Yield slices of 0 to `count` in order, until the budget ends."""
        for start in range(0, count, size):
            if self.over:
                return
            yield slice(start, min(start + size, count))

    def all_parts(self, count, size=PART):
        """As `parts`. Raises OutOfTime where the budget ends before the last."""
        for start in range(0, count, size):
            if self.over:
                raise OutOfTime
            yield slice(start, min(start + size, count))
