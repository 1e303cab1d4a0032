"""The operators. In a checkout they are in kernels/ beside the package; a wheel has them here, in place of this file.

They are never importable as `kernels`: Hugging Face has a package of that name, which transformers imports.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "kernels")]
