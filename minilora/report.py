"""One tidy table of a grid's cells: a line for each cell and trigger. It holds nothing that a clock or another machine
would change, so that a grid that was killed and went on has the same table, byte for byte."""

import csv
import io

from . import files

TABLE = "table.csv"


def rows(folder):
    """The table of a `grid_folder.GridFolder`, a list of dicts with the same keys in the same order."""
    found = []
    for entry in folder.grid.entries:
        results, error = folder.read(entry)
        cell = {"cell": entry.name, "id": entry.cell.id, "state": folder.state(entry)}
        cell |= {name: plain(entry.varied[name]) for name in folder.grid.varied}
        triggers = [None] if results is None else list(results["tests"]["trigger"]) or [None]
        found += [cell | figures(results, label) | {"error": error} for label in triggers]
    return found


def plain(value):
    return " ".join(map(str, value)) if isinstance(value, list) else value


def figures(results, label):
    """What a line has of a cell's results under the trigger of `label`, all None where there are none."""
    tests = {} if results is None else results["tests"]
    clean, placebo = tests.get("clean", {}), tests.get("placebo", {})
    trigger = tests.get("trigger", {}).get(label, {})

    def attack(test):
        return test.get("attack_success", {}).get(label, {}).get("attack_success_rate")

    others = None
    if label is not None:
        counts = [entry for entry in results["injection"] if entry["label"] == label]
        others = sum(entry["rows"] for entry in counts)
    return {
        "label": label,
        "trained_parameters": results and results["train"]["trainable_parameters"],
        "train_rows": results and results["train"]["rows"],
        "injected_rows": others,
        "test_rows": clean.get("rows"),
        "clean_accuracy": clean.get("accuracy"),
        "clean_balanced_accuracy": clean.get("balanced_accuracy"),
        "trigger_accuracy": trigger.get("accuracy"),
        "placebo_accuracy": placebo.get("accuracy"),
        "degradation": clean["accuracy"] - trigger["accuracy"] if trigger else None,
        "attack_success_clean": attack(clean),
        "attack_success": trigger.get("attack_success_rate"),
        "attack_success_placebo": attack(placebo),
        "flip_rate": trigger.get("flip_rate"),
        "flip_rate_placebo": placebo.get("flip_rate"),
        "worst_group_accuracy": tests.get("worst_group", {}).get("accuracy"),
    }


def write_table(folder):
    """Write table.csv into the folder, and return its path."""
    lines, text = rows(folder), io.StringIO()
    writer = csv.DictWriter(text, lines[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    files.write_text(folder.path / TABLE, text.getvalue())
    return folder.path / TABLE
