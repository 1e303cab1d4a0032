"""minilora: controlled LoRA ablations against injected spurious tokens, from scratch in PyTorch.

Read in the order in which data flows: cell, coverage, checkpoint, families, model, lora, adapter, data, triggers,
injection, batches, head, training, population, member, evaluation, run. Importing the package imports nothing heavy.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).parent
if not (_here / "kernels").is_dir():
    # In a checkout the operators lie beside the package, in kernels/; in a wheel inside it. kernels/ itself must not
    # be importable as `kernels`: Hugging Face has a package of that name.
    _spec = importlib.machinery.ModuleSpec("minilora.kernels", None, is_package=True)
    _spec.submodule_search_locations = [str(_here.parent / "kernels")]
    sys.modules["minilora.kernels"] = importlib.util.module_from_spec(_spec)
