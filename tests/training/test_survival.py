"""Runs that are stopped by signals, full disks, numbers that are not finite, and damaged states."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import minilora
from minilora import files
from minilora.cell import Cell
from minilora.command import exit_cleanly
from minilora.errors import InputError, TrainingError
from minilora.runs import bases
from minilora.runs.folder import Run
from minilora.scripts import train
from minilora.training import loop
from minilora.training.state import read_state

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
WHOLE = ("adapter/adapter_model.safetensors", "factors.safetensors", "predictions.jsonl")


@pytest.fixture
def cell(base, reviews):
    return Cell(
        model=str(base), data=str(reviews), test_rows=31, max_length=30, batch_size=6, rank=2, lr=0.01, device="cpu"
    )


def script(*arguments):
    """The exit status of train.py."""
    try:
        exit_cleanly(train.main, list(map(str, arguments)))
    except SystemExit as end:
        return end.code
    return 0


def at_step(monkeypatch, step, act):
    """Call `act` within that update (from 1) of the training loop."""
    real, calls = loop.update, []

    def update(*arguments):
        calls.append(1)
        if len(calls) == step:
            act()
        return real(*arguments)

    monkeypatch.setattr(loop, "update", update)


def same_bytes(one, other):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in WHOLE)


# --- signals


@pytest.mark.parametrize("number, status", SIGNALS)
def test_a_signal_saves_a_population_which_goes_on_as_one(number, status, cell, tmp_path, monkeypatch, capsys):
    paths = []
    for k, one in enumerate((cell, cell.replace(rank=4, seed=2, dropout=0.2))):
        paths.append(tmp_path / f"{k}.toml")
        paths[-1].write_text(one.to_toml())
    line = ["--config", *paths, "--population", 2, "--save-every", 1000, "--out"]
    assert script(*line, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: os.kill(os.getpid(), number))
        assert script(*line, tmp_path / "stopped") == status
    stopped = sorted((tmp_path / "stopped").iterdir())
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert len(stopped) == 2 and all(f"{path}" in said.partition(" stopped")[0] for path in stopped)
    assert said.partition("train.py --resume ")[2].split() == list(map(str, Run(stopped[0]).population()))
    assert [read_state(path / "state.safetensors")[1]["step"] for path in stopped] == [5, 5]
    assert script("--resume", stopped[1]) == 0  # takes the other too
    for path in stopped:
        assert Run(path).read_results()["train"]["population"] == 2
        assert same_bytes(path, tmp_path / "whole" / path.name)
    assert script("--resume", *stopped) == 0  # says that they are finished
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_in_a_grid_names_the_members_and_the_grid(cell, tmp_path, monkeypatch, capsys):
    text = cell.to_toml().replace("\n[inject]", "\n[cell.inject]")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("rank ="))
    (tmp_path / "g.toml").write_text(f"[cell]\n{text}\n[grid]\nrank = [1, 2]\n")
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert script("--grid", tmp_path / "g.toml", "--out", tmp_path / "g", "--population", 2) == 143
    said, cells = capsys.readouterr().err.strip().splitlines()[-1], sorted((tmp_path / "g" / "cells").iterdir())
    assert len(cells) == 2 and all(str(path) in said for path in cells)
    assert said.endswith(f"go on with python train.py --grid {tmp_path / 'g'}")
    assert [read_state(path / "state.safetensors")[1]["step"] for path in cells] == [3, 3]
    assert script("--grid", tmp_path / "g") == 0


def test_ctrl_c_in_a_notebook(cell, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match=f"--resume {tmp_path / 'run'}"):
            minilora.train(cell, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert read_state(tmp_path / "run" / "state.safetensors")[1]["step"] == 4
    minilora.train(resume=tmp_path / "run")  # the signal is forgotten


def test_what_an_import_makes_of_a_signal_is_still_a_signal(capsys):
    def swallow(argv):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        raise AttributeError("half a module")

    with pytest.raises(SystemExit) as end:
        exit_cleanly(swallow, [])
    assert end.value.code == 143 and capsys.readouterr().err == "interrupted by SIGTERM\n"


def test_a_signal_while_modules_are_imported_is_one_line():
    program = (
        "import os, signal, sys\nfrom minilora import interrupts\ninterrupts.quit_early()\n"
        "os.kill(os.getpid(), int(sys.argv[1]))\nprint('went on')"
    )
    for number, status in SIGNALS:
        done = subprocess.run(
            [sys.executable, "-c", program, str(int(number))], cwd=ROOT, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (status, "", "interrupted\n")


# --- a full disk


def test_a_full_disk_says_what_is_missing_and_how_to_go_on(cell, tmp_path, monkeypatch, capsys):
    real, out = files.write_tensors, tmp_path / "run"

    def full(path, tensors, metadata=None):
        with files.replacing(path, 2**60):
            raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "cell.toml").write_text(cell.to_toml())
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_tensors", full)
        assert script("--config", tmp_path / "cell.toml", "--save-every", 3, "--out", out) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"no space is left in {out}: state.safetensors needs {2**50:,} KiB, of which " in said
    missing = int(said.partition("of which ")[2].partition(" KiB")[0].replace(",", ""))
    assert 0 < missing < 2**50 and said.endswith(f"make room, then go on with python train.py --resume {out}")
    assert real is files.write_tensors and script("--resume", out) == 0


# --- not finite


def test_weights_that_are_not_finite_are_no_result(cell, tmp_path):
    wild = dict(lr=1e30, clip=0.0, warmup=0.0, schedule="constant")
    for steps, what in ((1, "not finite after step 1"), (7, "not finite|the loss is|the norm")):
        out = tmp_path / f"{steps}"
        with pytest.raises(TrainingError, match=what):
            minilora.train(cell.replace(steps=steps, **wild), out)
        assert not (out / "results.json").exists() and not (out / "predictions.jsonl").exists()
        assert "error" in files.read_jsonl(out / "metrics.jsonl")[-1]


def test_a_state_that_is_not_finite_is_not_saved(cell, tmp_path, monkeypatch):
    real = loop.update

    def update(population, *arguments):
        found = real(population, *arguments)
        population.flat.values.data[0, 3] = torch.inf
        return found

    monkeypatch.setattr(loop, "update", update)
    with pytest.raises(TrainingError, match=r"layers\..* is not finite after step 1 .*no state was saved"):
        minilora.train(cell, tmp_path / "run", save_every=1)
    assert not (tmp_path / "run" / "state.safetensors").exists()


# --- a damaged state


def test_a_state_with_other_meters_is_refused_by_name(cell, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
        minilora.train(cell, tmp_path / "run")
    path = tmp_path / "run" / "state.safetensors"
    tensors, meters = load_file(path), read_state(path)[1]
    changes = [dict(step=10**9), dict(step=-1), dict(step=0), dict(step=4.5), dict(step="4"), dict(step=True),
               dict(step=None), dict(seconds=None), dict(seconds=-1.0), dict(tokens="x"), dict(tokens=-5),
               dict(inputs=None), dict(inputs={"base": 3}), dict(choices={"products": 3})]  # fmt: skip
    damaged = [meters | change for change in changes] + [3, [], {}, None, "x"]
    damaged += [{key: meters[key] for key in meters if key != left} for left in meters if left != "choices"]
    for value in damaged:
        save_file(tensors, path, {"meters": json.dumps(value)})
        with pytest.raises(InputError, match="state.safetensors does not fit this run .*: delete it"):
            minilora.train(resume=tmp_path / "run")
    assert len(damaged) == 23
    save_file(tensors, path, {"meters": json.dumps(meters)})
    minilora.train(resume=tmp_path / "run")


# --- too little memory


def test_a_base_that_does_not_fit_is_refused_before_it_is_read(cell, tmp_path, monkeypatch):
    for free, fits in ((1, False), (2**40, True), (None, True)):
        with monkeypatch.context() as patch:
            patch.setattr(bases, "free_memory", lambda device, free=free: free)
            if fits:
                bases.Settings().load(cell, False)
                continue
            patch.setattr(bases.model, "load", None)
            with pytest.raises(InputError, match="needs about .* GiB"):
                bases.Settings().load(cell, False)
    assert 2**20 < bases.free_memory(torch.device("cpu")) < 2**50
