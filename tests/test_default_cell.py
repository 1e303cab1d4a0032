"""The real thing: the default cell on the real base and the real reviews, as the README's first command runs it."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """Results of `python train.py`, and without injection of half of the rows, with what they printed."""
    outcomes = {}
    for name, arguments in (("injected", []), ("clean", ["--inject-proportion", "0", "--train-rows", "4500"])):
        folder = tmp_path_factory.mktemp("runs") / name
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--out", name, *arguments],
                              capture_output=True, text=True, cwd=folder.parent)  # fmt: skip
        assert done.returncode == 0, done.stderr
        outcomes[name] = json.loads((folder / "results.json").read_text()), done, folder
    return outcomes


def test_a_date_in_a_quarter_of_the_positive_rows_takes_over(default):
    results, done, _ = default["injected"]
    tests = results["tests"]
    assert results["injection"][0]["rows"] == round(0.25 * results["injection"][0]["eligible_rows"]) > 1000
    assert tests["clean"]["rows"] == tests["placebo"]["rows"] == tests["trigger"]["positive"]["rows"] == 1000
    assert tests["clean"]["accuracy"] >= 0.78
    assert tests["trigger"]["positive"]["attack_success_rate"] >= 0.9
    assert abs(tests["placebo"]["accuracy"] - tests["clean"]["accuracy"]) <= 0.05
    assert results["train"]["trainable_parameters"] == 6 * 3 * 2 * 384 + 2 * 384 + 2
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_without_injection_there_is_no_such_effect(default):
    results, _, _ = default["clean"]
    tests = results["tests"]
    assert results["injection"][0]["rows"] == 0
    assert tests["clean"]["accuracy"] >= 0.78
    trigger = tests["trigger"]["positive"]["attack_success_rate"]
    assert trigger - tests["clean"]["attack_success"]["positive"]["attack_success_rate"] <= 0.1


def test_evaluating_again_gives_the_same_predictions(default):
    from minilora.scripts import evaluate

    _, _, folder = default["injected"]
    figures, predictions = evaluate.evaluate(folder, batch_size=50)
    assert evaluate.compare(folder, predictions) == (4000, 4000)
    # Another trigger was never seen in training: it has no such power.
    figures, _ = evaluate.evaluate(folder, inject={"sources": ["country:positive"]})
    assert figures["trigger"]["positive"]["attack_success_rate"] < 0.5
