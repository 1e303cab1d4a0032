"""Configurations as they are published, with leftovers and older words; and DeBERTa in training."""

import json

import pytest
import torch
import zoo
from conftest import VOCABULARY
from test_families import apart, beast, load, one_thread, rows, states  # noqa: F401  fixtures

from minilora.base import families
from minilora.errors import InputError


def spec_of(beast, family, case, change):  # noqa: F811
    """(the spec of a published configuration, that after `change`, a function of the configuration)."""
    config = json.loads(json.dumps(beast(family, case)[1].config))
    before = families.read_spec(json.loads(json.dumps(config)))
    change(config)
    return before, families.read_spec(config)


@pytest.mark.parametrize("name, plain", [("gelu_python", "gelu"), ("swish", "silu"),
                                         ("gelu_python_tanh", "gelu_pytorch_tanh")])  # fmt: skip
def test_older_names_of_activations(beast, tmp_path, monkeypatch, name, plain):  # noqa: F811
    monkeypatch.setitem(zoo.FAMILIES["bert"].cases, "other", {"hidden_act": name})
    judge = zoo.build("bert", "other", tmp_path)
    base = load(tmp_path, judge)
    assert base.spec.activation == plain
    ids, lengths = rows(judge, (20, 3))
    with torch.no_grad():
        assert apart(states(base, ids, lengths)[1], judge(ids, lengths).hidden) <= 2e-5


@pytest.mark.parametrize(
    "section", [{"type": None}, {"rope_type": None, "factor": None}, {"type": "default"}, {}, None]
)
def test_a_section_of_nulls_is_no_scaling(beast, section):  # noqa: F811
    for family in ("llama", "phi3", "gemma3_text", "olmo2", "smollm3"):
        case = {"llama": "2: untied, all heads", "phi3": "4k: window"}.get(
            family, next(iter(zoo.FAMILIES[family].cases))
        )
        before, after = spec_of(beast, family, case, lambda config: config.update(rope_scaling=section))
        assert before == after


def test_leftovers_beside_the_sections_of_a_rotation(beast):  # noqa: F811
    """Gemma 3 as transformers 5 writes it: rope_theta null and a type beside the two sections."""
    _, judge = beast("gemma3_text", "local and global", False)
    before = families.read_spec(judge.config)
    for leftover in ({"rope_theta": None}, {"rope_type": "default", "rope_theta": None}, {"type": None}):
        changed = judge.config | {"rope_parameters": judge.config["rope_parameters"] | leftover}
        assert families.read_spec(changed) == before
    for odd in ({"rope_theta": 7.0}, {"rope_type": "yarn"}, {"other_attention": {}}):
        with pytest.raises(InputError, match="rope_parameters"):
            families.read_spec(judge.config | {"rope_parameters": judge.config["rope_parameters"] | odd})


def test_modernbert_s_other_name_for_the_local_theta(beast):  # noqa: F811
    config = dict(beast("modernbert", "local and global")[1].config)
    config.pop("local_rope_theta")
    spec = families.read_spec(config | {"local_attention_rope_theta": 77.0})
    assert [rope.theta for rope in spec.ropes] == [160_000.0, 77.0]
    assert [
        r.theta
        for r in families.read_spec(config | {"local_rope_theta": 5.0, "local_attention_rope_theta": None}).ropes
    ][1] == 5.0
    with pytest.raises(InputError, match="local_attention_rope_theta"):
        families.read_spec(config | {"local_rope_theta": 5.0, "local_attention_rope_theta": 77.0})


def test_gemma_3_that_sees_pictures(beast):  # noqa: F811
    folder, judge = beast("gemma3_text", "inside the one that sees pictures")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "gemma3" and families.read_spec(config).family == "gemma3_text"
    for wrong in (None, [], "x"):
        with pytest.raises(InputError, match="text_config"):
            families.read_spec(config | {"text_config": wrong})
    with pytest.raises(InputError, match="quantization_config"):
        families.read_spec(config | {"quantization_config": {"bits": 4}})


def test_smollm3_s_layers_without_a_rotation(beast):  # noqa: F811
    config = beast("smollm3", "every fourth without")[1].config
    of = lambda **changes: [layer.rope for layer in families.read_spec(config | changes).layers]  # noqa: E731
    assert of() == of(no_rope_layers=None) == [0, 0, 0, None, 0]
    assert of(no_rope_layers=None, no_rope_layer_interval=2) == [0, None, 0, None, 0]
    assert of(no_rope_layers=[0, 1, 1, 1, 0]) == [None, 0, 0, 0, None]
    for wrong in ([1], [1, 1, 2, 0, 0], "x", [None] * 5):
        with pytest.raises(InputError, match="no_rope_layers"):
            of(no_rope_layers=wrong)


REFUSED = [("conv_kernel_size", 3), ("share_att_key", False), ("pos_att_type", "c2c"), ("pos_att_type", []),
           ("norm_rel_ebd", "batch_norm"), ("embedding_size", 7), ("position_buckets", 3)]  # fmt: skip


@pytest.mark.parametrize("key, value", REFUSED)
def test_deberta_s_other_settings_are_refused(beast, key, value):  # noqa: F811
    config = beast("deberta-v2", "v3: buckets")[1].config
    families.read_spec(config | {"conv_kernel_size": 0, "embedding_size": None})
    with pytest.raises(InputError, match=key):
        families.read_spec(config | {key: value})


def test_deberta_in_a_population_is_what_it_is_alone(tmp_path):
    """Adapters on q and k change what a distance means: each member has its own."""
    import minilora
    from minilora.cell import Cell
    from minilora.lora import peft_config, storage

    zoo.build("deberta-v2", "v3: buckets", tmp_path / "base")
    zoo.write_tokenizer(tmp_path / "base")
    draw = torch.Generator().manual_seed(0)
    words = [word for word in VOCABULARY if word.isalpha()]
    lines = ["text,label"]
    for row in range(90):
        some = [words[int(torch.randint(len(words), (), generator=draw))] for _ in range(3 + row % 9)]
        lines.append(" ".join([*some, ("good", "bad")[row % 2]]) + f",{('yes', 'no')[row % 2]}")
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    cell = Cell(model=str(tmp_path / "base"), data=str(tmp_path / "rows.csv"), test_rows=20,
                inject={"sources": ["none"]}, max_length=30, batch_size=6, steps=8, lr=0.01, rank=2, device="cpu")  # fmt: skip
    cells = [cell.replace(targets=("q", "k")), cell.replace(targets=("all",), rank=3, seed=2),
             cell.replace(targets=("k", "v"), layers="1-2", dropout=0.2, seed=3)]  # fmt: skip
    minilora.train_together(cells, [tmp_path / f"t{k}" for k in range(3)], size=3)
    for k, one in enumerate(cells):
        minilora.train(one, tmp_path / f"a{k}")
        found, right = (storage.read_tensors(tmp_path / f"{x}{k}/adapter" / peft_config.TENSORS) for x in "ta")
        assert list(found) == list(right)
        for name, value in right.items():
            assert (found[name] - value).abs().max() <= 2e-3 * value.abs().max(), name
