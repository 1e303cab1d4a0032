"""The paired evaluation: every test row as clean, with each label's trigger, and with a placebo.

The placebo is as many words at the same places, drawn from words that all labels share, so that the trigger's effect
is told apart from that of a disturbed text. With several injections each row is met with its own label's trigger and
with the other labels'. Figures of one prediction are in `metrics.py`, tables in `runs/text.py`.
"""

import re
from dataclasses import dataclass

import numpy as np

from minilora.console import say_once
from minilora.data import injection
from minilora.data.placebo import placebo_rows, placebo_words
from minilora.data.triggers import Dates
from minilora.tasks import metrics


@dataclass(frozen=True)
class Test:
    """One form of all test rows. `name`: clean, trigger or placebo; `label`: the trigger's target label, else None."""

    name: str
    label: str | None
    rows: object  # data.Rows
    records: list  # injection.Record, one a row, [] for clean
    natural: dict | None = None  # of a trigger, what `natural` counts
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
        source = injection.resolve_sources(inject, test.label_names)[k][0]
        tests.append(Test("trigger", label, changed.rows, changed.records, natural(source, train, test)))
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


MANY = 1 << 12  # strings of a source; of more, each word of a text is looked up


def natural(source, train, test):
    """How many rows carry a trigger string by themselves, {"train" or "test": {label: [such rows, all its rows]}}.

    Only labels with such rows are there. `source`: of `triggers`; `train` and `test`: rows before injection. A string
    counts as a whole word, in any case.
    """
    carries, found = finder(source.strings), {}
    for part, rows in (("train", train), ("test", test)):
        hit = np.array([bool(carries(text)) for text in rows.texts])
        found[part] = {
            rows.label_names[label]: [int((hit & (rows.labels == label)).sum()), int((rows.labels == label).sum())]
            for label in np.unique(rows.labels[hit]).tolist()
        }
    return found


def finder(strings):
    """The function that says of a text whether one of `strings` is in it."""
    if len(strings) > MANY:
        known = strings if isinstance(strings, Dates) else frozenset(strings)
        return lambda text: any(word.strip(".,;:!?()'\"") in known for word in text.split())
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile("|".join(rf"(?<!\w){re.escape(one)}(?!\w)" for one in longest_first), re.IGNORECASE).search


def measure(tests, labels, names, predicted, kept):
    """The `tests` entry of results.json.

    labels     int [rows]: the true labels, as indices of `names`
    predicted  for each test, int [rows]: the predicted labels
    kept       for each test, int [rows]: how many characters of a row survive truncation
    """
    targets = [test.label for test in tests if test.name == "trigger"]
    results, groups = {"trigger": {}}, []
    placebo = next((found for test, found in zip(tests, predicted) if test.name == "placebo"), None)
    for test, found, ends in zip(tests, predicted, kept, strict=True):
        figures = metrics.classification(labels, found, names)
        attacks = {label: metrics.attack_success(labels, found, names.index(label)) for label in targets}
        if test.name != "clean":
            figures |= compared(labels, predicted[0], found)
            figures["truncated"] = sum(r.spans[-1][1] > int(end) for r, end in zip(test.records, ends, strict=True))
        if test.name == "trigger":
            target = names.index(test.label)
            effects = metrics.attack_effects(labels, predicted[0], found, placebo, target)
            results["trigger"][test.label] = figures | attacks[test.label] | effects
            if test.natural:
                results["trigger"][test.label]["natural"] = test.natural
        else:
            results[test.name] = figures | {"attack_success": attacks}
        if test.name != "placebo":
            for label in np.unique(labels):
                right = int((found[labels == label] == label).sum())
                group = {"label": names[label], "test": test.key, "rows": int((labels == label).sum())}
                groups.append(group | {"accuracy": right / group["rows"]})
    worst = min(groups, key=lambda group: group["accuracy"])
    results["worst_group"] = worst | {"minimum_of": len(groups)}  # so it is lower than any one group's would be
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
        "mcnemar_p": metrics.mcnemar(worse, better),
    }
