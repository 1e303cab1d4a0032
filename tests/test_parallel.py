"""One cell over two processes, against the same cell in one: rows, adapters, predictions, memory and errors."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_bert
from torch import distributed
from zoo import tiny_decoder

import minilora
from minilora import files, parallel
from minilora.base import model
from minilora.cell import Cell
from minilora.data import batches
from minilora.errors import InputError
from minilora.grid.run import train_grid
from minilora.kernels.dropout import least_kept, mask, shifted
from minilora.lora import peft_config, storage
from minilora.training import feed

# How far two processes may be from one in float32, as `distance` measures it: they add up the same numbers in another
# order. In bfloat16 the rounding of a row may depend on the rows beside it; the limit then follows from `spread`.
LIMITS = {"loss": 1e-5, "norm": 1e-5, "tensor": 2e-5, "logit": 2e-4}
DEADLINE = 1200  # seconds, on a machine that is busy with other things
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}

# Of 89 training rows: the last batch of 6 or 7 has 5, that of 11 has one, so that the first process has none.
LM = dict(task="lm", max_length=40)
CASES = {  # name: (base, sharded, what the cell has of its own)
    "rows": ("bert", False, dict()),
    "a batch of one row": ("bert", False, dict(batch_size=11)),
    "dropout and accumulation": ("bert", False, dict(batch_size=7, accumulate=3, dropout=0.3)),
    "the whole base trained": ("bert", False, dict(method="full", rank=None)),
    "adafactor, a ridge head": ("bert", False, dict(optimizer="adafactor", head="ridge", pooling="mean+last")),
    "sharded": ("bert", True, dict(targets=("all",), batch_size=11, accumulate=2)),
    "sharded, upper layers": ("bert", True, dict(targets=("q", "down"), layers="1-2", dropout=0.2, batch_size=7)),
    "sharded, bfloat16": ("bert", True, dict(dtype="bfloat16", batch_size=7)),
    "sharded, merged": ("bert", True, dict(form="merged")),
    "sharded, dora": ("bert", True, dict(variant="dora", init="pissa", head="ridge")),
    "sharded, the head alone": ("bert", True, dict(method="head", rank=None)),
    "sharded, gated": ("llama", True, LM | dict(targets=("all",), batch_size=11)),
    "sharded, tied and fused": ("gpt2", True, LM | dict(accumulate=2, batch_size=7, dropout=0.1)),
    "sharded, a part of a fused dora": ("gpt2", True, LM | dict(variant="dora", targets=("q",))),
}
# What every process does, one task after the other; `outcome` is what it found.
WORKER = """
import gc, json, os, sys
from pathlib import Path
import torch, minilora
from minilora import errors
from minilora.base import model
from minilora.training import loop
from minilora.cell import Cell
from minilora.data import batches
from minilora.kernels import lora_linear

def live(kind):  # bytes of all tensors of a kind
    seen = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), kind) and not thing.is_meta:
            storage = getattr(thing, "_local_tensor", thing).untyped_storage()
            seen[storage._cdata] = storage.nbytes()
    return sum(seen.values())

def watched(function, figures, kind, every=1):
    calls = []
    def inner(*arguments):
        if getattr(arguments[0], "training", True):  # not in a prediction
            calls.append(1)
            if len(calls) % every == 0:
                figures.append(live(kind))
        return function(*arguments)
    return inner

def memory(cell, out, shard):
    gc.collect()  # what earlier tasks left
    between, forwards, backwards = [], [], []
    forward, backward = model.Layer.forward, lora_linear.Projections.backward
    update, ahead = loop.update, batches.ahead
    model.Layer.forward = watched(forward, forwards, torch.nn.Parameter, 5)  # not those that are sharded
    lora_linear.Projections.backward = staticmethod(watched(backward, backwards, torch.nn.Parameter, 5))
    loop.update = watched(update, between, torch.Tensor)
    # No other thread meanwhile: it may be at work on what the collector would show.
    batches.ahead = lambda made, device: ((item, item) for item in made)
    minilora.train(cell, out, shard=shard)
    model.Layer.forward, loop.update, batches.ahead = forward, update, ahead
    lora_linear.Projections.backward = staticmethod(backward)
    samples = [len(between), len(forwards), len(backwards)]
    return {"between": between[1], "forward": max(forwards), "backward": max(backwards), "samples": samples}

def broken_off(cell, out, shard):
    update, calls = loop.update, []
    def failing(*arguments):
        calls.append(1)
        if len(calls) == 9:
            raise errors.TrainingError("broken off")
        return update(*arguments)
    loop.update = failing
    try:
        minilora.train(cell, out, save_every=3, shard=shard)
    except errors.TrainingError as error:
        assert str(error) == "broken off"
    loop.update = update
    return minilora.train(resume=out, eval_every=4, shard=shard)[0]["train"]["steps"]

def plain(cell, out, shard):
    return minilora.train(cell, out, shard=shard)[0]["train"]["processes"]

tasks, outcomes = json.loads(Path(sys.argv[1]).read_text()), {}
for name, task in tasks.items():
    try:
        outcome = globals()[task["kind"]](Cell(**task["cell"]), task["out"], task["shard"])
    except (errors.InputError, errors.TrainingError) as error:
        outcome = f"{type(error).__name__}: {error}"
    outcomes[name] = outcome
Path(sys.argv[1] + os.environ["RANK"]).write_text(json.dumps(outcomes))
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that are started here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    tiny_bert(root / "bert")
    tiny_decoder(root / "gpt2")
    tiny_decoder(root / "llama", "llama")
    tiny_bert(root / "deep", num_hidden_layers=8, hidden_size=96, intermediate_size=384)
    return root


@pytest.fixture(scope="module")
def cells(bases, reviews):
    """The cell of each case, and of the tasks that are no comparison."""

    def cell(base, **changes):
        fields = dict(model=str(bases / base), data=str(reviews), test_rows=31, max_length=30, batch_size=6,
                      window=3, rank=2, lr=0.01) | changes  # fmt: skip
        return Cell(**fields)

    found = {name: cell(base, **changes) for name, (base, _, changes) in CASES.items()}
    return found | {
        "memory": cell("deep", steps=2, targets=("all",)),
        "memory, sharded": cell("deep", steps=2, targets=("all",), seed=1),
        "broken off": cell("bert", dropout=0.2, seed=3),
        "broken off, sharded": cell("llama", **LM, dropout=0.2, seed=3),
        "diverged": cell("bert", lr=1e30),
        "taken": cell("bert", seed=4),
    }


@pytest.fixture(scope="module")
def outcomes(cells, tmp_path_factory):
    """(What each of two processes that torchrun started found of each task, the folder of their runs)."""
    root = tmp_path_factory.mktemp("two")
    (root / "worker.py").write_text(WORKER)
    kinds = {"memory": "memory", "broken off": "broken_off"}
    tasks = {
        name: {
            "kind": kinds.get(name.partition(",")[0], "plain"),
            "cell": cell.to_dict(),
            "out": str(root / name),
            "shard": "sharded" in name,
        }
        for name, cell in cells.items()
    }
    (root / "taken").mkdir()
    (root / "taken" / "thesis.tex").write_text("mine")
    files.write_json(root / "tasks", tasks)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "worker.py", "tasks"], cwd=root, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((root / f"tasks{rank}").read_text()) for rank in (0, 1)], root


def lines_of(folder):
    return files.read_jsonl(folder / "metrics.jsonl")


def distance(found, wanted, skip="none is skipped"):
    """The largest differences between two run folders: of a loss and of a gradient's norm, relative; of a tensor, of
    its largest entry; of a logit (or log-likelihood), absolute. Asserts that they have the same steps, names and rows.
    """
    largest = dict.fromkeys(LIMITS, 0.0)

    def note(kind, difference):
        assert difference < float("inf")  # and not NaN
        largest[kind] = max(largest[kind], float(difference))

    ours, theirs = ([line for line in lines_of(folder) if line["kind"] == "step"] for folder in (found, wanted))
    assert len(ours) == len(theirs) > 4
    for line, right in zip(ours, theirs, strict=True):
        assert all(line[key] == right[key] for key in ("step", "rows", "tokens", "lr"))
        for kind in ("loss", "norm"):
            note(kind, abs(line[kind] - right[kind]) / abs(right[kind]))
    name = peft_config.TENSORS if (wanted / "adapter" / peft_config.TENSORS).exists() else storage.TRAINED
    ours, theirs = (storage.read_tensors(folder / "adapter" / name) for folder in (found, wanted))
    assert list(ours) == list(theirs) and len(theirs) > 1
    for name, right in theirs.items():
        assert right.shape == ours[name].shape
        if not name.endswith(skip):
            note("tensor", (ours[name] - right).abs().max() / right.abs().max())
    compared = 0
    for a, b in zip(*(files.read_jsonl(folder / "predictions.jsonl") for folder in (found, wanted)), strict=True):
        assert a["id"] == b["id"] and list(a) == list(b)
        for test in ("clean", "trigger positive", "placebo"):
            key = "logits" if "logits" in b[test] else "log_likelihood"
            ours, theirs = (list(x.values()) if isinstance(x, dict) else x for x in (a[test][key], b[test][key]))
            note("logit", np.abs(np.subtract(ours, theirs)).max())
            compared += 1
    assert compared == 93
    return largest


def halves(rows, longest, most):
    """In place of `feed.passes`: the parts that two processes have of a batch, as passes of one."""
    middle = rows // 2
    return [own for own in (slice(0, middle), slice(middle, rows)) if own.start < own.stop]


def spread(cell, alone, folder):
    """{kind: how far runs of the cell in one process are from the one in `alone`, see `distance`}: one whose passes are
    those that two processes make, and one with a pass for every row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "passes", halves)
        minilora.train(cell, folder / "halves")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "TOKENS", 1)
        minilora.train(cell, folder / "rows")
    found = [distance(folder / name, alone) for name in ("halves", "rows")]
    return {kind: max(one[kind] for one in found) for kind in LIMITS}


def assert_alike(together, alone, limits=LIMITS, skip="none is skipped"):
    """Two run folders of one cell hold the same, but for the order of sums."""
    found = distance(together, alone, skip)
    assert all(found[kind] <= limits[kind] for kind in limits), (found, limits)
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (together, alone))
    for key in ("cell", "inputs", "injection", "seeds"):
        assert first[key] == second[key]
    assert first["train"]["processes"] == 2 and second["train"]["processes"] == 1
    assert first["train"]["trainable_parameters"] == second["train"]["trainable_parameters"]
    assert sorted(os.listdir(together)) == sorted(os.listdir(alone))
    return first


# --- rows


def processes(monkeypatch, count):
    """Be each of `count` processes, one after the other."""
    for rank in range(count):
        monkeypatch.setattr(parallel, "_here", parallel.Here(rank, count, rank))
        yield rank


def test_parts_are_the_whole_in_its_order(monkeypatch):
    cases = 0
    for count in (1, 2, 3, 5):
        for rows in range(13):
            parts = [list(range(rows))[parallel.part(rows)] for _ in processes(monkeypatch, count)]
            assert sum(parts, []) == list(range(rows))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            cases += 1
    assert cases == 52


def test_batches_go_round_and_all_have_as_many(monkeypatch):
    lengths = np.random.default_rng(1).integers(1, 20, 47)
    offsets = np.concatenate([[0], lengths.cumsum()])
    encoded = type("Encoded", (), {"ids": np.arange(offsets[-1]), "offsets": offsets})
    answers = torch.arange(47) * 3
    alone = list(batches.by_length(encoded, 5, 0, answers))
    assert len(alone[0].index) == 5 and sum(len(batch.index) for batch in alone) == 47 and len(alone) > 3
    for count in (2, 3, 4, 7, 11):
        shares = [list(batches.by_length(encoded, 5, 0, answers)) for _ in processes(monkeypatch, count)]
        assert {len(share) for share in shares} == {-(-len(alone) // count)}
        theirs = [batch for turn in zip(*shares) for batch in turn if len(batch.index)]
        for batch, wanted in zip(theirs, alone, strict=True):
            assert batch.index.tolist() == wanted.index.tolist()
            assert torch.equal(batch.ids, wanted.ids) and torch.equal(batch.answers, wanted.answers)
        fillers = [batch for share in shares for batch in share if not len(batch.index)]
        assert len(fillers) == -len(alone) % count
        assert all(len(batch.ids) == len(batch.answers) == 1 for batch in fillers)


def test_a_part_without_rows_is_filled_with_one_that_is_not_predicted(monkeypatch):
    encoded = type("Encoded", (), {"ids": np.arange(9), "offsets": np.array([0, 4, 9])})
    sizes, answers, rows = np.array([4, 5]), torch.tensor([1, 0]), np.array([1])
    found = [batches.collate([(encoded, rows[parallel.part(1)], answers)], sizes, 7) for _ in processes(monkeypatch, 2)]
    assert [batch.ids.tolist() for batch in found] == [[[7, 7, 7, 7]], [[4, 5, 6, 7, 8]]]
    assert [batch.index[0].tolist() for batch in found] == [[], [1]]
    assert [batch.answers.tolist() for batch in found] == [[-100], [0]]


def test_a_shifted_key_drops_what_later_rows_would():
    cases = 0
    for key in (0, 1, 2**31 - 1, 1234567890):
        whole = mask((9, 5, 7), least_kept(0.4), torch.tensor([key], dtype=torch.int32), 99)
        assert 0.4 < whole.float().mean() < 0.8
        for start in (0, 1, 4, 8):
            keys = torch.tensor([shifted(key, start)], dtype=torch.int32)
            assert torch.equal(mask((9 - start, 5, 7), least_kept(0.4), keys, 99), whole[start:])
            cases += 1
    assert cases == 16


# --- the same cell


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(name, cells, outcomes, tmp_path):
    found, root = outcomes
    assert [one[name] for one in found] == [2, 2]
    cell, alone, limits = cells[name], tmp_path / "alone", LIMITS
    minilora.train(cell, alone)
    if cell.dtype == "bfloat16":
        measured = spread(cell, alone, tmp_path)
        assert measured["loss"] < 0.01 and measured["norm"] < 0.02  # less than what a wrong row or gradient does
        limits = {kind: max(LIMITS[kind], 2 * measured[kind]) for kind in LIMITS}
    # A bias of k adds the same to all scores of a query: its gradient is the rounding of 0, which AdamW makes a step.
    skip = ".k.bias" if cell.method == "full" else "none is skipped"
    results = assert_alike(root / name, alone, limits, skip)
    assert results["train"]["sharded"] == CASES[name][1]


@pytest.mark.parametrize("name", ["broken off", "broken off, sharded"])
def test_a_run_that_broke_off_goes_on(name, cells, outcomes, tmp_path):
    found, root = outcomes
    assert [one[name] for one in found] == [15, 15]
    minilora.train(cells[name], tmp_path / "alone")
    assert_alike(root / name, tmp_path / "alone")
    steps = [line["step"] for line in lines_of(root / name) if line["kind"] == "step"]
    assert steps == list(range(1, 16))
    assert [line["step"] for line in lines_of(root / name) if line["kind"] == "test"] == [8, 12, steps[-1]]


def test_a_sharded_base_takes_its_part_of_the_memory(bases, outcomes):
    base = model.load(bases / "deep")
    total, layer = (sum(p.nbytes for p in part.parameters()) for part in (base, base.layers[0]))
    assert total > 8 * layer
    for one in outcomes[0]:
        plain, sharded = one["memory"], one["memory, sharded"]
        assert plain["samples"] == sharded["samples"] == [2, 16 // 5, 64 // 5]
        trained = plain["forward"] - total
        assert 0 < trained < 0.1 * total and plain["backward"] == plain["forward"]
        # Between steps each has half of the base, and in a step one layer at work and one that is fetched ahead.
        assert sharded["between"] - plain["between"] == pytest.approx(-total / 2, rel=0.05)
        for pass_ in ("forward", "backward"):
            assert layer <= sharded[pass_] - trained <= 2 * layer


# --- errors


def test_all_fail_alike(outcomes):
    found, root = outcomes
    assert found[0]["taken"] == found[1]["taken"]
    assert found[0]["taken"].startswith("InputError: ") and "is not an empty folder" in found[0]["taken"]
    assert os.listdir(root / "taken") == ["thesis.tex"]
    assert found[0]["diverged"] == found[1]["diverged"]
    assert found[0]["diverged"].startswith("TrainingError: the loss is")
    assert "error" in lines_of(root / "diverged")[-1] and not (root / "diverged" / "results.json").exists()


def start_two(arguments, cwd, script=ROOT / "train.py"):
    """Both processes of a script as torchrun starts them, but apart: [(status, stdout, stderr), ...]."""
    # As in torchrun, the store in which they meet lives until both have ended: PyTorch has one without it say so.
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=cwd, env=ENVIRONMENT | address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=DEADLINE) for process in started]
        return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]
    finally:
        for process in started:
            process.kill()


def test_the_first_process_alone_speaks(cells, tmp_path):
    (tmp_path / "cell.toml").write_text(cells["rows"].replace(steps=3).to_toml())
    (status, out, err), other = start_two(["--config", "cell.toml", "--shard"], tmp_path)
    assert (status, *other) == (0, 0, "", "")
    assert out.count("run folder: runs/") == 1 and "processes  2, each with a part of each batch" in err
    assert len(os.listdir(tmp_path / "runs")) == 1
    missing = start_two(["--config", "cell.toml", "--data", "nowhere.csv"], tmp_path)
    assert [status for status, *_ in missing] == [2, 2]
    said = "".join(out + err for _, out, err in missing)
    assert said.startswith("error: ") and said.count("\n") == 1 and "nowhere.csv" in said


def test_one_that_fails_ends_all_and_says_so_once(cells, tmp_path):
    (tmp_path / "cell.toml").write_text(cells["rows"].to_toml())
    (tmp_path / "script.py").write_text(
        "import atexit, os\n"
        "atexit.register(os.abort)\n"  # as gloo's threads do at times, where Python takes down a group in use
        "from minilora.command import exit_cleanly\n"
        "from minilora.scripts import train\n"
        "from minilora.training import loop\n"
        "update, calls = loop.update, []\n"
        "def failing(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4 and os.environ['RANK'] == '1':\n"
        "        raise ZeroDivisionError('in the second')\n"
        "    return update(*arguments)\n"
        "loop.update = failing\n"
        "exit_cleanly(train.main)\n"
    )
    (status, out, err), other = start_two(["--config", "cell.toml", "--out", "run"], tmp_path, tmp_path / "script.py")
    assert (status, out, other[0], other[1]) == (1, "", 1, "")
    assert "Traceback" not in err and "error" not in err
    assert other[2].count("Traceback") == 1 and other[2].endswith("ZeroDivisionError: in the second\n")
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2, 3]


def test_what_several_processes_do_not_do(cells, tmp_path, monkeypatch):
    cell = cells["rows"]
    full = cell.replace(method="full")
    with pytest.raises(InputError, match="--shard splits the base among several processes: start them with"):
        minilora.train(cell, tmp_path / "x", shard=True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    refused = [
        (lambda: minilora.train(full, tmp_path / "x", shard=True), "--shard is for a frozen base, but method is"),
        (lambda: minilora.train(cell.replace(compile="on"), tmp_path / "x"), "a step of 3 processes is not compiled"),
        (lambda: minilora.train(cell.replace(device="mps"), tmp_path / "x"), "device is mps, but 3 processes need one"),
        (lambda: minilora.train(cell.replace(device="cuda:1"), tmp_path / "x"), "device is cuda:1, but 3 processes"),
        (lambda: minilora.train_together([cell, cell]), "train one cell together, and not several cells"),
        (lambda: train_grid(None, tmp_path / "x"), "train one cell together, and not a grid"),
    ]
    for refuse, words in refused:
        with pytest.raises(InputError, match=words):
            refuse()
        assert parallel.count() == 1 and parallel.first()
    assert len(refused) == 6 and not (tmp_path / "x").exists()


def test_alone_it_imports_nothing():
    script = (
        "import sys, minilora.parallel as parallel\n"
        "assert 'torch' not in sys.modules\n"
        "with parallel.together('cpu'), parallel.in_turn(), parallel.fail_together():\n"
        "    assert (parallel.count(), parallel.first(), parallel.part(5)) == (1, True, slice(0, 5))\n"
        "    assert parallel.broadcast_object(lambda: 7) == 7\n"
        "parallel.all_reduce(None), parallel.barrier(), parallel.broadcast(None)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, check=True)
