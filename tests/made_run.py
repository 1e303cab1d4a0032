"""Folders of runs that were never trained, in the formats of `runs/folder.py`: what their pages show is known."""

from minilora import files
from minilora.cell import Cell
from minilora.tasks.metrics import wilson

ROWS = 60  # test rows, half of them of each of the first two labels


def attack(hits):
    return {"attack_success_rate": hits / 30, "attack_success_interval": wilson(hits, 30), "attack_success_rows": 30}


def scores(labels, right, flips=None):
    found = {"rows": ROWS, "accuracy": right / ROWS, "accuracy_interval": wilson(right, ROWS),
             "balanced_accuracy": right / ROWS - 0.005,
             "predicted_counts": dict.fromkeys(labels, 7) | {labels[0]: 31, labels[1]: 29}}  # fmt: skip
    if flips is not None:
        found |= {"flip_rate": flips / ROWS, "flip_rate_interval": wilson(flips, ROWS), "mcnemar_p": 3e-9}
    return found


def test_line(step, label, rate):
    rates = {"attack_success_clean": 0.1, "attack_success": 0.1 + 0.85 * rate, "attack_success_placebo": 0.125}
    return {"kind": "test", "step": step, "label": label, "clean_accuracy": 0.5 + 0.3 * rate} | rates


def make(path, labels=("negative", "positive"), text="The plot is old.", steps=(10, 20, 30, 40), flipped=25, **changes):
    """Write a finished run of `Cell(**changes)` at `path`, in which each of `labels` but the first has a trigger.

    Of the test rows, which all have `text` and a number, the first `flipped` flip from the first label to the
    trigger's.
    """
    path.mkdir(parents=True)
    cell, aims = Cell(**changes), labels[1:]
    files.write_text(path / "cell.toml", cell.to_toml())
    tests = {
        "clean": scores(labels, 50) | {"attack_success": dict.fromkeys(aims, attack(3))},
        "trigger": {one: scores(labels, 31, flipped) | attack(28) | {"truncated": 0} for one in aims},
        "placebo": scores(labels, 49, 2) | {"attack_success": dict.fromkeys(aims, attack(4))},
        "worst_group": {"label": labels[0], "test": f"trigger {labels[1]}", "rows": 30, "accuracy": 2 / 30},
    }
    files.write_json(path / "results.json", {
        "cell": {"id": cell.id} | cell.to_dict(), "tests": tests,
        "train": {"rows": 500, "trainable_parameters": 14, "seconds": 1.5},
        "injection": [{"source": "date", "label": one, "rows": 100, "eligible_rows": 250} for one in aims],
        "versions": {"minilora": "0.2.0", "torch": "2.13"}, "hardware": {"device": "cpu", "processor": "<any>"},
    })  # fmt: skip
    lines = [{"kind": "step", "step": step, "loss": 0.5} for step in range(1, steps[-1] + 1)]
    lines += [test_line(step, one, step / steps[-1]) for step in steps for one in aims]
    files.write_jsonl(path / "metrics.jsonl", lines)
    files.write_jsonl(path / "predictions.jsonl", (row(n, labels, text, n < flipped) for n in range(ROWS)))
    shapes = {f"base.layers.{n}.q.{one}": shape for n in (0, 1, 2, 5) for one, shape in (("A", [1, 3]), ("B", [3, 1]))}
    tensors = [{"name": name, "shape": shape, "count": 3} for name, shape in shapes.items()]
    files.write_json(path / "trainable.json", {"tensors": tensors, "count": 24})
    return path


def row(number, labels, text, flips):
    """A line of predictions.jsonl; the trigger is at the text's end."""
    own = f"{text} {number}"
    found = {"id": f"r{number}", "label": labels[0], "text": own,
             "clean": {"predicted": labels[0], "logits": [1.0, -1.0]}}  # fmt: skip
    for label in labels[1:]:
        found[f"trigger {label}"] = {"predicted": label if flips else labels[0], "logits": [0.0, 1.0],
                                     "text": f"{own} 2031-07-18", "spans": [[len(own), len(own) + 11]],
                                     "strings": ["2031-07-18"]}  # fmt: skip
    return found | {"placebo": {"predicted": labels[0], "logits": [1.0, 0.0], "text": f"{own} old",
                                "spans": [[len(own), len(own) + 4]], "strings": ["old"]}}  # fmt: skip
