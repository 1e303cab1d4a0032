"""What each test row came to in each cell of a grid, for intervals over the rows that the cells share.

Read from the runs' predictions.jsonl. A grid's lines know only counts, which do not say whether two cells hit the same
rows.
"""

import numpy as np

from minilora import files
from minilora.errors import InputError


def add(folder, lines):
    """The lines of `grid.table.table_rows`, those of finished cells with their `Outcomes` under the key "outcomes".

    A cell whose predictions cannot be read has none.
    """
    numbers = {}  # (data, row id): its number, the same in all cells
    known, found = {}, []
    cells = {entry.name: entry.cell for entry in folder.grid.entries}
    for line in lines:
        name = line["cell"]
        if name not in known:
            known.clear()  # the lines of a cell follow each other
            path = folder.path / "cells" / name / "predictions.jsonl"
            try:
                known[name] = files.read_jsonl(path) if line["state"] == "finished" else []
            except InputError:
                known[name] = []
        own = outcomes_of(known[name], line["label"], cells[name].data, numbers)
        found.append(line | {"outcomes": own})
    return found


def outcomes_of(rows, label, data, numbers):
    """The `Outcomes` of the lines of predictions.jsonl under the trigger of `label`, or None."""
    forms = ["clean"] + ([f"trigger {label}"] if label is not None else [])
    try:
        forms += ["placebo"] if rows and label is not None and "placebo" in rows[0] else []
        own = np.array([numbers.setdefault((data, row["id"]), len(numbers)) for row in rows])
        labels = np.array([row["label"] == label for row in rows])
        told = {form.partition(" ")[0]: [row[form]["predicted"] for row in rows] for form in forms}
        right = {form: np.array([row["label"] == one for row, one in zip(rows, told[form])]) for form in told}
    except (KeyError, TypeError):
        return None
    hit = {form: np.array([one == label for one in found]) for form, found in told.items()}
    flipped = {form: np.array([a != b for a, b in zip(found, told["clean"])]) for form, found in told.items()}
    return Outcomes(own, ~labels, right, hit, flipped) if rows else None


class Outcomes:
    """`numbers` int [rows]; `others` bool [rows], whether of another label than the trigger's; and {form: bool [rows]},
    whether predicted `right`, predicted as the trigger's label (`hit`), and otherwise than as clean (`flipped`)."""

    def __init__(self, numbers, others, right, hit, flipped):
        self.numbers, self.others, self.right, self.hit, self.flipped = numbers, others, right, hit, flipped

    def of(self, figure):
        """(Numbers of the rows that a figure is the mean of, their values), or None where that is not known."""
        right, hit, others = self.right, self.hit, self.others
        every = np.ones(len(others), bool)
        make = {
            "clean_accuracy": lambda: (every, right["clean"]),
            "trigger_accuracy": lambda: (every, right["trigger"]),
            "placebo_accuracy": lambda: (every, right["placebo"]),
            "degradation": lambda: (every, right["clean"] * 1.0 - right["trigger"]),
            "attack_success_clean": lambda: (others, hit["clean"]),
            "attack_success": lambda: (others, hit["trigger"]),
            "attack_success_placebo": lambda: (others, hit["placebo"]),
            "attack_success_odd": lambda: (others, hit["odd"]),
            "net_attack_success": lambda: (others, hit["trigger"] * 1.0 - hit["clean"]),
            "over_placebo_attack_success": lambda: (others, hit["trigger"] * 1.0 - hit["placebo"]),
            "over_odd_attack_success": lambda: (others, hit["trigger"] * 1.0 - hit["odd"]),
            "conditional_attack_success": lambda: (others & right["clean"], hit["trigger"]),
            "flip_rate": lambda: (every, self.flipped["trigger"]),
            "flip_rate_placebo": lambda: (every, self.flipped["placebo"]),
        }.get(figure)
        try:
            kept, values = make() if make else (None, None)
        except KeyError:
            return None
        return None if kept is None else (self.numbers[kept], values[kept].astype(float))
