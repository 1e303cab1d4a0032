"""A base by itself, opened as a run is: for what reads hidden states only, or the perplexity under a decoder."""

import functools

from minilora.base.checkpoint import read_config
from minilora.base.families import read_spec
from minilora.base.source import resolve_base
from minilora.cell import Cell
from minilora.errors import InputError
from minilora.runs.bases import Setting, Settings
from minilora.runs.trained import Trained
from minilora.tasks.find import find_task


def open_base(model, **fields):
    """The base `model` (a hub id or a folder) as a `Trained` without adapter, head, labels and rows.

    fields  of the cell, such as device="cpu" or max_length=64; with task="lm" its unembedding is loaded too
    Raises InputError for a base that cannot be opened.
    """
    spec = read_spec(read_config(resolve_base(model)))
    longest = min(fields.pop("max_length", Cell.max_length), spec.positions or Cell.max_length)
    cell = Cell(model=str(model), inject={"sources": ("none",)}, max_length=longest, **fields)
    setting = Setting.of(cell)
    task = find_task(cell, setting.spec, setting.tokenizer)
    base = Settings().load(cell, task.unembedding)
    return Trained(cell, model, setting, base, task, None, None, (), has_head=False)


@functools.lru_cache(maxsize=1)
def open_decoder(model, device="auto"):
    """A decoder with its unembedding; the last one is kept. Raises InputError for an encoder."""
    spec = read_spec(read_config(resolve_base(model)))
    if not spec.causal:
        raise InputError(f"{model} is a {spec.family} base, an encoder that predicts no next token: "
                         "choose another --decoder")  # fmt: skip
    return open_base(model, task="lm", device=device)
