"""What a cell does before and while it trains so that a shortcut is not learned: the table `mitigate` of a cell.

The fields only say what is done. `minilora/mitigation/` does it, and its docstrings name each method's source. Weight
decay is a field of the cell itself. What is done to a finished run is in `mitigation/after.py`.
"""

from dataclasses import dataclass, fields

from minilora.data.triggers import possible
from minilora.errors import InputError, shown
from minilora.fields import Named, check_fields, option
from minilora.lora.targets import MOVING

# {method: {a field that it takes: its default}}; `suspects` and `scores` are two ways to say which rows are flagged.
METHODS = {
    "none": {},
    "drop": {"suspects": (), "scores": None, "rate": 0.05},
    "strip": {"suspects": (), "scores": None, "rate": 0.05},
    "rewrite": {"rewritten": None},
    "reweight": {"suspects": ()},
    "counterfactual": {"suspects": (), "rate": 0.5},
    "token-dropout": {"rate": 0.1},
    "group-dro": {"suspects": (), "step": 0.01},
    "masktune": {},
}
ROWS = ("drop", "strip", "rewrite", "reweight", "counterfactual")  # the methods that change the training rows
FLAGGED = ("drop", "strip", "reweight", "group-dro")  # those that must know which rows are suspected
SCAN = "scan"  # the suspect that stands for what a scan of the training rows flags


@dataclass(frozen=True)
class Mitigate(Named):
    """What is done against shortcuts before and while a cell trains; each method is described in `mitigation/`."""

    method: str = option(
        "none", "mitigation", f"against shortcuts: {', '.join(METHODS)}; docs/mitigation.md says what each does",
        flag="mitigate", short="", marks="free",
    )  # fmt: skip
    suspects: tuple[str, ...] = option(
        (), "mitigation", "suspected strings, each date, country, color, html, file:PATH (one a line) or a literal "
        "text: rows that hold one are flagged; or scan: what a scan of the training rows flags", marks="free",
    )  # fmt: skip
    scores: str | None = option(
        None, "mitigation", "a CSV or JSONL file with id and score of training rows, or FILE:COLUMN: the rows with the "
        "highest are flagged, and strip takes their spans there", marks="free path",
    )  # fmt: skip
    rewritten: str | None = option(
        None, "mitigation", "a file of the training rows as another tool rewrote them, with a column id or in the same "
        "order: rewrite trains on these texts", marks="free path",
    )  # fmt: skip
    rate: float | None = option(
        None, "mitigation", "share of the tokens that are dropped, of the rows that get a copy (counterfactual), or of "
        "the rows that are flagged (by scores)", least=0, most=1, unset="0.1, 0.5 or 0.05", marks="free",
    )  # fmt: skip
    step: float | None = option(
        None, "mitigation", "step size of the groups' weights in group-dro", least=0, unset=0.01, marks="free"
    )
    init_scale: float = option(  # the start's variance (Liang et al. 2025, ICML, arXiv 2505.12871), times its square
        1.0, "mitigation", "multiplies A at its start: below 1 for a small start, with any method", least=0,
        flag="init_scale", axis="scale of A's start", marks="free",
    )  # fmt: skip

    def __post_init__(self):
        check_fields(self, "mitigate.")
        if self.method not in METHODS:
            raise InputError(f"mitigate.method is {shown(self.method)}, but must be one of {', '.join(METHODS)}")
        takes = METHODS[self.method]
        for f in fields(self):
            if f.name not in ("method", "init_scale", *takes) and getattr(self, f.name) != f.default:
                able = ", ".join(method for method, own in METHODS.items() if f.name in own)
                raise InputError(f"mitigate.{f.name} is for {able}, but mitigate.method is {self.method!r}: drop one")
        for name, default in takes.items():
            if getattr(self, name) is None and not (name == "rate" and "scores" in takes and self.scores is None):
                object.__setattr__(self, name, default)
        if SCAN in self.suspects and len(self.suspects) > 1:
            raise InputError(f"mitigate.suspects has {SCAN!r} and others: the scan stands by itself, drop it or them")
        for name in self.suspects:
            if name != SCAN:
                source_of(name)
        if self.method == "rewrite" and self.rewritten is None:
            raise InputError("mitigate.method = 'rewrite' needs the rewritten rows: give rewritten, a file")
        self._check_flags()
        if self.init_scale == 0:
            raise InputError("mitigate.init_scale is 0, but must be above 0: with B = 0 too, nothing would move")

    def after(self, changes):
        """As `fields.changed`; another method drops what belonged to the old one, except what both take."""
        values, method = super().after(changes), changes.get("method", self.method)
        if method == self.method:
            return values
        kept = {"method", "init_scale", *changes, *(METHODS.get(method, {}).keys() - {"rate", "step"})}
        return {f.name: values[f.name] if f.name in kept else f.default for f in fields(self)}

    def _check_flags(self):
        if self.method not in FLAGGED:
            return
        if not self.suspects and self.scores is None:
            raise InputError(f"mitigate.method = {self.method!r} must know which rows are suspected: give suspects")
        if self.scores is not None and self.suspects:
            raise InputError("mitigate.suspects and mitigate.scores are both given: drop one of them")
        if self.scores is None and self.rate is not None:
            raise InputError("mitigate.rate is the share of rows with the highest scores: give scores, or drop it")

    def check(self, cell):
        """Raise InputError where a method cannot be what it says in this cell."""
        if self.method in ("group-dro", "masktune") and cell.task != "classification":
            raise InputError(f"mitigate.method = {self.method!r} is of classifiers, but task is {cell.task!r}")
        if self.init_scale != 1:
            if cell.method != "lora":
                raise InputError(f"mitigate.init_scale is of an adapter's A, but method is {cell.method!r}: drop it")
            if cell.start is not None or cell.init in MOVING:
                start = f"start = {cell.start!r}" if cell.start is not None else f"init = {cell.init!r}"
                raise InputError(f"mitigate.init_scale would break the start that {start} gives: drop one of them")


def source_of(name):
    """The `triggers.Source` of a suspect. Raises InputError for a name that is no source."""
    if name == SCAN:
        raise InputError(
            f"suspects: {SCAN!r} stands for a scan of the training rows, before training only: name strings, or "
            f"text:{SCAN} for the word"
        )
    try:
        return possible(f"{name}:any")[0][0]
    except InputError as error:
        raise InputError(f"mitigate.suspects: {error}") from None
