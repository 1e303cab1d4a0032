"""Choices by measurement: made once for what they depend on, kept, recorded, and those of a run's beginning."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import bert_spec

import minilora
from minilora import files, precision
from minilora.cell import Cell
from minilora.kernels import attention, linear
from minilora.training import choices, loop
from minilora.training.limit import products

OURS = str(attention.LONGEST[torch.float32])  # what the made-up machine below finds of attention
SPEC = bert_spec(hidden_size=6, num_hidden_layers=2, num_attention_heads=2, intermediate_size=14)
SETTING = SimpleNamespace(spec=SPEC, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A CPU with both ways and a clock of its own: `seconds` {way: of a product}, `rounds` it was looked at."""
    machine = SimpleNamespace(seconds={"onednn": 1.0, "mkl": 2.0}, now=5.0, way="onednn", measured=0)

    @contextmanager
    def using(way):
        machine.way = way
        yield

    def product(x, weight):
        machine.now += machine.seconds[machine.way] * weight.numel()
        machine.measured += 1

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(linear, "HAS_ONEDNN", True)
    monkeypatch.setattr(linear, "using", using)
    monkeypatch.setattr(linear, "product", product)
    monkeypatch.setattr(choices, "time", SimpleNamespace(perf_counter=lambda: machine.now))
    ways = {("batched", T): 1.0 if T <= 48 else 3.0 for T in attention.LENGTHS}
    ways |= {("torch", T): 2.0 for T in attention.LENGTHS}
    monkeypatch.setattr(choices, "attention_times", lambda setting: ways)
    return machine


def chosen(products=None):
    """All choices of the made-up machine."""
    return {"attention": OURS} | ({"products": products} if products else {})


def test_the_faster_way_is_taken_and_oneDNN_only_where_it_is_clearly_faster(machine):
    found = {}
    for mkl in (0.5, 1.0, 1.029, 1.031, 2.0):
        (files.cache() / "choices.json").unlink(missing_ok=True)
        machine.seconds["mkl"] = mkl
        found[mkl] = choices.choose(SETTING)["products"]
    assert found == {0.5: "mkl", 1.0: "mkl", 1.029: "mkl", 1.031: "onednn", 2.0: "onednn"}


def test_what_is_measured_is_a_step_of_the_base(machine):
    times = products(SPEC, {}, "head")
    seconds = choices.measured(times)
    total = sum(i * o * count for (i, o, _), count in times.items())
    assert total == 2 * (6 * 18 + 6 * 6 + 2 * 6 * 14)
    assert seconds == {"onednn": pytest.approx(total), "mkl": pytest.approx(2 * total)}


def test_it_is_measured_once(machine):
    """A choice stays although the machine is another time slower, and other shapes have their own."""
    assert choices.choose(SETTING) == chosen("onednn")
    measured, machine.seconds = machine.measured, {"onednn": 9.0, "mkl": 1.0}
    assert choices.choose(SETTING) == chosen("onednn") and machine.measured == measured > 0
    wider = bert_spec(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=14)
    assert choices.choose(SimpleNamespace(**vars(SETTING) | {"spec": wider})) == chosen("mkl")
    assert sorted(json.loads((files.cache() / "choices.json").read_text()).values()) == [OURS, OURS, "mkl", "onednn"]
    deeper = bert_spec(hidden_size=6, num_hidden_layers=3, num_attention_heads=2, intermediate_size=14)
    assert choices.choose(SimpleNamespace(**vars(SETTING) | {"spec": deeper})) == chosen("onednn")


def test_it_depends_on_cpu_torch_and_threads(machine, monkeypatch):
    capability = f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    choices.choose(SETTING)
    before = set(choices.read(files.cache() / "choices.json"))
    monkeypatch.setattr(choices, "hardware", lambda device: {"processor": "another", "threads": 71})
    choices.choose(SETTING)
    assert set(choices.read(files.cache() / "choices.json")) - before == {
        f"another, {capability}, 71 threads, 6x6, 6x14, 6x18, 14x6",
        f"another, {capability}, 71 threads, 2 heads in 2 of 3, float32",
    }


@pytest.mark.parametrize("seconds, expected", [
    ([1, 1, 1, 1, 1, 1], "128"), ([3, 3, 3, 3, 3, 3], "0"), ([1, 1, 1, 3, 3, 3], "48"), ([1, 1, 2.5, 1, 3, 3], "64"),
])  # fmt: skip
def test_attention_is_ours_up_to_where_it_gains_most(seconds, expected):
    found = {("batched", T): own for T, own in zip(attention.LENGTHS, seconds, strict=True)}
    assert choices.longest(found | {("torch", T): 2 for T in attention.LENGTHS}) == expected


def test_both_ways_of_attention_are_measured_and_used(monkeypatch):
    taken, real = [], attention.attention
    monkeypatch.setattr(choices.attention, "batched", lambda *a: taken.append(a[0].shape[2]) or real_batched(*a))
    real_batched = attention.Batched.apply
    spec = SimpleNamespace(layers=[SimpleNamespace(heads=4, kv_heads=2)], head_width=3)
    seconds = choices.attention_times(SimpleNamespace(spec=spec, dtype=torch.float32))
    assert {way for way, _ in seconds} == {"batched", "torch"} and len(seconds) == 2 * len(attention.LENGTHS)
    assert set(taken) == set(attention.LENGTHS) and all(0 < own < 60 for own in seconds.values())
    taken.clear()
    q = torch.randn(1, 4, 20, 3)
    for longest in (16, 32, None):
        with precision.ways({} if longest is None else {"attention": str(longest)}, "float32"):
            real(q, q, q, torch.zeros(1, 1, 1, 20), 1.0)
    assert taken == [20, 20] and attention.LONGEST[torch.float32] == 48


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": NaN}', None])
def test_a_damaged_cache_is_measured_again(machine, damage):
    assert choices.choose(SETTING) == chosen("onednn")
    path, measured = files.cache() / "choices.json", machine.measured
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), 7)) if damage is None else damage)
    machine.seconds["mkl"] = 0.1
    assert choices.choose(SETTING) == chosen("mkl") and machine.measured > measured
    assert sorted(json.loads(path.read_text()).values()) == [OURS, "mkl"]


def test_what_cannot_be_kept_is_not_measured(machine, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choices.choose(SETTING) == chosen("onednn") and machine.measured == 0


def test_there_is_nothing_to_choose_elsewhere(machine, monkeypatch):
    assert choices.choose(SimpleNamespace(**vars(SETTING) | dict(dtype=torch.bfloat16))) == chosen()
    assert choices.choose(SimpleNamespace(**vars(SETTING) | dict(device=torch.device("cuda")))) == {}
    monkeypatch.setattr(linear, "HAS_ONEDNN", False)
    assert choices.choose(SETTING) == chosen() and machine.measured == 0


def test_a_run_goes_on_as_it_began(machine):
    member = SimpleNamespace(setting=SETTING, meters={"choices": {"products": "mkl"}})
    assert choices.of([member], 7) == {"products": "mkl"} and machine.measured == 0
    assert choices.of([member], 0) == chosen("onednn")
    member.meters["choices"] = {}  # of an older version
    assert choices.of([member], 7) == {}


def test_a_run_is_recorded_and_goes_on_with_the_choice_of_its_beginning(base, reviews, tmp_path, monkeypatch):
    """Although the cache holds another one by then; and the choice ends with the run."""
    cell = Cell(model=str(base), data=str(reviews), test_rows=31, max_length=30, batch_size=6, rank=2, device="cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "measured", lambda times: {"onednn": 2.0, "mkl": 1.0})
    monkeypatch.setattr(choices, "longest", lambda times: OURS)
    real, ways = loop.update, []

    def update(*arguments):
        ways.append("onednn" if linear.ONEDNN else "mkl")
        if len(ways) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    whole, _ = minilora.train(cell, tmp_path / "whole")
    monkeypatch.setattr(loop, "update", update)
    with pytest.raises(KeyboardInterrupt):
        minilora.train(cell, tmp_path / "run", save_every=2)
    path = files.cache() / "choices.json"
    if linear.HAS_ONEDNN:
        kept = files.read_json(path)
        files.write_json(path, kept | {key: "onednn" for key, choice in kept.items() if choice == "mkl"})
    resumed, _ = minilora.train(resume=tmp_path / "run")
    again, _ = minilora.train(cell, tmp_path / "again")
    before, after = (chosen(way if linear.HAS_ONEDNN else None) for way in ("mkl", "onednn"))
    assert (whole["choices"], resumed["choices"], again["choices"]) == (before, before, after)
    steps = whole["train"]["steps"]
    assert ways == ["mkl"] * (4 + steps - 2) + ["onednn" if linear.HAS_ONEDNN else "mkl"] * steps
    assert linear.ONEDNN == linear.HAS_ONEDNN
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "run")]
    assert adapters[0] == adapters[1]


def test_an_opened_run_predicts_in_the_ways_of_its_training(base, reviews, tmp_path, monkeypatch):
    cell = Cell(model=str(base), data=str(reviews), test_rows=31, max_length=30, batch_size=6, rank=2, device="cpu")
    monkeypatch.setattr(choices, "choose", lambda setting: {"products": "mkl", "attention": "16"})
    minilora.train(cell, tmp_path / "run")
    run, ways = minilora.open(tmp_path / "run"), []
    real = run.task.label_scores
    monkeypatch.setattr(run.task, "label_scores", lambda *arguments: ways.append(
        (linear.ONEDNN, attention.LONGEST[torch.float32])) or real(*arguments))  # fmt: skip
    before = linear.ONEDNN, attention.LONGEST[torch.float32]
    run.predict(["it is good", "it is bad"])
    assert run.choices == {"products": "mkl", "attention": "16"} and ways == [(False, 16)]
    assert (linear.ONEDNN, attention.LONGEST[torch.float32]) == before != (False, 16)
