"""The table of families in the README: `python tests/parity.py` prints it as Markdown, in half a minute on a CPU.

Per family the largest difference, over the zoo's cases (`zoo.py`), to transformers (for OpenELM, which it lacks, to
`openelm_reference.py`) in hidden states and logits, which are of the order of 1: in float32 absolute, in bfloat16 in
parts of the largest entry. Then what the checkpoint fuses; and the largest difference between here and PEFT for an
adapter on every projection that was saved here and loaded there, and for one that went the other way, in float32.
"""

import argparse
import copy
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent / "base")]  # installed or not

import test_families as tests
import zoo

from minilora.base import families
from minilora.base.spec import TARGETS
from minilora.lora import storage
from minilora.lora.layer import detach

ROWS = [(41, 1, 7, 23), (19, 19)]


def wide_difference(family, case, folder):
    """The largest difference to the judge in float32, at positions up to 350 too."""
    judge = zoo.build(family, case, folder)
    base = tests.load(folder, judge)
    return max(difference(base, judge, *tests.rows(judge, lengths)) for lengths in [*ROWS, (350, 12)])


def half_difference(family, case, folder):
    """The largest difference to the judge, both in bfloat16, over the largest entry in float32."""
    judge = zoo.build(family, case, folder, calm=True)
    base, half = tests.load(folder, judge, dtype=torch.bfloat16), copy.deepcopy(judge).to(torch.bfloat16)
    found = 0.0
    for lengths in ROWS:
        ids, lengths = tests.rows(judge, lengths)
        with torch.no_grad():
            theirs, exact = half(ids, lengths), judge(ids, lengths)
        _, hidden, logits = tests.states(base, ids, lengths)
        found = max(found, tests.apart(hidden, theirs.hidden) / exact.hidden.abs().max().item())
        if judge.decoder:
            found = max(found, tests.apart(logits, theirs.logits) / tests.logits_size(judge, exact))
    return found


def difference(base, judge, ids, lengths):
    """The largest difference in hidden states and logits."""
    with torch.no_grad():
        theirs = judge(ids, lengths)
    _, hidden, logits = tests.states(base, ids, lengths)
    found = tests.apart(hidden, theirs.hidden)
    return max(found, tests.apart(logits, theirs.logits)) if judge.decoder else found


def peft_difference(family, case, folder):
    """(saved here and loaded in PEFT, saved by PEFT and loaded here): the largest differences in float32."""
    import peft

    judge = zoo.build(family, case, folder / "base")
    ids, lengths = tests.rows(judge, (23, 1, 9))
    base = tests.load(folder / "base", judge)
    tests.adapted(base, judge)
    cell = SimpleNamespace(method="lora", task="lm" if judge.decoder else "classify", model="base", revision=None)
    storage.save(folder / "ours", SimpleNamespace(base=base), cell, [])
    wrapped = peft.PeftModel.from_pretrained(called(judge), folder / "ours")
    there = difference(base, judge, ids, lengths)
    wrapped.unload()

    modules = {id(judge.base.get_submodule(name)) for name in linear(judge, base.spec)}
    names = [name for name, module in called(judge).named_modules() if id(module) in modules]
    task = "CAUSAL_LM" if judge.decoder else None
    wrapped = peft.get_peft_model(
        called(judge), peft.LoraConfig(r=3, lora_alpha=5, target_modules=names, task_type=task)
    )
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    wrapped.eval().save_pretrained(folder / "theirs")
    base = detach(base)
    storage.load(folder / "theirs", base)
    return there, difference(base, judge, ids, lengths)


def called(judge):
    """The model that a user of PEFT would adapt: for causal language modelling, or the bare encoder."""
    judge.model.prepare_inputs_for_generation = getattr(judge.model, "prepare_inputs_for_generation", None)  # OpenELM
    return judge.model if judge.decoder else judge.base


def linear(judge, spec):
    """Every linear map of the judge's layers, by its name in the base."""
    found = (zoo.slices(judge, target, layer) for layer in range(len(spec.layers)) for target in TARGETS)
    return {module for module, _ in filter(None, found)}


def fused(family):
    """`q k v of attn.c_attn`, ... or a dash."""
    modules = families.find(family).layout.modules
    parts = [f"`{targets}` of `{module.rpartition('.')[2]}`" for targets, module in modules.items() if " " in targets]
    return ", ".join(parts) or "-"


def row(family, folder):
    """The table's line for a family: the largest over its cases."""
    cases = list(enumerate(zoo.FAMILIES[family].cases))
    wide = max(wide_difference(family, case, folder / f"{i}") for i, case in cases)
    half = max(half_difference(family, case, folder / f"{i}-half") for i, case in cases)
    there, back = (
        max(pair) for pair in zip(*(peft_difference(family, case, folder / f"{i}-peft") for i, case in cases))
    )
    name = f"`{family}` | {zoo.FAMILIES[family].example}"
    return f"| {name} | {wide:.0e} | {half:.1%} | {fused(family)} | {there:.0e} / {back:.0e} |"


def main(argv):
    argparse.ArgumentParser(
        prog="python tests/parity.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print("| family | example | float32 | bfloat16 | fused | PEFT: to / from |\n|---|---|---|---|---|---|")
    for family in zoo.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            print(row(family, Path(folder)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
