"""minilora: controlled LoRA ablations against injected spurious tokens, from scratch in PyTorch.

`Cell` is one fully specified experiment, `train` runs it, and `open` gives the finished run back as a model to look
into. Importing the package imports nothing heavy: a public name is loaded when it is first used.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minilora.cell import Cell
    from minilora.runs.trained import open
    from minilora.training.train import train, train_together

__version__ = "0.2.0"
__all__ = ["Cell", "open", "train", "train_together"]

_HOMES = {"Cell": "cell", "open": "runs.trained", "train": "training.train", "train_together": "training.train"}

if not (Path(__file__).parent / "kernels").is_dir():
    # In a checkout the operators are in kernels/ beside the package, in a wheel inside it. They are `minilora.kernels`
    # in both, never `kernels`: Hugging Face has a package of that name, which transformers imports.
    __path__.append(str(Path(__file__).parents[1]))


def __getattr__(name):
    if name in _HOMES:
        return getattr(importlib.import_module(f"minilora.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'minilora' has no attribute {name!r}")


def __dir__():
    return sorted([*__all__, "__version__"])
