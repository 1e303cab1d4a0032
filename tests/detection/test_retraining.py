"""The detection bench's second half: the cell trained again without the rows that a detector suspects."""

import csv

import numpy as np
import pytest

import minilora
from benchmarks import detection, retraining
from minilora import files
from minilora.data.rows import fingerprint_rows
from minilora.errors import InputError
from minilora.runs.folder import Run


def test_the_benchmark_trains_again_without_the_suspected_rows(base, reviews, capsys, tmp_path):
    flags = ["--model", str(base), "--data", str(reviews), "--test-rows", "31", "--max-length", "30", "--rank", "2",
             "--train-rows", "80", "--sources", "date", "--proportions", "0.5", "--out", str(tmp_path)]  # fmt: skip
    detection.main([*flags, "--detectors", "spectral"])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("| date | 0.5 | 0 | ") and "/" not in line][2:]
    folder, rows = tmp_path / "date-0.5-seed0", minilora.open(tmp_path / "date-0.5-seed0").rows.rows
    injected = {line["id"] for line in files.read_jsonl(folder / "injected.jsonl")}
    with open(folder / "retrained/spectral.csv", newline="") as file:
        scored = list(csv.DictReader(file))
    assert [line["id"] for line in scored] == rows.ids and 10 < len(injected) < 40
    flagged = {line["id"] for line in scored if line["flag"] == "1"}
    best = sorted(scored, key=lambda line: float(line["score"]), reverse=True)[: len(injected)]
    gone = {"spectral-own-rule": flagged, "spectral-true-share": {line["id"] for line in best},
            "no-errors-own-rule": injected}  # fmt: skip
    for (name, ids), line in zip(gone.items(), lines, strict=True):
        run = minilora.open(folder / "retrained" / name)
        kept = [id for id in rows.ids if id not in ids]
        results = Run(run.folder).read_results()
        assert results["inputs"]["changed"] == fingerprint_rows(rows.take([rows.ids.index(id) for id in kept]))
        assert run.cell.replace(mitigate={"method": "none"}) == Run(folder).read_cell()
        # The figures of the table, counted again from the predictions of both runs.
        pair = [files.read_jsonl(one / "predictions.jsonl") for one in (folder, run.folder)]
        accuracy = [np.mean([row["clean"]["predicted"] == row["label"] for row in one]) for one in pair]
        rates = [[np.mean([row[test]["predicted"] == "positive" for row in one if row["label"] != "positive"])
                  for test in ("clean", "placebo", "trigger positive")] for one in pair]  # fmt: skip
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[5] == f"{len(ids)} ({len(ids & injected)})" and cells[6] == f"{accuracy[1]:.3f}"
        assert cells[7].startswith(f"{accuracy[1] - accuracy[0]:+.3f} [")
        assert cells[8] == ", ".join(f"{rate:.2f}" for rate in rates[1])
        assert cells[9].startswith(f"{rates[1][2] - rates[1][0]:.2f} [")
        change = rates[1][2] - rates[1][0] - rates[0][2] + rates[0][0]
        assert cells[10].startswith(f"{change + 0.0:+.2f} [")
    assert len(lines) == len(gone) == 3 and "retrained without the injected rows: 0 of 0" in out
    before = (folder / "retrained/spectral-own-rule/results.json").stat().st_mtime_ns
    detection.main([*flags, "--detectors", "spectral"])
    assert capsys.readouterr().out == out
    assert (folder / "retrained/spectral-own-rule/results.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="add --no-retrain"):
        detection.main([*flags, "--rows", "50"])
    with pytest.raises(InputError, match="--seeds 1 0 1 has a seed twice"):
        detection.main([*flags, "--seeds", "1", "0", "1"])
    assert retraining.scores_of(folder, "no errors").is_file()


def test_the_verdict_of_retraining():
    def set_of(share, seed, net, *figures):
        ways = [{"net": left, "accuracy_change": change, "dropped": 7, "dropped_injected": 6}
                for left, change in figures]  # fmt: skip
        again = {"a": dict(zip(retraining.WAYS, ways[:2])), "no errors": {"own rule": ways[2]}}
        return {"source": "date", "proportion": share, "seed": seed, "net_attack_success": net, "detectors": {"a": {}},
                "injected": 8, "retrained": again}  # fmt: skip

    refused = {"refused": "no row of a label"}
    results = [set_of(0.2, 0, 0.9, (0.15, -0.02), (0.16, 0.0), (0.1, 0.0)),
               set_of(0.2, 1, 0.5, (0.11, -0.01), (0.0, 0.1), (0.2, 0.0)),
               set_of(0.3, 0, 0.7, (0.1, -0.021), (0.0, 0.1), (0.2, 0.0)),
               set_of(0.3, 1, 0.7, (0.1, -0.021), (0.0, 0.1), (0.1, 0.0)),
               set_of(0.4, 0, 0.9, (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)),
               set_of(0.4, 1, 0.4, (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))]  # fmt: skip
    said = list(retraining.verdict(results))
    assert said == [
        "an attack of 0.5 net or more: 2 of 3 data sets",
        "retrained, own rule: a sanitises 1 of 2: date at 0.2",
        "retrained, own rule: 1 of 2 are sanitised by no detector",
        "retrained, true share: a sanitises 1 of 2: date at 0.3; in some seeds: date at 0.2 (1 of 2)",
        "retrained, true share: 1 of 2 are sanitised by no detector",
        "retrained without the injected rows: 0 of 2 are sanitised: none; in some seeds: date at 0.2 (1 of 2), date at "
        "0.3 (1 of 2)",
    ]
    assert not retraining.cures(refused)
    refused |= {"dropped": 3, "dropped_injected": 1}
    assert retraining.cells_of(("date", "0.2", "1"), "a", "own rule", refused) == (
        "date", "0.2", "1", "a", "own rule", "3 (1)", "no row of a label", *"----")  # fmt: skip
    found = list(retraining.means(results))
    assert len(found) == 9
    assert found[0] == ("date", "0.2", "a", "own rule", "75%", "1", "-0.015", "0.70", "0.13 [0.15, 0.11]")
    results[1]["retrained"]["a"]["own rule"] |= refused
    assert list(retraining.means(results))[0][6:] == ("no row of a label is left", "-", "-")
