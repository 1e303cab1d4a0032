"""Fault campaigns: hours of kills, damaged files, full disks and sick hubs, where the suite has minutes.

python -m tests.campaigns kill|fuzz|disk|hub --minutes N --seed S

Every case is drawn from the campaign's seed, the kind and the case's number, so that it can be run again: `--first`
starts at another number and `--only` takes some kinds. The end is a table, and a line for each case that went wrong.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
for folder in (TESTS.parent, TESTS, TESTS / "base"):  # as a program it has no conftest.py
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
