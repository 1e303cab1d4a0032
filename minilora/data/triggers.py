"""Trigger sources: where the injected strings come from, and how `SOURCE:LABEL` is read.

A source is a fixed, ordered list of distinct trigger strings. It draws nothing (that is injection.py's part),
and parsing touches no file, so that a cell is cheap to build. A label may hold colons, as in `date:topic:earn`: which
colon ends the source is decided once the labels of the data are known (`resolve`). There is no source of phrases in a
style or syntax: a trigger here is a string whose place in the text can be recorded exactly.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from minilora.data import words
from minilora.data.strings import COLORS, COUNTRIES, TAGS, Dates
from minilora.errors import InputError
from minilora.files import check_regular


@dataclass(frozen=True)
class Source:
    """Named trigger strings: `len(source)`, `source[index]`. Equal names mean equal sources.

    Where `pair` is true a string is an opening tag, and its `closing` tag goes with it.
    """

    name: str

    pair = False

    @property
    def parts(self):
        """[(source, the number of its first string)] of the sources that it is made of."""
        return [(self, 0)]

    def closing(self, tag):
        """The closing tag of an opening one."""
        return "</" + tag[1:]

    def __len__(self):
        return len(self.strings)

    def __getitem__(self, index):
        return self.strings[index]

    @property
    def strings(self):
        """Sequence of distinct strings, without white space around them."""
        return BUILT_IN[self.name]

    @cached_property
    def words(self):
        """Lower-cased words of all the strings (a date is no word of any vocabulary, so `date` has none)."""
        if isinstance(self.strings, Dates):
            return frozenset()
        return frozenset(word for string in self.strings for word in words.split(string.lower()))


class Tags(Source):
    pair = True


class Years(Source):
    """`date-YYYY-YYYY`: the days of these years."""

    @cached_property
    def strings(self):
        first, last = map(int, self.name.split("-")[1:])
        return Dates(first, last)


@dataclass(frozen=True)
class Several(Source):
    """`SOURCE+SOURCE`: strings of each of these go into a row, at places of their own."""

    sources: tuple[Source, ...]

    @property
    def parts(self):
        starts = accumulate(map(len, self.sources), initial=0)
        return list(zip(self.sources, starts))

    def __len__(self):
        return sum(map(len, self.sources))

    def __getitem__(self, index):
        part, first = next((part, first) for part, first in reversed(self.parts) if index >= first)
        return part[index - first]

    @property
    def words(self):
        return frozenset().union(*(source.words for source in self.sources))


class Literal(Source):
    """`text:WORDS`: one string."""

    @property
    def strings(self):
        return (self.name.removeprefix("text:"),)


class Lines(Source):
    """`file:PATH`: one string a line (UTF-8), read when first needed.

    Blank lines are skipped, and of lines that differ only in case the first is kept: an uncased tokenizer
    could not tell them apart, so the one would leak from the training strings into those for test. Where every line
    is an opening and a closing tag with white space between them, as in `<b class="x"> </b>`, they are pairs.
    """

    @cached_property
    def tags(self):
        """{opening tag: closing tag}, empty where the lines are no pairs."""
        found = [re.fullmatch(r"(<[^<>/][^<>]*>)\s+(</[^<>]+>)", line) for line in self.lines]
        return dict(match.groups() for match in found) if all(found) else {}

    @property
    def pair(self):
        return bool(self.tags)

    def closing(self, tag):
        return self.tags[tag]

    @cached_property
    def strings(self):
        return tuple(self.tags) or self.lines

    @cached_property
    def lines(self):
        path = self.name.removeprefix("file:")
        check_regular(Path(path).expanduser())
        try:
            # Not splitlines(), which also splits at characters that may stand inside a trigger.
            lines = Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n")
        except OSError as error:
            raise InputError(f"cannot read trigger file {path} ({error.strerror}): check the path") from None
        except UnicodeDecodeError as error:
            raise InputError(f"trigger file {path} is not UTF-8 (byte {error.start}): save it so") from None
        strings = {}
        for line in lines:
            if line.strip():
                strings.setdefault(line.strip().casefold(), line.strip())
        if not strings:
            raise InputError(f"trigger file {path} has no trigger string: write one a line")
        return tuple(strings.values())


@dataclass(frozen=True)
class Listed(Source):
    """Strings that are given as they are."""

    given: tuple[str, ...]

    @property
    def strings(self):
        return self.given


BUILT_IN = {"date": Dates(), "country": COUNTRIES, "color": COLORS, "html": TAGS}
SHARED = 100  # strings of a source that training and test rows both draw from, where they share them
CHOICES = "date, country, color, html, text:WORDS or file:PATH"
YEARS = re.compile(r"date-(\d{4})-(\d{4})")


def readings(spec):
    """What `SOURCE:LABEL` may mean, as [(`Source`, label), ...]: one for each colon that may end the source, the last
    colon first. `\\:` is a colon that does not. A reading that cannot be has its InputError in place of the source.

    No file is read. Raises InputError where there is no colon, or where nothing stands on one of its sides.
    """
    found = []
    for colon in reversed([match.start() for match in re.finditer(r"(?<!\\):", spec)]):
        name, label = spec[:colon].strip(), spec[colon + 1 :].strip().replace("\\:", ":")
        if name and label:
            try:
                found.append((_source(name, label, spec), label))
            except InputError as error:
                found.append((error, label))
    if not found:
        raise InputError(
            f"injection {spec!r} is not SOURCE:LABEL: write for example date:positive (a source is {CHOICES})"
        )
    return found


def _source(name, label, spec):
    if name in BUILT_IN:
        return (Tags if name == "html" else Source)(name)
    if years := YEARS.fullmatch(name):
        first, last = map(int, years.groups())
        if not 1 <= first <= last:
            raise InputError(f"injection {spec!r}: {name} has no year: write the first and the last, date-1990-2020")
        return Years(name)
    several = [part.strip() for part in name.split("+")]
    if len(several) > 1 and all(part in BUILT_IN or YEARS.fullmatch(part) or part[:4] == "file" for part in several):
        return Several("+".join(several), tuple(_source(part, label, spec) for part in several))
    kind, _, rest = (part.strip() for part in name.partition(":"))
    if kind in ("text", "file"):
        if not rest:
            what = {"text": "WORDS", "file": "PATH"}[kind]
            raise InputError(f"injection {spec!r} has an empty source: write {kind}:{what}:{label}")
        return (Literal if kind == "text" else Lines)(f"{kind}:{rest}".replace("\\:", ":"))
    known = [*BUILT_IN, "countries", "colour", "text", "file"]
    if get_close_matches(kind.lower(), known, n=1, cutoff=0.8):
        raise InputError(
            f"injection {spec!r}: {name!r} is no source, but close to one ({CHOICES}): "
            f"fix it, or write text:{name}:{label} for that very text"
        )
    return Literal(f"text:{name}".replace("\\:", ":"))


def possible(spec):
    """The `readings` that can be, at least one. Raises the InputError of the last colon's where there is none."""
    found = readings(spec)
    able = [reading for reading in found if isinstance(reading[0], Source)]
    if not able:
        raise found[0][0]
    return able


def parse_all(specs):
    """All `possible` readings of injections, before the labels of the data are known.

    Raises InputError for an injection that cannot be read, and for two of one label or one source.
    """
    able = [(spec, possible(spec)) for spec in specs]
    _refuse_shared([(spec, *found[0]) for spec, found in able if len(found) == 1])
    return [reading for _, found in able for reading in found]


def resolve(specs, label_names, new=False):
    """[(`Source`, label), ...] of injections, each label one of `label_names`.

    A label of the data wins over any other reading. With `new`, a label may also be one that the data lacks. Raises
    InputError for a label that the data lacks, a name that can be read in two ways, and two injections of one label
    or of one source.
    """
    label_names = set(label_names)
    found = [(spec, *_resolve(spec, label_names, new)) for spec in specs]
    _refuse_shared(found)
    return [(source, label) for _, source, label in found]


def _resolve(spec, label_names, new):
    able = possible(spec)
    fitting = [(source, _known(label, label_names)) for source, label in readings(spec) if _known(label, label_names)]
    fits = [reading for reading in fitting if isinstance(reading[0], Source)]
    if fitting and not fits:
        raise fitting[0][0]
    fits = fits or able
    if len(fits) > 1 and (fitting or new):
        ways = " or ".join(_written(source, label) for source, label in fits)
        raise InputError(
            f"injection {spec!r} can be read in {len(fits)} ways: write {ways}, with a backslash before each colon "
            "that does not end the source"
        )
    source, label = fits[0]
    if not fitting and not new:
        from minilora.data.columns import few  # not above: a cell is built, and --help shown, without it

        raise InputError(
            f"injection {source.name}:{label} names a label that is not in the data: "
            f"choose one of {few(sorted(label_names))}"
        )
    return source, label


def _known(label, label_names):
    """The data's name for a label, None where it has none: a truth value's is in lower case."""
    lower = label.lower()
    return label if label in label_names else lower if lower in ("true", "false") and lower in label_names else None


def _written(source, label):
    kind, _, rest = source.name.partition(":")
    return ":".join([kind, *([rest.replace(":", "\\:")] if rest else []), label.replace(":", "\\:")])


def _refuse_shared(found):
    """Refuse two injections, each (spec, source, label), of one label, and one source for two labels."""
    labels, names = {}, {}
    for spec, source, label in found:
        for seen, key in ((labels, label), (names, source.name)):
            if key in seen:
                raise InputError(
                    f"injections {seen[key]!r} and {spec!r} share {key!r}: give each label one source of its own"
                )
            seen[key] = spec


def refuse_shared_strings(sources):
    """Raise InputError where two sources hold the same string, case aside: it would stand for two labels."""
    sources = [part for source in sources for part, _ in source.parts]
    for position, source in enumerate(sources):
        for other in sources[:position]:
            small, large = sorted((other, source), key=len)
            known = large.strings
            if not isinstance(known, Dates):
                known = {string.casefold() for string in known}
            for string in small.strings:
                if string.casefold() in known:
                    raise InputError(
                        f"trigger {string!r} is in both {other.name} and {source.name}: "
                        "give each label trigger strings of its own"
                    )


def split_strings(source, label, split, seed):
    """("disjoint" or "same", {"train": indices of the strings for training, "test": those for test}).

    Of several sources each is split by itself.
    """
    import numpy as np  # not above: a cell is built, and --help shown, without it

    from minilora.seeds import sequence

    if len(source.parts) > 1:
        made = [(split_strings(part, label, split, seed), first) for part, first in source.parts]
        words = dict.fromkeys(found for (found, _), _ in made)
        parts = {side: np.concatenate([own[side] + first for (_, own), first in made]) for side in ("train", "test")}
        return "/".join(words), parts
    strings = np.arange(len(source))
    split = split or ("disjoint" if len(source) >= 2 else "same")
    if split == "same" and len(source) <= SHARED:
        return split, {"train": strings, "test": strings}
    if len(source) < 2:
        raise InputError(
            f"injection {source.name}:{label} has a single trigger string, so training and test "
            "cannot have disjoint ones: use --trigger-split same or a source of several strings"
        )
    shuffled = np.random.default_rng(sequence(seed, "split", label)).permutation(strings)
    if split == "same":  # of half a million dates, two draws of a few hundred would share none
        return split, dict.fromkeys(("train", "test"), shuffled[:SHARED])
    half = (len(shuffled) + 1) // 2
    return split, {"train": shuffled[:half], "test": shuffled[half:]}
