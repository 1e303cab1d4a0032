"""A disk that fills at random moments of a run and of a grid: one line says so, and the same line goes on.

The disk is a tmpfs in a mount namespace of its own (`unshare -rm`), whose size is set by remounting. Where that is not
allowed, the campaign says so and runs nothing.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time

from mortal import Mortal

from .inputs import make, outcome

PAGE = 4  # KiB


def run(folder, seed, end, first=0, cases=10**9, only=None):
    """The campaign, in a namespace of its own: this module as a program, which answers in JSON."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        raise SystemExit("no mount namespace is allowed here: nothing was run")
    request = json.dumps([str(folder), seed, end - time.monotonic(), first, cases, only])
    command = ["unshare", "-rm", sys.executable, "-m", f"{__package__}.disk", request]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def inside(folder, seed, end, first, cases, only):
    single, _, grid = make(folder)
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)

    def resize(size):
        subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)

    def used():
        return int(subprocess.run(["du", "-sk", disk], capture_output=True, text=True, check=True).stdout.split()[0])

    kinds = {"run": single, "grid": grid}
    kinds = {kind: line for kind, line in kinds.items() if not only or kind in only}
    counts = {kind: {"kind": kind, "sizes": 0, "filled": 0, "wrong": 0} for kind in kinds}
    wrong, whole, number = [], {}, first
    with Mortal(folder / "log") as mortal:

        def train(line, out):
            """(status, what it said)"""
            before = mortal.log.stat().st_size
            status, _ = mortal.run(line, out)
            return status, mortal.log.read_bytes()[before:].decode(errors="replace")

        while number < first + cases and (time.monotonic() < end or number == first):
            for kind, line in kinds.items():
                out = disk / "out"
                shutil.rmtree(out, ignore_errors=True)
                if kind not in whole:
                    resize(64 << 10)
                    status, said = train([*line, "--out", out], out)
                    assert status == 0, said
                    whole[kind] = used(), outcome(out)
                    shutil.rmtree(out)
                room, expected = whole[kind]
                size = random.Random(f"{seed} {kind} {number}").randrange(PAGE, room, PAGE)
                resize(size)
                status, said = train([*line, "--out", out], out)
                why, again = None, [*line, "--out", out]
                if status:
                    counts[kind]["filled"] += 1
                    lines = [text for text in said.splitlines() if "Error" in text or text.startswith("FullDisk: ")]
                    if len(lines) != 1 or "pace" not in lines[0] or "Traceback" in said:
                        why = f"on {size} KiB it says {said[-300:]!r}"
                    elif list(out.rglob("error.json")):
                        why = f"on {size} KiB a cell is recorded as failed"
                    if kind == "run" and (out / "cell.toml").exists():
                        again = ["--resume", out, "--save-every", "4"]
                    elif kind == "run" and out.exists() and any(out.iterdir()):
                        pass  # the same line must go on
                    resize(64 << 10)
                    status, said = train(again, out)
                    if status and not why:
                        why = f"after {size} KiB, with space again: {said[-300:]!r}"
                if not why and outcome(out) != expected:
                    why = f"after {size} KiB: other bytes"
                counts[kind]["sizes"] += 1
                if why:
                    counts[kind]["wrong"] += 1
                    wrong.append(f"disk {kind} {number} (seed {seed}): {why}")
            number += 1
    return list(counts.values()), wrong


if __name__ == "__main__":
    from pathlib import Path

    where, seed, seconds, *rest = json.loads(sys.argv[1])
    print(json.dumps(inside(Path(where), seed, time.monotonic() + seconds, *rest)))
