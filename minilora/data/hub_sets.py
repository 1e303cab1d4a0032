"""A data set on the hub: which of its files make up a split.

The hub keeps a Parquet copy of nearly every public data set in its branch refs/convert/parquet, as
CONFIG/SPLIT/0000.parquet, and most such files name their classes. Where there is no copy, or only one of the
first 5 GB, and where a revision is asked for, the data set's own files are read: there the words in the names of
files and folders tell the splits, as in `data/train-00000-of-00002.parquet`. Left out: the card (README.md), so
that classes which only it names stay numbers, and loading scripts, so that no remote code ever runs.
"""

import re

from minilora import hub
from minilora.data import formats
from minilora.data.columns import NoLabels, few
from minilora.data.formats import FORMATS
from minilora.errors import InputError

CONVERTED = "refs/convert/parquet"
# As the hub's converter names them: `partial-` marks the first 5 GB of a split, `-part0` the first 10,000 files.
LAYOUT = re.compile(r"([^/]+)/((?:partial-)?[\w.]+)(?:-part\d)?/\d{4}\.parquet")
SPLIT_WORDS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
NOT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json")


class Incomplete(InputError):
    """A revision does not hold the whole data set in files that are read here."""


class HubSet:
    """The data set `source` (`owner/name` or `owner/name:CONFIG`); all reads see the commit of the first one.

    revision  branch, tag or commit whose files are read; default (also "main"): the hub's Parquet copy of the main
              branch, else the main branch
    """

    def __init__(self, source, revision=None):
        self.source = source
        self.repo_id, _, self.config = source.partition(":")
        self.revision = None if revision == "main" else revision

    def read(self, split, text_column=None, label_column=None, free=False, skip=True):
        """The files of `split`, a list of `formats.Table`; NoLabels if there is no such split or no labels.

        Rows that cannot be used are left out (`skip`), because nobody here can correct them.
        """
        chosen = []

        def choose(names):
            chosen[:] = self._files(names, split)
            return chosen

        folder = self._fetch(choose)
        self.revision = folder.name
        return [
            formats.read(folder / name, f"{self.repo_id}/{name}", text_column, label_column, free, skip)
            for name in chosen
        ]

    def _fetch(self, choose):
        try:
            return hub.fetch(self.repo_id, choose, kind="dataset", revision=self.revision or CONVERTED)
        except InputError as error:
            # Without a network, a set that has no copy is in the cache only as the main branch.
            has_copy = not (isinstance(error, (Incomplete, hub.HubUnreachable)) or hub.lacks_revision(error))
            if self.revision or has_copy:
                raise
        return hub.fetch(self.repo_id, choose, kind="dataset")

    def _files(self, names, split):
        """The files among `names` that make up `split` of the configuration asked for, "default" or the only one."""
        configs = _configurations(names)
        if not configs:
            advice = f"; try revision {CONVERTED}" if self.revision else f", and no whole copy at {CONVERTED}"
            raise Incomplete(f"{self.source} has no files that are read here ({' '.join(FORMATS)}){advice}")
        wanted = self.config or (next(iter(configs)) if len(configs) == 1 else "default")
        if wanted not in configs:
            problem = f"has no configuration {self.config!r}" if self.config else "has several configurations"
            there = few(filter(None, configs)) or "none"
            raise InputError(f"{self.source} {problem}; what can be given as {self.repo_id}:CONFIG: {there}")
        splits = configs[wanted]
        if any(name.startswith("partial-") for name in splits):
            raise Incomplete(f"{self.source}: this revision holds only the first 5 GB of a split; leave it out")
        word = SPLIT_WORDS.get(split, split)
        known = split if split in splits else next((s for s in splits if SPLIT_WORDS.get(s, s) == word), None)
        if known is None:
            raise NoLabels(f"{self.source} has no split {split!r}; there are: {few(splits)}")
        return splits[known]


def _configurations(names):
    """{configuration: {split: files}}, of files in the most suitable form only."""
    forms = {name: formats.format_of(name) for name in sorted(names) if name.rpartition("/")[2] not in NOT_DATA}
    best = next((form for form in FORMATS if form in forms.values()), None)
    configs = {}
    for name in (name for name, form in forms.items() if form and form == best and not name.startswith(".")):
        config, split = _place(name)
        configs.setdefault(config, {}).setdefault(split, []).append(name)
    others = configs.pop(None, None)  # of a split with another name; or all there are, then it is one split
    return configs or ({"": others} if others else {})


def _place(name):
    """(configuration, split) of a file: of the converter's layout, else by the word nearest to the path's end."""
    if match := LAYOUT.fullmatch(name):
        return match.groups()
    parts = name.split("/")
    for depth in reversed(range(len(parts))):
        for word in re.split("[^a-z]+", parts[depth].lower()):
            if word in SPLIT_WORDS:
                return "/".join(parts[:depth]), SPLIT_WORDS[word]
    return None, "train"
