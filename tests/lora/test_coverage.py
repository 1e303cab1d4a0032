"""Which modules a plan covers, at what rank and scale, and how a target or layer that the base lacks is refused."""

import dataclasses
import json
import subprocess
import sys
from itertools import combinations

import pytest
from conftest import ROOT, bert_spec

from minilora import coverage
from minilora.base.spec import Spec
from minilora.cell import Cell
from minilora.errors import InputError
from minilora.lora.targets import SCALES, Slot, describe_slots, parse_layers, parse_targets, plan_slots, ranges

SPEC = bert_spec(hidden_size=6, num_hidden_layers=7, num_attention_heads=2, intermediate_size=10)


class AttentionAlone(Spec):
    targets = ("q", "k", "v", "o")


def test_scales_of_the_three_policies():
    wanted = {"constant": 24 / 9, "rank": 1.0, "rslora": 24 / 3}
    for scaling, scale in wanted.items():
        cell = Cell(rank=9, scaling=scaling, targets=("v",), alpha=None if scaling == "rank" else 24)
        alpha = 9.0 if scaling == "rank" else 24.0
        assert parse_targets(cell.targets, 9, cell.alpha, scaling) == {"v": Slot(9, alpha, scale)}
    assert list(SCALES) == list(wanted)


def test_own_rank_and_alpha():
    parse = parse_targets
    assert parse(("down:3", "attn:2:5", "gate"), 4, 12.0, "constant") == {
        "q": Slot(2, 5.0, 2.5), "k": Slot(2, 5.0, 2.5), "v": Slot(2, 5.0, 2.5), "o": Slot(2, 5.0, 2.5),
        "gate": Slot(4, 12.0, 3.0), "down": Slot(3, 12.0, 4.0)}  # fmt: skip
    assert list(parse(("mlp", "o", "k"), 1, 1.0, "constant")) == ["k", "o", "gate", "up", "down"]  # canonical order
    assert list(parse(("all",), 1, 1.0, "constant")) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert parse(("k:7",), 3, None, "rank") == {"k": Slot(7, 7.0, 1.0)}


def test_plan():
    cell = Cell(rank=2, alpha=6, targets=("up:4:2", "q"), layers="1-2,5")
    q, up = Slot(2, 6.0, 3.0), Slot(4, 2.0, 0.5)
    assert plan_slots(SPEC, cell) == {
        "layers.1.q": q, "layers.1.up": up, "layers.2.q": q, "layers.2.up": up, "layers.5.q": q,
        "layers.5.up": up}  # fmt: skip
    everything = plan_slots(SPEC, Cell(targets=("all",)))  # a group may hold what the family lacks
    assert list(everything) == [f"layers.{i}.{t}" for i in range(7) for t in ("q", "k", "v", "o", "up", "down")]
    assert plan_slots(SPEC, Cell(method="full")) == plan_slots(SPEC, Cell(method="head")) == {}
    assert describe_slots(plan_slots(SPEC, cell), SPEC) == [
        "q        6 x 6     rank 2    scale 3       layers 1-2,5, 72 trained",
        "up      10 x 6     rank 4    scale 0.5     layers 1-2,5, 192 trained",
    ]
    for variant, trained in (("dora", 72 + 3 * 6), ("lora-fa", 3 * 2 * 6)):  # with the magnitude; B only
        assert f"{describe_slots(plan_slots(SPEC, cell), SPEC, variant)[0]}".endswith(f"1-2,5, {trained} trained")
    assert describe_slots({}, SPEC) == ["none"]


def test_plan_refuses_with_what_did_match():
    one_layer = dataclasses.replace(SPEC, layers=SPEC.layers[:1])
    attention = AttentionAlone(**vars(SPEC))
    cases = [
        (SPEC, dict(targets=("q", "gate", "up")),
         "target 'gate' matches nothing in a bert base, which has q k v o up down (the targets matched: q up)"),
        (SPEC, dict(targets=("gate",)), "(the targets matched: none)"),
        (attention, dict(targets=("mlp:3",)), "target 'gate' matches nothing in a bert base, which has q k v o (the"),
        (SPEC, dict(targets=("attn", "gate:2")), "target 'gate' matches nothing"),
        (SPEC, dict(layers="5-9"),
         "layers '5-9' names layer 9, but the base has layers 0-6 (of those named it has: 5, 6)"),
        (SPEC, dict(layers="0,7"), "names layer 7, but the base has layers 0-6 (of those named it has: 0)"),
        (SPEC, dict(layers="7"), "(of those named it has: none)"),
        (one_layer, dict(layers="1"), "names layer 1, but the base has layers 0-0"),
        (SPEC, dict(rank=7), "rank 7 of target 'q' is larger than its matrix (6 x 6): use at most 6"),
        (SPEC, dict(targets=("v", "down:7")),
         "rank 7 of target 'down' is larger than its matrix (6 x 10): use at most 6"),
    ]  # fmt: skip
    for spec, values, message in cases:
        with pytest.raises(InputError) as caught:
            plan_slots(spec, Cell(**values))
        assert message in str(caught.value)
    assert len(cases) == 10
    assert len(plan_slots(attention, Cell(targets=("mlp", "o")))) == 7
    assert len(plan_slots(SPEC, Cell(rank=6, layers="6"))) == 3  # the largest that there are


def test_layer_ranges():
    cases = 0
    for size in range(1, 5):
        for layers in combinations(range(7), size):
            text = ranges(layers)
            assert parse_layers(text) == parse_layers(text, 7) == layers
            assert parse_layers(", ".join(map(str, reversed(layers)))) == layers
            cases += 1
    assert cases == 7 + 21 + 35 + 35
    assert ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8" and ranges((4,)) == "4"
    assert parse_layers("3-3,1-2,2") == (1, 2, 3)
    assert parse_layers("all") is None and parse_layers("all", 3) == (0, 1, 2)


# --- the command

SMALL = dict(vocab_size=11, hidden_size=6, intermediate_size=14, num_attention_heads=2, num_hidden_layers=4)
CONFIGS = {
    "gpt2": dict(model_type="gpt2", vocab_size=11, n_embd=6, n_layer=4, n_head=2, n_positions=9),
    "gpt_neox": dict(model_type="gpt_neox", max_position_embeddings=9, rotary_pct=1.0, hidden_size=8) | {
        k: v for k, v in SMALL.items() if k != "hidden_size"},
    "phi3": dict(model_type="phi3", max_position_embeddings=9, num_key_value_heads=1, hidden_size=8) | {
        k: v for k, v in SMALL.items() if k != "hidden_size"},
    "modernbert": dict(model_type="modernbert", max_position_embeddings=9, hidden_size=8) | {
        k: v for k, v in SMALL.items() if k != "hidden_size"},
    "openelm": dict(
        model_type="openelm", vocab_size=11, model_dim=6, head_dim=2, num_transformer_layers=3,
        num_query_heads=[2, 4, 4], num_kv_heads=[2, 2, 2], ffn_multipliers=[1.0, 1.0, 2.0], ffn_dim_divisor=2,
        max_context_length=9),
}  # fmt: skip


def run_command(folder, capsys, name, *arguments):
    path = folder / name
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIGS[name]))
    coverage.main([str(path), *arguments])
    title, empty, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith(f"{path}: {name}, ") and empty == "" and all(len(line) <= 100 for line in lines)
    return lines


def test_the_command_names_slices_of_fused_tensors(tmp_path, capsys):
    assert run_command(tmp_path, capsys, "gpt2", "--targets", "v:3:6", "mlp", "--rank", "2", "--layers", "0-1,3") == [
        "v    h.{i}.attn.c_attn.weight[:, 12:18]",
        "     6 x 6, rank 3, scale 2, 36 trained parameters, layers 0-1,3",
        "up   h.{i}.mlp.c_fc.weight",
        "     24 x 6, rank 2, scale 4, 60 trained parameters, layers 0-1,3",
        "down h.{i}.mlp.c_proj.weight",
        "     6 x 24, rank 2, scale 4, 60 trained parameters, layers 0-1,3",
        "",
        "layers 0-1,3: 156 trained parameters each",
        "in all 468 trained parameters on 9 projections",
        "missed: gate (named, but a gpt2 layer has no such projection)",
        "missed: q k o (not named)",
        "missed: all of layer 2",
    ]
    assert run_command(tmp_path, capsys, "gpt_neox", "--targets", "attn", "--rank", "1")[0:6:2] == [
        "q    layers.{i}.attention.query_key_value.weight, the first third of each head's rows",
        "k    layers.{i}.attention.query_key_value.weight, the second third of each head's rows",
        "v    layers.{i}.attention.query_key_value.weight, the last third of each head's rows",
    ]
    lines = run_command(tmp_path, capsys, "phi3", "--targets", "all", "--variant", "dora", "--scaling", "rslora")
    assert lines[:14:2] == [
        "q    layers.{i}.self_attn.qkv_proj.weight[0:8]",
        "k    layers.{i}.self_attn.qkv_proj.weight[8:12]",
        "v    layers.{i}.self_attn.qkv_proj.weight[12:16]",
        "o    layers.{i}.self_attn.o_proj.weight",
        "gate layers.{i}.mlp.gate_up_proj.weight[0:14]",
        "up   layers.{i}.mlp.gate_up_proj.weight[14:28]",
        "down layers.{i}.mlp.down_proj.weight",
    ]
    added = [8 + 8 + 8, 8 + 4 + 4, 8 + 4 + 4, 8 + 8 + 8, 8 + 14 + 14, 8 + 14 + 14, 14 + 8 + 8]  # magnitudes too
    assert lines[-3:] == [
        f"layers 0-3: {sum(added)} trained parameters each",
        f"in all {4 * sum(added)} trained parameters on 28 projections",
        "missed: nothing",
    ]
    assert run_command(tmp_path, capsys, "modernbert", "--targets", "up")[0] == "up   layers.{i}.mlp.Wi.weight[14:28]"


def test_the_command_keeps_layers_of_other_sizes_apart(tmp_path, capsys):
    lines = run_command(tmp_path, capsys, "openelm", "--targets", "k", "down", "--rank", "1")
    assert lines == [
        "k    layers.{i}.attn.qkv_proj.weight[4:8]",  # of one size in all layers, but elsewhere in the tensor
        "     4 x 6, rank 1, scale 8, 10 trained parameters, layer 0",
        "down layers.{i}.ffn.proj_2.weight",
        "     6 x 6, rank 1, scale 8, 12 trained parameters, layers 0-1",
        "k    layers.{i}.attn.qkv_proj.weight[8:12]",
        "     4 x 6, rank 1, scale 8, 10 trained parameters, layers 1-2",
        "down layers.{i}.ffn.proj_2.weight",
        "     6 x 12, rank 1, scale 8, 18 trained parameters, layer 2",
        "",
        "layers 0-1: 22 trained parameters each",
        "layer 2: 28 trained parameters",
        "in all 72 trained parameters on 6 projections",
        "missed: q v o gate up (not named)",
    ]


def test_the_command_agrees_with_what_is_trained(tmp_path, capsys):
    from minilora.base import families

    cases = 0
    for name, config in CONFIGS.items():
        spec = families.read_spec(config)
        for variant in ("lora", "dora"):
            cell = Cell(targets=("all",), rank=2, variant=variant)
            slots = plan_slots(spec, cell)
            total = sum(s.rank * sum(spec.shape(n.split(".")[2], int(n.split(".")[1]))) for n, s in slots.items())
            total += (variant == "dora") * sum(spec.shape(n.split(".")[2], int(n.split(".")[1]))[0] for n in slots)
            lines = run_command(tmp_path, capsys, name, "--targets", "all", "--rank", "2", "--variant", variant)
            assert f"in all {total:,} trained parameters on {len(slots)} projections" in lines
            cases += 1
    assert cases == 10


def test_the_command_fetches_the_configuration_alone(server, capsys):
    files = {"config.json": json.dumps(CONFIGS["gpt2"]).encode(), "model.safetensors": b"x" * 999}
    server.put("someone/small", files)
    coverage.main(["someone/small", "--targets", "q"])
    assert server.bodies() == ["config.json"]
    assert capsys.readouterr().out.startswith("someone/small: gpt2, 4 layers of width 6\n\nq    h.{i}.attn.c_attn")


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    run_command(tmp_path, capsys, "gpt2")
    (tmp_path / "empty").mkdir()
    cases = [
        (["gpt2", "--targets", "gate"], "target 'gate' matches nothing in a gpt2 base"),
        (["gpt2", "--layers", "2-9"], "layers '2-9' names layer 9"),
        (["gpt2", "--dropout", "0.1"], "unknown argument --dropout"),
        (["empty"], "empty has no config.json"),
    ]
    for (name, *arguments), words in cases:
        with pytest.raises(InputError) as caught:
            coverage.main([str(tmp_path / name), *arguments])
        assert words in str(caught.value) and capsys.readouterr().out == ""
    assert len(cases) == 4


def test_the_command_runs_without_torch(tmp_path, capsys):
    run_command(tmp_path, capsys, "gpt2")
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['coverage', {str(tmp_path / 'gpt2')!r}]\n"
        "try: runpy.run_module('minilora.coverage', run_name='__main__', alter_sys=True)\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("missed: o up down (not named)\nFalse\n"), done.stderr
