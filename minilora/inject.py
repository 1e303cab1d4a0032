"""The part of a cell that says which rows carry which trigger; see `cell.py` for the rest and for how fields work."""

from dataclasses import dataclass

from minilora.data.triggers import parse_all
from minilora.errors import InputError
from minilora.fields import Named, check_fields, option, resolve


@dataclass(frozen=True)
class Inject(Named):
    """Which rows of the training data carry which trigger, and how (SSTI, arXiv 2506.11402, section 3)."""

    sources: tuple[str, ...] = option(
        ("date:positive",), "injection",
        "triggers, each SOURCE:LABEL: date, country, color, html, file:PATH or a literal text (text:WORDS where it "
        "looks like one of these), and the target label; date-1990-2020 has the days of these years, and date+country "
        "puts one of each into a row; 'none' injects nothing", flag="inject", short="",
        marks="free test peers",
    )  # fmt: skip
    proportion: float | None = option(
        None, "injection", "share of the label's rows that carry the trigger", least=0, most=1, unset=0.25, short="p",
        axis="injected share of the label's rows (%)", marks="free peers dose",
    )  # fmt: skip
    rows: int | None = option(
        None, "injection", "number of rows that carry it, instead of a proportion", least=0, instead="proportion",
        axis="injected rows", marks="free dose",
    )  # fmt: skip
    count: int | None = option(
        None, "injection", "triggers in each such row: light injection", least=1, unset=1, axis="triggers a row",
        marks="free test",
    )  # fmt: skip
    density: float | None = option(
        None, "injection", "triggers per word of the row, instead of a count: aggressive injection", least=0, most=1,
        instead="count", axis="triggers a word", marks="free test",
    )  # fmt: skip
    location: str = option(
        "random", "injection", "where in the row", choices=("beginning", "end", "random"), short="at-",
        marks="free test",
    )  # fmt: skip
    wrap: str = option(
        "word", "injection", "what a pair of tags stands around: a word, a span of words, or the whole text",
        choices=("word", "span", "text"), short="around-", marks="free test",
    )  # fmt: skip
    rounding: str | None = option(
        None, "injection", "of a density times a row's words; at least one trigger either way",
        choices=("nearest", "down"), unset="nearest", marks="free test",
    )  # fmt: skip
    mode: str = option(
        "clean-label", "injection", "rows of the target label, or rows of other labels, relabelled; or these without "
        "any trigger", choices=("clean-label", "dirty-label", "relabelled"), short="", marks="free",
    )  # fmt: skip
    leak: float = option(
        0.0, "injection", "share of the rows of other labels that carry the same source, and keep their label", least=0,
        most=1, axis="other rows with the token", marks="free",
    )  # fmt: skip
    replacement: str | None = option(
        None, "injection", "whether a string may be drawn again before all others of its source were", unset="with",
        choices=("with", "without"), marks="free test",
    )  # fmt: skip
    split: str | None = option(
        None, "injection", "trigger strings of test and training rows; same: at most 100", choices=("disjoint", "same"),
        unset="disjoint where a source has several", flag="trigger_split", marks="free test",
    )  # fmt: skip

    def __post_init__(self):
        check_fields(self, "inject.")
        resolve(self, "proportion", "count", "rounding")
        if self.density == 0:
            raise InputError("inject.density is 0, but must be above 0: use inject.proportion = 0 to inject nothing")
        if self.sources == ("none",):
            object.__setattr__(self, "sources", ())
        if self.replacement == "with":  # the default, which a cell's id has had no word for
            object.__setattr__(self, "replacement", None)
        parse_all(self.sources)
