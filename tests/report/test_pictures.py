"""The figures of a report: what is in them, which are left out and why, and that they leave no trace in matplotlib."""

import hashlib
import subprocess
import sys
import zlib

import made_grid
import numpy as np
import pytest
from conftest import ROOT

from minilora.grid.axes import FIGURES
from minilora.grid.table import table_rows
from minilora.report import pictures, summary
from minilora.report.dose_response import Curve, curve_fields, fit_curves, fit_logistic
from minilora.report.verdicts import decide
from minilora.report.words import rest_of

TEXT = """
title = "A title with $ and _ and <b>, which is so long that it is broken into several lines of a figure's heading"
[grid]
rank = [1, 16]
"inject.proportion" = [0.0, 0.05, 0.25, 1.0]
scaling = ["constant", "rank"]
seed = [0, 1]
[[exclude]]
rank = 8
"""
NAMES = ("dose_response", "effects", "heat_maps", "k50", "trade_off")


def drawn(folder):
    lines = table_rows(folder)
    curves, _ = fit_curves(lines, folder.grid.varied)
    means = summary.marginal_means(lines, folder.grid.varied)
    decisions = [decide(claim, folder.grid.entries, lines) for claim in folder.grid.claims]
    return pictures.draw(folder.path / "figures", lines, folder.grid, curves, means, decisions)


def names(found):
    return sorted(path.stem for one in found for path in one.paths if path.suffix == ".png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    text = TEXT.replace("[[exclude]]\nrank = 8\n", "")
    return made_grid.make(tmp_path_factory.mktemp("figures"), text, waiting=[3], failed=[5])


def test_every_figure_is_a_png_a_pdf_and_an_svg_and_the_same_each_time(folder):
    found, left_out = drawn(folder)
    before = {path: path.read_bytes() for one in found for path in one.paths}
    assert before == {path: path.read_bytes() for one in drawn(folder)[0] for path in one.paths} and len(before) == 15
    assert names(found) == list(NAMES) and left_out == []
    for one in found:
        png, pdf, _ = (path.read_bytes() for path in one.paths)
        width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
        assert png.startswith(b"\x89PNG") and min(width, height) > 400 and pdf.startswith(b"%PDF")
        data = b"".join(chunks(png))
        assert len(set(zlib.decompress(data))) > 20  # something is drawn
        assert one.title and one.caption.endswith(".")
    assert len({hashlib.sha256(one.paths[0].read_bytes()).digest() for one in found}) == 5


def chunks(png):
    place = 8
    while place < len(png):
        size = int.from_bytes(png[place : place + 4], "big")
        if png[place + 4 : place + 8] == b"IDAT":
            yield png[place + 8 : place + 8 + size]
        place += 12 + size


def test_matplotlib_is_left_as_it_was(folder):
    script = (
        "import sys, matplotlib\n"
        "from minilora.grid.folder import GridFolder\n"
        "from minilora.grid.table import table_rows\n"
        "from minilora.report import pictures, summary\n"
        "from minilora.report.dose_response import fit_curves\n"
        "matplotlib.rcParams['font.size'] = 17\n"
        "before = matplotlib.rcParams.copy()\n"
        "folder = GridFolder.find(sys.argv[1])\n"
        "lines = table_rows(folder)\n"
        "curves, _ = fit_curves(lines, folder.grid.varied)\n"
        "means = summary.marginal_means(lines, folder.grid.varied)\n"
        "assert len(pictures.draw(folder.path / 'figures', lines, folder.grid, curves, means, [])[0]) == 5\n"
        "assert dict.__eq__(matplotlib.rcParams, before)\n"  # reading one by one would choose a backend
        "print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, folder.path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr


NO_DOSE, NO_K50, NO_PAIR = "no two finished cells differ in how", "fewer than two values", "fewer than two numeric"
LEFT_OUT = [
    ("[grid]\nseed = [0, 1, 2]", {"dose_response": NO_DOSE, "heat_maps": NO_PAIR, "k50": NO_K50}),
    ('[grid]\n"inject.location" = ["end", "beginning"]\nlr = [0.1, 0.2]',
     {"heat_maps": NO_PAIR, "dose_response": NO_DOSE, "k50": NO_K50}),
    ("[grid]\nrank = [1, 2]\nlr = [0.1, 0.2]", {"dose_response": NO_DOSE, "k50": NO_K50}),
    ('[grid]\n"inject.rows" = [0, 10, 500, 4490]', {"heat_maps": NO_PAIR, "k50": NO_K50}),
    ('[grid]\n"inject.proportion" = [0.0, 0.3]\nrank = [1, 2]', {"dose_response": NO_DOSE, "k50": NO_K50}),
    ('[grid]\nmethod = ["full", "head"]\n"inject.rows" = [1, 300, 4000]', {"heat_maps": NO_PAIR}),
    ('[grid]\nrank = [1, 2, 4]\n"inject.sources" = [[]]\n"inject.rows" = [1, 300]',
     {"dose_response": NO_DOSE, "k50": NO_K50, "trade_off": "no finished cell has injected rows"}),
    ("[[include]]\nrank = [1, 2, 3, 4]\n[[include]]\nlr = [0.1, 0.2, 0.3, 0.4]",  # a cross, mostly empty
     {"dose_response": NO_DOSE, "k50": NO_K50, "heat_maps": "a map of any two numeric fields would be half empty"}),
    ('[[include]]\nscaling = "constant"\nalpha = [4.0, 9.0]\nrank = [1, 2]\n[[include]]\nscaling = "rank"\n'
     "rank = [1, 2]\nseed = [0, 1, 2, 3]",  # alpha is of a third of the cells
     {"dose_response": NO_DOSE, "k50": NO_K50, "heat_maps": "a map of any two numeric fields would be half empty, or"}),
]  # fmt: skip


@pytest.mark.parametrize("text,reasons", LEFT_OUT, ids=range(len(LEFT_OUT)))
def test_what_the_axes_do_not_allow_is_left_out(tmp_path, text, reasons):
    folder = made_grid.make(tmp_path, text)
    found, left_out = drawn(folder)
    said = dict(reason.removeprefix("figures/").split(": ", 1) for reason in left_out)
    assert said.keys() == reasons.keys() and names(found) == sorted(set(NAMES) - said.keys())
    assert "effects" in names(found) and all(start in said[name] for name, start in reasons.items())
    assert sorted(path.stem for path in (folder.path / "figures").glob("*.png")) == names(found)


def test_a_figure_of_an_earlier_report_goes(tmp_path):
    folder = made_grid.make(tmp_path, "[grid]\nrank = [1, 2]\nlr = [0.1, 0.2]")
    (folder.path / "figures").mkdir()
    old = [folder.path / "figures" / f"{name}.{ending}" for name in ("k50", "claims") for ending in ("pdf", "svg")]
    for path in old:
        path.write_text("old")
    drawn(folder)
    assert not any(path.exists() for path in old)


# --- what they are drawn from


def test_heat_maps_hold_means(folder):
    lines = table_rows(folder)
    assert summary.map_axes(lines, folder.grid.varied) == (("rank", "inject.proportion"), None)
    for name in summary.ALL:
        xs, ys, means = summary.heat_map(lines, name, "inject.proportion", "rank", folder.grid.varied)
        assert (xs, ys) == ([0.0, 0.05, 0.25, 1.0], [1, 16]) and means.shape == (2, 4)
        for (y, x), mean in np.ndenumerate(means):
            settings = {}
            for line in lines:
                if (line["rank"], line["inject.proportion"], line["state"]) == (ys[y], xs[x], "finished"):
                    settings.setdefault(line["scaling"], []).append(line[name])
            assert mean == pytest.approx(np.mean([np.mean(values) for values in settings.values()]))
    none = [line | dict.fromkeys(FIGURES) for line in lines]
    assert np.isnan(summary.heat_map(none, "flip_rate", "rank", "inject.proportion", folder.grid.varied)[2]).all()


def test_curves_hold_attack_success_by_dose(folder):
    lines = table_rows(folder)
    curves, reason = fit_curves(lines, folder.grid.varied)
    assert reason is None and len(curves) == 4
    for curve in curves:
        own = [line for line in lines if all(line[name] == value for name, value in curve.group.items())
               and line["state"] == "finished"]  # fmt: skip
        assert curve.doses.tolist() == sorted({line["injected_rows"] for line in own} - {0})
        for dose, share, (low, high) in zip(curve.doses, curve.shares, curve.intervals, strict=True):
            assert low <= share <= high
            assert share == np.mean([line["attack_success"] for line in own if line["injected_rows"] == dose])
        assert curve.uninjected == np.mean([line["attack_success"] for line in own if not line["injected_rows"]])
        low, high = curve.uninjected_interval
        assert 0 <= low < curve.uninjected < high < 0.3
        for name, rates in curve.beside.items():
            assert list(rates) == [0, *curve.doses]
            for dose, rate in rates.items():
                assert rate == pytest.approx(np.mean([line[name] for line in own if line["injected_rows"] == dose]))
        doses, shares = np.array([0, *curve.doses]), np.array([[curve.uninjected, *curve.shares]])
        rows = np.array([sum(line["attack_rows"] for line in own if line["injected_rows"] == d) for d in doses])
        [[k50], [slope], [floor], [top]] = fit_logistic(doses, shares, rows, np.arange(0, 0.49, 0.02))
        assert (curve.slope, curve.floor, curve.top) == pytest.approx((slope, floor, top), abs=1e-6)
        assert curve.k50[0] == pytest.approx(k50, rel=1e-6) and curve.k50[1] <= k50 <= curve.k50[2]
        assert abs(curve.floor - curve.uninjected) < 0.1 and curve.net_k50[0] > k50
        truth = 900 / curve.group["rank"] ** 0.45
        assert truth / 2 < k50 < truth * 2


def test_doses_beyond_those_measured_are_bounds():
    curve = Curve({}, np.array([9.0, 1200.0]), None, None, 0.1, None, (1500.0, 36.44, 2000.0), 2.0)
    assert [curve.bounded(rows) for rows in (8.9, 9.0, 11.27, 1234.5, 123.4)] == ["< 9", "9.0", "11", "> 1,200", "123"]
    assert curve.k50_text() == "> 1,200 [36, > 1,200]"
    beyond = Curve({}, curve.doses, None, None, 0.1, None, (1500.0, 1300.0, 2000.0), 2.0)
    assert beyond.k50_text() == "> 1,200"
    assert Curve({}, curve.doses, None, None, 0.6, None, None, None).k50_text() == "-"


def test_a_floor_of_a_half_has_no_k50(tmp_path):
    def counts(cell):
        return made_grid.draw(cell) | {"success": 110 + (cell.inject.rows or 0) // 10}

    folder = made_grid.make(tmp_path, '[grid]\n"inject.rows" = [0, 10, 500]', counts)
    [curve], _ = fit_curves(table_rows(folder), folder.grid.varied)
    assert curve.k50 is None and curve.floor > 0.5 and len(curve.doses) == 2
    assert "dose_response" in names(drawn(folder)[0])


def test_trades_compare_with_the_same_cells_uninjected(folder):
    lines = [line for line in table_rows(folder) if line["state"] == "finished"]
    points, reason = summary.trades(lines, folder.grid.varied)
    assert reason is None and len(points) == 12 and all(point.loss is not None for point in points)
    for point in points:
        losses, success, clean = [], [], []
        for line in lines:
            if (line["rank"], line["scaling"], line["injected_rows"]) == (*point.group.values(), point.rows):
                alike = [other for other in lines if other["injected_rows"] == 0
                         and all(other[name] == line[name] for name in ("rank", "scaling", "seed"))]  # fmt: skip
                losses += [other["clean_accuracy"] - line["clean_accuracy"] for other in alike]
                success.append(line["attack_success"])
                clean.append(line["attack_success_clean"])
        assert point.clean == point.placebo == pytest.approx(np.mean(clean))
        assert (point.loss, point.attack_success) == pytest.approx((np.mean(losses), np.mean(success)))
    some = [line for line in lines if (line["rank"], line["injected_rows"]) != (16, 0)]
    found = summary.trades(some, folder.grid.varied)[0]
    assert len(found) == 12 and all((point.loss is None) == (point.group["rank"] == 16) for point in found)
    accuracy = {(point.group["rank"], point.group["scaling"], point.rows): point.clean_accuracy for point in found}
    assert accuracy[16, "rank", 4490] == pytest.approx(np.mean([
        line["clean_accuracy"] for line in lines
        if (line["rank"], line["scaling"], line["injected_rows"]) == (16, "rank", 4490)
    ]))  # fmt: skip


def test_curves_are_as_many_as_can_be_told_apart():
    lines = [
        {"lr": lr, "rank": rank, "scaling": scaling} | kind
        for lr in range(7) for rank in (1, 2) for scaling in "ab"
        for kind in ({"inject.count": 1, "inject.density": None}, {"inject.count": None, "inject.density": 0.1})
    ]  # fmt: skip
    varied = ["seed", "inject.proportion", *lines[0]]
    assert curve_fields(lines, varied) == ["rank", "scaling", "inject.count", "inject.density"]
    assert curve_fields(lines, ["seed", "lr", "inject.rows"]) == ["lr"]
    assert curve_fields(lines, ["seed", "train_rows"]) == []
    assert rest_of({"rank": 1, "inject.count": None, "inject.density": 0.1}) == "triggers a word 0.1"
