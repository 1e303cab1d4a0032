"""train.py in children of one process, which has imported all of it once; each may be killed at a moment of its own.

A moment is a step of training, or something that is done to a file in a folder: they are counted and not timed, so that
a kill meets the same state on a fast machine and on a slow one.
"""

import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


class Mortal:
    """A context in which `run` runs train.py; what that prints is in the file `log`."""

    def __init__(self, log):
        self.log = log

    def __enter__(self):
        # One thread, as others would not live on in a child.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=log, text=True, env=environment)  # fmt: skip
        return self

    def run(self, arguments, folder, last=0, how=signal.SIGKILL):
        """(Status of train.py with these arguments, how many moments it had in `folder`); killed at moment `last`."""
        print(json.dumps([list(map(str, arguments)), str(folder), last, how]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, self.log.read_text()
        return tuple(json.loads(answer))

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def saving_often(train_population):
    """`train_population` that saves the state every 4 steps, where it would do so less often."""

    def inner(members, base, options):
        return train_population(members, base, replace(options, save_every=min(options.save_every, 4)))

    return inner


def serve():
    import minilora
    from minilora.training import train

    for module in pkgutil.walk_packages(minilora.__path__, "minilora."):
        importlib.import_module(module.name)
    train.train_population = saving_often(train.train_population)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the children print is no answer
    for line in sys.stdin:
        print(json.dumps(in_a_child(*json.loads(line))), file=answers, flush=True)


def in_a_child(arguments, folder, last, how):
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        status = 1
        try:
            os.write(writing, str(moments(arguments, folder, last, how)).encode())
            status = 0
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        count = int(pipe.read() or last)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), count


def moments(arguments, folder, last, how):
    from minilora.scripts import train
    from minilora.training import loop

    count, update = 0, loop.update

    def moment():
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), how)

    def step(*arguments):
        moment()
        return update(*arguments)

    def watch(event, arguments):
        if event in EVENTS and str(arguments[0]).startswith(folder + os.sep):
            moment()

    loop.update = step
    sys.addaudithook(watch)
    train.main(arguments)
    return count


if __name__ == "__main__":
    serve()
