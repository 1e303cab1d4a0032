"""The run folder with its lock, atomic files, and how an error leaves a script."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open

from minilora import files
from minilora.cell import Cell
from minilora.command import exit_cleanly
from minilora.errors import InputError, TrainingError
from minilora.runs import record
from minilora.runs.folder import Run
from minilora.runs.record import hardware, trainable, versions

CELL = Cell(rank=3, lr=0.5)


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


RESULTS = {
    "tests": {
        "clean": {"rows": 2, "accuracy": 0.5}, "trigger": {},
        "worst_group": {"label": "é", "test": "clean", "accuracy": 0.5},
    },
    "train": {"rows": 3, "trainable_parameters": 4, "seconds": 0.5}, "injection": [], "versions": {}, "hardware": {},
}  # fmt: skip


# --- a new folder

HELD = [".lock", ".lock.json", "cell.toml"]  # a run folder that a process holds


def test_a_new_run(tmp_path):
    made = Run.plan(tmp_path / "deep" / "run", CELL)
    assert entries(tmp_path) == []  # nothing is written before `hold`
    with made.hold(CELL) as held:
        assert held is made and not made.finished and entries(made.path) == HELD
        assert made.read_cell() == Run(made.path).read_cell() == CELL
        made.state.write_bytes(b"state")
        assert made.state == made.path / "state.safetensors"
        made.finish(RESULTS)
        assert made.finished and entries(made.path) == [*HELD, "results.json"]
    assert Run(made.path).finished and Run(made.path).read_results() == RESULTS


def test_names_under_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (CELL.name, f"{CELL.name}-2", f"{CELL.name}-3"):
        planned = Run.plan(None, CELL)
        assert str(planned.path) == f"runs/{name}" and not planned.path.exists()
        with planned.hold(CELL):
            pass
    (tmp_path / "runs" / f"{CELL.name}-4").symlink_to("nowhere")
    assert Run.plan(None, CELL).path.name == f"{CELL.name}-5"


def test_existing_folders(tmp_path):
    def folder(name, *names):
        (tmp_path / name).mkdir()
        for inside in names:
            (tmp_path / name / inside).write_text("mine")
        return tmp_path / name

    for path in (folder("empty"), folder("locked", ".lock")):
        with Run.plan(path, CELL).hold(CELL):
            assert Run(path).read_cell() == CELL
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    refused = [
        (folder("finished", "cell.toml", "results.json"), "holds a finished run: see python evaluate.py"),
        (folder("unfinished", "cell.toml"), "holds an unfinished run: go on with python train.py --resume"),
        (folder("other", "thesis.tex"), "exists and is not an empty folder: choose another --out"),
        (tmp_path / "file", "exists and is not an empty folder"),
        (tmp_path / "link", "exists and is not an empty folder"),
    ]
    for path, message in refused:
        with pytest.raises(InputError, match=message):
            Run.plan(path, CELL)
        before = sorted(str(p) for p in tmp_path.rglob("*"))
        with pytest.raises(InputError):  # nor can the plan be skipped
            with Run(path).hold(CELL):
                raise AssertionError
        after = sorted(str(p) for p in tmp_path.rglob("*") if p.name != ".lock")
        assert after == [name for name in before if not name.endswith(".lock")]
    assert len(refused) == 5
    for name in ("finished/cell.toml", "finished/results.json", "unfinished/cell.toml", "other/thesis.tex"):
        assert (tmp_path / name).read_text() == "mine"


def test_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=r"cannot write to the run folder .* \(.+\): choose another --out"):
            with Run.plan(path, CELL).hold(CELL):
                raise AssertionError
    assert entries(tmp_path) == ["file"]


# --- resuming


def test_resuming(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(InputError, match=f"there is no run folder {folder}: check the path"):
        Run(folder).read_cell()
    with pytest.raises(InputError, match="cannot write to the run folder"):
        with Run(folder, resume=True).hold(CELL):
            raise AssertionError
    assert entries(tmp_path) == []
    folder.mkdir()
    with pytest.raises(InputError, match=f"{folder} has no cell.toml, so it is not a run folder"):
        Run(folder).read_cell()
    with Run(folder).hold(CELL):
        pass
    (folder / "cell.toml").write_text(CELL.to_toml() + "# a remark\n")
    with Run(folder, resume=True).hold(CELL) as resumed:
        assert (folder / "cell.toml").read_text().endswith("# a remark\n")  # not written again
        resumed.finish({})
    with pytest.raises(InputError, match="holds a finished run"):
        with Run(folder, resume=True).hold(CELL):
            raise AssertionError
    (folder / "cell.toml").write_text("rank = 'x'")
    with pytest.raises(InputError, match=f"{folder}/cell.toml: rank is 'x', but must be a whole number"):
        Run(folder).read_cell()


def test_one_process_at_a_time(tmp_path):
    script = (
        "import sys\n"
        "from minilora.cell import Cell\n"
        "from minilora.runs.folder import Run\n"
        "with Run(sys.argv[1]).hold(Cell(rank=3, lr=0.5)):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    folder = tmp_path / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(InputError, match=f"{folder} is in use by process {other.pid} for [0-9]+ s: wait"):
                with Run(folder, resume).hold(Cell()):
                    raise AssertionError
        assert entries(folder) == HELD and Run(folder).read_cell() == CELL
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert files.holder(folder / ".lock") is None and entries(folder) == HELD  # what it left says nothing
    with Run(folder, resume=True).hold(CELL):  # a killed process holds nothing
        with pytest.raises(InputError, match="in use"):
            with Run(folder, resume=True).hold(CELL):
                raise AssertionError
    with pytest.raises(KeyError):
        with Run(folder, resume=True).hold(CELL):
            raise KeyError
    with Run(folder, resume=True).hold(CELL):  # nor does one that failed
        pass


# --- metrics.jsonl


def test_metrics_go_on_after_the_saved_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    odd = {"label": "a\u2028b\x85c\né"}  # label names may hold what some take for line ends
    lines = [{"kind": "test", "step": 0} | odd, {"kind": "step", "step": 1, "loss": 0.5},
             {"kind": "step", "step": 2, "loss": 0.25}, {"kind": "test", "step": 2} | odd,
             {"kind": "step", "step": 3, "loss": 0.125}, {"kind": "error", "step": 3, "error": "x"}]  # fmt: skip
    with Run(tmp_path).hold(CELL) as first:
        first.start_metrics(0, 3)
        for line in lines:
            first.log(line["kind"], {name: value for name, value in line.items() if name != "kind"})
            assert json.loads(path.read_text().split("\n")[-2]) == line  # at once
    whole = path.read_text()
    with open(path, "a") as file:
        file.write('{"kind": "step", "step": 4, "lo')  # killed here
    for _ in range(2):  # twice, since the first time writes the file anew
        with Run(tmp_path, resume=True).hold(CELL) as second:
            second.start_metrics(2, 3)
            assert files.read_jsonl(path) == lines[:4]
            second.log("step", {"step": 3, "loss": 0.0625})
        assert files.read_jsonl(path)[4:] == [{"kind": "step", "step": 3, "loss": 0.0625}]
        assert path.read_text().endswith("}\n")
    for step, steps, kept in ((3, 3, 5), (2, 2, 3)):  # the last tests run again
        path.write_text(whole)
        with Run(tmp_path, resume=True).hold(CELL) as ended:
            ended.start_metrics(step, steps)
        assert files.read_jsonl(path) == lines[:kept]
    path.write_text(whole)
    with Run(tmp_path, resume=True).hold(CELL) as third:
        third.start_metrics(0, 3)  # as do the first
    assert path.read_text() == "" and entries(tmp_path) == [".lock", "cell.toml", "metrics.jsonl"]
    with pytest.raises(ValueError, match="closed file"):
        third.log("step", {"step": 1})


def test_damaged_files_of_a_run_are_named(tmp_path):
    with Run(tmp_path).hold(CELL):
        pass
    lines = ["1", "{}", "null", '{"kind": "step", "step": "x"}', '{"step": 1}', '{"kind": "step", "step": 1}\n{"st',
             "[" * 9999]  # fmt: skip
    for text in lines:
        (tmp_path / "metrics.jsonl").write_text(text + "\n")
        with Run(tmp_path, resume=True).hold(CELL) as run, pytest.raises(InputError, match="metrics.jsonl: .*; delete"):
            run.start_metrics(1, 2)
        assert (tmp_path / "metrics.jsonl").read_text() == text + "\n"
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n")
    with Run(tmp_path, resume=True).hold(CELL) as run, pytest.raises(InputError, match="metrics.jsonl: .*; delete"):
        run.start_metrics(1, 2)
    whole, cuts = CELL.to_toml(), 0
    for end in range(len(whole.rstrip().rpartition("\n")[0]) + 1):
        (tmp_path / "cell.toml").write_text(whole[:end])
        with pytest.raises(InputError, match="cell.toml"):
            Run(tmp_path).read_cell()
        cuts += 1
    assert cuts > 500 and len(lines) == 7
    (tmp_path / "cell.toml").write_text(whole)
    assert Run(tmp_path).read_cell() == CELL


def test_what_a_kill_leaves_is_cleaned(tmp_path):
    """Unfinished files, in a folder whose cell.toml was never finished and in one to resume; nobody else's."""
    mark = "0123456789abcdef" * 2
    for name in (f".cell.toml.{mark}", ".lock", ".lock.json"):
        (tmp_path / name).write_text("half")
    with Run.plan(tmp_path, CELL).hold(CELL):
        assert entries(tmp_path) == HELD
    (tmp_path / "adapter").mkdir()
    for name in (f".state.safetensors.{mark}", f"adapter/.x.json.{mark}", f".mine.{mark[1:]}", f"mine.{mark}"):
        (tmp_path / name).write_text("half")
    with Run(tmp_path, resume=True).hold(CELL):
        assert entries(tmp_path) == [".lock", ".lock.json", f".mine.{mark[1:]}", "adapter", "cell.toml", f"mine.{mark}"]
        assert entries(tmp_path / "adapter") == []


def test_a_run_knows_its_population(tmp_path):
    runs = [Run(tmp_path / name) for name in "abc"]
    paths = [run.path for run in runs]
    for run in runs:
        run.path.mkdir()
        assert run.population() == [run.path]
        run.write_population(paths)
        assert run.population() == paths
    (tmp_path / "moved").mkdir()
    for path in paths:
        path.rename(tmp_path / "moved" / path.name)
    assert Run(tmp_path / "moved" / "b").population() == [tmp_path / "moved" / name for name in "abc"]
    (tmp_path / "moved" / "b" / "population.json").write_text('{"runs": [1]}')
    with pytest.raises(InputError, match="population.json: .*; delete it"):
        Run(tmp_path / "moved" / "b").population()
    Run(tmp_path / "moved" / "b").write_population(paths[:1])
    assert entries(tmp_path / "moved" / "b") == []


# --- what results.json says of the run


def test_certificate():
    parameters = {"a.A": torch.zeros(3, 5), "a.B": torch.zeros(7, 3), "bias": torch.zeros(2)}
    assert trainable(parameters) == {
        "tensors": [
            {"name": "a.A", "shape": [3, 5], "count": 15},
            {"name": "a.B", "shape": [7, 3], "count": 21},
            {"name": "bias", "shape": [2], "count": 2},
        ],
        "count": 38,
    }
    assert trainable({}) == {"tensors": [], "count": 0}


def test_versions_and_hardware():
    found = versions()
    assert set(found) == {"minilora", "python", "torch", "safetensors", "tokenizers", "huggingface-hub", "numpy"}
    assert found["python"].startswith("{}.{}.{}".format(*sys.version_info))
    assert torch.__version__.startswith(found["torch"])
    machine = hardware(torch.device("cpu"))
    assert machine["device"] == "cpu" and machine["cores"] == os.cpu_count() and machine["processor"]
    assert machine["threads"] == torch.get_num_threads() and "gpu" not in machine
    json.dumps([found, machine])


def test_peak_memory_is_of_this_process_alone():
    """A process starts with no more than its own, however large the one that started it."""
    script = (
        "import torch\n"
        "from minilora.runs.record import peak_memory\n"
        "print(peak_memory(torch.device('cpu')))\n"
        "torch.ones(2**25)\n"
        "print(peak_memory(torch.device('cpu')))\n"
    )
    ballast = torch.ones(3 * 2**26)  # 768 MiB
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 2**26 < before < ballast.nbytes and before + 2**26 < after < before + 2**28


# --- atomic files


class Failure(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old\n")

    def broken():
        yield {"a": 1}
        raise Failure

    def in_replacing():
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise Failure

    failing = [
        (lambda: files.write_jsonl(path, broken()), Failure),
        (in_replacing, Failure),
        (lambda: files.write_json(path, {"a": {1, 2}}), TypeError),
        (lambda: files.write_jsonl(path, [{"a": 1}, {"b": {1, 2}}]), TypeError),
        (lambda: files.write_text(path, "\udc80"), UnicodeEncodeError),
    ]
    for action, error in failing:
        with pytest.raises(error):
            action()
        assert path.read_text() == "old\n" and entries(tmp_path) == ["file"]
    assert len(failing) == 5
    with pytest.raises(FileNotFoundError):
        files.write_text(tmp_path / "absent" / "file", "x")
    with pytest.raises(FileNotFoundError):  # nothing was written to the temporary path
        with files.replacing(path):
            pass
    assert path.read_text() == "old\n" and entries(tmp_path) == ["file"]


def test_a_write_shows_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    with files.replacing(path) as temporary:
        assert temporary.parent == tmp_path and not path.exists()
        temporary.write_text("new")
        with files.replacing(path) as other:  # two writers do not meet
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "new" and entries(tmp_path) == ["file"]
    old = os.umask(0o027)
    try:
        files.write_text(tmp_path / "shared", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o640  # the user's own choice


def test_json_round_trips(tmp_path):
    value = {"é\u2028": [1, 2.5, None, True, "a\nb\r"], "z": {}}
    files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and text.endswith("}\n") and "é" in text
    records = [value, {}, {"r": "\u2028\x85\x0b\r\n"}]
    files.write_jsonl(tmp_path / "a.jsonl", iter(records))
    assert files.read_jsonl(tmp_path / "a.jsonl") == records
    files.write_jsonl(tmp_path / "a.jsonl", [])
    assert files.read_jsonl(tmp_path / "a.jsonl") == []


def test_json_is_strict(tmp_path):
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            files.write_json(tmp_path / "a.json", {"a": [value]})
        with pytest.raises(ValueError, match="not JSON compliant"):
            files.write_jsonl(tmp_path / "a.json", [{"a": value}])
    assert entries(tmp_path) == []
    damaged = ["", "{", '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": 1, "a": 2}', "[1]", "null", "[" * 9999]
    for text in damaged:
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(InputError, match=r"a.json: .*; do so") as caught:
            files.read_json(tmp_path / "a.json", "do so")
        assert len(str(caught.value)) < 300
        if text not in ("", "[1]", "null"):
            (tmp_path / "b.jsonl").write_text('{"a": 1}\n' + text + "\n")
            with pytest.raises(InputError, match=r"b.jsonl: a line is not valid JSON .*; do so"):
                files.read_jsonl(tmp_path / "b.jsonl", "do so")
    assert len(damaged) == 9
    (tmp_path / "results.json").write_text('{"tests": ')
    with pytest.raises(InputError, match=f"results.json: .*; delete it, .* python train.py --resume {tmp_path}"):
        Run(tmp_path).read_results()
    for read in (files.read_json, files.read_jsonl):
        with pytest.raises(InputError, match="absent: cannot be read"):
            read(tmp_path / "absent")


def test_tensors_are_as_open_as_other_files(tmp_path):
    path, value = tmp_path / "a.safetensors", {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor([True])}
    for mask, mode in ((0o022, 0o644), (0o027, 0o640), (0o002, 0o664)):
        old = os.umask(mask)
        try:
            files.write_tensors(path, value, {"meters": "3"})
        finally:
            os.umask(old)
        assert stat.S_IMODE(path.stat().st_mode) == mode
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"meters": "3"} and set(file.keys()) == set(value)
        assert all(torch.equal(file.get_tensor(name), value[name]) for name in value)
    assert entries(tmp_path) == ["a.safetensors"]


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path):
    """The library's own error is not one. A limit on the size of files stands in for the disk."""
    script = (
        "import resource, signal, sys, torch\n"
        "from minilora import files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "for write in (lambda: files.write_tensors(sys.argv[1], {'a': torch.ones(9999)}),\n"
        "              lambda: files.write_text(sys.argv[1], 'x' * 9999)):\n"
        "    try:\n"
        "        write()\n"
        "    except OSError as error:\n"
        "        print(error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], cwd=ROOT, capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert done.stdout.split() == [str(errno.EFBIG)] * 2 and entries(tmp_path) == []
    with pytest.raises(OSError) as caught:
        files.write_text(tmp_path / "absent" / "file", "x")
    assert caught.value.filename == str(tmp_path / "absent" / "file")  # and not the hidden file beside it


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "there").mkdir()
    files.try_folder(tmp_path / "a" / "b" / "c", "--out")
    files.try_folder(tmp_path / "there", "--out")
    with pytest.raises(InputError, match=r"cannot make the folder .*/file/a \(Not a directory\): choose another --out"):
        files.try_folder(tmp_path / "file" / "a", "--out")
    assert entries(tmp_path) == ["file", "there"]


def test_nothing_of_unix_is_needed(monkeypatch):
    """All of it is imported without the modules that Windows does not have, and says nothing of memory there."""
    paths = [path.relative_to(ROOT) for path in (ROOT / "minilora").rglob("*.py") if path.stem != "__init__"]
    names = [".".join(path.with_suffix("").parts) for path in paths]
    script = "import sys, torch, filelock\nsys.modules |= dict.fromkeys(['fcntl', 'resource', 'grp', 'pwd'])\n"
    script += "\n".join(f"import {name}" for name in [*names, "train", "evaluate"])
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    assert len(names) >= 60
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(record, "Path", lambda path: Path("/absent"))
    assert record.peak_memory(torch.device("cpu")) is None


# --- errors at the script's edge


def test_exit_cleanly(capsys):
    def failing(error):
        def main(argv):
            assert argv in (["--x"], ["--traceback"])
            raise error

        return main

    cases = [
        (InputError("rank is 0:\n  use   1"), 2, "error: rank is 0: use 1\n"),
        (TrainingError("the loss is nan"), 1, "error: the loss is nan\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (InputError("rank is \x1b[31mx"), 2, "error: rank is \\x1b[31mx\n"),
    ]
    for error, status, line in cases:
        with pytest.raises(SystemExit) as caught:
            exit_cleanly(failing(error), ["--x"])
        assert caught.value.code == status and capsys.readouterr() == ("", line)
    assert len(cases) == 4
    with pytest.raises(SystemExit):
        exit_cleanly(failing(InputError("bad")), ["--traceback"])
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and "in main" in shown and shown.endswith("\nerror: bad\n")
    with pytest.raises(ZeroDivisionError):  # a defect of ours is not dressed up as the user's
        exit_cleanly(failing(ZeroDivisionError()), ["--x"])
    assert exit_cleanly(lambda argv: None, []) is None


def test_exit_cleanly_reads_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--rank", "3"])
    seen = []
    exit_cleanly(seen.append)
    assert seen == [["--rank", "3"]]
