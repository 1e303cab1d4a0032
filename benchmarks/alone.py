"""A part of a benchmark in a process of its own, with a limit of seconds: what hangs or dies takes nothing with it.

The process is started as `python -m MODULE NAME FOLDER OUT BEGAN`. It writes its record to OUT as JSON; on the way it
may `tell` parts of it, which are kept even when it does not come to its end.
"""

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LAST_LINES = 15  # of what a failed process wrote, kept in results.json
WAIT = 0.05  # seconds between looks at a process
now = time.monotonic  # the one clock of all limits: a test puts its own here


def run(module, name, folder, threads, limit=None, told=None):
    """What the process reports, or where it fails {"error": one line, "trace": its last lines}.

    It sees one GPU at most, because Trainer would take all, and has `limit` seconds. `told` is called with each record
    that it tells, soon after.
    """
    out = Path(folder) / "record.json"
    lines = Told(out.with_suffix(".jsonl"), told)
    out.unlink(missing_ok=True)
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    environment = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": gpu, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", module, name, str(folder), str(out), repr(time.time())]
    with tempfile.TemporaryFile() as written:
        status = wait(command, environment, written, limit, lines.read)
        lines.read()
        if status == 0 and out.exists():
            return json.loads(out.read_text(encoding="utf-8"))
        written.seek(0)
        trace = written.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]
    return {"error": why(status, limit, trace), "trace": trace}


def why(status, limit, trace):
    if status is None:
        return f"not done in {limit:.0f} s"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return trace[-1] if trace else f"exit status {status}"


def wait(command, environment, written, limit=None, look=lambda: None, out=subprocess.DEVNULL):
    """The exit status of `command`, run from the clone, or None after `limit` seconds.

    Its standard error goes to the file `written`, its output to `out`. Its whole process group ends with it, compilers
    and data loaders included.
    """
    clone = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]
    environment = os.environ | environment | {"PYTHONPATH": os.pathsep.join(filter(None, clone))}
    stop = None if limit is None else now() + limit
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=out,
                               stderr=written, start_new_session=True)  # fmt: skip
    try:
        while process.poll() is None:
            look()
            if stop is not None and now() > stop:
                process.send_signal(signal.SIGUSR1)  # see `begin`: it writes where it is
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                return None
            time.sleep(WAIT)
        return process.returncode
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Told:
    """The records that a process tells, from the file that `tell` writes."""

    def __init__(self, path, told):
        self.path, self.told, self.at = path, told, 0
        path.unlink(missing_ok=True)

    def read(self):
        if self.told is None or not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self.at)
            for line in file:
                if line.endswith(b"\n"):  # else it is being written
                    self.at += len(line)
                    self.told(json.loads(line))


# --- in the process


def begin():
    """Let the process write where it is to standard error when its time is up, and end when its parent is gone."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()


def end_with_parent(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def tell(out, record):
    """Report a part of the record that will be written to `out`."""
    with open(Path(out).with_suffix(".jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
