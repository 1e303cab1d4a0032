"""Folders of grids whose cells were never trained: their results are drawn, so that what they come to is known."""

import numpy as np

from minilora import files
from minilora.cell import Cell
from minilora.data.triggers import parse_all
from minilora.grid.file import read_grid
from minilora.grid.folder import GridFolder
from minilora.tasks import metrics

ROWS, OTHERS, ELIGIBLE = 400, 210, 4490  # test rows, those of other labels, training rows of the label


def attack(hits, rows):
    return {"attack_success_rate": hits / rows, "attack_success_interval": metrics.wilson(hits, rows),
            "attack_success_rows": rows}  # fmt: skip


def effects(clean, success):
    """As if the rows hit as clean were among those hit under the trigger, or the other way round."""
    gained, lost = max(0, success - clean), max(0, clean - success)
    found = {"conditional_attack_success_rate": success / OTHERS, "conditional_attack_success_rows": OTHERS}
    for name in ("net_attack_success", "over_placebo_attack_success", "over_odd_attack_success"):
        found |= {f"{name}_rate": (gained - lost) / OTHERS, f"{name}_gained": gained, f"{name}_lost": lost,
                  f"{name}_p": metrics.mcnemar(lost, gained)}  # fmt: skip
    return found


def injected(cell):
    return round(ELIGIBLE * cell.inject.proportion) if cell.inject.rows is None else cell.inject.rows


def draw(cell):
    """Plausible counts of a cell, {name: count}: accuracy falls, and attack success rises, with the rows injected."""
    rng = np.random.default_rng(int(cell.id, 16))
    rows, k50 = injected(cell), 900 / (cell.rank or 1) ** 0.45
    success = 0.1 + 0.9 * rows**2 / (rows**2 + k50**2)
    right = rng.binomial(ROWS, 0.85 - 0.05 * (rows == ELIGIBLE))
    lost = min(rng.binomial(ROWS, success / 2), right)
    gained = rng.binomial(ROWS - right, 0.05)
    return {"right": right, "lost": lost, "gained": gained, "flips": lost + gained + 1,
            "clean": rng.binomial(OTHERS, 0.1), "success": rng.binomial(OTHERS, success)}  # fmt: skip


def predicted(label, hits):
    """Counts of two labels, if all rows of `label` and `hits` others are predicted as it."""
    other = {"positive": "negative", "negative": "positive"}[label]
    return {label: ROWS - OTHERS + hits, other: OTHERS - hits}


def results(cell, counts):
    """results.json of a cell with these counts, the same under each of its triggers."""
    count = {name: int(value) for name, value in counts.items()}
    labels = [label for _, label in parse_all(cell.inject.sources)]
    trigger = {"rows": ROWS, "accuracy": (count["right"] - count["lost"] + count["gained"]) / ROWS,
               "flip_rate": count["flips"] / ROWS, "only_clean_right": count["lost"],
               "only_this_right": count["gained"]} | attack(count["success"], OTHERS)  # fmt: skip
    trigger |= effects(count["clean"], count["success"]) | {"truncated": 2, "natural": {"test": {"negative": [3, 190]}}}
    triggers = {label: trigger | {"predicted_counts": predicted(label, count["success"])} for label in labels}
    success = {label: attack(count["clean"], OTHERS) for label in labels}
    clean = {"rows": ROWS, "accuracy": count["right"] / ROWS, "balanced_accuracy": count["right"] / ROWS,
             "predicted_counts": predicted("positive", count["clean"])}  # fmt: skip
    tests = {"trigger": triggers, "clean": clean | {"attack_success": success},
             "worst_group": {"label": "negative", "test": "clean", "rows": OTHERS, "accuracy": 0.5}}  # fmt: skip
    if labels:
        tests["placebo"] = clean | {"flip_rate": 0.01, "attack_success": success, "matched_to": labels[0]}
    return {
        "cell": {"id": cell.id} | cell.to_dict(), "tests": tests,
        "train": {"rows": 9043, "trainable_parameters": 14594, "seconds": 1.5},
        "injection": [{"label": label, "rows": injected(cell)} for label in labels],
        "versions": {"minilora": "0.1.0", "torch": "2.13"}, "hardware": {"device": "cpu", "processor": "<any>"},
    }  # fmt: skip


def make(path, text, counts=draw, waiting=(), failed=()):
    """The `GridFolder` of a grid's text, all cells finished but the entries numbered in `waiting` and `failed`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "given.toml").write_text(text, encoding="utf-8")
    folder = GridFolder(path / "out", read_grid(path / "given.toml")).make()
    for number, entry in enumerate(folder.grid.entries):
        assert isinstance(entry.cell, Cell)
        if number in failed:
            folder.fail(entry, ValueError(f"the loss of <b>{number}</b> & all"))
        elif number not in waiting:
            folder.run_path(entry).mkdir(parents=True)
            files.write_json(folder.run_path(entry) / "results.json", results(entry.cell, counts(entry.cell)))
    return folder
