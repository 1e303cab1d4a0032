"""Names of folders: words for the fields in which an experiment differs from another one."""

import re
from pathlib import Path

from minilora.fields import declared, run_options, value_of, word

LONGEST = 80  # characters of a folder's name


def file_safe(text):
    """The text with only letters, digits and _ . + - in it, which any file system takes."""
    return re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).strip("-_.")


def word_of(kind, name, value):
    """(A field of the dataclass `kind` and its value, such as r16, dora or seed3; whether the word tells it exactly).

    Of a path or a hub id it is the last part, which is taken to tell it.
    """
    marks, short = (declared(kind)[name].metadata[key] for key in ("marks", "short"))
    leaf = name.rpartition(".")[2].replace("_", "-")
    if value == []:
        return f"no-{leaf}", True
    text = word(value)
    if "path" in marks:
        text = Path(text).name or text
    said = file_safe(text)
    exact = float(text) == value if isinstance(value, float) else said == text.replace(":", "-") != ""
    if short is None:
        short = leaf if isinstance(value, (int, float)) else f"{leaf}-"
    return short + said, exact


def difference(owner, defaults):
    """(Words for the fields in which `owner` differs from `defaults` {name: value}; whether they tell all exactly).

    Run options change no result, and are left out; so is a field without a value, since another one excludes it.
    """
    kind = type(owner)
    values = {name: value_of(owner, name) for name in declared(kind) if name not in run_options(kind)}
    made = [word_of(kind, name, value) for name, value in values.items() if value not in (None, defaults[name])]
    return [word for word, _ in made], all(exact for _, exact in made)


def joined(words, exact, id):
    """A folder's name: the words, and a part of `id` where they were cut or do not tell all."""
    name = "_".join(words)
    if exact and len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 7].strip('-_.') or 'cell'}_{id[:6]}"


def names(cells):
    """A name for each cell; different cells of one name have a part of their ids in it."""
    found = {}
    for cell in cells:
        found.setdefault(cell.name, set()).add(cell)
    return [cell.name if len(found[cell.name]) == 1 else f"{cell.name}_{cell.id[:6]}" for cell in cells]
