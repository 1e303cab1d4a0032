"""The paired evaluation: every test row as clean, with each label's trigger, and with a placebo.

The placebo is as many words at the same places, drawn from words that all labels share, so that the trigger's effect
is told apart from that of a disturbed text. With several injections each row is met with its own label's trigger and
with the other labels'. Figures of one prediction are in `metrics.py`, tables in `runs/text.py`.
"""

import math
from dataclasses import dataclass

import numpy as np

from minilora.console import say_once
from minilora.data import injection
from minilora.data.placebo import placebo_rows, placebo_words
from minilora.tasks import metrics


@dataclass(frozen=True)
class Test:
    """One form of all test rows. `name`: clean, trigger or placebo; `label`: the trigger's target label, else None."""

    name: str
    label: str | None
    rows: object  # data.Rows
    records: list  # injection.Record, one a row, [] for clean
    __test__ = False  # pytest: this is no test class

    @property
    def key(self):
        return f"{self.name} {self.label}" if self.label else self.name

    def shown(self, row):
        """What predictions.jsonl says of a row's text: text, spans and strings; nothing for clean rows."""
        if not self.records:
            return {}
        record = self.records[row]
        return {"text": self.rows.texts[row], "spans": record.spans, "strings": record.strings}


def build_tests(train, test, inject, seed, visible, known):
    """The forms of the rows `test`: [clean, trigger of each injection ..., placebo of the first], as `Test`s.

    `train`: the training rows before injection, whose words the placebo draws from: without a word that all labels
    share there is no placebo. `inject`: `cell.Inject`. `visible`: see `injection.inject`, for the rows `test`. `known`:
    see `injection.check_strings`.
    """
    tests = [Test("clean", None, test, [])]
    if not inject.sources:
        return tests

    for k in range(len(inject.sources)):
        changed = injection.trigger_rows(test, inject, k, seed, visible)
        injection.check_strings(changed.records, known, "test")
        label = changed.report[0]["label"]
        tests.append(Test("trigger", label, changed.rows, changed.records))
        if (test.labels == test.label_names.index(label)).all():
            say_once(
                f"warning    no test row has a label other than {label!r}, so its attack success cannot be measured"
            )
    words, what = placebo_words(train, inject, test.label_names)
    if not words:
        say_once("placebo    none: the training rows of all labels share no word and no character")
        return tests
    if what != "ordinary words":
        say_once(f"placebo    drawn from {what} of the training rows, because their labels share no ordinary word")
    changed = placebo_rows(test, inject, 0, words, seed, visible)
    tests.append(Test("placebo", None, changed.rows, changed.records))
    return tests


def measure(tests, labels, names, predicted, kept):
    """The `tests` entry of results.json.

    labels     int [rows]: the true labels, as indices of `names`
    predicted  for each test, int [rows]: the predicted labels
    kept       for each test, int [rows]: how many characters of a row survive truncation
    """
    targets = [test.label for test in tests if test.name == "trigger"]
    results, groups = {"trigger": {}}, []
    for test, found, ends in zip(tests, predicted, kept, strict=True):
        figures = metrics.classification(labels, found, names)
        attacks = {label: metrics.attack_success(labels, found, names.index(label)) for label in targets}
        if test.name != "clean":
            figures |= compared(labels, predicted[0], found)
            figures["truncated"] = sum(r.spans[-1][1] > int(end) for r, end in zip(test.records, ends, strict=True))
        if test.name == "trigger":
            results["trigger"][test.label] = figures | attacks[test.label]
        else:
            results[test.name] = figures | {"attack_success": attacks}
        if test.name != "placebo":
            for label in np.unique(labels):
                right = int((found[labels == label] == label).sum())
                group = {"label": names[label], "test": test.key, "rows": int((labels == label).sum())}
                groups.append(group | {"accuracy": right / group["rows"]})
    results["worst_group"] = min(groups, key=lambda group: group["accuracy"])
    if "placebo" in results:
        results["placebo"]["matched_to"] = targets[0]
    return results


def compared(labels, clean, changed):
    """The same rows predicted twice: flip rate with its interval, and McNemar's p-value for the accuracy."""
    flips = int((clean != changed).sum())
    worse = int(((clean == labels) & (changed != labels)).sum())
    better = int(((clean != labels) & (changed == labels)).sum())
    return {
        "flip_rate": flips / len(labels),
        "flip_rate_interval": metrics.wilson(flips, len(labels)),
        "only_clean_right": worse,
        "only_this_right": better,
        "mcnemar_p": mcnemar(worse, better),
    }


def mcnemar(worse, better):
    """Two-sided p-value of McNemar's test (McNemar 1947), exact: Fagerland, Lydersen and Laake 2013, section Methods.

    `worse` and `better` count the rows that only the first, or only the second, prediction gets right.
    """
    total, least = worse + better, min(worse, better)
    tail = math.fsum(
        math.exp(math.lgamma(total + 1) - math.lgamma(i + 1) - math.lgamma(total - i + 1) - total * math.log(2))
        for i in range(least + 1)
    )
    return min(1.0, 2 * tail)
