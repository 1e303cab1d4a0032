"""List the words that flags take: `minilora ls`, or `minilora ls SECTION ...`. Nothing is fetched or loaded."""

import textwrap

from minilora.base.families import FAMILIES
from minilora.base.source import DEFAULT_BASE
from minilora.base.spec import GROUPS, TARGETS
from minilora.cell import PRESETS
from minilora.command import Parser
from minilora.data.formats import FORMATS
from minilora.data.named import NAMED
from minilora.data.triggers import BUILT_IN
from minilora.errors import InputError, shown, to_type
from minilora.fields import near
from minilora.lora.targets import STARTS, VARIANTS

WIDTH = 80


def sections():
    """{section: (the flag that takes its words, {word: what it is})}; words that need no explanation are under ""."""
    triggers = {name: f"{len(strings):,} strings, such as {strings[0]}" for name, strings in BUILT_IN.items()}
    return {
        "families": ("--model", {"": " ".join(FAMILIES), "default": DEFAULT_BASE}),
        "triggers": (
            "--inject SOURCE:LABEL",
            triggers | {"file:PATH": "a string a line", "text:WORDS": "the words themselves", "none": "no injection"},
        ),
        "presets": ("--preset", {name: " ".join(map(stated, fields.items())) for name, fields in PRESETS.items()}),
        "data": (
            "--data",
            {name: known.words for name, known in NAMED.items()}
            | {"FILE": " ".join(FORMATS), "OWNER/NAME": "a data set of the Hugging Face hub"},
        ),
        "targets": (
            "--targets",
            {"": " ".join(TARGETS)} | {group: "all of these" if names == TARGETS else " ".join(names)
                                       for group, names in GROUPS.items()},
        ),
        "variants": ("--variant", {"": " ".join(VARIANTS)}),
        "starts": ("--init", {"": " ".join(STARTS)}),
    }  # fmt: skip


def stated(field):
    """A field and its value, as in study's head=frozen."""
    name, value = field
    if isinstance(value, dict):
        return " ".join(f"{name}.{stated(inner)}" for inner in value.items())
    return f"{name}={','.join(value) if isinstance(value, tuple) else value}"


def lines(names):
    """The lines of the sections `names`, at most WIDTH columns each."""
    for name in names:
        flag, words = sections()[name]
        yield f"{name} ({flag})"
        width = max(map(len, words))
        for word, text in words.items():
            first = f"  {word:<{width}}  " if word else "  "
            indent = " " * len(first)
            yield textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)
        yield ""


def main(argv=None):
    parser = Parser(prog=to_type("ls"), description=__doc__.partition(":")[0] + ".")
    parser.add_argument("section", nargs="*", help=f"only these: {' '.join(sections())}")
    chosen = parser.parse_args(argv).section
    for name in chosen:
        if name not in sections():
            raise InputError(f"unknown section {shown(name)}{near(name, sections())}")
    print("\n".join(lines(chosen or sections())).rstrip())
