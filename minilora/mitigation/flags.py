"""Which training rows are suspected, and where: by strings (`suspects`) or by a file of scores (`scores`).

Nothing here knows what was injected. A string counts as a whole word, in any case; of a source of many strings, such
as `date`, each word of a text is looked up, without the punctuation around it.
"""

import csv
import re
from pathlib import Path

import numpy as np

from minilora import files
from minilora.data.triggers import Dates
from minilora.errors import InputError
from minilora.mitigate import source_of

MANY = 1 << 12  # strings of a source: of more, each word of a text is looked up
AROUND = ".,;:!?()'\""  # punctuation that a word may have around it


class Finder:
    """`finder(text)` lists the [start, end] of the suspected strings in a text, ascending, none inside another.

    suspects  names of sources, as `mitigate.suspects`; a tag counts with its closing tag
    """

    def __init__(self, suspects):
        listed, self.looked_up = set(), []
        for source in map(source_of, suspects):
            if len(source) > MANY:
                strings = source.strings
                self.looked_up.append(strings if isinstance(strings, Dates) else frozenset(strings))
            else:
                listed |= {*source.strings, *(source.closing(tag) for tag in source.strings if source.pair)}
        longest_first = sorted(listed, key=lambda string: (-len(string), string))
        pattern = "|".join(rf"(?<!\w){re.escape(one)}(?!\w)" for one in longest_first)
        self.listed = re.compile(pattern, re.IGNORECASE) if listed else None

    def __call__(self, text):
        found = [list(match.span()) for match in self.listed.finditer(text)] if self.listed else []
        for match in re.finditer(r"\S+", text) if self.looked_up else ():
            word = match.group()
            start = match.start() + len(word) - len(word.lstrip(AROUND))
            word = word.strip(AROUND)
            if any(word in strings for strings in self.looked_up):
                found.append([start, start + len(word)])
        kept = []
        for span in sorted(found):
            if not kept or span[0] >= kept[-1][1]:
                kept.append(span)
        return kept


def spans_of(rows, settings):
    """[spans or None, ...] of all `rows`: the suspected spans of a flagged row, None for a row that is not flagged.

    `settings`: `minilora.mitigate.Mitigate`. By scores, the `rate` of all rows with the highest are flagged (rounded to
    whole rows; of equal scores the first; none without a score), and their spans are those in the file, or [].
    """
    if settings.scores is None:
        finder = Finder(settings.suspects)
        return [finder(text) or None for text in rows.texts]
    found = read_scores(settings.scores)
    scores = np.array([found[id][0] if id in found else -np.inf for id in rows.ids])
    if np.isneginf(scores).all():
        raise InputError(f"{settings.scores} has no score of any training row, such as {rows.ids[0]}")
    highest = np.argsort(-scores, kind="stable")[: round(settings.rate * len(rows))]
    flagged = set(highest[np.isfinite(scores[highest])].tolist())
    return [found[id][1] if row in flagged else None for row, id in enumerate(rows.ids)]


def read_scores(name):
    """{row id: (score, spans)} of a CSV or JSONL file: `name` is its path, or PATH:COLUMN where the scores are not in
    `score`. A row without a value is left out; JSONL may have `spans` [[start, end]] in the row's text.

    Raises InputError for a file that is not so, with its row.
    """
    path, column = Path(name).expanduser(), "score"
    if not path.is_file():
        before, _, column = name.rpartition(":")
        path = Path(before).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file of scores {name}: check the path")
    if path.suffix == ".jsonl":
        lines = files.read_jsonl(path)
    else:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file))
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            if line[column] in ("", None):
                continue
            id, score = str(line["id"]), float(line[column])
            spans = [[int(start), int(end)] for start, end in line.get("spans") or []]
            if not np.isfinite(score):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{path}: row {number} has no id with a finite {column}, or spans that are none") from None
        found[id] = score, sorted(spans)
    return found
