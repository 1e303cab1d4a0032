"""report.html of a grid: tables, figures, links to its cells."""

import base64
import re
import shutil

import made_grid
import made_run
import pytest
from test_write import TEXT, TWO, Page

from minilora import files
from minilora.fields import value_of
from minilora.grid.axes import word
from minilora.report import grid_page
from minilora.report.write import write_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """258 cells, of which two failed and one waits; the first one has a page."""
    found = made_grid.make(tmp_path_factory.mktemp("report"), TEXT, failed=[1, 7], waiting=[33])
    files.write_text(found.run_path(found.grid.entries[0]) / "report.html", "")
    write_report(found)
    return found


def read(folder):
    """(The page's source, its `Page`, its words)."""
    source = (folder.path / "report.html").read_text(encoding="utf-8")
    found = Page(source)
    return source, found, " ".join(" ".join(found.text).split())


def test_the_page(folder):
    source, found, said = read(folder)
    assert not {"script", "link", "iframe", "b>"} & set(found.tags)
    for name, value in found.attributes:
        assert name not in ("srcset", "onload") and not (
            name == "src" and not value.startswith("data:image/png;base64,")
        )
    for words in (
        "Rank & <proportion>", "Figure 1 <of> arXiv 2506.11402", "255 finished", "2 failed", "1 waiting",
        "is not finished", "One <token> & 100% of it_ is | enough", "the loss of <b>7</b> & all", "movie-snippets",
        "0.003", "2.13", "<any>", f"python evaluate.py {folder.path}", "python train.py --grid grid.toml",
        '[[claim]] name = "one"', "Marginal means", "attack success without the trigger", "and 55 more, in table.csv",
    ):  # fmt: skip
        assert words in said, words


def test_each_title_is_there_once(folder):
    _, found, _ = read(folder)
    assert found.titles[:4] == ["Rank & <proportion>", "Claims", "Marginal means",
                                "Injected rows at which half of an attack succeeds"]  # fmt: skip
    assert len(found.titles) == len(set(found.titles)) >= 16


def test_a_figure_is_its_svg_or_else_its_png(tmp_path):
    folder = made_grid.make(tmp_path, TWO)
    write_report(folder)
    for path in (folder.path / "figures").glob("*.svg"):
        path.unlink()
    names = sorted(path.stem for path in (folder.path / "figures").glob("*.png"))
    paths = [folder.path / "figures" / f"{name}.png" for name in names]
    drawn = [type("Drawn", (), {"title": path.stem, "paths": (path,)}) for path in paths]
    assert len(drawn) >= 1
    for one, path in zip(drawn, paths, strict=True):
        data = re.search('base64,([^"]+)"', grid_page.picture(one))[1]
        assert base64.b64decode(data) == path.read_bytes()
        path.with_suffix(".svg").write_text('<svg width="3pt"><text>&lt;b&gt;</text></svg>')
        assert grid_page.picture(one) == '<svg width="3pt"><text>&lt;b&gt;</text></svg>'


def test_links_lead_to_cells_and_files(folder):
    _, found, _ = read(folder)
    links = [value for name, value in found.attributes if name == "href" and not value.startswith("#")]
    first, second = folder.grid.entries[0].name, folder.grid.entries[2].name
    assert f"cells/{first}/report.html" in links and f"cells/{second}" in links and "table.csv" in links
    assert len([link for link in links if link.startswith("cells/")]) == grid_page.MOST + 2
    assert all((folder.path / link).exists() for link in links)


def test_attack_success_stands_beside_its_clean_and_placebo_rates(folder):
    for name, heads in (("marginals", 13), ("claims", 12)):
        head, _, *lines = [line for line in (folder.path / f"{name}.md").read_text().splitlines() if line[:1] == "|"]
        heads_found = [cell.strip() for cell in head.strip("|").split("|")]
        assert len(heads_found) == heads and len(lines) >= 2
        assert any("without the trigger" in one for one in heads_found)
        assert any("under the placebo" in one for one in heads_found)
        cells = [float(one.split()[0]) for one in lines[0].split("|")[5:7]] if name == "marginals" else []
        assert cells in ([], [pytest.approx(0.1, abs=0.02), pytest.approx(0.54, abs=0.02)])
    claim = lines[0].replace(r"\|", "").split("|")
    values = [float(claim[place].split()[0]) for place in (4, 5, 6)]  # found, clean, placebo
    assert values[0] > 0.9 and values[1] == pytest.approx(0.1, abs=0.05) and values[1] == values[2]
    assert [one.strip() for one in lines[1].split("|")[5:7]] == ["-", "-"]  # a claim of clean accuracy


def test_settings_that_cells_share(folder):
    alike, differing = grid_page.settings(folder.grid)
    alike = dict(alike)
    assert alike["lr"] == "0.003" and alike["data"] == "movie-snippets" and not set(alike) & set(folder.grid.varied)
    assert "alpha" in differing and "init" in differing and "dropout" in differing
    for name, value in alike.items():
        assert all(str(word(value_of(entry.cell, name))) == value for entry in folder.grid.entries)


# --- in a browser


def pages(folder, path):
    """The files of a grid's page, and of two runs' pages, one of them with names and texts that look like HTML."""
    from minilora.report.run_page import write_page

    hostile = "<script>alert(1)</script></script><b onclick='x'>"
    grid = path / "grid"
    shutil.copytree(folder.path, grid)
    made_run.make(path / "run", flipped=3)
    made_run.make(path / "hostile", labels=("none", hostile, "word " * 30), text=f"{hostile} " + "long" * 200)
    return [grid / "report.html", *(write_page(path / name)[0] for name in ("run", "hostile"))]


def test_pages_in_a_browser(folder, tmp_path):
    """No error, no request but the file, nothing wider than the window, no interval over two lines."""
    from browser import Browser, need_browser

    need_browser()
    looks = [(width, dark) for width in (400, 1400) for dark in (False, True)]
    seen, grounds = 0, {}
    with Browser() as browser:
        for page in pages(folder, tmp_path):
            for width, dark in looks:
                browser.look(width, 900, dark)
                browser.open(page)
                browser.run("document.querySelectorAll('details').forEach(one => one.open = true)")
                assert browser.console() == []
                asked = [address for address in browser.requests() if not address.startswith("data:")]
                assert asked == [page.as_uri()]
                assert browser.run("return [document.documentElement.scrollWidth, innerWidth]") == [width, width]
                colours = browser.run("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
                grounds[dark] = grounds.get(dark, set()) | {tuple(colours)}
                heights = browser.run("""
                    return [...document.querySelectorAll('td')].filter(cell => /\\[.*, .*\\]/.test(cell.innerText))
                        .map(cell => { const range = document.createRange(); range.selectNodeContents(cell);
                                       return new Set([...range.getClientRects()].map(one => one.top)).size })""")
                assert len(heights) >= 6 and set(heights) == {1}
                seen += 1
    assert seen == 12 and grounds == {False: {("rgb(27, 27, 27)", "rgb(255, 255, 255)")},
                                      True: {("rgb(236, 236, 236)", "rgb(21, 21, 21)")}}  # fmt: skip


def test_the_browser_sees_what_goes_wrong(tmp_path):
    """An error of a script, a request and a click are seen, so that their absence says something."""
    from browser import Browser, need_browser

    need_browser()
    page = tmp_path / "page.html"
    page.write_text("""<input><button onclick="document.title = document.querySelector('input').value">set</button>
        <img src="missing.png"><script>console.error("said"); unknown()</script>""")
    with Browser() as browser:
        browser.open(page)
        said = browser.wait("return document.readyState == 'complete'") and browser.console()
        assert any("said" in text for _, text in said) and any("unknown" in text for _, text in said)
        assert browser.requests() == [page.as_uri(), (tmp_path / "missing.png").as_uri()]
        browser.type("input", "a word")
        browser.click("button")
        assert browser.run("return document.title + arguments[0]", "!") == "a word!"
        with pytest.raises(RuntimeError, match="no such element"):
            browser.click("#none")
