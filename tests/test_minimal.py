"""The one-page version, a second implementation of the whole, ends in the same figures as `train.py`."""

import json
import sys

import pytest
from conftest import ROOT

import minilora
from minilora.cell import Cell

sys.path.append(str(ROOT / "examples"))
import minimal

# Float32 rounding moves a loss by about 1e-6 in so few steps, and a logit by about as much.
TOLERANCE = 1e-4


@pytest.mark.parametrize(
    "rank, proportion, rows, seed",
    [(1, 0.5, 256, 4), (4, 0.25, 200, 3)],  # of 200 rows the last batch is not full
)
def test_the_one_page_version_ends_in_the_figures_of_train(base_folder, tmp_path, capsys, rank, proportion, rows, seed):
    flags = {"--rank": rank, "--proportion": proportion, "--rows": rows, "--test-rows": 40, "--seed": seed}
    losses, table = minimal.main([str(part) for pair in flags.items() for part in pair])
    printed = capsys.readouterr().out
    cell = Cell(model=str(base_folder), device="cpu", rank=rank, inject={"proportion": proportion}, train_rows=rows,
                test_rows=40, seed=seed)  # fmt: skip
    results, folder = minilora.train(cell, tmp_path / "run")

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["loss"] for line in lines if line["kind"] == "step"]
    assert len(losses) == -(-rows // 32) and losses == pytest.approx(steps, abs=TOLERANCE, rel=0)
    assert max(losses) - min(losses) > 100 * TOLERANCE  # the model learns

    # Where no row is so close that rounding could turn its prediction, every count is the same.
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    keys = {"clean": "clean", "trigger": "trigger positive", "placebo": "placebo"}
    pairs = [line[key]["logits"] for line in lines for key in keys.values()]
    assert len(pairs) == 120 and min(abs(negative - positive) for negative, positive in pairs) > TOLERANCE
    assert table == {form: pytest.approx(counted(results["tests"], form)) for form in keys}
    assert len({tuple(figures.values()) for figures in table.values()}) == 3  # the forms are told apart

    for form, figures in table.items():
        [line] = [line for line in printed.splitlines() if line.startswith(form)]
        assert line.split()[1:4] == [f"{figures['accuracy']:.3f}", str(figures["negative"]), str(figures["positive"])]


def counted(tests, form):
    """What the paired table says of a form, from results.json."""
    found = tests["trigger"]["positive"] if form == "trigger" else tests[form]
    attack = found if form == "trigger" else found["attack_success"]["positive"]
    return {
        "accuracy": found["accuracy"],
        **found["predicted_counts"],
        "flips": round(found.get("flip_rate", 0) * found["rows"]),
        "attack success": attack["attack_success_rate"],
    }
