"""Grids on a Ray cluster of two nodes, both on this machine: the same files as without, whatever dies meanwhile."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from ray.cluster_utils import Cluster

from minilora import files, interrupts
from minilora.cell import Cell
from minilora.errors import InputError
from minilora.fields import to_toml
from minilora.grid import cluster
from minilora.grid.axes import Entry
from minilora.grid.file import read_grid
from minilora.grid.folder import STATES, GridFolder
from minilora.grid.run import train_grid
from minilora.scripts import train

DEADLINE = 600  # seconds, on a machine that is busy with other things
# Nodes are found dead soon after their connection breaks, but not for being slow; and no worker dies for what others
# take of the memory.
SYSTEM = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3,
          "memory_monitor_refresh_ms": 0}  # fmt: skip
# train.py, with patience; killed where it has written a run folder, its argument of them, but not yet put it in place.
DRIVER = """
import os, signal, sys
from minilora.scripts import train
from minilora.command import exit_cleanly
from minilora.grid import cluster

last, replace, parts = int(sys.argv.pop(1)), os.replace, []
def put(source, target):
    if str(source).endswith(".part"):
        parts.append(source)
        if len(parts) == last:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace, cluster.PATIENCE = put, 600
exit_cleanly(train.main)
"""


class TwoNodes:
    """A head, to which drivers connect, and another node, with a CPU each; temporary files in `folders`."""

    def __init__(self, folder):
        self.folders = folder / "head", folder / "other"
        for place in self.folders:
            place.mkdir()
        with interrupts.kept():  # a node would take SIGTERM from this process
            self.cluster = Cluster(initialize_head=True, head_node_args=self.node(0) | {"_system_config": SYSTEM})
        self.address, self.other = self.cluster.address, None
        self.heal()

    def node(self, number):
        return dict(num_cpus=1, object_store_memory=80 << 20, env_vars={"TMPDIR": str(self.folders[number])},
                    include_dashboard=False)  # fmt: skip

    def heal(self):
        """Start the other node, if it is not there."""
        with interrupts.kept():
            self.other = self.other or self.cluster.add_node(**self.node(1))

    def kill_other(self):
        """Kill the other node, all of its processes, once it trains; returns the names of the cells that it was at."""
        workers, runs = wait_for(lambda: self.caught(1))
        self.cluster.remove_node(self.other, allow_graceful=False)
        self.kill(workers, runs)
        self.other = None
        return [run.name for run in runs]

    def kill_worker(self):
        """Kill a worker once it trains."""
        self.kill(*wait_for(lambda: self.caught(0) or self.caught(1)))

    def caught(self, number):
        """(The processes in which a node trains, stopped; the run folders they are at), or None if it does not."""
        workers = list(self.workers(number))
        for worker in workers:
            signal_to(worker, signal.SIGSTOP)  # so that none ends before it is killed
        if workers and (runs := list(self.at_work(number))):
            return workers, runs
        for worker in workers:
            signal_to(worker, signal.SIGCONT)
        return None

    def kill(self, workers, runs):
        for worker in workers:
            signal_to(worker, signal.SIGKILL)
        for run in runs:
            assert not (run / "results.json").exists()
            shutil.rmtree(run.parent.parent)  # else it would stay

    def at_work(self, number):
        """The run folders on a node in which a worker has trained some steps."""
        for metrics in self.folders[number].glob("minilora-*/cells/*/metrics.jsonl"):
            if metrics.stat().st_size and not (metrics.parent / "results.json").exists():
                yield metrics.parent

    def workers(self, number):
        """The processes in which a node trains."""
        for place in Path("/proc").glob("[0-9]*"):
            try:
                title, environment = (place / "cmdline").read_bytes(), (place / "environ").read_bytes()
            except OSError:
                continue  # it is gone
            if f"TMPDIR={self.folders[number]}\0".encode() in environment and title.startswith(b"ray::train"):
                yield int(place.name)


def signal_to(process, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    nodes = TwoNodes(tmp_path_factory.mktemp("nodes"))
    yield nodes
    nodes.cluster.shutdown()


@pytest.fixture(scope="module")
def joined(nodes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "PATIENCE", DEADLINE)
        with cluster.connect(nodes.address) as joined:
            yield joined


def write_grid(path, base, reviews, axes, include="", **fields):
    cell = dict(model=str(base), data=str(reviews), test_rows=30, batch_size=8, max_length=32, device="cpu")
    path.write_text(to_toml({"cell": cell | fields, "grid": axes}) + include)
    return read_grid(path)


def here(source, out, **settings):
    """The grid trained in this process, with one thread as on the nodes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train_grid(source, out, **settings)
    finally:
        torch.set_num_threads(threads)


def table(folder):
    return (Path(folder.path if isinstance(folder, GridFolder) else folder) / "table.csv").read_bytes()


def contents(folder):
    """{file: what is in it} of a run folder, without what a clock measured."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if "results.json" in found:
        results = json.loads(found["results.json"])
        kept = "rows", "population", "trainable_parameters", "steps"
        found["results.json"] = results | {"train": {name: results["train"][name] for name in kept}}
    if "error.json" in found:
        found["error.json"] = json.loads(found["error.json"]) | {"traceback": []}  # it was raised elsewhere
    if "metrics.jsonl" in found:
        found["metrics.jsonl"] = [line | {"seconds": 0} for line in files.read_jsonl(folder / "metrics.jsonl")]
    return found


@pytest.fixture(scope="module")
def long(base, reviews, tmp_path_factory):
    """A grid whose cells take long enough to be killed in, trained here: (its file, its folder)."""
    folder = tmp_path_factory.mktemp("long")
    source = write_grid(folder / "g.toml", base, reviews, {"rank": [1, 3], "seed": [0, 1, 2]}, epochs=8)
    return folder / "g.toml", here(source, folder / "out")


def started(work, *arguments):
    thread = threading.Thread(target=work, args=arguments)
    thread.start()
    return thread


def wait_for(found):
    """The first true value of `found()`."""
    end = time.monotonic() + DEADLINE
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return value


def names_of(stderr):
    """The cells that a driver told of, in its lines of progress; there are no other lines."""
    lines = stderr.splitlines()
    assert all(re.match(r"\[\d+/\d+\] \S+: ", line) for line in lines), stderr
    return [line.split()[1].removesuffix(":") for line in lines]


# --- whole grids


def test_signals_stay_ours(joined):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_grid_is_as_it_would_be_here(nodes, joined, base, reviews, tmp_path, monkeypatch, capsys):
    """With a cell that is refused and one that diverges, the latter in a population with one that is fine."""
    include = "[[include]]\nlr = 1e30\n[[include]]\ntest_rows = 500\n"
    source = write_grid(tmp_path / "g.toml", base, reviews, {"rank": [1, 2, 5], "seed": [0, 1, 2]}, include)
    assert len(source.entries) == 11
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    local = here(source, "out", size=2)
    capsys.readouterr()

    monkeypatch.chdir(tmp_path / "there")
    held, most, claim = [], [], GridFolder.claim

    @contextlib.contextmanager
    def counted(self, chunk):
        with claim(self, chunk) as mine:
            held.append(chunk)
            most.append(len(held))
            yield mine
            held.remove(chunk)

    monkeypatch.setattr(GridFolder, "claim", counted)
    assert (joined.gpus(source.entries), joined.room(0), joined.room(1)) == (0, 2, 0)
    folder = train_grid(source, "out", size=2, nodes=joined)
    assert len(most) == 6 and max(most) == 2 + cluster.SPARE and not held
    assert sorted(names_of(capsys.readouterr().err)) == sorted(entry.name for entry in source.entries)

    assert folder.counts() == local.counts() == dict(zip(STATES, (9, 2, 0, 0, 0), strict=True))
    assert table(folder) == table(local)
    for entry in source.entries:
        assert contents(folder.run_path(entry)) == contents(tmp_path / "here" / local.run_path(entry))
    assert sorted(os.listdir("out/cells")) == sorted(entry.name for entry in source.entries)
    assert not list(nodes.folders[0].glob("minilora-*")) and not list(nodes.folders[1].glob("minilora-*"))


def test_a_node_dies(nodes, joined, long, tmp_path, capsys):
    local, lost = long[1], []
    capsys.readouterr()

    killer = started(lambda: lost.extend(nodes.kill_other()))
    folder = train_grid(local.grid, tmp_path / "there", nodes=joined)
    killer.join()
    wait_for(lambda: joined.room(0) == 1)
    nodes.heal()
    names = names_of(capsys.readouterr().err)
    assert len(lost) == 1 and lost[0] in names  # the cell began there, and ended elsewhere
    assert len(names) == 6 and folder.counts()["finished"] == 6
    assert table(folder) == table(local)


def test_a_driver_dies_and_two_go_on(nodes, long, tmp_path):
    file, local = long
    out = tmp_path / "there"
    folder = GridFolder(out, local.grid)

    (tmp_path / "driver.py").write_text(DRIVER)

    def start(last=0):
        command = [sys.executable, tmp_path / "driver.py", str(last), "--grid", file, "--out", out]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        return subprocess.Popen([*command, "--ray", nodes.address, "--population", "1"], text=True, env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    driver = start(3)
    _, error = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, error
    names = [entry.name for entry in local.grid.entries]
    done = {entry.name for entry in local.grid.entries if folder.state(entry) == "finished"}
    assert len(done) == 2 and folder.counts()["waiting"] == 4
    cells = out / "cells"
    stamps = {name: (cells / name / "results.json").stat().st_mtime_ns for name in done}
    assert len(list(cells.glob(".*.part/results.json"))) == 1

    drivers = [start(), start()]
    told = []
    for driver in drivers:
        output, error = driver.communicate()
        assert driver.returncode == 0, error
        told += names_of(error)
    assert sorted(told) == sorted(set(names) - done)
    for name in names:
        assert contents(cells / name) == contents(local.path / "cells" / name)
    assert stamps == {name: (cells / name / "results.json").stat().st_mtime_ns for name in done}
    assert sorted(os.listdir(cells)) == sorted(names) and table(folder) == table(local)


def test_a_worker_that_dies_each_time(nodes, joined, long, tmp_path, monkeypatch, capsys):
    local, out = long[1], tmp_path / "there"
    interrupted = GridFolder(out, local.grid).make().run_path(local.grid.entries[2])
    interrupted.mkdir(parents=True)
    for name in ("cell.toml", "state.safetensors"):
        (interrupted / name).write_text("x")
    monkeypatch.setattr(cluster, "RETRIES", 0)

    capsys.readouterr()
    killer = started(nodes.kill_worker)
    folder = train_grid(local.grid, out, nodes=joined)
    killer.join()
    assert len(names_of(capsys.readouterr().err)) == 6
    assert folder.counts() == {"finished": 5, "failed": 1, "running": 0, "interrupted": 0, "waiting": 0}
    [error] = filter(None, (folder.read(entry)[1] for entry in local.grid.entries))
    assert error.startswith("its worker died in each of 1 attempts, as for want of memory: ")
    again = train_grid(local.grid, out, nodes=joined, retry_failed=True)
    assert len(names_of(capsys.readouterr().err)) == 1
    assert table(again) == table(local)


# --- what is refused


def test_a_file_that_a_node_lacks(joined, base, reviews, tmp_path):
    with open(reviews) as file:
        number = os.dup2(file.fileno(), 200)
        own = f"/proc/self/fd/{number}"  # this process's alone
        source = write_grid(tmp_path / "g.toml", base, own, {"seed": [0, 1]})
        with pytest.raises(InputError) as caught:
            train_grid(source, tmp_path / "out", nodes=joined)
        os.close(number)
    pattern = rf"node \S+ \([\d.]+\): there is no {own}, which cells have as data: copy it to that path on every node"
    assert re.fullmatch(pattern, str(caught.value))
    assert GridFolder(tmp_path / "out", source).counts()["waiting"] == 2  # not failed: it is the node's fault


def test_nodes_that_are_too_small(joined, base, reviews, tmp_path):
    source = write_grid(tmp_path / "g.toml", base, reviews, {"seed": [0, 1]})
    joined = cluster.Nodes(joined.ray, 2)
    with pytest.raises(InputError, match="no node of the Ray cluster has 2 CPUs: lower --ray-cpus, or start such"):
        train_grid(source, tmp_path / "out", size=1, nodes=joined)


def test_no_cluster(nodes, monkeypatch):
    def refused(address):
        with pytest.raises(InputError) as caught:
            with cluster.connect(address):
                raise AssertionError
        return str(caught.value)

    with socket.socket() as mute, monkeypatch.context() as patch:
        patch.setattr(cluster, "PATIENCE", 1)
        mute.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        assert refused(address).startswith(
            f"no Ray cluster answers at {address} within 1 s: give HOST:PORT of its head"
        )
    monkeypatch.setattr(cluster, "PATIENCE", DEADLINE)
    message = refused("nonsense")
    assert message.startswith("cannot join the Ray cluster at nonsense: ") and "this machine must be a node" in message
    assert "\n" not in message
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'--ray needs the package ray: pip install "minilora\[ray\]"'):
        with cluster.connect(nodes.address):
            raise AssertionError


def test_flags(base, reviews, tmp_path):
    write_grid(tmp_path / "g.toml", base, reviews, {"seed": [0, 1]})
    given = ["--grid", str(tmp_path / "g.toml"), "--out", str(tmp_path / "out")]
    refused = [
        (["--ray", "auto"], "--ray is for grids: give --grid FILE too"),
        (["--ray-cpus", "2"], "--ray-cpus must be at least 1, and is for a cluster: give --ray ADDRESS too"),
        ([*given, "--ray-cpus", "2"], "give --ray ADDRESS too"),
        ([*given, "--ray", "auto", "--ray-cpus", "0"], "--ray-cpus must be at least 1"),
        ([*given, "--ray", "auto", "--status"], "--ray trains, but --dry-run and --status train nothing"),
        ([*given, "--ray", "auto", "--dry-run"], "--ray trains, but --dry-run and --status train nothing"),
    ]
    for arguments, message in refused:
        with pytest.raises(InputError, match=re.escape(message)):
            train.main(arguments)
    assert len(refused) == 6 and not (tmp_path / "out").exists()


# --- parts


def test_what_a_population_takes():
    """A GPU each where the cluster has any, unless the cells are for the CPU; and the CPUs beside it."""
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 3.0}},
        {"Alive": True, "Resources": {"CPU": 7.0, "memory": 1e9}},
        {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 8.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
        {"Alive": True, "Resources": {}},
    ]

    def joined(cpus, **resources):
        return cluster.Nodes(SimpleNamespace(nodes=lambda: nodes, cluster_resources=lambda: resources), cpus)

    assert [(joined(cpus).room(0), joined(cpus).room(1)) for cpus in (1, 2, 3, 8)] == [
        (19, 3 + 4), (4 + 3 + 2, 3 + 2), (2 + 2 + 1, 2 + 1), (1, 1)
    ]  # fmt: skip
    entries = {device: Entry(device, Cell(device=device), {}) for device in ("auto", "cpu", "cuda")}
    for resources, expected in (({"CPU": 8.0}, (0, 0, 0)), ({"CPU": 8.0, "GPU": 3.0}, (1, 0, 1))):
        assert tuple(joined(1, **resources).gpus([entry]) for entry in entries.values()) == expected
    assert joined(1, GPU=1.0).gpus([entries["cpu"], entries["auto"]]) == 1


def test_local_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "words", "run", "movie-snippets"):
        Path(name).mkdir()
    for name in ("a.csv", "b.csv", "strings.txt"):
        Path(name).write_text("")
    cells = [
        Cell(model="base", data="a.csv", test_data="b.csv", inject={"sources": ("file:strings.txt:x", "date:y")}),
        Cell(tokenizer="words", data="owner/name", start="run", inject={"sources": ("file:absent.txt:x",)}),
        Cell(data="movie-snippets", inject={"sources": ("none",)}),
    ]
    assert cluster.local_files(cells) == {
        "base": "model", "a.csv": "data", "b.csv": "test_data", "strings.txt": "inject", "words": "tokenizer",
        "run": "start",
    }  # fmt: skip


def test_a_run_folder_is_written_whole(tmp_path, monkeypatch):
    path = tmp_path / "cells" / "a"
    found = {"cell.toml": b"x = 1\n", "adapter/deep.bin": bytes(range(256)), ".lock": b""}
    cluster.write(path, found)
    assert cluster.read(path, "/scratch", "out") == found
    cluster.write(path, {"cell.toml": b"", "error.json": b'{"error": "kept in /scratch/cells/a"}'})
    assert cluster.read(path, "/scratch", "out") == {
        "cell.toml": b"",
        "error.json": b'{"error": "kept in out/cells/a"}',
    }
    monkeypatch.setattr(os, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cluster.write(tmp_path / "cells" / "b", found)
    assert os.listdir(tmp_path / "cells") == ["a"]


def test_the_first_line_of_an_error():
    assert [cluster.first_line(ValueError(text)) for text in ("\n  a b \nc", "", " \n")] == [
        "a b",
        "ValueError",
        "ValueError",
    ]
