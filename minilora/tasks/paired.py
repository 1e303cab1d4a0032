"""The paired evaluation: every test row as clean, with each label's trigger, and with a placebo.

Each trigger has two placebos at the same places, of as many tokens: one of words that all labels share, so that the
trigger's effect is told apart from that of a disturbed text, and an odd one (see `data/placebo.py`). With several
injections each row is met with its own label's trigger and with the other labels'. Figures of one
prediction are in `metrics.py`, tables in `runs/text.py`.
"""

import re
from dataclasses import dataclass

import numpy as np

from minilora.console import say_once
from minilora.data import injection
from minilora.data.placebo import KINDS, placebo_rows, placebos
from minilora.data.triggers import Dates
from minilora.tasks import metrics


@dataclass(frozen=True)
class Test:
    """One form of all test rows. `name`: clean, trigger, placebo or odd. `label`: the trigger's target label; of a
    placebo the label of the trigger that it matches, None for that of the first one and for clean rows."""

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


def build_tests(train, test, inject, seed, visible, known, count=None):
    """The forms of the rows `test`: [clean, trigger of each injection ..., placebo of each, odd one of each], as
    `Test`s.

    `train`: the training rows before injection, whose words the placebo draws from. `inject`: `cell.Inject`.
    `visible`: see `injection.inject`, for the rows `test`. `known`: see `injection.check_strings`. `count`: see
    `placebo.placebo_rows`.
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
    labels = [test.label for test in tests[1:]]
    for kind, vocabulary in placebos(train, inject, test.label_names).items():
        for k, label in enumerate(labels):
            changed = placebo_rows(test, inject, k, vocabulary, seed, visible, count=count, kind=kind)
            tests.append(Test(kind, label if k else None, changed.rows, changed.records))
    return tests


MANY = 1 << 12  # strings of a source; of more, each word of a text is looked up


def natural(source, train, test):
    """How many rows carry a trigger string by themselves, {"train" or "test": {label: [such rows, all its rows]}}.

    Only labels with such rows are there. `source`: of `triggers`; `train` and `test`: rows before injection. A string
    counts as a whole word, in any case.
    """
    finders, found = [finder(part.strings) for part, _ in source.parts], {}
    for part, rows in (("train", train), ("test", test)):
        hit = np.array([any(carries(text) for carries in finders) for text in rows.texts])
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
    controls = {label: {} for label in targets}
    for test, found in zip(tests, predicted, strict=True):
        if test.name in KINDS:
            controls[test.label or targets[0]][test.name] = found
    for test, found, ends in zip(tests, predicted, kept, strict=True):
        figures = metrics.classification(labels, found, names)
        attacks = {label: metrics.attack_success(labels, found, names.index(label)) for label in targets}
        if test.name != "clean":
            figures |= compared(labels, predicted[0], found)
            figures["truncated"] = sum(r.spans[-1][1] > int(end) for r, end in zip(test.records, ends, strict=True))
        if test.name == "trigger":
            target = names.index(test.label)
            effects = metrics.attack_effects(labels, predicted[0], found, controls[test.label], target)
            results["trigger"][test.label] = figures | attacks[test.label] | effects
            if test.natural:
                results["trigger"][test.label]["natural"] = test.natural
        else:
            entry = results.setdefault(test.name, figures | {"attack_success": attacks})
            if test.label:  # that label's own placebo
                entry["attack_success"][test.label] = attacks[test.label]
        if test.name not in KINDS:
            for label in np.unique(labels):
                right = int((found[labels == label] == label).sum())
                group = {"label": names[label], "test": test.key, "rows": int((labels == label).sum())}
                groups.append(group | {"accuracy": right / group["rows"]})
    worst = min(groups, key=lambda group: group["accuracy"])
    results["worst_group"] = worst | {"minimum_of": len(groups)}  # so it is lower than any one group's would be
    for kind in KINDS:
        if kind in results:
            results[kind]["matched_to"] = targets[0]
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
