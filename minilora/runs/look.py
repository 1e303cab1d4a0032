"""A look at texts of one's own: each as it is, with a trigger, with a placebo and without the adapter, word by word.

The first half returns plain data, the second writes it as lines of text of at most 80 columns.
"""

from unicodedata import category, east_asian_width

import numpy as np

from minilora.console import short, visible
from minilora.data import words
from minilora.errors import InputError
from minilora.lora.layer import named_layers

NO_ADAPTER = "no adapter"  # the key of that test, beside "clean", "trigger LABEL" and "placebo"


def look(run, texts, seed=0):
    """Yield what `Trained.look` returns, text by text. Raises InputError as it does, before the first."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if len(run.labels) == 1:
        raise InputError(f"{run.folder} has only the label {run.labels[0]!r:.40}: there is nothing to tell apart")
    run.log_probabilities([])  # refuses a model without a head
    tokens, _ = run.task.read(texts, run.labels)
    if (empty := next((row for row, count in enumerate(tokens) if not count), None)) is not None:
        raise InputError(f"text {empty + 1}, {texts[empty]!r:.40}, has no token that the base reads: write a word")
    tests = run.tests_of(texts, seed)
    return (_look_at(run, tests, row, seed) for row in range(len(texts)))


def _look_at(run, tests, row, seed):
    text, found = tests[0].rows.texts[row], {}
    for test in tests:
        found[test.key] = {"text": test.rows.texts[row]} | test.shown(row) | _weighed(run, test.rows.texts[row])
    if dict(named_layers(run.base)):
        with run.detach():
            found[NO_ADAPTER] = {"text": text} | _predicted(run, [text])[0]
    return {"text": text, "seed": seed, "tests": found}


def _weighed(run, text):
    """The prediction of a text, and what each word that is read adds to its log odds."""
    _, [read] = run.task.read([text], run.labels)
    spans = words.spans(text)
    seen = [span for span in spans if span[1] <= read]
    parts = [without(text, *span) for span in seen]
    usable = run.task.read(parts, run.labels)[0] > 0
    whole, odds = _predicted(run, [text, *(part for part, use in zip(parts, usable) if use)])
    effects = iter((odds[0] - odds[1:]).tolist())
    entries = [
        {"word": text[start:end], "span": [start, end], "effect": round(next(effects), 6) if use else None}
        for (start, end), use in zip(seen, usable, strict=True)
    ]
    return whole | {"words": entries, "unread": len(spans) - len(seen)}


def _predicted(run, texts):
    """(The prediction of the first text, float64 [texts]: the log odds of that label in each text)."""
    scores = run.log_probabilities(texts)
    best = int(scores[0].argmax())
    others = np.delete(scores, best, axis=1)
    odds = scores[:, best] - np.logaddexp.reduce(others, axis=1)
    shares = {label: round(float(share), 6) for label, share in zip(run.labels, np.exp(scores[0]), strict=True)}
    return {"predicted": run.labels[best], "log_odds": round(float(odds[0]), 6), "probabilities": shares}, odds


def without(text, start, end):
    """The text without the word at [start, end) and the white space that follows it (the last: precedes it)."""
    after = text[end:].lstrip()
    if len(after) < len(text) - end or not after:
        return text[:start] + after if after else text[:start].rstrip()
    return text[:start] + after


# --- as text

COLUMNS = 80
TITLE, LABEL = 36, 16  # columns of the longest title of a row, and of a label
# Strength, as a share of the strongest word's: bold from the first, dim below the second.
BOLD, DIM = 0.5, 0.1
FOR, AGAINST = 36, 35  # cyan and magenta, which people who see no red or no green tell apart


def look_lines(found, colour=False):
    """Lines of text for what `look` yields of a text; with `colour` words are marked by a terminal's colours too."""
    tests = found["tests"]
    titles = {key: _title(key, test) for key, test in tests.items()}
    names = _shown_labels(tests)
    heads = [cut(name, LABEL) for name in names]
    width = max(6, *map(columns, heads))
    first = max(map(columns, titles.values()))
    yield cut(found["text"], COLUMNS) or "(an empty text)"
    yield ""
    yield " " * first + "".join("  " + " " * (width - columns(head)) + head for head in heads)
    for key, test in tests.items():
        shares = "".join(f"  {test['probabilities'][name]:>{width}.3f}" for name in names)
        yield titles[key] + " " * (first - columns(titles[key])) + shares
    if left := len(tests["clean"]["probabilities"]) - len(names):
        yield f"({left:,} more labels)"
    for key, test in tests.items():
        if test.get("words") and key != "placebo":
            yield ""
            yield f"{titles[key]} -> {cut(test['predicted'], LABEL)}"
            yield from _word_lines(test, colour)
        if test.get("unread"):
            yield f"  ({test['unread']:,} more words are not read: they are beyond the run's max_length)"


def closing_lines(run, found):
    """What the numbers are, how strings were drawn, and why a look has no trigger, placebo or test without adapter."""
    tests = found["tests"]
    yield "below a word: what it adds to the log odds of the label that is predicted"
    if not run.cell.inject.sources:
        yield "no trigger: nothing was injected here; --inject SOURCE:LABEL, such as date:LABEL, gives one"
    else:
        yield f"drawn with seed {found['seed']} among the strings of the tests; --seed N draws others"
        if "placebo" not in tests:
            yield "no placebo: there are no training rows here"
    if NO_ADAPTER not in tests:
        yield f"nothing without the adapter: method {run.cell.method} trained none"


def _title(key, test):
    if key in ("clean", NO_ADAPTER):
        return "as it is" if key == "clean" else "without the adapter"
    name, _, label = key.partition(" ")
    title = f"{name} of {cut(label, 12)}" if label else name
    return cut(f"{title}: {' '.join(test['strings'])}", TITLE)


def _shown_labels(tests):
    """As many labels as there is room for: what triggers aim at and tests predict first, then the likeliest."""
    names = list(tests["clean"]["probabilities"])
    aims = [key.partition(" ")[2] for key in tests if key.startswith("trigger ")]
    found = [*aims, *(test["predicted"] for test in tests.values())]
    found += sorted(names, key=tests["clean"]["probabilities"].get, reverse=True)
    width = max(6, *(columns(cut(name, LABEL)) for name in names))
    chosen = list(dict.fromkeys(found))[: max(2, (COLUMNS - TITLE) // (width + 2))]
    return sorted(chosen, key=names.index)


def _word_lines(test, colour):
    """Two lines of text for as many words as fit, the numbers below the words; what was put in stands in brackets."""
    strongest = max((abs(entry["effect"]) for entry in test["words"] if entry["effect"] is not None), default=0) or 1
    above, below, used = [], [], 0
    for entry in test["words"]:
        start, end = entry["span"]
        put_in = any(left <= start and end <= right for left, right in test.get("spans", ()))
        word = cut(entry["word"], COLUMNS // 2)
        word = f"[{word}]" if put_in else word
        number = "-" if entry["effect"] is None else f"{entry['effect']:+.2f}"
        width = max(columns(word), len(number))
        if used + width + 2 > COLUMNS:
            yield from ("".join(above).rstrip(), "".join(below).rstrip())
            above, below, used = [], [], 0
        used += width + 2
        pad = " " * (width - columns(word))
        above.append("  " + (_marked(word, entry["effect"], strongest) if colour else word) + pad)
        below.append(f"  {number:<{width}}")
    yield from ("".join(above).rstrip(), "".join(below).rstrip())


def _marked(word, effect, strongest):
    share = abs(effect or 0) / strongest
    weight = 1 if share >= BOLD else 22 if share >= DIM else 2
    return f"\x1b[{weight};{FOR if (effect or 0) > 0 else AGAINST}m{word}\x1b[0m"


def columns(text):
    """How many columns of a terminal a text takes."""
    found = 0
    for one in visible(text):
        found += 0 if category(one) in ("Mn", "Me", "Cf") else 2 if east_asian_width(one) in "WF" else 1
    return found


def cut(text, most):
    """The text on one line, and cut to `most` columns."""
    text = short(text, most)
    while columns(text) > most:
        text = text.removesuffix("…")[:-1] + "…"
    return text
