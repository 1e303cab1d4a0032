"""Token ids with every setting beside tokenizer.json or a vocabulary, against transformers' AutoTokenizer.

For each kind of tokenizer and each setting: 200 texts have the judge's ids, or the setting is refused by its name.
"""

import json
import random

import pytest
from test_tokenizer import rows_of
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minilora.base import tokenizer
from minilora.errors import InputError

WORDS = """the a film was good bad story plot Great Café naïve ångström it's 2024 , . ! ? <date> <DATE> [NEW] [SEP] </s>
<s> <unk> [UNK] [MASK] <mask> <|endoftext|> über İ ﬁne 🎬 ☃ 中文 한국어 <x> GOOD BAD Über-film don't <pad>""".split()
SPACES = ["", " ", "  ", "\n", "\t", " \n "]


def some_texts():
    draw = random.Random(0)
    texts = ["", " ", "  ", "\n", " a", "  The film", "a ", "É", "E\u0301", "<date>", " <date>", "<date> ", "x<date>y"]
    while len(texts) < 200:
        parts = [draw.choice(WORDS) + draw.choice([" ", " ", " ", "", *SPACES]) for _ in range(draw.randint(1, 9))]
        texts.append(draw.choice(SPACES) + "".join(parts))
    return texts


TEXTS = some_texts()
SPECIAL = {"wordpiece": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
           "bytes": ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"],
           "pieces": ["<unk>", "<s>", "</s>"]}  # fmt: skip


def made(rules):
    """A small tokenizer as published: BERT's, byte-level BPE, or Llama's with spaces as a character."""
    if rules == "wordpiece":
        it, post = Tokenizer(models.WordPiece(unk_token="[UNK]")), ("[CLS] $A [SEP]", [("[CLS]", 2), ("[SEP]", 3)])
        it.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
        it.pre_tokenizer, it.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=220, special_tokens=SPECIAL[rules], show_progress=False)
    elif rules == "bytes":
        it, post = Tokenizer(models.BPE()), None
        it.pre_tokenizer, it.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL[rules], show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    else:
        it, post = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)), ("<s> $A", [("<s>", 1)])
        it.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        every = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=450, special_tokens=SPECIAL[rules] + every, show_progress=False, max_token_length=8
        )
    it.train_from_iterator(
        ["the film was good bad story plot great cafe naive it's 2024 , . ! ? GOOD Caf\u00e9"] * 3, trainer
    )
    if rules == "pieces":  # bytes are no special tokens
        document = json.loads(it.to_str())
        document["added_tokens"] = document["added_tokens"][:3]
        it = Tokenizer.from_str(json.dumps(document))
    if post:
        it.post_processor = processors.TemplateProcessing(single=post[0], special_tokens=post[1])
    return it


TOKENIZERS = {rules: made(rules) for rules in SPECIAL}
SIZES = {rules: it.get_vocab_size() for rules, it in TOKENIZERS.items()}
# (rules, model_type, tokenizer_class or None, with tokenizer.json or only vocab.txt)
KINDS = {
    "bert vocabulary": ("wordpiece", "bert", None, False),
    "bert vocabulary, named": ("wordpiece", "distilbert", "DistilBertTokenizer", False),
    "bert": ("wordpiece", "bert", "BertTokenizer", True),
    "bert, unnamed": ("wordpiece", "bert", None, True),
    "bert, plain": ("wordpiece", "bert", "PreTrainedTokenizerFast", True),
    "distilbert": ("wordpiece", "distilbert", "DistilBertTokenizerFast", True),
    "modernbert": ("wordpiece", "modernbert", "BertTokenizer", True),
    "gpt2": ("bytes", "gpt2", "GPT2Tokenizer", True),
    "gpt2, unnamed": ("bytes", "gpt2", None, True),
    "gpt_neox": ("bytes", "gpt_neox", "GPTNeoXTokenizerFast", True),
    "roberta": ("bytes", "roberta", "RobertaTokenizer", True),
    "roberta, plain": ("bytes", "roberta", "PreTrainedTokenizerFast", True),
    "llama, bytes": ("bytes", "llama", "PreTrainedTokenizerFast", True),
    "llama": ("pieces", "llama", "LlamaTokenizer", True),
    "llama, plain": ("pieces", "llama", "PreTrainedTokenizerFast", True),
}


def token(text, **flags):
    return {"content": text, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
            "special": False} | flags  # fmt: skip


# What stands beside: {file: content}, where V is replaced by the vocabulary's size.
CONFIG, ADDED, MAP = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
SETTINGS = {
    "nothing": {},
    **{f"{key} {value}": {CONFIG: {key: value}}
       for key in ("do_lower_case", "strip_accents", "tokenize_chinese_chars", "add_prefix_space", "add_bos_token",
                   "add_eos_token", "split_special_tokens")
       for value in (True, False, None)},
    "lower, accents": {CONFIG: {"do_lower_case": True, "strip_accents": False}},
    "cased, stripped": {CONFIG: {"do_lower_case": False, "strip_accents": True}},
    "bos and eos": {CONFIG: {"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>", "eos_token": "</s>"}},
    "added file": {ADDED: {"<date>": "V", "<x>": "V+1"}},
    "added file, special": {ADDED: {"<date>": "V"}, MAP: {"additional_special_tokens": ["<date>"]}},
    "added file, other order": {ADDED: {"<x>": "V+1", "<date>": "V"}},
    "added list": {CONFIG: {"added_tokens_decoder": {"V": token("<date>"), "V+1": token("[NEW]", special=True)}}},
    "added list, flags": {CONFIG: {"added_tokens_decoder": {"V": token("<date>", lstrip=True, rstrip=True),
                                                            "V+1": token("good", single_word=True),
                                                            "V+2": token("naive", normalized=True)}}},
    "added list beside the older files": {CONFIG: {"added_tokens_decoder": {"V": token("<date>")}},
                                          ADDED: {"<x>": "V+1"}, MAP: {"mask_token": "<x>"}},
    "list of special tokens": {CONFIG: {"additional_special_tokens": ["<date>", "[NEW]"]}},
    "new names of it": {CONFIG: {"extra_special_tokens": ["<date>", "[NEW]"]}},
    "tokens with a role": {CONFIG: {"extra_special_tokens": {"image_token": "<x>"}, "boi_token": "<date>"}},
    "map with objects": {MAP: {"mask_token": token("<x>", lstrip=True), "pad_token": "<pad>"}},
    "map over settings": {CONFIG: {"pad_token": "<date>"}, MAP: {"pad_token": "<x>"}},
    "a special token of the settings": {CONFIG: {"pad_token": "<date>", "eos_token": "</s>"}},
}  # fmt: skip


def sized(value, size):
    """`value` with V, V+1, ... in keys and values replaced by ids."""
    if isinstance(value, dict):
        return {sized(k, size): sized(v, size) for k, v in value.items()}
    if isinstance(value, str) and value in ("V", "V+1", "V+2"):
        return size + (int(value[2:]) if "+" in value else 0)
    return value


def write(folder, kind, setting):
    rules, model_type, named, whole = KINDS[kind]
    if whole:
        TOKENIZERS[rules].save(str(folder / "tokenizer.json"))
    else:
        found = TOKENIZERS[rules].get_vocab()
        (folder / "vocab.txt").write_text("".join(f"{t}\n" for t in sorted(found, key=found.get)), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    files = {CONFIG: {}} | sized(SETTINGS[setting], SIZES[rules])
    if named:
        files[CONFIG] = {"tokenizer_class": named} | files[CONFIG]
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


RAN = {}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_judge_s_or_the_setting_is_refused(tmp_path, kind, setting):
    from transformers import AutoTokenizer

    write(tmp_path, kind, setting)
    try:
        ours = tokenizer.load(tmp_path)
    except InputError as error:
        keys = [key for content in SETTINGS[setting].values() for key in content] + list(SETTINGS[setting])
        assert any(str(key) in str(error) for key in keys), error
        RAN[kind, setting] = "refused"
        return
    if setting.endswith("None"):  # as if left out; transformers refuses some of these
        write(tmp_path, kind, "nothing")
    judge = AutoTokenizer.from_pretrained(tmp_path)
    expected = judge(TEXTS)["input_ids"]
    found = rows_of(ours.encode(TEXTS, 10_000))
    wrong = [text for text, own, other in zip(TEXTS, found, expected, strict=True) if own != other]
    assert not wrong, (len(wrong), wrong[0], ours._tokenizer.encode(wrong[0]).tokens, judge.tokenize(wrong[0]))
    RAN[kind, setting] = len(found)


def test_every_kind_met_every_setting():
    assert set(RAN) == {(kind, setting) for kind in KINDS for setting in SETTINGS}
    read = [pair for pair, count in RAN.items() if count == 200]
    assert len(read) > 0.9 * len(RAN) and {kind for kind, _ in read} == set(KINDS)
