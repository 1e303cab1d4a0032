"""The benchmarks of the diagnostics: what several runs say together, and seconds beside the passes that are needed."""

import json

import pytest

from benchmarks import explain, explain_study, report
from minilora import files
from minilora.diagnostics.knockout import Setting
from minilora.errors import InputError


def three(mean, width=0.02):
    return [mean, mean - width, mean + width]


def looked_into(folder, n, clean=False):
    """RUN/explain/ of a run that was never looked at: n moves its figures, and a clean one has no shortcut."""
    rows, shift = [], 0.2 if clean else 6.0 + n
    for row in range(12):
        margin = -2.0 + 0.1 * (row % 3)
        forms = {"clean": margin, "trigger": margin + shift, "placebo": margin + 0.1 * (row % 2)}
        made = {name: {"margin": one, "predicted": "positive" if one > 0 else "negative",
                       "pieces": ["[CLS]", "good", *(["20", "-"] if name == "trigger" else []), "[SEP]"],
                       "span": [False, False, *([True, True] if name == "trigger" else []), False]}
                for name, one in forms.items()}  # fmt: skip
        rows.append({"id": str(row), "label": "negative", "forms": made})

    def setting(kind, name, success, shift, lost=0.0):
        return {"kind": kind, "name": name, "attack_success": three(success), "shift": three(shift),
                "lost": three(lost), "clean_accuracy": three(0.9)}  # fmt: skip

    success, half = 0.8 + 0.05 * n, [[three(0.5, 0.2), three(0.4, 0.2)]]
    settings = [setting("whole", "adapter", 1.0, 6.0 + n), setting("whole", "head only", 0.2 + 0.1 * n, 0.5),
                setting("layer", "without 0", success, 4.0), setting("layer", "without 1", 1.0, 5.0),
                setting("target", "without v", 1.0, 0.25 * (6.0 + n)),
                setting("direction", "without layers.5.v 0", 1.0, 3.0, 2.0 + n),
                setting("direction", "without layers.1.q 0", 1.0, 3.0, 2.5)]  # fmt: skip
    first = {"first": three(0.1 if clean else 0.7), "first_flipped": three(0.96 + 0.01 * n)}
    change = [[three(0.01 if clean else 0.5), three(-0.3)]]
    step = None if clean else 10 * n
    parts = {
        "rows": {"label": "positive", "rows": rows},
        "knockout": {"settings": settings, "carrying": {"directions": 8 + n, "without": setting("", "", 0.3, 1.0)}},
        "attribution": {"scores": dict.fromkeys(explain_study_methods(), first)},
        "attention": {"change": change, "auc": {"span_share": [[three(0.9), three(0.4)]], "entropy": half}},
        "spectrum": {"pieces": [["20", 9.0], ["-", 8.0], *[["fine", 2.0]] * (14 if clean else 1)]},
        "formation": {"steps": [0, 10, 20], "onset": {"step": step}, "onset_gross": {"step": 0},
                      "clean_90": {"step": 20 + 10 * n},
                      "figures": {"attack_success": [three(0.5), three(0.9), three(1.0)],
                                  "attack_success_clean": [three(0.5), three(0.1 * n), three(0.0)],
                                  "clean_accuracy": [three(0.5)] * 3}},
    }  # fmt: skip
    (folder / "explain").mkdir(parents=True)
    for name, part in parts.items():
        files.write_json(folder / "explain" / f"{name}.json", {"part": name, "count": 12} | part)
    return str(folder)


def explain_study_methods():
    return "gradient x input", "integrated gradients", "leave-one-out"


T = 4.302652730  # Student's t, 2 degrees of freedom, 97.5%


def test_a_study_of_several_runs(tmp_path, capsys):
    runs = [looked_into(tmp_path / f"run-{n}", n) for n in range(3)]
    twins = [looked_into(tmp_path / f"twin-{n}", n, clean=True) for n in range(2)]
    for part in ("knockout", "attribution"):
        (tmp_path / "twin-1" / "explain" / f"{part}.json").unlink()  # what a twin need not have
    explain_study.main(["--runs", *runs, "--twins", *twins, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= report.COLUMNS
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = {one["words"]: one for one in results["statements"]}
    shift = found["shift (logits)"]
    assert shift["values"] == [6.0, 7.0, 8.0] and shift["mean"] == 7.0
    assert shift["high"] - 7.0 == pytest.approx(T * 1.0 / 3**0.5) == 7.0 - shift["low"]
    verdicts = {
        "shift (logits)": "confirmed", "positive with a date": "confirmed", "positive without a date": "confirmed",
        "without any one layer, at most": "confirmed", "head only is not 0": "undecided",
        "directions that carry half": "measured", "that one is of layer 5's v": "undecided",
        "without v: success hides the loss": "corrected",  # 0.75 in every run, and 0.62 was stated
        "gradient x input: date first": "corrected", "integrated gradients: flipped rows": "confirmed",
        "the largest 5 directions only": "undecided",  # no such setting
        "step 10: less that without a date": "confirmed", "step 10: clean accuracy": "corrected",
        "the shortcut is first: steps between": "confirmed",
    }  # fmt: skip
    assert {words: found[words]["verdict"] for words in verdicts} == verdicts
    assert found["the largest 5 directions only"]["values"] == [None] * 3
    assert found["that one is of layer 5's v"]["values"] == [0, 1, 1]
    assert found["costliest direction: share of shift"]["values"] == pytest.approx([2.5 / 6, 3 / 7, 4 / 8])
    rules = {one["rule"]: (one["runs"], one["twins"]) for one in results["rules"]}
    assert rules["net attack success above 0.1"] == (3, 0) and rules["shift beyond the placebo's, above 0"] == (3, 2)
    assert rules["the same, above 1 logit"] == (3, 0) and rules["share added to a head, above 0.1"] == (3, 0)
    assert rules["a head's share tells it from the placebo (AUC)"] == (3, 2)
    assert rules["a head's entropy does (AUC)"] == (0, 0) and rules["onset of net attack success"] == (3, 0)
    assert rules["onset of attack success as it is"] == (3, 2)
    assert rules["half of 16 pieces moved most are the trigger's"] == (3, 0)
    [one] = [one for one in results["rules"] if one["rule"].startswith("span first")]
    assert (one["runs"], one["of_runs"], one["twins"], one["of_twins"]) == (3, 3, 0, 1)
    assert results["rules"][0]["interval"] == pytest.approx([0, 0.6576], abs=1e-4)  # Wilson's of 0 in 2
    text = (tmp_path / "out" / "table.md").read_text()
    assert all(one["words"].strip() in text for one in results["statements"]) and "3 of 3 | 2 of 2" in text


def test_refuted():
    below = explain_study.Statement("", None, 0.1, below=0.5)
    above = explain_study.Statement("", None, 0.9, above=0.5)
    cases = [(below, 0.5, 0.7, "refuted"), (below, 0.4, 0.6, "undecided"), (below, 0.05, 0.2, "confirmed"),
             (below, 0.2, 0.3, "corrected"), (above, 0.1, 0.5, "refuted"), (above, 0.905, 0.91, "confirmed"),
             (above, 0.6, 0.7, "corrected"), (above, float("nan"), float("nan"), "undecided")]  # fmt: skip
    for statement, low, high, verdict in cases:
        assert statement.verdict(low, high) == verdict, (low, high)
    assert len(cases) == 8


def test_what_a_study_refuses(tmp_path):
    run, other = (looked_into(tmp_path / name, 1) for name in ("a", "b"))
    part = tmp_path / "b" / "explain" / "spectrum.json"
    for change, words in (({"count": 11}, "has 11 rows, and rows.json has 12"), ({"left_out": "why"}, "not whole")):
        before = part.read_text()
        files.write_json(part, json.loads(before) | change)
        with pytest.raises(InputError, match=words):
            explain_study.main(["--runs", run, other])
        part.write_text(before)
    part.unlink()
    for argv, words in (([run, other], "--explain .* writes it"), ([run], "at least two"), ([run, run], "twice")):
        with pytest.raises(InputError, match=words) as caught:
            explain_study.main(["--runs", *argv])
        assert "\n" not in str(caught.value)


# --- seconds


def test_layers_that_must_be_run():
    """Settings that agree up to a layer need it once: the tree of `knockout.outcomes_of`, counted by hand."""
    dials = {}, {"layers.1.q": 0.0}, {"layers.1.q": (0,)}, {"layers.1.q": 0.0, "layers.2.v": 0.0}, {"layers.0.q": 1.0}
    settings = [Setting("", "", own) for own in dials]
    assert explain.layer_passes(settings, 3) == 1 + 3 + 4
    assert explain.layer_passes(settings[:1], 3) == 3


def test_seconds_beside_what_is_needed(base, reviews, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("minilora.diagnostics.pictures.draw", lambda *parts: ())
    monkeypatch.setattr("minilora.diagnostics.knockout.COUNTS", (1, 2))
    monkeypatch.setattr("minilora.diagnostics.knockout.SINGLE", 2)
    monkeypatch.setattr("minilora.diagnostics.play.DRAWN", 5)
    explain.main(["--model", str(base), "--data", str(reviews), "--test-rows", "31", "--max-length", "30",
                  "--batch-size", "8", "--rank", "2", "--rows", "4", "--out", str(tmp_path)])  # fmt: skip
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= report.COLUMNS and "--explain attention spectrum" in said
    results = json.loads((tmp_path / "results.json").read_text())
    whole = results["calls"]["all"]
    assert set(whole["parts"]) == {"attention", "attribution", "spectrum", "knockout", "formation", "neighbours"}
    assert set(results["calls"]["attention spectrum"]["parts"]) == {"attention", "spectrum"}
    for own in whole["parts"].values():
        limit = sum(results["costs"][kind]["wall"] * count for kind, count in own["needed"].items())
        assert own["limits"]["wall"] == pytest.approx(limit) and limit > 0 < own["wall"]
    assert whole["wall"] == pytest.approx(whole["rest"]["wall"] + sum(one["wall"] for one in whole["parts"].values()))
    watch, play = results["watch"], results["play"]
    assert watch["files"] == 3 and 0 < watch["copies"]["wall"] < watch["with"]["wall"]  # steps 0, 10 and 12
    assert play["answers"] == 5 and 0 < play["median"] <= play["most"]
    forms = whole["parts"]["attention"]["needed"]["forward"]
    formed = whole["parts"]["formation"]["needed"]["forward"]
    assert forms % 2 == 0 and formed % 3 == 0 and formed > 3 * forms / 2
    with pytest.raises(InputError, match="--rank is of a run that is yet to be trained"):
        explain.main([str(tmp_path), "--rank", "3"])
    with pytest.raises(InputError, match="--rows is 1"):
        explain.main(["--rows", "1"])
