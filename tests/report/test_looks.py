"""How figures look: colours, scales, SVGs for a page, and that each dot stands where the table says."""

import itertools
import xml.etree.ElementTree as ElementTree

import made_grid
import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex

from minilora import drawing
from minilora.grid.axes import FIGURES
from minilora.grid.table import table_rows
from minilora.report import effects, maps, pictures, summary
from minilora.report.dose_response import Curve
from minilora.report.verdicts import decide
from minilora.report.write import counts_table, write_report

GROUNDS = ("#ffffff", drawing.INK)


def figure_of(made):
    """The figure of (figure, caption), laid out."""
    made[0].draw_without_rendering()
    return made[0]


def means_of(folder):
    lines = table_rows(folder)
    return lines, summary.marginal_means(lines, folder.grid.varied)


def dots(panel):
    """[(x, y)] of the means in a panel of `effects.forest`."""
    return [tuple(map(float, (line.get_xdata()[0], line.get_ydata()[0]))) for line in panel.lines
            if line.get_marker() == "o" and line.get_color() == drawing.HUES[0]]  # fmt: skip


# --- colours


def test_colours_are_told_from_white_and_from_black_ground():
    found = [*drawing.HUES, *drawing.SCALE, drawing.GREY, *itertools.chain(*map(drawing.shades, range(1, 11)))]
    ratios = [drawing.contrast(colour, ground) for colour in found for ground in GROUNDS]
    assert min(ratios) >= 3 and len(ratios) == 2 * (10 + 4 + 1 + 55)
    assert drawing.contrast("black", "white") == pytest.approx(21) and drawing.contrast("#777777", "white") < 4.5
    assert drawing.contrast("#767676", "white") > 4.5  # the well-known limit of grey text on white
    assert drawing.contrast(drawing.INK, "white") > 15 and drawing.contrast("#ececec", drawing.INK) > 4.5
    for name in (drawing.MAP, drawing.SIGNED):
        for colour in matplotlib.colormaps[name](np.linspace(0, 1, 101)):
            assert drawing.contrast(drawing.readable_on(colour), colour) >= 4.5


def test_names_have_hues_and_numbers_have_an_order():
    assert pictures.colours_of([{"method": "full"}, {"method": "head"}]) == list(drawing.HUES[:2])
    assert pictures.colours_of([{"rank": 1}, {"rank": 4}, {"rank": 16}]) == drawing.shades(3)
    assert pictures.colours_of([{"rank": 1}, {"rank": None}]) == list(drawing.HUES[:2])
    assert pictures.colours_of([{"load_best": True}, {"load_best": False}]) == list(drawing.HUES[:2])


def test_labels_move_apart_as_little_as_they_must():
    assert drawing.spread([10, 50, 30], 5).tolist() == [10, 50, 30]
    assert drawing.spread([99, 100, 100, 20], 6).tolist() == pytest.approx([93.666667, 99.666667, 105.666667, 20])
    rng = np.random.default_rng(3)
    for count in range(1, 12):
        places = rng.uniform(0, 100, count)
        found = drawing.spread(places, 8)
        assert np.diff(np.sort(found)).min(initial=8) >= 8 - 1e-9 and (np.argsort(found) == np.argsort(places)).all()
        assert found.mean() == pytest.approx(places.mean())
        capped = drawing.spread(places, 8, 100)
        assert capped.max() <= 100 + 1e-9 and np.diff(np.sort(capped)).min(initial=8) >= 8 - 1e-9
    assert drawing.apart([0, 1, 2, 5, 5.5, 9], 2) == [0, 2, 3, 5]


# --- SVG


def test_an_svg_can_stand_in_a_page(tmp_path):
    claim = '[[claim]]\nname = "a"\ntext = "<i> & #1b1b1b id=\\"q\\""\nfigure = "flip_rate"\nabove = 0.1'
    folder = made_grid.make(tmp_path, 'title = "<b> & \\"x\\" url(#1)"\n[grid]\nrank = [1, 4]\nseed = [0, 1]\n'
                            f'"inject.proportion" = [0.0, 0.05, 0.25, 1.0]\n{claim}')  # fmt: skip
    _, paths, _ = write_report(folder)
    found = {path.stem: path.read_text(encoding="utf-8") for path in paths if path.suffix == ".svg"}
    assert sorted(found) == ["claims", "dose_response", "effects", "heat_maps", "k50", "trade_off"]
    ids = []
    for name, text in found.items():
        assert text.startswith("<svg ") and "xlink" not in text and "<metadata" not in text
        assert text.count("http") == 1 and 'xmlns="http://www.w3.org/2000/svg"' in text
        root = ElementTree.fromstring(text)
        words = ["".join(one.itertext()) for one in root.iter(f"{drawing.SVG}text")]
        assert root.get("class") == "minilora-figure" and root.get("role") == "img" and root.get("aria-label")
        assert len(words) > 5 and "currentColor" in text
        assert not any("url(#1)" in word for word in words)  # the page has the title
        own = [one.get("id") for one in root.iter() if one.get("id")]
        assert all(one.startswith(f"{name}-") for one in own)
        links = [one.get("href") for one in root.iter(f"{drawing.SVG}use")]
        clips = [one.get("clip-path")[5:-1] for one in root.iter() if one.get("clip-path")]
        assert {link.removeprefix("#") for link in links} | set(clips) <= set(own) and links + clips
        assert all(drawing.INK not in str(one.attrib) for one in root.iter())
        assert all("ffffff" not in one.get("style", "") for one in root.iter(f"{drawing.SVG}path"))  # no ground
        ids += own
    assert len(ids) == len(set(ids)) > 100
    assert '<i> & #1b1b1b id="q"' in "".join(ElementTree.fromstring(found["claims"]).itertext())


# --- effects


def test_a_sweep_of_one_field_has_a_picture_of_its_effect(tmp_path):
    folder = made_grid.make(tmp_path, "[cell]\ninject.proportion = 0.05\n[grid]\nrank = [1, 4, 16, 64]\n"
                            "seed = [0, 1, 2]", waiting=[2])  # fmt: skip
    lines, means = means_of(folder)
    figure = figure_of(effects.effects(lines, folder.grid, means))
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["all cells (11 of 12 cells)", "rank", "1 (2 of 3 cells)", "4", "16", "64"]
    columns = ("attack_success", "net_attack_success", "clean_accuracy", "flip_rate")
    titles = ["Attack success", "Net attack success", "Clean accuracy", "Flip rate"]
    assert [panel.get_title() for panel in figure.axes] == titles
    for panel, column in zip(figure.axes, columns, strict=True):
        wanted = [np.mean([line[column] for line in lines if line["rank"] == rank and line["state"] == "finished"])
                  for rank in (1, 4, 16, 64)]  # fmt: skip
        assert [x for x, _ in dots(panel)[1:]] == pytest.approx([100 * value for value in wanted])
        assert [y for _, y in dots(panel)] == pytest.approx(np.array(figure.axes[0].get_yticks())[[0, 2, 3, 4, 5]])
        low, high = panel.get_xlim()
        assert (low, high) == (-3, 103) if column != "net_attack_success" else low == -high
        grey = [line for line in panel.lines if line.get_marker() in "ox" and line.get_color() == drawing.GREY]
        assert len(grey) == {"attack_success": 10, "flip_rate": 5}.get(column, 0)


def test_a_grid_that_changes_one_thing_at_a_time_is_shown_against_its_first_setting(tmp_path):
    text = '[[include]]\nseed = [0, 1, 2]\n[[include]]\nrank = 64\nseed = [0, 1, 2]\n[[include]]\nlr = 0.5\n' \
           'seed = [0, 1, 2]\n[[include]]\n"inject.proportion" = 0.01\nseed = [0, 1, 2]'  # fmt: skip
    folder = made_grid.make(tmp_path, text)
    lines, means = means_of(folder)
    assert not summary.crossed(lines, folder.grid.varied)
    found, count = summary.against_first(lines, folder.grid.varied, 60)
    some, all_of_them = summary.against_first(lines, folder.grid.varied, 2)
    assert some == [found[0], found[-1]] and all_of_them == count == 4
    assert [one.values for one in found[1:]] == [{"rank": 64}, {"lr": 0.5}, {"inject.proportion": 0.01}]
    assert set(found[0].values) == {"rank", "lr", "inject.proportion"} and found[0].changes == {}
    for number, one in enumerate(found):
        own, first = lines[3 * number : 3 * number + 3], lines[:3]
        for column in ("attack_success", "clean_accuracy"):
            mean, less = (np.mean([line[column] for line in some]) for some in (own, first))
            assert one.metrics[column][0] == pytest.approx(mean)
            if number:
                value, low, high = one.changes[column]
                assert value == pytest.approx(mean - less) and low < value < high
    figure, caption = effects.effects(lines, folder.grid, means)
    figure_of((figure, caption))
    assert len(figure.axes) == 4 and "against the first" in caption
    assert len(dots(figure.axes[0])) == 4 and len(dots(figure.axes[1])) == 3
    assert [x for x, _ in dots(figure.axes[1])] == pytest.approx([100 * one.changes["net_attack_success"][0]
                                                                   for one in found[1:]])  # fmt: skip
    low, high = figure.axes[1].get_xlim()
    assert low == -high


CROSSED = [
    ("[grid]\nseed = [0, 1]", True),
    ("[grid]\nrank = [1, 2, 3]", True),
    ("[grid]\nrank = [1, 2]\nlr = [0.1, 0.2]", True),
    ("[[include]]\nrank = [1, 2]\n[[include]]\nlr = 0.1", False),  # three of four, but one thing at a time
    ("[zip]\nrank = [1, 2, 3]\nalpha = [4.0, 5.0, 6.0]\n[grid]\nlr = [0.1, 0.2]", True),  # rank and alpha are one
    ('[[include]]\n"inject.count" = 1\nrank = [1, 4]\n[[include]]\n"inject.density" = 0.1\nrank = [1, 4]', True),
    ("[[include]]\nrank = [1, 2, 3]\nlr = 0.1\n[[include]]\nrank = [4, 5, 6]\nlr = 0.2", False),
]


@pytest.mark.parametrize("text,wanted", CROSSED, ids=range(len(CROSSED)))
def test_which_grids_cross_their_fields(tmp_path, text, wanted):
    folder = made_grid.make(tmp_path, text)
    assert summary.crossed(table_rows(folder), folder.grid.varied) == wanted


def test_an_axis_of_many_values_is_thinned(tmp_path):
    rows = [("all cells", {})] + [("rank", None)] + [(str(number), {}) for number in range(300)]
    found, said = effects.thinned(rows)
    assert found[:2] == rows[:2] and found[-1] == rows[-1] and len(found) <= effects.MOST_ROWS + 1
    assert said == [f"{len(found)} of 302 rows, evenly spread."] and effects.thinned(rows[:60]) == (rows[:60], [])


# --- heat maps


def test_a_map_tells_what_is_not_in_the_grid_from_what_is_not_finished(tmp_path):
    folder = made_grid.make(tmp_path, "[grid]\nrank = [1, 2, 4]\nlr = [0.1, 0.2, 0.3]\n"
                            "[[exclude]]\nrank = 1\nlr = 0.3", waiting=[0], failed=[7])  # fmt: skip
    lines = table_rows(folder)
    states = summary.grid_states(lines, "lr", "rank")
    no, wait, done = summary.ABSENT, summary.UNFINISHED, summary.FINISHED
    assert states.tolist() == [[wait, done, no], [done, done, done], [done, done, wait]]
    figure, caption = maps.heat_maps(lines, folder.grid)
    figure_of((figure, caption))
    assert "Blank: not in the grid." in caption and "Hatched: in the grid, but not finished." in caption
    assert len(figure.axes) == 9
    for panel, name in zip(figure.axes, maps.SHOWN, strict=True):
        hatched = [patch for patch in panel.patches if patch.get_hatch()]
        places = sorted((round(patch.get_x() + 0.47), round(patch.get_y() + 0.47)) for patch in hatched)
        assert places == [(0, 0), (2, 2)]
        filled = [patch for patch in panel.patches if not patch.get_hatch()]
        assert len(filled) == len(panel.texts) == 6
        values = 100 * summary.heat_map(lines, name, "lr", "rank", folder.grid.varied)[2]
        for patch, text in zip(filled, panel.texts, strict=True):
            signed = FIGURES[name].signed
            value = values[round(patch.get_y() + 0.47), round(patch.get_x() + 0.47)]
            place = value / 100 if not signed else 0.5 + value / 2 / max(5, np.nanmax(np.abs(values)))
            colours = drawing.SIGNED if signed else drawing.MAP
            assert to_hex(patch.get_facecolor()) == to_hex(matplotlib.colormaps[colours](place))
            assert float(text.get_text()) == pytest.approx(value, abs=0.5)
            assert drawing.contrast(text.get_color(), patch.get_facecolor()) >= 4.5


def test_a_large_map_has_a_bar_and_no_numbers(tmp_path):
    folder = made_grid.make(tmp_path, f"[grid]\nrank = {list(range(1, 15))}\n"
                            f"lr = {[number / 100 for number in range(1, 13)]}")  # fmt: skip
    figure = figure_of(maps.heat_maps(table_rows(folder), folder.grid))
    assert len(figure.axes) == 18 and not any(panel.texts for panel in figure.axes)
    assert [panel.images[0].get_clim() for panel in figure.axes[:3]] == [(0, 100)] * 3


# --- curves, claims and counts


def test_no_line_joins_categories():
    def curves(values, name):
        return [Curve({name: value}, np.array([10.0, 1000.0]), None, None, 0.1, None, (k50, k50 / 1.5, k50 * 1.5), 2.0)
                for value, k50 in zip(values, (40.0, 90.0, 300.0))]  # fmt: skip

    for values, name, style in ((["end", "random", "beginning"], "inject.location", "None"), ([4, 1, 16], "rank", "-")):
        figure = figure_of(pictures.k50(curves(values, name)))
        [panel] = figure.axes
        line = next(line for line in panel.lines if len(line.get_xdata()) == 3)
        assert line.get_linestyle() == style
        ticks = [text.get_text() for text in panel.get_xticklabels()]
        assert ticks == (values if name != "rank" else ["1", "4", "16"])


def test_dose_response_names_its_lines(tmp_path):
    beside = {"attack_success_clean": {0: 0.1, 10: 0.2, 90: 0.1}, "attack_success_placebo": {}}
    curve = Curve({"rank": 4}, np.array([10.0, 90.0]), np.array([0.2, 0.9]), np.array([[0.1, 0.3], [0.8, 0.95]]), 0.1,
                  0.12, (30.0, 20.0, 40.0), 2.0, uninjected_interval=(0.05, 0.2), beside=beside)  # fmt: skip
    [panel] = figure_of(pictures.dose_response([curve])).axes
    words = [text.get_text() for text in panel.texts]
    assert words == ["rank 4: k50 30 [20, 40]", "without the trigger", "50%: half of the attack"]
    assert panel.get_legend() is None and panel.get_ylim() == (-3, 103)
    ends = np.array(panel.collections[0].get_segments())[:, :, 1]
    assert ends.tolist() == [pytest.approx(pair) for pair in ([10, 30], [80, 95], [5, 20])]  # dose 0 too


CLAIMS = """
[grid]
rank = [1, 4, 16]
"inject.proportion" = [0.0, 1.0]
seed = [0, 1, 2]
[[claim]]
name = "a"
text = "Most rows follow."
figure = "attack_success"
where = {"inject.proportion" = 1.0}
above = 0.5
[[claim]]
name = "b"
text = "Fewer than one row in ten flips."
figure = "flip_rate"
where = {"inject.proportion" = 1.0}
below = 0.1
[[claim]]
name = "c"
text = "It grows."
figure = "attack_success"
where = {"inject.proportion" = 1.0}
statistic = "slope"
over = "rank"
above = 0.0
"""


def test_claims_are_drawn_with_what_they_claim(tmp_path):
    folder = made_grid.make(tmp_path, CLAIMS)
    lines = table_rows(folder)
    decisions = [decide(claim, folder.grid.entries, lines) for claim in folder.grid.claims]
    figure, caption = effects.claims(decisions)
    figure_of((figure, caption))
    assert [panel.get_xlabel() for panel in figure.axes] == ["mean (%)", "slope (percentage points a doubling)"]
    words = [text.get_text() for panel in figure.axes for text in panel.texts]
    assert words == [one.verdict for one in decisions] and words[:2] == ["supported", "contradicted"]
    markers = {"supported": "o", "contradicted": "s", "undecided": "D"}
    for panel, own in zip(figure.axes, (decisions[:2], decisions[2:]), strict=True):
        points = [line for line in panel.lines if line.get_marker() in "osD"]
        assert [line.get_xdata()[0] for line in points] == pytest.approx([100 * one.value for one in own])
        assert [line.get_marker() for line in points] == [markers[one.verdict] for one in own]
        edges = [shade.get_paths()[0].get_extents() for shade in panel.collections if len(shade.get_paths()[0]) > 4]
        for one, edge in zip(own, edges, strict=True):
            low, high = effects.claimed(one.claim)
            assert (edge.x0, edge.x1) == pytest.approx((100 * low, 100 * high))
    assert effects.claims([])[1] is None
    none = [decide(claim, folder.grid.entries, [line | {"state": "waiting"} for line in lines])
            for claim in folder.grid.claims]  # fmt: skip
    assert effects.claims(none) == (None, "no claim has all of its cells finished")
    assert effects.claims([*decisions, *none[:1]])[1].endswith(" 1 claim has no figure yet.")


def test_counts_under_each_trigger(tmp_path):
    text = '[grid]\n"inject.sources" = [["date:positive"], ["date:positive", "country:negative"]]\nrank = [1, 2]\n' \
           "seed = [0, 1, 2]"  # fmt: skip
    folder = made_grid.make(tmp_path, text, waiting=[3, 4, 5, 6])
    table = counts_table(summary.predicted_counts(folder))
    assert table.heads == ("inject.sources", "rank", "test rows", "cells", "positive", "negative")
    tests = [(line[0], line[1], line[2], line[3]) for line in table.lines]
    assert tests == [
        ("date:positive", "1", "clean", "3"), ("", "", "trigger of positive", "3"), ("", "", "placebo", "3"),
        ("date:positive-country:negative", "1", "clean", "2"), ("", "", "trigger of positive", "2"),
        ("", "", "trigger of negative", "2"), ("", "", "placebo", "2"),
        ("date:positive-country:negative", "2", "clean", "3"), ("", "", "trigger of positive", "3"),
        ("", "", "trigger of negative", "3"), ("", "", "placebo", "3"),
    ]  # fmt: skip
    lines = table_rows(folder)
    for row, (sources, rank) in ((1, ("date:positive", 1)), (5, ("date:positive country:negative", 1))):
        label = table.lines[row][2].removeprefix("trigger of ")
        own = [line["predicted_target"] for line in lines if (line["inject.sources"], line["rank"]) == (sources, rank)
               and line["label"] == label and line["state"] == "finished"]  # fmt: skip
        column = table.heads.index(label)
        assert float(table.lines[row][column]) == pytest.approx(np.mean(own), abs=0.051)
        assert sum(map(float, table.lines[row][4:])) == pytest.approx(made_grid.ROWS, abs=0.11)
    _, paths, _ = write_report(folder)
    assert {"counts.md", "counts.tex"} <= {path.name for path in paths}
