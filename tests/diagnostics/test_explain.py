"""`evaluate.py RUN --explain` as people use it: what it writes and says, of runs of all kinds, and what it refuses."""

import csv
import json
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import ROOT, as_csv, write

import minilora
from minilora.cell import Cell
from minilora.diagnostics import explain, knockout, text
from minilora.errors import InputError
from minilora.scripts import evaluate

FOUR = ("attention", "attribution", "spectrum", "knockout")


def read(path):
    return json.loads(path.read_text())


def finite(value):
    """Every number in what JSON holds."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for one in value for number in finite(one)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.fixture
def undrawn(monkeypatch):
    """A figure takes a second, so that only one test draws."""
    monkeypatch.setattr("minilora.diagnostics.pictures.draw", lambda *parts: ())


@pytest.mark.parametrize("kind", ["encoder", "grouped"])
def test_a_run(small_run, kind, tmp_path, capsys, request):
    ends = ("json", "csv", "png", "pdf", "svg")
    if kind == "grouped":
        request.getfixturevalue("undrawn")
        ends = ends[:2]
    run, out = small_run(kind), tmp_path / "out"
    evaluate.main([str(run), "--explain", *FOUR, "--rows", "9", "--out", str(out)])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 and f"written to {out}" in said
    for words in ("AUC, the share by itself", "integrated gradients", "eff. rank", "head only"):
        assert words in said, words
    names = {path.name for path in out.iterdir()}
    assert names == {"rows.json", "explain.html"} | {f"{part}.{end}" for part in FOUR for end in ends}

    rows = read(out / "rows.json")
    assert len(rows["rows"]) == 9 == rows["count"] and rows["label"] == "positive" and rows["labels"][1] == "positive"
    ids = [row["id"] for row in rows["rows"]]
    for row in rows["rows"]:
        assert set(row["forms"]) == {"clean", "trigger", "placebo"} and row["label"] == "negative"
        for name, form in row["forms"].items():
            assert len(form["pieces"]) == len(form["special"]) == len(form["span"])
            assert any(form["span"]) == (name != "clean") and 0.5 <= form["probability"] <= 1
            [shares] = minilora.open(run).predict([form["text"]])
            assert shares.max() == pytest.approx(form["probability"], abs=1e-5)
            assert (form["margin"] > 0) == (form["predicted"] == "positive")

    seen = read(out / "attention.json")
    L, H = seen["layers"], seen["heads"]
    for figure in (seen["entropy"]["clean"], seen["span_share"]["trigger"], seen["auc"]["entropy"], seen["change"]):
        assert np.array(figure, float).shape == (L, H, 3)
    assert list(seen["rows"]) == ids and set(seen["span_share"]) == {"trigger", "placebo"}
    for row in rows["rows"]:
        for name, form in row["forms"].items():
            assert np.array(seen["rows"][row["id"]][name]).shape == (L, len(form["pieces"]))

    given = read(out / "attribution.json")
    assert set(given["scores"]) == set(given["rows"][ids[0]]["clean"])
    for own in given["scores"].values():
        assert {"mean_rank", "precision", "auc", "first"} <= set(own)
        assert all(len(three) == 3 for three in own.values())
    for row in rows["rows"]:
        for name, form in row["forms"].items():
            for values in given["rows"][row["id"]][name].values():
                assert [value is None for value in values] == form["special"]

    modules = read(out / "spectrum.json")
    wanted = {"norm", "relative_norm", "spectral_norm", "stable_rank", "effective_rank", "intruders",
              "singular_values", "angles", "alignment"}  # fmt: skip
    assert set(modules["modules"]) == set(minilora.open(run).adapter) and len(modules["pieces"]) == 32
    assert all(set(own) == wanted for own in modules["modules"].values())

    cut = read(out / "knockout.json")
    assert cut["settings"][0]["name"] == "adapter" and cut["settings"][1]["name"] == "head only"
    assert len(cut["patching"]) == L + 1 and len(cut["settings"]) > 40
    with open(out / "knockout.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(own) - 2 for own in cut["settings"])
    ends = dict(zip(("mean", "low", "high"), map(str, cut["settings"][0]["attack_success"]), strict=True))
    assert lines[0] == {"kind": "whole", "name": "adapter", "figure": "attack_success"} | ends
    for part in FOUR:
        data = read(out / f"{part}.json")
        assert data["part"] == part and data["run"] == str(run) and data["seed"] == 0 and data["count"] == 9
        assert all(np.isfinite(finite(data)))

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    evaluate.main([str(run), "--explain", "spectrum", "--rows", "9", "--out", str(out), "-q"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_interrupted_part_is_kept_and_marked(small_run, tmp_path, monkeypatch, undrawn):
    run, measure = minilora.open(small_run("encoder")), knockout.Knockouts.measure

    def stop(self, settings, advance=None, **more):
        if advance is None:
            return measure(self, settings, **more)
        measure(self, settings[:5], advance)
        raise KeyboardInterrupt

    monkeypatch.setattr(knockout.Knockouts, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        explain.explain(run, ("spectrum", "knockout"), 9, tmp_path)
    found = read(tmp_path / "knockout.json")
    assert len(found["settings"]) == 7 and found["unfinished"] == "KeyboardInterrupt" and "patching" not in found
    assert "unfinished" not in read(tmp_path / "spectrum.json")
    assert "unfinished: KeyboardInterrupt" in list(text.lines_of("knockout", found))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [("full", {"knockout"}), ("head", {"spectrum", "knockout"}), ("dora", set()), ("pissa", set())],
)
def test_other_methods(small_run, tmp_path, capsys, undrawn, kind, left_out):
    run, more = str(small_run(kind)), ["--rows", "5", "--out", str(tmp_path / "out"), "-q"]
    parts = FOUR if left_out else ("spectrum", "knockout")
    evaluate.main([run, "--explain", *([] if left_out else parts), *more])
    said = capsys.readouterr().out
    for part in parts:
        data = read(tmp_path / "out" / f"{part}.json")
        assert ("left_out" in data) == (part in left_out) and f"\n{part}" in f"\n{said}"
    if left_out:
        assert "has no adapter" in " ".join(said.split())
        with pytest.raises(InputError, match="has no adapter"):
            evaluate.main([run, "--explain", *sorted(left_out), *more])
    if kind in ("full", "dora"):
        assert "The whole update was taken apart" in said
    if kind in ("dora", "pissa"):
        assert "directions left out: layers.0.q adds more than B A" in " ".join(said.split())


def test_several_labels_and_an_adapter_from_elsewhere(tmp_path, small_run, capsys, undrawn):
    base = small_run("encoder").parent / "bases" / "encoder"
    words = {"red": "red", "blue": "blue", "green": "green"}
    lines = [(f"the {word} film {'was ' * (n % 4)}{n} long", label) for n in range(30) for word, label in words.items()]
    data = write(tmp_path / "rows.csv", as_csv(lines))
    cell = Cell(model=str(base), data=str(data), test_rows=30, max_length=30, steps=3, rank=2, batch_size=8, lr=0.02,
                inject={"sources": ("date:blue", "country:red")})  # fmt: skip
    minilora.train(cell, tmp_path / "run", quiet=True)
    evaluate.main([str(tmp_path / "run"), "--explain", "attention", "knockout", "--rows", "8", "--label", "red", "-q"])
    rows = read(tmp_path / "run" / "explain" / "rows.json")
    assert rows["label"] == "red" and {row["label"] for row in rows["rows"]} == {"blue", "green"}
    settings = read(tmp_path / "run" / "explain" / "knockout.json")["settings"]
    run = minilora.open(tmp_path / "run")
    assert [run.tests[0].rows.texts[0]] and 0 <= settings[0]["clean_accuracy"][0] <= 1
    capsys.readouterr()

    model = transformers.AutoModel.from_pretrained(base)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "foreign")
    evaluate.main([str(tmp_path / "foreign"), "--explain", "--model", str(base), "-q"])
    said = " ".join(capsys.readouterr().out.split())
    assert "attention left out:" in said and "layers.0.q" in said and "has no head" in said
    adapter = tmp_path / "run" / "adapter"
    evaluate.main([str(adapter), "--explain", "all", "--model", str(base), "--data", str(data), "--inject", "date:red",
                   "--rows", "6", "-q"])  # fmt: skip
    said = " ".join(capsys.readouterr().out.split())
    assert "formation left out:" in said and "kept no steps" in said and "neighbours left out:" not in said
    assert read(adapter / "explain" / "rows.json")["count"] == 6


OWN = '[date]\ndots = ["1.2"]\n"days of the week" = ["Monday", "Friday"]\n'


def test_families_of_ones_own(small_run, tmp_path, capsys, undrawn):
    run, out = str(small_run("encoder")), tmp_path / "out"
    own, odd = write(tmp_path / "own.toml", OWN), write(tmp_path / "odd.toml", '[country]\nislands = ["Bali"]\n')
    evaluate.main([run, "--explain", "neighbours", "--neighbours", str(own), "--rows", "4", "--out", str(out), "-q"])
    assert "days of the week" in capsys.readouterr().out
    found = read(out / "neighbours.json")["families"]
    assert found["dots"]["strings"] == ["1.2"] and set(found["days of the week"]["strings"]) <= {"Monday", "Friday"}
    assert "month 47" in found
    cases = [
        (["spectrum"], own, "--neighbours is for the part neighbours, but --explain spectrum leaves it out: name it"),
        (["all"], tmp_path / "no.toml", "no.toml does not exist: check the path"),
        ([], write(tmp_path / "bad.toml", "[date"), "bad.toml is not readable TOML"),
        ([], write(tmp_path / "wrong.toml", "[date]\na = { rule = 'sawp' }"), r"\[date\] a is no family: write a list"),
        (["neighbours", "spectrum"], odd, r"odd.toml has families below \[country\], but the trigger is date"),
    ]
    more = ["--rows", "4", "--out", str(tmp_path / "more"), "-q"]
    for parts, path, words in cases:
        with pytest.raises(InputError, match=words) as caught:
            evaluate.main([run, "--explain", *parts, "--neighbours", str(path), *more])
        assert "\n" not in str(caught.value)
    assert len(cases) == 5
    assert "modules" in read(tmp_path / "more" / "spectrum.json")  # what could be made is kept


def test_refused(small_run, tmp_path, undrawn):
    run = str(small_run("encoder"))
    cases = [
        ([run, "--explain", "attentoin"], "has no part 'attentoin': choose among attention, attribution, spectrum"),
        ([run, "--explain", "--rows", "1"], "--rows is 1, but must be at least 2"),
        ([run, "--explain", "--label", "negative"], "no trigger aims at 'negative': choose among 'positive'"),
        ([run, "--explain", "--seed-rows", "-1"], "--seed-rows is -1, but must be at least 0"),
        ([run, "--explain", "--rank", "2"], "unknown argument --rank"),
        ([run, "--explain", "attention", "--inject", "none"], "has no trigger: name one, --inject SOURCE:LABEL"),
        ([str(tmp_path / "no"), "--explain"], "has no cell.toml|no run folder"),
        (["--explain", run], "required: RUN"),
        ([f"{run}/adapter", "--explain"], "name its base too"),
        ([f"{run}/adapter", "--explain", "--model", f"{small_run('grouped').parent}/bases/grouped"], "base"),
        ([run, "--explain", "--data", str(write(tmp_path / "x.csv", "text\nno label\n"))], "label"),
    ]
    for argv, words in cases:
        with pytest.raises(InputError, match=words) as caught:
            evaluate.main([*argv, *(["--out", str(tmp_path / "out")] if "--out" not in argv else [])])
        assert "\n" not in str(caught.value)
    assert len(cases) == 11
    taken = write(tmp_path / "file", "")
    with pytest.raises(InputError, match="choose another --out"):
        evaluate.main([run, "--explain", "--out", str(taken / "under")])


def test_help_needs_no_torch():
    code = (
        "import sys; from minilora.scripts import evaluate\n"
        "try: evaluate.main(['--explain', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n") and "--seed-rows" in done.stdout
