"""minilora: controlled LoRA ablations against injected spurious tokens, from scratch in PyTorch.

`Cell` is one fully specified experiment, `train` runs it, and `open` gives the finished run back as a model to look
into. Importing the package imports nothing heavy: a public name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minilora.cell import Cell
    from minilora.runs.trained import open
    from minilora.training.train import train, train_together

__version__ = "0.2.0"
__all__ = ["Cell", "open", "train", "train_together"]

_HOMES = {"Cell": "cell", "open": "runs.trained", "train": "training.train", "train_together": "training.train"}


def __getattr__(name):
    if name in _HOMES:
        return getattr(importlib.import_module(f"minilora.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'minilora' has no attribute {name!r}")


def __dir__():
    return sorted([*__all__, "__version__"])
