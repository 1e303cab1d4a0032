"""Row detectors: rows and an opened run in, a score a row out, and the higher it is the more suspicious is the row.

`DETECTORS[name](run, texts, labels)` gives `Scores`. A detector sees texts, labels and the run's model, and never which
rows were injected: that is read by `scoring.py`, which says how well it did. The scores follow from the rows as a set:
not from their order, the padding or the batch size. So rows are always taken in one order, that of a hash of what they
hold, and random draws are seeded by what a row holds.

Whatever a paper leaves to a threshold is set from `held`, clean rows that were kept apart: the threshold is the one
that rejects 1% of these (`FRR`), as in OpenBackdoor (Cui et al. 2022, arXiv 2206.08514). Other detectors have a rule of
their own, such as "the smaller cluster", and need no such rows.
"""

import contextlib
import hashlib
import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minilora.detection.clock import Clock
from minilora.errors import InputError

FRR = 0.01  # of the held rows, the share that may be above the threshold


@dataclass(frozen=True)
class Scores:
    """What a detector says of N rows.

    scores   float64 [N], higher is more suspicious; nan for a row that the budget left no time for
    name     the detector's
    seconds  that it took, those for the held rows among them
    flagged  bool [N], the rows that its rule rejects; None without a rule, where no held rows were given
    """

    scores: np.ndarray
    name: str
    seconds: float
    flagged: np.ndarray | None = None

    @property
    def partial(self):
        return bool(np.isnan(self.scores).any())


@dataclass(frozen=True)
class Detector:
    """A detector, whose code is the function `name` of a module of this package.

    needs     what it reads: "states" of a base or a run, "predictions" of a run, the "head" of a classifier, or a
              "decoder" of its own, without any run
    own_rule  whether it says which rows to reject by a rule of its own
    about     its source, in a line of help
    """

    name: str
    module: str
    needs: str
    own_rule: bool
    about: str

    def check(self, run):
        """Raise InputError where `run` does not have what the detector needs."""
        if self.needs == "decoder":
            return
        if run is None:
            raise InputError(f"{self.name} needs a model, but there is none: give the folder of a finished run")
        if self.needs in ("predictions", "head") and not run.has_head:
            raise InputError(f"{self.name} needs predictions, but {run.folder} has no trained head: give a trained run")
        if self.needs == "head" and run.cell.task == "lm":
            raise InputError(f"{self.name} needs the head of a classifier, but {run.folder} is a run of the task lm: "
                             "choose another detector")  # fmt: skip

    def __call__(self, run, texts: Sequence[str], labels, *, held=None, clock=None, **settings) -> Scores:
        """The `Scores` of N rows.

        run       from `minilora.open` or `open_base`; None for a detector that needs none
        labels    int64 [N], the place of each row's label among `run.labels`
        held      (texts, labels) of clean rows that were kept apart, for thresholds and as what rows are mixed with
        clock     a `Clock`; when it ends, the rows that are not scored yet have nan
        settings  those of the detector's function, which its docstring names

        Raises InputError for rows that cannot be scored and a run without what the detector needs, and OutOfTime where
        the clock ends before a detector that looks at all rows together has a result.
        """
        self.check(run)
        begun, clock = time.perf_counter(), clock or Clock()
        texts, labels = _checked(texts, labels, run if self.needs != "states" else None)
        held = _sorted(*_checked(*held, None)) if held is not None and len(held[0]) else None
        function = getattr(importlib.import_module(f"minilora.detection.{self.module}"), self.name)
        both = held is not None and not self.own_rule
        rows = (texts + held[0], np.concatenate([labels, held[1]])) if both else (texts, labels)
        order = _order(*rows)
        with _merged(run):
            found = function(run, [rows[0][i] for i in order], rows[1][order], held, clock, **settings)
        found, flagged = found if self.own_rule else (found, None)
        back, count = np.argsort(order), len(texts)
        found, flagged = found[back], None if flagged is None else flagged[back]
        if both:
            found, own = found[:count], found[count:]
            flagged = found > threshold(own)
        return Scores(found.astype(np.float64), self.name, time.perf_counter() - begun, flagged)


DETECTORS = {
    one.name: one
    for one in (
        Detector("onion", "perplexity", "decoder", False, "perplexity without each word (Qi et al. 2021)"),
        Detector("strip", "perturbation", "predictions", False, "entropy under mixed-in words (Gao et al. 2019)"),
        Detector("rap", "perturbation", "head", False, "resistance to a learned word (Yang et al. 2021)"),
        Detector("bki", "features", "states", True, "words that move the state most (Chen and Dai 2021)"),
        Detector("cube", "features", "states", True, "small clusters by density (Cui et al. 2022)"),
        Detector("spectral", "features", "states", True, "spectral signatures (Tran et al. 2018)"),
        Detector("activation", "features", "states", True, "the smaller of two clusters (Chen et al. 2018)"),
        Detector("loss", "influence", "predictions", False, "rows of low training loss (Li et al. 2021)"),
        Detector("influence", "influence", "head", False, "last-layer self-influence, TracIn (Pruthi et al. 2020)"),
    )
}


def find_detectors(names):
    """The detectors of these names; "all", or no name, is all of them. Raises InputError for another name."""
    names = list(DETECTORS) if not names or "all" in names else list(dict.fromkeys(names))
    if wrong := [name for name in names if name not in DETECTORS]:
        raise InputError(f"there is no detector {wrong[0]!r}: choose among {', '.join(DETECTORS)}, all")
    return [DETECTORS[name] for name in names]


def threshold(held):
    """The score that at most a share `FRR` of the held rows' scores is above; nan where none was scored."""
    held = np.sort(held[~np.isnan(held)])[::-1]
    return held[int(FRR * len(held))] if len(held) else np.nan


def _checked(texts, labels, run):
    texts, labels = list(texts), np.asarray(labels)
    if not texts:
        raise InputError("there are no rows to score: give at least one")
    if labels.shape != (len(texts),) or labels.dtype.kind not in "iu":
        raise InputError(f"{len(texts)} texts need as many labels, whole numbers, but these are {labels.dtype} of "
                         f"shape {labels.shape}: give the place of each label")  # fmt: skip
    if run is not None and len(run.labels) and not 0 <= labels.min() <= labels.max() < len(run.labels):
        raise InputError(f"a row has the label {labels.max()}, but {run.folder} has {len(run.labels)} labels: "
                         "give the place of each label among these")  # fmt: skip
    return texts, labels.astype(np.int64)


def _order(texts, labels):
    """The order in which rows are taken: by a hash of what they hold, so that the first of them are a fair sample."""
    keys = [hashlib.sha256(text.encode()).digest() for text in texts]
    return np.array(sorted(range(len(texts)), key=lambda i: (keys[i], labels[i])))


def _sorted(texts, labels):
    order = _order(texts, labels)
    return [texts[i] for i in order], labels[order]


def _merged(run):
    """A context in which the run's adapter is merged, which predicts the same and faster."""
    if run is None:
        return contextlib.nullcontext()
    from minilora.lora.layer import merged_meanwhile

    return merged_meanwhile(run.base)
