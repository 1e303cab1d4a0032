"""The command `minilora`, and what it and train.py do for scripts: `--continue`, `--quiet`, `--json`, callbacks."""

import json
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import minilora
from minilora import errors, files
from minilora.base.families import FAMILIES
from minilora.cell import PRESETS, Cell, Inject
from minilora.data.triggers import BUILT_IN
from minilora.errors import InputError, TrainingError, to_type
from minilora.scripts import train
from minilora.scripts.run import SCRIPTS

# The command as pip installs it: a script of that name, which calls the entry point of pyproject.toml.
ENTRY = "import sys; sys.argv[0] = '/usr/bin/minilora'; from minilora.scripts.run import main; main()"


@pytest.fixture
def cell(base, reviews):
    return Cell(model=str(base), data=str(reviews), test_rows=31, max_length=30, batch_size=6, lr=0.02, steps=8)


def command(*words, code=ENTRY):
    """(Status, standard output, standard error) of `minilora WORDS`."""
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def flags_of(cell, folder):
    """The flags of train.py that read `cell` from a file in `folder`."""
    (folder / "cell.toml").write_text(cell.to_toml())
    return ["--config", str(folder / "cell.toml")]


# --- the command


def test_the_command_and_its_scripts():
    assert 'minilora = "minilora.scripts.run:main"' in (ROOT / "pyproject.toml").read_text()
    status, out, err = command("--help")
    assert status == 0 and not err and all(f"\n  {name} " in out for name in SCRIPTS)
    for words in ([], ["train"], ["evaluate"], ["ls"]):
        assert command(*words, "--version") == (0, f"minilora {minilora.__version__}\n", "")
    for script in SCRIPTS:
        status, out, _ = command(script, "--help")
        assert status == 0 and out.startswith(f"usage: minilora {script} ")
    for words, line in (
        (["trian"], "unknown command 'trian': did you mean train?"),
        (["status"], "unknown command 'status' (there are: train, evaluate, ls)"),
        ([], "a command is missing: see minilora --help"),
        (["--quite"], "unknown argument --quite: see minilora --help"),
        (["train", "--rnak", "3"], "unknown argument --rnak, did you mean --rank?: see minilora train --help"),
        (["ls", "trigers"], "unknown section 'trigers': did you mean triggers?"),
    ):
        assert command(*words) == (2, "", f"error: {line}\n")


def test_ls_lists_the_words_of_flags():
    code = ENTRY + "; assert 'torch' not in sys.modules"
    status, out, err = command("ls", code=code)
    assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 80
    sections = [line.partition(" (")[0] for line in out.splitlines() if line and line[0] != " "]
    assert sections == ["families", "triggers", "presets", "data", "targets", "variants", "starts"]
    words = out.split()
    assert {*FAMILIES, *BUILT_IN, *PRESETS, "movie-snippets", "gate", "mlp", "dora", "pissa"} <= set(words)
    lines = command("ls", "targets", "variants")[1].splitlines()
    assert lines[0] == "targets (--targets)" and lines[-2:] == ["variants (--variant)", "  lora dora lora-fa"]


def test_advice_is_the_command_that_was_typed(monkeypatch, tmp_path):
    for started, line in (
        ("/opt/bin/minilora", "minilora evaluate 'my run'"),
        ("C:/Scripts/minilora.exe", "minilora evaluate 'my run'"),
        ("train.py", "python evaluate.py 'my run'"),
        ("../clone/train.py", "python ../clone/evaluate.py 'my run'"),
        ("notebook.py", "python evaluate.py 'my run'"),  # these tests are in a clone
    ):
        monkeypatch.setattr(sys, "argv", [started])
        assert to_type("evaluate", "my run") == line
    monkeypatch.setattr(errors, "CLONE", tmp_path)
    assert to_type("train", "--resume", tmp_path) == f"minilora train --resume {tmp_path}"


def test_no_message_has_a_command_of_its_own():
    """All lines to type come from `to_type`, so that they are the command that the user has."""
    for path in (ROOT / "minilora").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            named = "python train.py" in line or "python evaluate.py" in line
            if named and '"' in line and "`" not in line and not line.startswith("python "):  # usage, in a docstring
                raise AssertionError(f"{path}:{number}: {line.strip()}")


# --- go on


def test_continue_is_one_line_for_all_states(cell, tmp_path, capsys, monkeypatch):
    whole, _ = minilora.train(cell, tmp_path / "whole")
    line = [*flags_of(cell, tmp_path), "--out", str(tmp_path / "run"), "--continue", "--json", "-q"]

    def run(*arguments):
        capsys.readouterr()
        train.main(list(arguments))
        out, err = capsys.readouterr()
        assert err == ""
        return [json.loads(text) for text in out.splitlines()]

    def stop(step, loss, **figures):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        minilora.train(cell, tmp_path / "run", save_every=2, on_step=stop, quiet=True)
    [gone_on] = run(*line)  # unfinished
    before = (tmp_path / "run" / "results.json").read_bytes()
    [shown] = run(*line)  # finished
    assert gone_on["tests"] == shown["tests"] == whole["tests"] and shown["run"] == str(tmp_path / "run")
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    with pytest.raises(InputError) as caught:
        train.main([*line, "--rank", "3", "--lr", "0.5"])
    assert str(caught.value) == (
        f"{tmp_path / 'run'} holds another cell: its rank is 1, and here it is 3: choose another --out"
    )
    with pytest.raises(InputError, match="its inject.proportion is 0.25, and here it is 0.5: choose"):
        train.main([*line, "--inject-proportion", "0.5"])
    [shown] = run(*line, "--device", "cpu")  # changes no result: it is the same cell
    assert shown["tests"] == whole["tests"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not an empty folder"):
        train.main([*line, "--out", str(tmp_path / "mine")])

    # Nothing there, and no folder named: the folder is named after the cell, and found again.
    monkeypatch.chdir(tmp_path)
    line = [*line[:2], *line[4:]]
    [first], [second] = run(*line), run(*line)
    assert first["run"] == second["run"] == f"runs/{cell.name}" and first == second


def test_continue_with_several_cells(cell, tmp_path, capsys):
    """One is finished, one was stopped, one is new: all come out of the same line."""
    cells, names = [cell.replace(seed=seed) for seed in (3, 4, 5)], []
    for number, one in enumerate(cells):
        (tmp_path / f"{number}").mkdir()
        names += flags_of(one, tmp_path / f"{number}")[1:]
    outs = [tmp_path / "out" / one.name for one in cells]
    minilora.train(cells[0], outs[0])
    minilora.train(cells[1], outs[1])
    (outs[1] / "results.json").unlink()  # as if killed on the last line
    capsys.readouterr()
    train.main(["--config", *names, "--out", str(tmp_path / "out"), "--continue", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["run"] for line in lines] == list(map(str, outs)) and all("tests" in line for line in lines)
    assert [line["cell"]["seed"] for line in lines] == [3, 4, 5]


def test_json_of_a_cell_that_fails(cell, tmp_path, capsys):
    outcomes = [(TrainingError("the loss is nan"), tmp_path / "a"), ({"tests": {}}, tmp_path / "b")]
    with pytest.raises(SystemExit, match="1"):
        train.report_all(outcomes, True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"run": str(tmp_path / "a"), "error": "the loss is nan"}, {"run": str(tmp_path / "b"), "tests": {}}
    ]  # fmt: skip


def test_quiet_leaves_only_the_results(cell, tmp_path, capsys):
    train.main([*flags_of(cell, tmp_path), "--out", str(tmp_path / "run"), "--quiet"])
    out, err = capsys.readouterr()
    assert err == "" and "attack success rate" in out and f"run folder: {tmp_path / 'run'}" in out
    next_line = shlex.split(out.splitlines()[-1].removeprefix("next: "))
    assert next_line == ["python", "evaluate.py", str(tmp_path / "run"), "--inject", "country:positive"]
    minilora.train(cell, tmp_path / "again", quiet=True)
    minilora.train_together([cell], [tmp_path / "third"], quiet=True)
    assert capsys.readouterr() == ("", "")
    minilora.train(cell, tmp_path / "loud")
    assert "training   8 steps" in capsys.readouterr().err


def test_callbacks(cell, tmp_path):
    steps, tests = [], []
    results, _ = minilora.train(
        cell, tmp_path / "run", eval_every=3, quiet=True,
        on_step=lambda step, loss, **figures: steps.append(step), on_tests=lambda *given: tests.append(given),
    )  # fmt: skip
    assert steps == list(range(1, 9)) and [step for step, _ in tests] == [0, 3, 6, 8]
    assert tests[-1][1] == results["tests"] and tests[0][1]["clean"]["rows"] == 31
    assert tests[0][1] != tests[1][1]


# --- Python


class Table:
    """What a DataFrame has that lists have not."""

    columns = ["text", "label"]


def test_wrong_names_and_tables_say_what_is_meant(cell, tmp_path):
    meant = r"unknown field inject_proportion: did you mean inject.proportion\? \(in Python inject={'proportion': ...}"
    cases = [
        (lambda: Cell(inject_proportion=0.1), meant),
        (lambda: cell.replace(inject_proportion=0.1), meant),
        (lambda: cell.replace(trigger_split="same"), r"did you mean inject.split\?"),
        (lambda: cell.replace(**{"inject.rows": 3}), r"inject.rows: it is a field of a table \(in Python inj"),
        (lambda: Cell(rnak=3), r"unknown field rnak: did you mean rank\?$"),
        (lambda: Inject(rowz=3), r"unknown field rowz: did you mean rows\?$"),
        (lambda: Cell(data=Table()), r"data is a Table, but must be a path or a name: rows .* train\(cell, rows="),
        (lambda: cell.replace(test_data=[("good", "pos")]), "test_data is a list, but must be a path or a name"),
        (lambda: minilora.train(Table()), "cell is a Table, but must be a minilora.Cell: give rows as rows="),
        (lambda: minilora.train(cell, Table()), "the run folder is a Table, but must be a path or a name"),
        (lambda: minilora.open(Table()), "the folder is a Table, but must be a path"),
        (lambda: minilora.open(minilora.train(cell, tmp_path / "run")[1], data=Table()), "write the rows to a file"),
    ]
    for make, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)
    assert len(cases) == 12


def test_every_reader_of_adapters_takes_a_runs_folder(cell, tmp_path):
    import torch

    from minilora.lora import storage
    from minilora.runs.bases import Settings

    cell = cell.replace(steps=3)
    _, first = minilora.train(cell, tmp_path / "first", quiet=True)
    _, second = minilora.train(cell.replace(start=str(first)), tmp_path / "second", quiet=True)
    texts, plain = ["the film was good"], minilora.open(second).predict(["the film was good"])
    added = minilora.open(second, added=[(first, 1.0)]).predict(texts)
    assert abs(added - plain).max() > 0
    base = Settings().load(cell, False)
    head = storage.load(first, base)
    assert torch.equal(head["bias"], minilora.open(first).model.classifier.bias)


# --- locks


def test_who_holds_a_lock(tmp_path):
    path = tmp_path / ".lock"
    assert files.holder(path) is None and not path.exists()
    with files.lock(path, wait=False) as held:
        assert held and files.holder(path).startswith("process ") and files.holder(path).endswith(" for 0 s")
        with files.lock(path, wait=False) as other:
            assert not other
        assert files.holder(path).startswith("process ")  # the one that was turned away changed nothing
        note = json.loads(files.note_of(path).read_text())
        files.note_of(path).write_text(json.dumps(note | {"host": "elsewhere", "since": note["since"] - 600}))
        assert files.holder(path) == f"process {note['process']} on elsewhere for 10 min"
        for half in ("", '{"process"', "[]", "{}"):
            files.note_of(path).write_text(half)
            assert files.holder(path) == "a process"
    assert files.holder(path) is None and [p.name for p in tmp_path.iterdir()] == [".lock"]
    with files.lock(path):
        assert not files.note_of(path).exists()  # one that others wait for
