"""`python -m benchmarks COMMAND`: hands over to the command's own module."""

import importlib
import sys

from minilora.command import exit_cleanly
from minilora.errors import InputError

COMMANDS = {
    "cell": "one cell side by side with its peers: rows/s, FLOP/s against the limit, memory, start-up, accuracy",
    "prediction": "test rows predicted, side by side with transformers and PEFT: rows/s, share of the limit",
    "operators": "each operator of kernels/ against its reference, PEFT's layer and the limit",
    "grid": "many cells in one process against the same cells one after the other through PEFT and Trainer",
    "data": "from a file of a million rows to tokens: rows/s of a core, and memory over the file's size",
    "coverage": "how often the intervals of a report hold the truth, and how often a verdict is false, simulated",
    "detection": "detectors of injected rows on the same rows, over sources and proportions: AUC, recall, FRR, FAR",
    "scan_data": "how well a scan of rows names triggers, and how often it raises a false alarm",
    "scan": "how well `evaluate.py --scan-adapter` finds and names triggers, and how often it alarms falsely",
    "explain": "what a look into a run costs, part by part, beside the passes that it needs; training with --watch",
    "explain_study": "what looks into several runs say together, and how often clean twins raise a false alarm",
    "device": "on a GPU within 500 s: each path once, small and large cells, a grid, profiles, tests",
}


def main(argv):
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m benchmarks COMMAND [--help]\n")
        for name, help in COMMANDS.items():
            print(f"  {name:<13} {help}")
        return
    if argv[0] not in COMMANDS:
        raise InputError(f"unknown command {argv[0]!r}: there are {', '.join(COMMANDS)}")
    importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    exit_cleanly(main, sys.argv[1:])
