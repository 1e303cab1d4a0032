"""`--watch N`: what was trained at every N-th step stays in the run folder, byte for byte, however the run went."""

import json

import pytest
import torch
from safetensors.torch import load_file

import minilora
from minilora import files
from minilora.cell import Cell
from minilora.errors import InputError
from minilora.runs.folder import Run
from minilora.scripts import train
from minilora.training import loop

STEPS = [0, 4, 8, 12, 15]


@pytest.fixture
def cell(base, reviews):
    return Cell(
        model=str(base), data=str(reviews), test_rows=31, max_length=30, batch_size=6, rank=2, lr=0.01, device="cpu"
    )


class Stop(Exception):
    pass


def stop_at(step):
    def stop(step_now, **_):
        if step_now == step:
            raise Stop

    return lambda step, loss, **figures: stop(step)


def same_files(one, other):
    ours, wanted = Run(one).watched(), Run(other).watched()
    assert list(ours) == list(wanted) and len(ours) >= 3
    return all(ours[step].read_bytes() == wanted[step].read_bytes() for step in ours)


def test_what_is_kept(cell, tmp_path, monkeypatch):
    seen, update = [], loop.update

    def look(population, *rest):
        seen.append({name: p.detach().clone() for name, p in population.flat.members[0].items()})
        return update(population, *rest)

    monkeypatch.setattr(loop, "update", look)
    minilora.train(cell, tmp_path / "run", watch=4)
    kept = Run(tmp_path / "run").watched()
    assert list(kept) == STEPS and len(seen) == 15
    names = [tensor["name"] for tensor in json.loads((tmp_path / "run" / "trainable.json").read_text())["tensors"]]
    for step in STEPS[:-1]:  # before update number step + 1
        found = load_file(kept[step])
        assert sorted(found) == sorted(names) and len(names) == 20
        assert all(torch.equal(found[name], seen[step][name]) for name in names)
    assert not any(value.any() for name, value in load_file(kept[0]).items() if name.endswith(".B"))
    last, whole = load_file(kept[15]), load_file(tmp_path / "run" / "factors.safetensors")
    assert sorted(name.removeprefix("base.") for name in last) == sorted(whole)
    assert all(torch.equal(value, whole[name.removeprefix("base.")]) for name, value in last.items())
    minilora.train(cell, tmp_path / "plain")
    assert not (tmp_path / "plain" / "watch").exists()
    for name in ("factors.safetensors", "predictions.jsonl", "cell.toml"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.parametrize("step, save_every", [(9, 6), (14, 100)])
def test_a_run_that_goes_on_keeps_the_same_files(step, save_every, cell, tmp_path):
    minilora.train(cell, tmp_path / "whole", watch=4)
    with pytest.raises(Stop):
        minilora.train(cell, tmp_path / "run", watch=4, save_every=save_every, on_step=stop_at(step))
    part = Run(tmp_path / "run").watched()
    assert list(part) == [kept for kept in STEPS if kept < step]
    (tmp_path / "run" / "watch" / f".step-000004.safetensors.{'0' * 32}").write_text("half a file")
    minilora.train(resume=tmp_path / "run")  # as it began, without being told again
    assert same_files(tmp_path / "run", tmp_path / "whole")
    assert len(list((tmp_path / "run" / "watch").iterdir())) == len(STEPS)


def test_members_of_a_population_keep_their_own(cell, tmp_path):
    cells = [cell, cell.replace(rank=5, seed=3, targets=("q", "down"), steps=10)]
    outs = {name: [tmp_path / f"{name}{k}" for k in range(2)] for name in ("whole", "part", "solo")}
    minilora.train_together(cells, outs["whole"], size=2, watch=4)
    with pytest.raises(Stop):
        minilora.train_together(cells, outs["part"], size=2, watch=4, save_every=3, on_step=stop_at(9))
    minilora.train_together(resume=outs["part"])
    compared = 0
    for one, whole, part, solo in zip(cells, *outs.values(), strict=True):
        minilora.train(one, solo, watch=4)
        assert same_files(part, whole)
        ours, alone = Run(whole).watched(), Run(solo).watched()
        assert list(ours) == list(alone) == (STEPS if one is cell else [0, 4, 8, 10])
        assert ours[0].read_bytes() == alone[0].read_bytes()
        for step in ours:  # as all results of a population: the same but for rounding
            found, wanted = load_file(ours[step]), load_file(alone[step])
            assert sorted(found) == sorted(wanted)
            for name, value in wanted.items():
                assert (found[name] - value).norm() <= 2e-3 * value.norm()
                compared += 1
    assert compared == 5 * 20 + 4 * 14


@pytest.mark.parametrize("changes, count", [(dict(method="head", rank=None), 2), (dict(variant="dora"), 29),
                                            (dict(init="pissa"), 20), (dict(head="frozen"), 18)])  # fmt: skip
def test_other_methods(changes, count, cell, tmp_path):
    minilora.train(cell.replace(steps=3, **changes), tmp_path / "run", watch=2)
    kept = Run(tmp_path / "run").watched()
    assert list(kept) == [0, 2, 3] and {len(load_file(path)) for path in kept.values()} == {count}


def test_refused(cell, tmp_path):
    minilora.train(cell.replace(steps=2), tmp_path / "plain")
    minilora.train(cell.replace(steps=2), tmp_path / "kept", watch=1)
    (tmp_path / "g.toml").write_text("[grid]\nrank = [1, 2]\n")
    full = ["--method", "full", "--model", cell.model, "--data", cell.data, "--test-rows", "31", "--max-length", "30"]
    cases = [
        (["--resume", tmp_path / "plain", "--watch", "2"], "is finished, and --watch looks at a run while it trains"),
        ([*full, "--out", tmp_path / "full", "--watch", "2"], "method 'full' trains the whole base: drop --watch"),
        (["--grid", tmp_path / "g.toml", "--watch", "2"], "--watch is for single cells, but --grid is given"),
        (["--watch", "-1"], "--watch must be at least 0"),
        (["--out", tmp_path / "plain", "--watch", "2"], "holds a finished run"),
    ]
    for arguments, said in cases:
        with pytest.raises(InputError) as caught:
            train.main(list(map(str, arguments)))
        assert said in str(caught.value) and "\n" not in str(caught.value)
    assert len(cases) == 5 and not (tmp_path / "full").exists()
    train.main(["--resume", str(tmp_path / "kept"), "--watch", "1"])  # it is finished, and has its steps
    before = files.read_jsonl(tmp_path / "kept" / "metrics.jsonl")
    assert [line["step"] for line in before if line["kind"] == "step"] == [1, 2]
