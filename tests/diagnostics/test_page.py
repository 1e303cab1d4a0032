"""explain.html: what stands in it, what is missing, and that nothing from data becomes HTML or a script."""

import base64
import hashlib
import html.parser
import json
import math
import re

import made_explain
import made_run
import pytest

from minilora import files
from minilora.diagnostics import page

HOSTILE = "<script>alert(1)</script> </script><!-- & \"'\x1b[31m\u202e"


class Whole(html.parser.HTMLParser):
    """Checks that tags are balanced, and gathers tags, attributes and scripts [(type, text)]."""

    VOID = {"meta", "link", "!doctype"}

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.titles, self.scripts = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "script":
            self.scripts.append((dict(attributes).get("type", "script"), ""))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open[-1:] == ["h1"]:
            self.titles.append(text)
        if self.open[-1:] == ["script"]:
            kind, before = self.scripts.pop()
            self.scripts.append((kind, before + text))


def read(folder):
    """(The page's `Whole`, the data in it)."""
    path = page.write_page(folder)
    assert path == folder / "explain" / "explain.html"
    found = Whole(path.read_text(encoding="utf-8"))
    assert [kind for kind, _ in found.scripts] == ["application/json", "script"]
    return found, json.loads(found.scripts[0][1])


def test_all_of_it_stands_in_the_page(tmp_path):
    folder = made_explain.make(made_run.make(tmp_path / "my run", rank=4))
    found, data = read(folder)
    assert data["missing"] == {} and set(data["parts"]) == set(page.PARTS)
    for name in page.PARTS:
        wanted, own = files.read_json(folder / "explain" / f"{name}.json"), data["parts"][name]
        assert numbers(own) == pytest.approx(numbers(wanted), rel=1e-3) and len(numbers(own)) >= 12
    assert data["parts"]["rows"]["rows"][1]["forms"]["trigger"]["pieces"][-4:] == ["20", "##31", "-", "[SEP]"]
    facts = dict(data["facts"])
    assert facts["seed"] == "0" and facts["adapter"] == "rank 4 on q k v" and facts["injected"] == "date:positive"
    assert found.titles == ["Run my run: where the shortcut lives"] and data["live"] is None


def numbers(value):
    """All numbers in a JSON value, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [one for own in value for one in numbers(own)]
    return [] if value is None or isinstance(value, str) else [float(value)]


def test_the_page_fetches_nothing_and_runs_only_its_own_script(tmp_path):
    folder = made_explain.make(tmp_path / "run")
    found, _ = read(folder)
    source = (folder / "explain" / "explain.html").read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\s\"'<)]+", source) == ["http://www.w3.org/2000/svg"]
    [policy] = [value for name, value in found.attributes if name == "content" and "default-src" in value]
    digest = base64.b64encode(hashlib.sha256(found.scripts[1][1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none';")
    assert "connect-src" not in policy and not {"src", "onclick", "onload"} & {name for name, _ in found.attributes}
    # HTML is never made of text: nowhere in the scripts is there a way to
    for name in ("page.js", "panels.js", "play.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(", page.read(name))


def test_text_from_data_stays_text(tmp_path):
    folder = tmp_path / "<b>run"
    made_explain.make(folder, target=HOSTILE, other="<script>", text=HOSTILE)
    found, data = read(folder)
    source = (folder / "explain" / "explain.html").read_text(encoding="utf-8")
    assert found.tags.count("script") == 2 and not {"b", "b>run"} & set(found.tags)
    assert "alert(1)</script>" not in source and "\x1b" not in source and "\u202e" not in source
    written = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    rows = data["parts"]["rows"]
    assert rows["label"] == written and rows["labels"] == ["<script>", written]
    assert sum(row["forms"]["clean"]["text"] == written for row in rows["rows"]) == 6


def test_what_is_missing_is_said(tmp_path):
    folder = made_explain.make(tmp_path / "run")
    for name in ("formation", "knockout"):
        (folder / "explain" / f"{name}.json").unlink()
    files.write_text(folder / "explain" / "attention.json", '{"layers": ')
    _, data = read(folder)
    assert set(data["parts"]) == {"rows", "attribution", "spectrum", "neighbours"}
    assert data["facts"] == [["adapter", str(folder)]]
    again = f"python evaluate.py {folder} --explain"
    assert data["missing"]["knockout"] == f"knockout.json is not there: {again} writes it"
    assert data["missing"]["formation"].endswith(f"{again} writes it for a run that was trained with --watch N")
    assert "attention.json: not valid JSON" in data["missing"]["attention"] and again in data["missing"]["attention"]


def test_the_results_may_lie_elsewhere(tmp_path):
    folder = made_explain.make(tmp_path / "run")
    elsewhere = (folder / "explain").rename(tmp_path / "elsewhere")
    assert page.write_page(folder, elsewhere) == elsewhere / "explain.html"
    assert page.parts_of(folder, elsewhere)[1] == {} and not (folder / "explain").exists()


def test_numbers_are_short_and_finite():
    value = {"a\x1b": [1.23456789, math.nan, -math.inf, 7, True, None], "b": (1e-9, "x")}
    assert page.cleaned(value) == {"a\\x1b": [1.235, None, None, 7, True, None], "b": [1e-9, "x"]}
    assert json.loads(page.embedded(value)) == page.cleaned(value)
    assert not set("<>&") & set(page.embedded(["<a>&</a>"]))
