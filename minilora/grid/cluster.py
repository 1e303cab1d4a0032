"""The populations of a grid on a Ray cluster, each a task of its own: on a GPU where there are any, else on CPUs.

Nodes share no file system. A worker trains in a temporary folder and returns the files of the run folders; the driver,
the process that was started with --ray, holds the population's claim meanwhile and writes them into the grid's folder.
So what `grid/folder.py` says holds here too, and other processes may be at work in that folder, drivers among them.

A node needs Ray and what minilora imports; the driver sends its own minilora along. Left out: starting a
cluster (`ray start` does), the state of a population whose worker dies (it begins again), and the temporary folder
(minilora-...) of a worker that is killed, which stays on its node.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from minilora import console, files, interrupts
from minilora.cell import Cell
from minilora.data.named import NAMED
from minilora.data.triggers import parse_all
from minilora.errors import InputError, TrainingError
from minilora.fields import marked, value_of
from minilora.grid.folder import GridFolder
from minilora.runs.text import one_line

RETRIES = 2  # of a population whose worker or node died
SPARE = 2  # populations that wait beside those at work, so that no node does
PATIENCE = 20  # seconds that a cluster has to answer
PROBE = """
import sys, ray
try:
    ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
except Exception as error:
    sys.exit(" ".join(str(error).split()))
"""


# --- the driver


@contextlib.contextmanager
def connect(address, cpus=1):
    """The `Nodes` of the Ray cluster at `address`: HOST:PORT, or auto for the one that this machine is a node of.

    `cpus` are what a population takes of a node, and its threads. Raises InputError without the package, where nothing
    answers, and for a cluster that this process cannot join.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError('--ray needs the package ray: pip install "minilora[ray]"') from error
    check_answers(address)
    # Ray would end this process at SIGTERM before the folder of the grid is named.
    with tempfile.TemporaryDirectory() as code, interrupts.kept():
        copy_code(Path(code))
        ray.init(address, runtime_env={"working_dir": code}, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield Nodes(ray, cpus)
    finally:
        ray.shutdown()


def check_answers(address):
    """Raise InputError for a cluster that cannot be joined. A process of its own tries, for Ray may do so for ever."""
    command = [sys.executable, "-c", PROBE, address]
    try:
        subprocess.run(
            command, timeout=PATIENCE, check=True, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"no Ray cluster answers at {address} within {PATIENCE} s: give HOST:PORT of its head, or auto on a "
            "machine that is a node of one that runs"
        ) from None
    except subprocess.CalledProcessError as error:
        raise InputError(
            f"cannot join the Ray cluster at {address}: {error.stderr.strip().splitlines()[-1]} (this machine must be "
            "a node of it: see ray start --address)"
        ) from None


def copy_code(folder):
    """What a worker imports of ours, from a checkout or from where it is installed."""
    [kernels] = importlib.import_module("minilora.kernels").__path__
    ignore = shutil.ignore_patterns("__pycache__", "kernels")  # of a checkout: it points beside the package
    shutil.copytree(Path(__file__).parents[1], folder / "minilora", ignore=ignore)
    shutil.copytree(kernels, folder / "minilora" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))


def local_files(cells):
    """{path: field} of the files and folders of this machine that cells read, and that every node must have too."""
    found = {}
    for cell in cells:
        named = [(value_of(cell, name), name) for name in marked(Cell, "path")]
        sources = [part.name for source, _ in parse_all(cell.inject.sources) for part, _ in source.parts]
        sources += cell.mitigate.suspects
        named += [(name.removeprefix("file:"), "inject") for name in sources if name.startswith("file:")]
        found |= {path: name for path, name in named if path and path not in NAMED and exists(path)}
    return found


def exists(path):
    return os.path.exists(os.path.expanduser(path))


def first_line(error):
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class Nodes:
    """A Ray cluster that this process has joined, used instead of this machine by `train_grid`."""

    def __init__(self, ray, cpus):
        self.ray, self.cpus = ray, cpus

    def gpus(self, entries):
        """How many GPUs a task with these entries takes: one, unless the cluster has none or they are for the CPU."""
        return int(any(entry.cell.device != "cpu" for entry in entries) and "GPU" in self.ray.cluster_resources())

    def room(self, gpus):
        """How many populations the nodes that are alive can train at once."""
        alive = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        wanted = {"CPU": self.cpus} | ({"GPU": gpus} if gpus else {})
        return sum(min(int(node.get(kind, 0) // count) for kind, count in wanted.items()) for node in alive)

    def submit(self, work, entries, *arguments):
        """Start `work(entries, ...)` on a worker, and return Ray's reference to its result."""
        # A worker that had a GPU ends with its task, which is Ray's default: so the GPU's memory is free again.
        task = self.ray.remote(num_cpus=self.cpus, num_gpus=self.gpus(entries), max_retries=RETRIES)(work)
        paths = local_files(entry.cell for entry in entries)
        return task.remote(entries, *arguments, self.cpus, os.getcwd(), paths)

    def result(self, reference):
        """What a task returned. Raises TrainingError where its worker died each time, else what the task raised."""
        failures = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except failures.RayTaskError as error:
            raise error.cause from error
        except (failures.WorkerCrashedError, failures.NodeDiedError, failures.OutOfMemoryError,
                failures.ObjectLostError) as error:  # fmt: skip
            raise TrainingError(
                f"its worker died in each of {1 + RETRIES} attempts, as for want of memory: {first_line(error)}"
            ) from error
        except failures.RayError as error:
            raise InputError(f"the Ray cluster failed: {first_line(error)}; fix it and start again") from error

    def settle(self, entries, size, settings):
        """As `plan.settle`, measured on a worker."""
        from minilora.grid import plan

        return plan.settle(entries, size, settings) if size else self.result(self.submit(settle, entries))

    def train(self, folder, chunks, progress):
        """Train what is left of the populations `chunks`, as many at once as there is room for and `SPARE` more.

        Raises InputError where no node is large enough, and for a file that a node lacks.
        """
        for gpus in {self.gpus(chunk) for chunk in chunks if folder.left(chunk)}:
            if not self.room(gpus):
                wanted = f"{self.cpus} CPUs" + " and a GPU" * gpus
                raise InputError(f"no node of the Ray cluster has {wanted}: lower --ray-cpus, or start such a node")
        working = {}  # reference: (entries, their claim)
        try:
            for chunk in chunks:
                while len(working) >= self.room(self.gpus(chunk)) + SPARE:
                    self.gather(folder, working, progress)
                claim = contextlib.ExitStack()
                if claim.enter_context(folder.claim(chunk)):
                    left = folder.left(chunk)
                    working[self.submit(train, left, str(folder.path))] = left, claim
            while working:
                self.gather(folder, working, progress)
        finally:
            for _, claim in working.values():
                claim.close()

    def gather(self, folder, working, progress):
        """Wait for one of the populations that are `working`, and write what it left into the folder."""
        [reference], _ = self.ray.wait(list(working))
        entries, claim = working.pop(reference)
        with claim:
            try:
                for entry, found in zip(entries, self.result(reference), strict=True):
                    write(folder.run_path(entry), found)
            except TrainingError as error:
                for entry in entries:
                    folder.fail(entry, error)
            for entry in entries:
                results, error = folder.read(entry)
                progress.advance(entry.name, one_line(results) if results else f"failed: {error}")


def write(path, found):
    """Make the run folder at `path` from {file: bytes}: all of it or nothing. It replaces an interrupted one."""
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a driver that was killed
    try:
        for name, content in found.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(part / name) as temporary:
                temporary.write_bytes(content)
        (path / "cell.toml").unlink(missing_ok=True)  # so that, killed on the next line, it has not begun
        shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


# --- a worker


def settle(entries, cpus, home, paths):
    """`plan.settle` on this node."""
    with at_work(cpus, home, paths):
        from minilora.grid import plan

        return plan.settle(entries, None, settings())


def train(entries, path, cpus, home, paths):
    """Train a population, of the grid's folder at `path` on the driver; returns {file: bytes} of each run folder."""
    with at_work(cpus, home, paths), tempfile.TemporaryDirectory(prefix="minilora-") as scratch:
        from minilora.grid.run import train_chunk

        folder = GridFolder(scratch, None)
        with console.Cells(len(entries), 0) as progress:
            train_chunk(folder, entries, settings(), progress)
        return [read(folder.run_path(entry), scratch, path) for entry in entries]


@contextlib.contextmanager
def at_work(cpus, home, paths):
    """Make this worker as the driver is: its threads, and relative paths where there is such a folder."""
    with contextlib.suppress(OSError):
        os.chdir(home)
    try:
        import torch

        torch.set_num_threads(cpus)
        for path, name in paths.items():
            if not exists(path):
                raise InputError(f"there is no {path}, which cells have as {name}: copy it to that path on every node")
        yield
    except ImportError as error:
        raise InputError(f"node {here()}: {error}: install there what minilora needs") from error
    except InputError as error:
        raise InputError(f"node {here()}: {error}") from error


def here():
    import ray

    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"


@functools.cache
def settings():
    """What this worker keeps from task to task: tokenizers, and one base."""
    from minilora.runs.bases import Settings

    return Settings()


def read(folder, scratch, path):
    """{file: bytes} of a run folder; an error that names the worker's folder `scratch` names the driver's `path`."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    if "error.json" in found:
        found["error.json"] = found["error.json"].replace(scratch.encode(), path.encode())
    return found
