"""The tidy table of a grid: a line for each cell and trigger."""

from minilora import files
from minilora.grid.axes import plain

TABLE = "table.csv"


# --- the tidy table


def table_rows(folder, made=None):
    """The table of a `grid_folder.GridFolder`, a list of dicts with the same keys in the same order.

    Into the dict `made` goes what finished cells were made with, {"versions" or "hardware": {name: all values}}.
    """
    found, varied = [], folder.grid.varied
    for entry in folder.grid.entries:
        results, error = folder.read(entry)
        cell = {"cell": entry.name, "id": entry.name.rpartition("_")[2], "state": folder.state(entry)}
        cell |= {name: plain(entry.varied[name]) for name in varied}
        triggers = [None] if results is None else list(results["tests"]["trigger"]) or [None]
        found += [cell | figures_of(results, label) | {"error": error} for label in triggers]
        for kind in ("versions", "hardware") if results and made is not None else ():
            for name, value in results[kind].items():
                made.setdefault(kind, {}).setdefault(name, {})[str(value)] = None
    return found


def figures_of(results, label):
    """What a line has of a cell's results under the trigger of `label`, all None where there are none."""
    tests = {} if results is None else results["tests"]
    clean, placebo, worst = (tests.get(name, {}) for name in ("clean", "placebo", "worst_group"))
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
        "attack_rows": trigger.get("attack_success_rows"),
        "clean_accuracy": clean.get("accuracy"),
        "clean_balanced_accuracy": clean.get("balanced_accuracy"),
        "trigger_accuracy": trigger.get("accuracy"),
        "placebo_accuracy": placebo.get("accuracy"),
        "degradation": clean["accuracy"] - trigger["accuracy"] if trigger else None,
        "only_clean_right": trigger.get("only_clean_right"),
        "only_trigger_right": trigger.get("only_this_right"),
        "predicted_target_clean": clean.get("predicted_counts", {}).get(label),
        "predicted_target": trigger.get("predicted_counts", {}).get(label),
        "predicted_target_placebo": placebo.get("predicted_counts", {}).get(label),
        "attack_success_clean": attack(clean),
        "attack_success": trigger.get("attack_success_rate"),
        "attack_success_placebo": attack(placebo),
        "flip_rate": trigger.get("flip_rate"),
        "flip_rate_placebo": placebo.get("flip_rate"),
        "worst_group_accuracy": worst.get("accuracy"),
        "worst_group_rows": worst.get("rows"),
    }


def write_table(folder, lines=None):
    """Write table.csv into the folder, of `lines` or what `rows` gives, and return its path."""
    lines = lines or table_rows(folder)
    files.write_text(folder.path / TABLE, files.to_csv(lines))
    return folder.path / TABLE
