"""The task of a cell, by its name."""

from minilora.tasks.classification import Classification
from minilora.tasks.completion import Completion


def find_task(cell, spec, tokenizer):
    """The task of a cell, for a base of this `spec`. Raises InputError for a base that cannot do it."""
    return {"classification": Classification, "lm": Completion}[cell.task](cell, spec, tokenizer)
