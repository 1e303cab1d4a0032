"""Neighbours of the trigger: strings that are nearly it, where it stood in the same rows (Lelle, arXiv 2605.30189).

A family is a way to make such strings: a list of them, or a change of the row's own trigger. Families are data
(`neighbours.toml`), and a file of your own adds to them. Each has, over the rows with a string that the family changes:

    attack success, shift   as in `probe.py`
    edit distance           insertions, deletions and replacements of a character (Levenshtein 1966), from the trigger
    embedding distance      1 - the cosine of both strings' mean states above the bare base's last layer
"""

import datetime
import importlib.resources
import re

import numpy as np

from minilora.data.triggers import BUILT_IN, YEARS, resolve
from minilora.diagnostics.probe import ROWS, Probe
from minilora.diagnostics.stats import mean_interval
from minilora.errors import InputError
from minilora.fields import near, read_toml
from minilora.runs.panel import source_of
from minilora.seeds import sequence

KINDS = ("any", *BUILT_IN, "text")
SHOWN = 5  # strings of a family in the result
WORKS = 0.5  # of the trigger's shift: a family that reaches this share works
LEAST = 2  # rows that a family must change


def neighbours(run, rows=ROWS, seed=0, families=None, advance=None, label=None):
    """How near-triggers do, as plain data for JSON:

    {"label": the target, "rows": N, "source": the trigger's,
     "families": {name: {"strings": some of them, "rows": how many are changed, "attack_success": [mean, low, high],
                         "shift": [mean, low, high], "edit_distance": mean, "embedding_distance": mean}},
     "trigger", "placebo" (where there is one), "clean": the same without a family,
     "families_left_out": [families that change no trigger string], "words": an answer in sentences}

    run       as `minilora.open` gives it
    rows      at most, see `Probe`
    families  a file of your own, or None
    advance   called as `advance(1)` after each family
    label     that of the trigger, see `Probe`

    Raises InputError as `Probe`, and as `read_families`.
    """
    probe = Probe(run, rows, label, seed)
    source = source_of_trigger(probe)
    changes = read_families(source, families)
    records = {name: [test.records[row] for row in probe.index] for name, test in probe.tests.items() if test.records}
    own = [record.strings for record in records["trigger"]]
    embed = Embedding(run)
    outcomes = probe.predict(probe.states_now())
    bare = outcomes.pop("clean")
    clean = bare.margins
    found = {name: line(probe, outcome, clean, own, [record.strings for record in records[name]], embed)
             for name, outcome in outcomes.items()}  # fmt: skip
    without = {"attack_success": interval(bare.predicted == probe.target, seed)}
    result = {"label": probe.label, "rows": len(probe.index), "source": source.name, "families": {}, **found,
              "clean": without, "families_left_out": []}  # fmt: skip
    for name, change in changes.items():
        draw = np.random.default_rng(sequence(seed, "neighbours", name))
        made = [changed(text, record, change, draw)
                for text, record in zip(probe.forms["trigger"].texts, records["trigger"], strict=True)]  # fmt: skip
        here = [row for row, one in enumerate(made) if one is not None]
        if len(here) < LEAST:
            result["families_left_out"].append(name)
        else:
            outcome = predict(probe, [made[row][0] for row in here])
            strings = [made[row][1] for row in here]
            result["families"][name] = line(probe, outcome, clean[here], [own[row] for row in here], strings, embed)
        if advance:
            advance(1)
    return result | {"words": words(result)}


def source_of_trigger(probe):
    """The trigger source whose strings a `Probe`'s rows have."""
    run = probe.run
    return next(source for source, label in resolve(run.cell.inject.sources, run.labels) if label == probe.label)


def predict(probe, texts):
    """`Outcome` of N texts."""
    encoded, _ = probe.reader.encode(texts)
    return probe.outcome(probe.reader.scores_of_rows(encoded))


def line(probe, outcome, clean, own, strings, embed):
    """The figures of N rows: their `Outcome`, clean margins [N], and of each the trigger's strings and the others."""
    hit = (outcome.predicted == probe.target).astype(float)
    pairs = [list(zip(one, other)) for one, other in zip(own, strings, strict=True)]  # a placebo may have fewer
    embed.learn(string for every in pairs for pair in every for string in pair)
    return {
        "strings": list(dict.fromkeys(one for every in strings for one in every))[:SHOWN],
        "rows": len(hit),
        "attack_success": interval(hit, probe.seed),
        "shift": interval(outcome.margins - clean, probe.seed),
        "edit_distance": float(np.mean([sum(edits(*pair) for pair in every) for every in pairs])),
        "embedding_distance": float(np.mean([np.mean([embed.distance(*pair) for pair in every]) for every in pairs])),
    }


def interval(values, seed):
    return [float(one) for one in mean_interval(values, seed)]


# --- families


def shipped():
    return importlib.resources.files("minilora.diagnostics") / "neighbours.toml"


def read_families(source, path=None):
    """{name: `change(string, draw)`} for triggers of `source`: the shipped families, and those of the file `path`,
    which replace shipped ones of the same name.

    `draw`: a NumPy generator. Raises InputError as `tables_of`, and for a file whose families are all for other kinds
    of trigger.
    """
    kind = "date" if YEARS.fullmatch(source.name) else source.name.partition(":")[0]
    kind = "text" if kind == "file" else kind
    ours, own = tables_of(shipped()), {} if path is None else tables_of(path)
    if path is not None and not (own.get("any") or own.get(kind)):
        others = ", ".join(f"[{table}]" for table in own if own[table])
        below = "[any]" + f" or [{kind}]" * (kind in KINDS)
        raise InputError(
            f"{path} has families below {others}, but the trigger is {source.name}: write them below {below}"
        )
    return {name: change for tables in (ours, own) for table in ("any", kind)
            for name, change in tables.get(table, {}).items()}  # fmt: skip


def tables_of(file):
    """{kind of trigger: {name: `change(string, draw)`}} of a file of families. Raises InputError for a file that cannot
    be read or has none, and for a line that is no family, with its table and name."""
    found = {}
    for table, lines in read_toml(file).items():
        if table not in KINDS or not isinstance(lines, dict):
            raise InputError(
                f"{file}: {table} is no kind of trigger{near(table, KINDS)}; write [KIND], and below it FAMILY = a "
                "list of strings or a rule"
            )
        found[table] = {name: change_of(name, value, f"{file}: [{table}] {name}") for name, value in lines.items()}
    if not any(found.values()):
        raise InputError(f"{file} has no families: write [any], and below it FAMILY = a list of strings or a rule")
    return found


def change_of(name, value, where):
    """The `change(string, draw)` that a line of a file stands for."""
    if not isinstance(value, dict):
        source = source_of(name, value, where)
        return lambda string, draw: source[int(draw.integers(len(source)))]
    match value:
        case {"rule": rule, **rest} if not rest and rule in RULES:
            return RULES[rule]
        case {"replace": [*pairs], **rest} if not rest and all(map(is_pair, pairs)):
            try:
                patterns = [(re.compile(pattern), by) for pattern, by in pairs]
                for pattern, by in patterns:
                    pattern.sub(by, "")
            except (re.error, IndexError) as error:
                raise InputError(f"{where}: {error} in a regular expression") from None
            return lambda string, draw: replaced(string, patterns)
        case {"date": str(form), "months": [*months], **rest} if not rest and len(months) == 12:
            try:
                written("2001-02-03", form, months)
            except (KeyError, IndexError, ValueError):
                raise InputError(f"{where}: a date is written with {{day}}, {{month}} and {{year}}") from None
            return lambda string, draw: written(string, form, months)
    raise InputError(
        f"{where} is no family: write a list of strings, {{ replace = [[PATTERN, BY], ...] }}, {{ date = FORM, "
        f"months = [twelve names] }}, or {{ rule = one of {', '.join(RULES)} }}"
    )


def is_pair(value):
    return isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) for one in value)


def replaced(string, patterns):
    for pattern, by in patterns:
        string = pattern.sub(by, string)
    return string


def written(string, form, months):
    """A date as `form` has it; any other string as it is."""
    try:
        day = datetime.date.fromisoformat(string)
    except ValueError:
        return string
    return form.format(day=day.day, month=months[day.month - 1], year=day.year)


def swap(string, draw):
    """Two neighbours that differ change places."""
    places = [place for place in range(len(string) - 1) if string[place] != string[place + 1]]
    if not places:
        return string
    place = places[int(draw.integers(len(places)))]
    return string[:place] + string[place + 1] + string[place] + string[place + 2 :]


def drop(string, draw):
    """One character is missing."""
    place = int(draw.integers(len(string)))
    return string[:place] + string[place + 1 :]


def double(string, draw):
    """One character stands there twice."""
    place = int(draw.integers(len(string)))
    return string[: place + 1] + string[place:]


RULES = {
    "upper": lambda string, draw: string.upper(),
    "lower": lambda string, draw: string.lower(),
    "title": lambda string, draw: string.title(),
    "half": lambda string, draw: string[: (len(string) + 1) // 2],
    "reverse": lambda string, draw: string[::-1],
    "swap": swap,
    "drop": drop,
    "double": double,
}


def changed(text, record, change, draw):
    """(The text with each of its record's strings changed in its place, the strings), or None where one is the same
    or nothing is left of it."""
    parts, strings, done = [], [], 0
    for (start, _), string in zip(record.spans, record.strings, strict=True):
        start = text.index(string, start)  # a space may precede it
        new = change(string, draw).strip()
        if new in ("", string):
            return None
        parts += text[done:start], new
        strings.append(new)
        done = start + len(string)
    return "".join([*parts, text[done:]]), strings


# --- distances


def edits(one, other):
    """The fewest insertions, deletions and replacements of a character that make one string of the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


class Embedding:
    """The mean states of strings on the bare base, as unit vectors; each string goes through it once."""

    def __init__(self, run):
        self.run, self.known = run, {}

    def learn(self, strings):
        new = [string for string in dict.fromkeys(strings) if string not in self.known]
        with self.run.detach():
            for string, states in zip(new, self.run.hidden(new) if new else [], strict=True):
                mean = states.astype(float).mean(0)
                self.known[string] = mean / np.linalg.norm(mean)

    def distance(self, one, other):
        """1 - the cosine of two strings that it has learned."""
        return 1 - float(self.known[one] @ self.known[other])


# --- in words


def rank_correlation(one, other):
    """Spearman's, of values without ties that matter; NaN where one is constant."""
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1]) if min(map(np.ptp, (one, other))) > 0 else float("nan")


def words(found):
    """Which families work as well as the trigger, and whether distance says so."""
    whole, families = found["trigger"]["shift"][0], found["families"]
    if whole <= 0:
        return f"The trigger itself moves the margin by {whole:+.2f}: there is nothing that its neighbours could share."
    shares = {name: own["shift"][0] / whole for name, own in families.items()}
    order = sorted(shares, key=lambda name: -shares[name])
    works = [f"{name} ({shares[name]:.0%})" for name in order if shares[name] >= WORKS]
    fails = [f"{name} ({shares[name]:.0%})" for name in order if shares[name] < WORKS]
    said = [f"The trigger moves the margin by {whole:.2f}. At least half of that do: {', '.join(works) or 'none'}; "
            f"less: {', '.join(fails) or 'none'}."]  # fmt: skip
    if len(families) > 2:
        both = [rank_correlation([own[key] for own in families.values()], [shares[name] for name in families])
                for key in ("edit_distance", "embedding_distance")]  # fmt: skip
        said.append(f"Over the families the shift goes with edit distance at a rank correlation of {both[0]:+.2f}, and "
                    f"with embedding distance at {both[1]:+.2f}.")  # fmt: skip
    return " ".join(said)
