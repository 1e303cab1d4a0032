"""The command line of the campaigns, see __init__.py."""

import argparse
import datetime
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # before torch is imported


def main(argv=None):
    from . import disk, fuzz, kill

    campaigns = {"kill": kill.run, "fuzz": fuzz.run, "disk": disk.run, "hub": fuzz.run_hub}
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns", description=sys.modules[__package__].__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("campaign", choices=campaigns)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    parser.add_argument("--cases", type=int, default=10**9, help="at most so many cases of each kind")
    parser.add_argument("--only", nargs="+", help="only these kinds")
    given = parser.parse_args(argv)
    print(f"{given.campaign}: seed {given.seed}, {given.minutes:g} minutes from {datetime.date.today()}", flush=True)
    end = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory(prefix="minilora-campaign-") as folder:
        rows, wrong = campaigns[given.campaign](Path(folder), given.seed, end, given.first, given.cases, given.only)
    show(rows)
    print(*(f"wrong: {line}" for line in wrong), f"{len(wrong)} wrong", sep="\n")
    return int(bool(wrong))


def show(rows):
    """A table of dicts with the same keys."""
    for row in [dict(zip(rows[0], rows[0], strict=True)), *rows] if rows else []:
        print(*(f"{value!s:>{max(len(key), 8)}}" for key, value in row.items()))


if __name__ == "__main__":
    sys.exit(main())
