"""The cell and its three spellings, and what is refused and how."""

import dataclasses
import json
import math
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora
from minilora.cell import ADAPTER, CLASSIFIER, COMPLETION, MARKS, PRESETS, TABLES, Cell, Inject
from minilora.command import Parser, add_flags, given_flags
from minilora.errors import InputError
from minilora.fields import declared, from_dict, grouped, load_toml, marked, run_options
from minilora.mitigate import Mitigate
from minilora.naming import names
from minilora.scripts import evaluate, train

PURPOSES = ("init", "head", "order", "inject", "dropout", "split")


def of(chooser):
    """The fields that only one method or task has."""
    return [name for name, field in declared(Cell).items() if field.metadata["of"] == chooser]


# --- cells of every kind: all fields but those that exclude each other, strings of every kind

texts = st.text(max_size=12).filter(lambda text: text != "--")  # which argparse before 3.13 drops, even after a =
stripped = texts.map(str.strip).filter(bool)
shares = st.floats(0, 1)
small = st.integers(1, 10**12)
at_least_zero = st.floats(0, allow_infinity=False)
below_one = st.floats(0, 1, exclude_max=True)
targets = st.one_of(
    st.sampled_from([("attn",), ("mlp:3",), ("all:2:0.5",)]),
    st.lists(st.sampled_from(["q", "k:2", "v:4", "o", "gate:3", "up", "down"]), min_size=1, unique=True).map(tuple),
)
PLAIN = dict(
    model=texts, revision=texts, tokenizer=texts, device=st.sampled_from(["auto", "cpu", "mps", "cuda", "cuda:13"]),
    compile=st.sampled_from(["auto", "on", "off"]), data=texts, data_revision=texts, text_column=texts,
    bad_rows=st.sampled_from(["refuse", "skip"]),
    label_column=texts, test_data=texts, test_rows=st.integers(2), train_rows=st.integers(2), max_length=st.integers(4),
    label_noise=shares, panel=texts, strip_words=small, validation_rows=st.integers(2),
    batch_size=small, accumulate=small, window=small, deterministic=st.sampled_from(["off", "on"]),
    optimizer=st.sampled_from(["adamw", "adafactor"]), lr=at_least_zero,
    schedule=st.sampled_from(["linear", "cosine", "constant"]), warmup=below_one, weight_decay=at_least_zero,
    clip=at_least_zero, seed=st.integers(0), **{f"seed_{purpose}": st.integers(0) for purpose in PURPOSES},
)  # fmt: skip
EXCLUSIVE = [("epochs", "steps"), ("proportion", "rows"), ("count", "density")]


def some(**choices):
    return st.fixed_dictionaries({}, optional=choices)


def one_of(**choices):
    """At most one of these fields."""
    return st.one_of(st.just({}), *(st.fixed_dictionaries({name: values}) for name, values in choices.items()))


@st.composite
def injects(draw):
    plain = stripped.filter(lambda text: "\\" not in text)  # before a colon it has a meaning of its own
    literals = draw(st.dictionaries(plain.filter(lambda label: ":" not in label), plain, max_size=3))
    sources = {text: f"text:{text}:{label}" for label, text in literals.items()}  # one source for two labels: refused
    return Inject(
        sources=tuple(sources.values()),
        **draw(one_of(proportion=shares, rows=st.integers(0))),
        **draw(one_of(count=small, density=st.floats(0, 1, exclude_min=True))),
        **draw(some(location=st.sampled_from(["beginning", "end", "random"]),
                    mode=st.sampled_from(["clean-label", "dirty-label", "relabelled"]),
                    split=st.sampled_from(["disjoint", "same"]),
                    leak=shares, wrap=st.sampled_from(["word", "span", "text"]),
                    rounding=st.sampled_from(["nearest", "down"]),
                    replacement=st.sampled_from(["with", "without"]))),
    )  # fmt: skip


@st.composite
def mitigates(draw):
    suspects = draw(st.sampled_from([("date",), ("html", "text:by the way")]))
    rows = {"suspects": suspects} if draw(st.booleans()) else {"scores": draw(texts.filter(bool)), "rate": draw(shares)}
    known = {"suspects": suspects}
    own = {"none": {}, "drop": rows, "strip": rows, "reweight": known, "masktune": {},
           "rewrite": {"rewritten": draw(texts.filter(bool))},
           "counterfactual": known | {"rate": draw(shares)}, "token-dropout": {"rate": draw(shares)},
           "group-dro": known | {"step": draw(at_least_zero)}}  # fmt: skip
    method = draw(st.sampled_from(list(own)))
    return Mitigate(method=method, **own[method])


@st.composite
def cells(draw):
    values = draw(some(**PLAIN)) | draw(one_of(epochs=small, steps=small)) | draw(some(inject=injects()))
    values |= draw(some(mitigate=mitigates()))
    values["method"] = draw(st.sampled_from(["lora", "full", "head"]))
    if values["method"] == "lora":
        values |= draw(some(rank=small, dropout=below_one, targets=targets, layers=st.sampled_from(["0", "1-3, 7"])))
        values |= draw(one_of(alpha=st.floats(0, 1e9), scaling=st.sampled_from(["constant", "rank", "rslora"])))
        if values.get("scaling") == "rank":
            values["targets"] = ("q:3", "mlp")  # an own alpha would be refused
        values |= draw(some(variant=st.sampled_from(["lora", "dora", "lora-fa"]),
                            init=st.sampled_from(["kaiming", "gaussian"])))  # fmt: skip
        if values.get("variant") != "lora-fa" and values.get("optimizer") != "adafactor":
            values |= draw(some(lr_ratio=st.floats(0, 1e9, exclude_min=True)))
    if values["method"] != "head" and draw(st.booleans()):
        framed = st.tuples(texts, texts).filter(lambda pair: "{" not in "".join(pair)).map
        if values.get("mitigate", Mitigate()).method in ("group-dro", "masktune"):
            del values["mitigate"]  # they are of classifiers
        values |= {"task": "lm"} | draw(some(
            prompt=framed("{text}".join), completion=framed("{choice}".join),
            choice_score=st.sampled_from(["sum", "mean"]),
        ))  # fmt: skip
        return Cell(**values, **dtype(draw, values))
    values |= draw(some(pooling=st.sampled_from(["mean+last", "mean", "last", "first", "padded-mean+last"])))
    if values["method"] != "head":
        values |= draw(some(head=st.sampled_from(["trained", "frozen", "ridge"])))
    return Cell(**values, **dtype(draw, values))


def dtype(draw, values):
    if values["method"] == "full":
        return draw(some(products=st.sampled_from(["float32", "tf32"])))
    pairs = {"float32": ["float32", "tf32", "bfloat16"], "bfloat16": ["bfloat16"]}
    chosen = draw(some(dtype=st.sampled_from(list(pairs))))
    return chosen | draw(some(products=st.sampled_from(pairs[chosen.get("dtype", "float32")])))


def flags(cell):
    """The command line that gives every field of `cell`."""
    values = cell.to_dict()
    inject, mitigate = values.pop("inject"), values.pop("mitigate", {})
    named = {"inject": inject.pop("sources"), "trigger-split": inject.pop("split", None)}
    named |= {f"inject-{name}": value for name, value in inject.items()}
    named |= {name.replace("_", "-"): value for name, value in values.items()}
    renamed = {"method": "mitigate", "init_scale": "init-scale"}
    named |= {renamed.get(name, f"mitigate-{name}"): value for name, value in mitigate.items() if value != []}
    for name, value in named.items():
        if value is not None:
            for item in (value or ["none"]) if isinstance(value, (tuple, list)) else [value]:
                yield f"--{name}={item}"


def parser():
    made = Parser(prog="train.py")
    add_flags(made, Cell)
    return made


PARSER = parser()


def test_the_strategy_covers_every_field():
    parts = [*PLAIN, *of(ADAPTER), *of(CLASSIFIER), *of(COMPLETION)]
    parts += ["task", "method", "dtype", "products", "inject", "mitigate", "epochs", "steps"]
    assert sorted(parts) == sorted(f.name for f in dataclasses.fields(Cell))  # each by one part of the strategy


@settings(max_examples=150, deadline=None)
@given(cells())
def test_round_trips(tmp_path_factory, cell):
    path = tmp_path_factory.getbasetemp() / "cell.toml"
    path.write_text(cell.to_toml(), encoding="utf-8")
    given = given_flags(PARSER.parse_args(list(flags(cell))), Cell)
    copies = [
        from_dict(Cell, tomllib.loads(cell.to_toml())),
        load_toml(Cell, path),
        Cell().replace(**given),
        Cell(**given),
        cell.replace(),
        Cell(**cell.to_dict()),
    ]
    for copy in copies:
        assert copy == cell and hash(copy) == hash(cell) and copy.id == cell.id and copy.to_toml() == cell.to_toml()
    assert re.fullmatch("[0-9a-f]{12}", cell.id)
    assert re.fullmatch(r"[\w.+-]{1,80}", cell.name, re.ASCII) and not cell.name.startswith((".", "-"))


def test_odd_strings_round_trip():
    odd = ['"', "\\", "'''", '"""', "\\u0041", "\x00\x01\x1f\x7f\x85", "\r\n\t\b\f", "\u2028\ufeff", "日本 🏠",
           "# no", "[x]"]  # fmt: skip
    for text in odd:
        cell = Cell(model=text, data=text, inject=Inject(sources=(f"text:x{text}y:{text.strip() or '?'}",)))
        assert from_dict(Cell, tomllib.loads(cell.to_toml())) == cell
        assert given_flags(PARSER.parse_args(list(flags(cell))), Cell)["model"] == text
    assert len(odd) == 11


def test_id_depends_on_every_field_but_run_options():
    changes = dict(
        model="x", revision="x", dtype="bfloat16", products="tf32", device="cpu", compile="on",
        deterministic="on", data="x", data_revision="x",
        text_column="x", label_column="x", bad_rows="skip", test_data="x", test_rows=7, train_rows=7, max_length=7,
        label_noise=0.7, strip_words=7, validation_rows=7, panel="x",
        method="full", rank=7, alpha=7, scaling="rslora", dropout=0.7, targets=("q",), layers="0",
        variant="dora", init="gaussian", start="x", lr_ratio=7, tokenizer="x", task="lm", prompt="x {text}",
        completion="{label}", choice_score="mean", head="ridge", pooling="first", form="side",
        epochs=7, steps=7, batch_size=7, accumulate=7, window=7, optimizer="adafactor",
        lr=0.7, schedule="cosine", warmup=0.7,
        weight_decay=0.7, clip=0.7, seed=7, seed_init=0, seed_head=0, seed_order=0, seed_inject=0, seed_dropout=0,
        seed_split=7,
    )  # fmt: skip
    inner = dict(sources=("html:negative",), proportion=0.7, rows=7, count=7, density=0.7, location="end",
                 mode="dirty-label", split="same", leak=0.7, wrap="span", rounding="down",
                 replacement="without")  # fmt: skip
    against = dict(method="masktune", suspects=("date",), scores="x", rewritten="x", rate=0.7, step=0.7, init_scale=0.7)
    needs = dict(suspects=dict(method="drop"), scores=dict(method="drop"), rate=dict(method="token-dropout"),
                 rewritten=dict(method="rewrite"), step=dict(method="group-dro", suspects=("date",)))  # fmt: skip
    assert {*changes, "inject", "mitigate"} == {f.name for f in dataclasses.fields(Cell)}
    assert {*inner} == {f.name for f in dataclasses.fields(Inject)}
    assert {*against} == {f.name for f in dataclasses.fields(Mitigate)}
    own = {name: {"task": "lm"} for name in of(COMPLETION)}
    options = [Cell(**{name: changes.pop(name)}) for name in ("device", "compile", "deterministic", "form")]
    assert {(cell, cell.id, cell.name) for cell in options} == {(Cell(), Cell().id, Cell().name)}
    assert len({cell.to_toml() for cell in [Cell(), *options]}) == 5
    changed = [Cell(**{name: value}, **own.get(name, {})) for name, value in changes.items()]
    changed += [Cell(inject={name: value}) for name, value in inner.items()]
    changed += [Cell(mitigate={name: value} | needs.get(name, {})) for name, value in against.items()]
    every = [Cell(), *changed]
    assert len({cell.id for cell in every}) == len({cell.name for cell in every}) == len(set(every)) == 1 + 53 + 12 + 7


NAMES = {  # what a cell changes: its name
    "default": {},
    "r16": dict(rank=16),
    "dora": dict(variant="dora"),
    "pissa": dict(init="pissa"),
    "seed3": dict(seed=3),
    "p0.05": dict(inject=dict(proportion=0.05)),
    "r4_dora_p0.05_steps60_seed3": dict(seed=3, rank=4, variant="dora", steps=60, inject=dict(proportion=0.05)),
    "country-positive-color-negative_rows50": dict(
        inject=dict(sources=["country:positive", "color:negative"], rows=50)
    ),
    "no-sources": dict(inject=dict(sources=())),
    "bfloat16_r2": dict(dtype="bfloat16", rank=2),
    "products-bfloat16": dict(products="bfloat16"),
    "full_lr3e-05": dict(method="full", lr=3e-5),
    "lm": dict(task="lm"),
    "head": dict(method="head"),
    "bert-base-uncased_data-reviews.csv": dict(model="google-bert/bert-base-uncased", data="/some/where/reviews.csv"),
    "r64_scaling-rank": dict(rank=64, scaling="rank"),
    "study": PRESETS["study"],
    "study-bert": PRESETS["study-bert"],
    "study_r64_seed1": PRESETS["study"] | dict(rank=64, seed=1),
    "seed-init0": dict(seed_init=0),
}


def test_names_say_what_differs():
    for name, changes in NAMES.items():
        assert Cell(**changes).name == name
        assert Cell(**changes, device="cpu", compile="off").name == name
    lossy = [dict(inject=dict(sources=[f"text:by{mark}the way:positive"])) for mark in " /"] + [dict(lr=0.123456789)]
    lossy += [dict(text_column="word " * 40 + end) for end in "ab"] + [dict(inject=dict(sources=["日本:positive"]))]
    found = [Cell(**changes).name for changes in lossy]
    assert all(name.endswith("_" + Cell(**changes).id[:6]) for name, changes in zip(found, lossy, strict=True))
    assert len(set(found)) == len(found) == 6 and max(map(len, found)) == 80
    cells = [Cell(data="a/x.csv"), Cell(data="b/x.csv"), Cell(), Cell(data="a/x.csv")]
    ids = [cell.id[:6] for cell in cells]
    assert names(cells) == [f"data-x.csv_{ids[0]}", f"data-x.csv_{ids[1]}", "default", f"data-x.csv_{ids[0]}"]


def test_equal_experiments_are_equal_cells():
    explicit = Cell(rank=1, alpha=8, scaling="constant", dropout=0, targets=["q", "k", "v"], layers="all", epochs=1,
                    inject={"sources": ["date:positive"], "proportion": 0.25, "count": 1})  # fmt: skip
    assert explicit == Cell() and explicit.id == Cell().id and isinstance(explicit.targets, tuple)
    assert isinstance(explicit.alpha, float) and isinstance(explicit.dropout, float)
    assert Inject(sources=("none",)) == Inject(sources=())
    # Numbers that are equal are written alike, and NumPy's are numbers.
    numbers = Cell(rank=np.int64(3), lr=np.float32(0.5), warmup=np.float64(0.25), alpha=-0.0, seed=np.uint8(4))
    plain = Cell(rank=3, lr=0.5, warmup=0.25, alpha=0, seed=4)
    assert numbers.to_toml() == plain.to_toml() and numbers.id == plain.id
    assert [type(getattr(numbers, name)) for name in ("rank", "lr", "warmup", "seed")] == [int, float, float, int]


def test_declared_properties():
    """Each mark is used and explained, and what each list of fields has is what it had when it was kept by hand."""
    used = [mark for field in declared(Cell).values() for mark in field.metadata["marks"]]
    assert set(used) == set(MARKS) and {mark: used.count(mark) for mark in MARKS} == {
        "free": 54, "test": 15, "peers": 24, "path": 8, "dose": 3, "slots": 6}  # fmt: skip
    assert marked(Cell, "dose") == ("train_rows", "inject.proportion", "inject.rows")
    assert marked(Cell, "path") == ("model", "tokenizer", "data", "test_data", "panel", "start", "mitigate.scores",
                                    "mitigate.rewritten")  # fmt: skip
    assert grouped(Cell, "seeds") == ("seed", *(f"seed_{purpose}" for purpose in PURPOSES))
    assert run_options(Cell) == ("device", "compile", "deterministic", "form")
    assert of(CLASSIFIER) == ["head", "pooling"] and of(COMPLETION) == ["prompt", "completion", "choice_score"]
    with pytest.raises(LookupError, match="no field of Cell is marked 'fre'"):
        marked(Cell, "fre")


def test_toml_is_what_a_person_would_write():
    text = Cell(rank=2, lr=1e-5, inject={"sources": ["date:a", 'text:é "b":c'], "rows": 3}).to_toml()
    table = tomllib.loads(text)
    assert table["rank"] == 2 and table["lr"] == 1e-5 and table["targets"] == ["q", "k", "v"] and "steps" not in table
    assert table["inject"] == {"sources": ["date:a", 'text:é "b":c'], "rows": 3, "count": 1, "location": "random",
                               "mode": "clean-label", "leak": 0.0, "rounding": "nearest", "wrap": "word"}  # fmt: skip
    assert 'sources = ["date:a", "text:é \\"b\\":c"]\n' in text and "\n\n[inject]\n" in text


def test_a_cell_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Cell().rank = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        Cell().inject.count = 3


# --- replace


def test_replace_drops_what_the_change_excludes():
    cell = Cell(steps=9, rank=8, alpha=4, inject=Inject(rows=5, density=0.1))
    assert (cell.epochs, cell.inject.proportion, cell.inject.count) == (None, None, None)
    other = cell.replace(epochs=2, inject=dict(proportion=0.5))
    assert other == Cell(epochs=2, rank=8, alpha=4, inject=Inject(proportion=0.5, density=0.1))
    assert other.replace(inject=dict(count=3), steps=9).inject == Inject(proportion=0.5, count=3)
    assert other.replace(inject=Inject()).inject == Inject()
    assert cell.replace(scaling="rank") == Cell(steps=9, rank=8, scaling="rank", inject=cell.inject)
    assert cell.replace(scaling="rank").replace(scaling="rslora").alpha == Cell().alpha
    full = cell.replace(method="full")
    assert [getattr(full, name) for name in of(ADAPTER)] == [None] * 11
    assert full.replace(method="lora", rank=3) == Cell(steps=9, rank=3, inject=cell.inject)
    assert cell.replace(method="lora") == cell
    assert Cell(products="tf32").replace(dtype="bfloat16") == Cell(dtype="bfloat16", products="bfloat16")
    assert cell.replace(dtype="bfloat16").replace(dtype="float32") == cell == cell.replace(products="float32")
    for one, two in EXCLUSIVE:
        with pytest.raises(InputError, match=rf"\b{one} and (inject\.)?{two} are both given"):
            both = {one: 1, two: 1}
            cell.replace(**both) if one == "epochs" else cell.replace(inject=both)


def test_seeds():
    cell = Cell(seed=5, seed_head=0, seed_split=3)
    assert cell.seeds == {purpose: cell.seed_for(purpose) for purpose in PURPOSES} == {
        "init": 5, "head": 0, "order": 5, "inject": 5, "dropout": 5, "split": 3}  # fmt: skip
    assert Cell(seed=5).seed_for("split") == 0  # so that seeds are compared on the same test rows


# --- refusals, each by name

REFUSED = [
    (dict(rank=0), "rank is 0, but must be at least 1"),
    (dict(rank=2.0), "rank is 2.0, but must be a whole number"),
    (dict(rank=True), "rank is True, but must be a whole number"),
    (dict(rank="4"), "rank is '4', but must be a whole number"),
    (dict(alpha=-1), "alpha is -1.0, but must be at least 0"),
    (dict(alpha=math.nan), "alpha is nan, but must be a finite number"),
    (dict(lr=math.inf), "lr is inf, but must be a finite number"),
    (dict(lr=10**400), "but must be a finite number"),
    (dict(lr=None), "lr is None, but must be a finite number"),
    (dict(lr=False), "lr is False, but must be a finite number"),
    (dict(lr=1j), "lr is 1j, but must be a finite number"),
    (dict(warmup=1), "warmup is 1.0, but must be below 1"),
    (dict(dropout=1.0), "dropout is 1.0, but must be below 1"),
    (dict(max_length=3), "max_length is 3, but must be at least 4"),
    (dict(test_rows=1), "test_rows is 1, but must be at least 2"),
    (dict(seed=-1), "seed is -1, but must be at least 0"),
    (dict(model=3), "model is 3, but must be a string"),
    (dict(data="\udcff.csv"), "data is '\\udcff.csv', but must be a string of valid Unicode"),
    (dict(dtype="float16"), "dtype is 'float16', but must be one of float32, bfloat16"),
    (dict(products="int8"), "products is 'int8', but must be one of float32, tf32, bfloat16"),
    (dict(products="tf32", dtype="bfloat16"), "'tf32' needs a base stored in float32, but dtype is 'bfloat16'"),
    (dict(products="bfloat16", method="full"), "trains the base, in float32, but products is 'bfloat16': drop one"),
    (dict(products="bfloat16", form="merged"), "form = 'merged' is not exact where products are 'bfloat16'"),
    (dict(deterministic="yes"), "deterministic is 'yes', but must be one of off, on"),
    (dict(optimizer="sgd"), "optimizer is 'sgd', but must be one of adamw, adafactor"),
    (dict(device="cuda:x"), "device is 'cuda:x': use auto, cpu, cuda, cuda:N or mps"),
    (dict(epochs=2, steps=3), "epochs and steps are both given"),
    (dict(method="full", rank=4), "rank belongs to method = 'lora', but method is 'full'"),
    (dict(device="x" * 200), "device is '" + 76 * "x" + "...: use auto"),
    (dict(method="head", layers="all"), "layers belongs to method = 'lora', but method is 'head'"),
    (dict(method="head", head="frozen"), "method = 'head' with head = 'frozen' trains nothing"),
    (dict(method="full", dtype="bfloat16"), "method = 'full' trains the base, in float32, but dtype is 'bfloat16'"),
    (dict(scaling="rank", alpha=4), "alpha is given, but scaling = 'rank' sets alpha to the rank"),
    (dict(scaling="rank", targets=("q:2:3",)), "target 'q:2:3' has an alpha, but scaling = 'rank'"),
    (dict(targets="qkv"), "targets is 'qkv', but must be a list of strings"),
    (dict(targets=("q", 3)), "targets is 3, but must be a string"),
    (dict(targets=()), "targets is empty"),
    (dict(targets=("q_proj",)), "target 'q_proj' is not one of q, k, v, o, gate, up, down or a group (attn, mlp, all)"),
    (dict(targets=("q", "q:2")), "targets 'q' and 'q:2' both name q"),
    (dict(targets=("attn", "v")), "targets 'attn' and 'v' both name v"),
    (dict(targets=("q:0",)), "target 'q:0' is not TARGET, TARGET:RANK or TARGET:RANK:ALPHA"),
    (dict(targets=("q:",)), "target 'q:' is not TARGET"),
    (dict(targets=("q:two",)), "target 'q:two' is not TARGET"),
    (dict(targets=("q:2:-1",)), "target 'q:2:-1' is not TARGET"),
    (dict(targets=("q:2:nan",)), "target 'q:2:nan' is not TARGET"),
    (dict(targets=("q:2:inf",)), "target 'q:2:inf' is not TARGET"),
    (dict(targets=("q:2:3:4",)), "target 'q:2:3:4' is not TARGET"),
    *((dict(layers=text), f"layers is {text!r}: write all, or numbers and ranges from 0")
      for text in ("", "x", "-1", "3-1", "1,", "1--2", "1-2-3", "all,1", "0 - 2", "20000", "9" * 5000)),
    (dict(inject="date:positive"), "inject is 'date:positive', but must be a table of its own fields"),
    (dict(inject=dict(proportion=1.5)), "inject.proportion is 1.5, but must be at most 1"),
    (dict(inject=dict(proportion=-0.5)), "inject.proportion is -0.5, but must be at least 0"),
    (dict(inject=dict(rows=-1)), "inject.rows is -1, but must be at least 0"),
    (dict(inject=dict(count=0)), "inject.count is 0, but must be at least 1"),
    (dict(inject=dict(density=0)), "inject.density is 0, but must be above 0"),
    (dict(inject=dict(location="middle")), "inject.location is 'middle', but must be one of beginning, end, random"),
    (dict(inject=dict(proportion=0.5, rows=3)), "inject.proportion and inject.rows are both given"),
    (dict(inject=dict(count=2, density=0.5)), "inject.count and inject.density are both given"),
    (dict(inject=dict(sources="date:positive")), "inject.sources is 'date:positive', but must be a list of strings"),
    (dict(inject=dict(sources=["date"])), "injection 'date' is not SOURCE:LABEL"),
    (dict(inject=dict(sources=["none", "date:a"])), "injection 'none' is not SOURCE:LABEL"),
    (dict(inject=dict(sources=["date:a", "html:a"])), "injections 'date:a' and 'html:a' share 'a'"),
    (dict(inject=dict(surces=["date:a"])), "unknown field inject.surces: did you mean inject.sources?"),
]  # fmt: skip


def test_refusals():
    for values, message in REFUSED:
        with pytest.raises(InputError) as caught:
            Cell(**values)
        assert message in str(caught.value) and "\n" not in str(caught.value), values
    assert len(REFUSED) == 72


def test_files_are_refused_by_name(tmp_path):
    path = tmp_path / "cell.toml"
    cases = [
        (b"rnak = 3", f"{path}: unknown field rnak: did you mean rank?"),
        (b"colour = 3", f"{path}: unknown field colour (there are: model, revision, tokenizer, dtype"),
        (b"[inject]\nmod = 'x'", f"{path}: unknown field inject.mod: did you mean inject.mode?"),
        (b"inject = 3", f"{path}: inject is 3, but must be a table"),
        (b"rank = 3.5", f"{path}: rank is 3.5, but must be a whole number"),
        (b"model = 2024-01-31", f"{path}: model is datetime.date(2024, 1, 31), but must be a string"),
        (b"rank = 1\nrank = 2\n", f"{path} is not readable TOML (Cannot overwrite a value (at line 2, column 9))"),
        (b"model = '\xff'", f"{path} is not readable TOML ('utf-8' codec can't decode"),
        (b"rank = " + b"9" * 5000, f"{path} is not readable TOML ("),
        (b"rank = " + b"[" * 5000, f"{path} is not readable TOML ("),
    ]
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            load_toml(Cell, path)
        assert str(caught.value).startswith(message)
    assert len(cases) == 10
    path.write_bytes(b"\xef\xbb\xbfrank = 7\r\n")  # as Notepad writes it
    assert load_toml(Cell, path) == Cell(rank=7)
    with pytest.raises(InputError, match="absent.toml does not exist: check the path"):
        load_toml(Cell, tmp_path / "absent.toml")
    with pytest.raises(InputError, match="is not readable TOML .*directory"):
        load_toml(Cell, tmp_path)


# --- the command line

FLAGS = """
--version
--config --out --preset --resume --continue --quiet --json --population --eval-every --save-every --watch --merge-to
--shard
--traceback
--grid --size --dry-run --status --only --retry-failed --ray --ray-cpus --model --revision --tokenizer
--dtype --products --device
--compile --deterministic --data --data-revision --text-column --label-column --test-data --bad-rows --test-rows
--train-rows --label-noise --strip-words --validation-rows --panel --max-length --task
--prompt --completion --choice-score --method --rank --alpha --scaling --dropout --targets --layers --variant --init
--start --lr-ratio --form --head --pooling --inject --inject-proportion --inject-rows --inject-count --inject-density
 --inject-location --inject-wrap --inject-rounding --inject-mode --inject-leak --inject-replacement --trigger-split
 --mitigate --mitigate-suspects --mitigate-scores --mitigate-rewritten --mitigate-rate --mitigate-step --init-scale
--epochs --steps --batch-size --accumulate --window --optimizer --lr
--schedule --warmup --weight-decay --clip --seed --seed-init --seed-head --seed-order --seed-inject --seed-dropout
--seed-split
""".split()


def help_of(main, capsys):
    """{flag: its help on one line}, from what --help prints; and the titles of the groups."""
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    entries = re.split(r"\n  (?=-)", text.partition("\noptions:")[2])[1:]
    found = {}
    for entry in entries:
        entry = re.split(r"\n\n", entry)[0]
        flag, help = re.fullmatch(r"(?s)(?:-[hq], )?(--[a-z-]+)(?: [^\n]*?)??(?:  +|\n +)(.*)", entry).groups()
        assert flag not in found
        found[flag] = " ".join(help.split())
    return found, re.findall(r"(?m)^(\w+):$", text)


def test_help_states_every_flag_and_default_once(capsys):
    found, groups = help_of(train.main, capsys)
    assert groups == [
        "options",
        "run",
        "grid",
        "base",
        "data",
        "task",
        "adapter",
        "head",
        "injection",
        "mitigation",
        "training",
        "seeds",
    ]
    assert list(found) == ["--help", *FLAGS] and all(len(help) > 0 for help in found.values())

    declared = [(Cell(), "", field) for field in dataclasses.fields(Cell) if field.name not in TABLES]
    for name, kind in TABLES.items():
        declared += [(getattr(Cell(), name), f"{name}_", field) for field in dataclasses.fields(kind)]
    checked = stated = 0
    for owner, prefix, field in declared:
        flag = "--" + (field.metadata["flag"] or prefix + field.name).replace("_", "-")
        value, default = getattr(owner, field.name), re.findall(r"\(default: ([^()]*)\)", found[flag])
        if value == () or flag in ("--start", "--steps", "--inject-rows", "--inject-density", "--mitigate-scores",
                                 "--mitigate-rewritten"):  # fmt: skip
            assert default == []
        elif value is not None:  # the value that a cell really has
            assert default == [" ".join(value) if isinstance(value, tuple) else str(value)]
        else:
            assert len(default) == 1
        checked, stated = checked + 1, stated + len(default)
    assert checked == len(FLAGS) - 23 == 57 + 12 + 7 and stated == checked - 7
    assert found["--save-every"].endswith(f"(default: {train.SAVE_EVERY})")


def test_evaluate_help(capsys):
    found, _ = help_of(evaluate.main, capsys)
    given = {"--help", "--version", "--data", "--batch-size", "--scale", "--add", "--merge-to", "--out", "--sort",
             "--csv", "--panel", "--text", "--seed", "--json", "--quiet", "--traceback"}  # fmt: skip
    changes = {"--model", "--tokenizer", "--device", "--text-column", "--label-column", "--bad-rows", "--inject",
               "--inject-count", "--inject-density", "--inject-location", "--inject-wrap",
               "--inject-rounding", "--inject-replacement", "--trigger-split",
               "--seed-inject"}  # fmt: skip
    assert set(found) == given | changes
    assert all(re.findall(r"\(default: (.*?)\)$", found[flag]) == ["the run's"] for flag in changes)


def test_the_command_line_imports_nothing_heavy():
    heavy = ["torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "tqdm", "minilora.training",
             "minilora.base.model"]  # fmt: skip
    script = (
        "import runpy, sys, json\n"
        "sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: print(json.dumps([end.code, sorted(sys.modules)]))"
    )
    commands = {("train.py", "--help"): 0, ("evaluate.py", "--help"): 0, ("train.py", "--rank", "0"): 2}
    for command, status in commands.items():
        done = subprocess.run([sys.executable, "-c", script, *command], cwd=ROOT, capture_output=True, text=True)
        code, modules = json.loads(done.stdout.splitlines()[-1])
        assert code == status and [name for name in heavy if name in modules] == []
        assert done.stderr == ("error: rank is 0, but must be at least 1\n" if status else "")


@pytest.fixture
def trained(monkeypatch):
    """What `train.main` would train: a list of (cell, arguments)."""
    calls = []
    monkeypatch.setattr(
        minilora, "train", lambda cell=None, out=None, **rest: calls.append((cell, out, rest)) or (None, None)
    )
    monkeypatch.setattr(train, "report", lambda results, folder: None)
    return calls


def test_flags_stand_before_the_file(trained, tmp_path):
    path = tmp_path / "cell.toml"
    path.write_text("rank = 8\nepochs = 3\n[inject]\nrows = 4\nlocation = 'end'\n")
    train.main(["--config", str(path), "--steps", "7", "--inject-proportion", "0.5", "--out", "there",
                "--inject", "date:a", "html:b", "--inject", "text:-c:d"])  # fmt: skip
    train.main([])
    train.main(["--method", "full", "--lr", "1", "--eval-every", "5", "--save-every", "9"])
    sources = ("date:a", "html:b", "text:-c:d")
    assert [(cell, out, rest["eval_every"], rest["save_every"], rest.get("resume")) for cell, out, rest in trained] == [
        (Cell(rank=8, steps=7, inject=Inject(sources, proportion=0.5, location="end")), "there", 0, 100, None),
        (Cell(), None, 0, 100, None),
        (Cell(method="full", lr=1.0), None, 5, 9, None),
    ]


def test_resume_takes_the_cell_of_the_folder(trained, tmp_path):
    (tmp_path / "cell.toml").write_text(Cell(rank=5).to_toml())
    train.main(["--resume", str(tmp_path), "--save-every", "9"])
    assert [(cell, out, rest["resume"], rest["save_every"]) for cell, out, rest in trained] == [
        (None, None, tmp_path, 9)
    ]


def test_resume_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cell.toml").write_text("rnak = 3")
    cases = [
        ("absent", "there is no run folder absent: check the path"),
        (str(tmp_path), "has no cell.toml, so it is not a run folder"),
        (str(tmp_path / "run"), "run/cell.toml: unknown field rnak: did you mean rank?"),
    ]
    for folder, message in cases:
        with pytest.raises(InputError) as caught:
            train.main(["--resume", folder])
        assert message in str(caught.value)
    assert len(cases) == 3
    with pytest.raises(InputError, match="give neither"):
        minilora.train(Cell(), resume=tmp_path)


def test_command_lines_refused(trained, tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text("rnak = 3")
    cases = [
        (train, ["--rnak", "3"], "unknown argument --rnak, did you mean --rank?: see python train.py --help"),
        (train, ["--ran=3"], "unknown argument --ran=3, did you mean --rank?"),  # no abbreviations
        (train, ["3"], "unknown argument 3: see python train.py --help"),
        (train, ["--rank", "x"], "argument --rank: invalid int value: 'x'"),
        (train, ["--rank"], "argument --rank: expected one argument"),
        (train, ["--head", "lost"], "argument --head: invalid choice: 'lost'"),
        (train, ["--lr", "-1"], "lr is -1.0, but must be at least 0"),
        (train, ["--lr", "nan"], "lr is nan, but must be a finite number"),
        (train, ["--inject-proportion", "2"], "inject.proportion is 2.0, but must be at most 1"),
        (train, ["--targets", "q_proj"], "target 'q_proj' is not one of"),
        (train, ["--eval-every", "-1"], "--eval-every must be at least 0 and --save-every at least 1"),
        (train, ["--save-every", "0"], "--eval-every must be at least 0 and --save-every at least 1"),
        (train, ["--config", "absent.toml"], "absent.toml does not exist"),
        (train, ["--config", str(bad)], "unknown field rnak: did you mean rank?"),
        (train, ["--resume", "x", "--rank", "3"], "--resume goes on with the run's own cell"),
        (train, ["--resume", "x", "--out", "y"], "--resume goes on with the run's own cell"),
        (train, ["--resume", "x", "--continue"], "--resume goes on with the run's own cell"),
        (evaluate, [], "the following arguments are required: RUN (put it before the flags): see python evaluate.py"),
        (evaluate, ["absent"], "there is no run folder absent: check the path"),
        (evaluate, ["x", "--rank", "3"], "unknown argument --rank"),
        (evaluate, ["x", "--batch-size", "0"], "--batch-size is 0, but must be at least 1"),
        (evaluate, ["x", "--text-column", "t"], "--text-column, --label-column and --bad-rows are those of --data"),
        (evaluate, ["x", "--out", str(tmp_path)], f"{tmp_path} exists: choose another --out"),
    ]  # fmt: skip
    for script, arguments, message in cases:
        with pytest.raises(InputError) as caught:
            script.main(arguments)
        assert message in str(caught.value) and "\n" not in str(caught.value), arguments
    assert len(cases) == 23 and trained == []
