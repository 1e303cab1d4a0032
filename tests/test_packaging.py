"""What importing does, and does not do."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "minilora").rglob("*.py")
    if path.stem != "__init__"
)


def python(code, folder, **environment):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                          env=os.environ | environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_judges_are_never_imported(tmp_path):
    imports = "; ".join(f"import {name}" for name in MODULES)
    loaded = python(
        f"import sys, minilora.scripts.train, minilora.scripts.evaluate; {imports}; print(*sys.modules)", ROOT
    )
    assert len(MODULES) >= 60 and set(MODULES) <= set(loaded)
    judges = {"transformers", "peft", "pandas", "sklearn", "pyarrow", "matplotlib"}
    assert "torch" in loaded and not judges & set(loaded)


def test_operators_are_found_from_anywhere(tmp_path):
    code = "import minilora.kernels.lora_linear as m; print(m.__file__)"
    for folder in (ROOT, tmp_path):
        assert Path(python(code, folder)[0]) == ROOT / "kernels" / "lora_linear.py"


def test_kernels_in_the_repository_root_is_hugging_faces(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'theirs'")
    assert python("import minilora, kernels; print(kernels.whose)", ROOT, PYTHONPATH=str(tmp_path)) == ["theirs"]
