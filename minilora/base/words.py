"""From a tokenizer's files to the `tokenizers` library's own object, with the ids that transformers gives.

`tokenizer.json` holds the rules, or for WordPiece `vocab.txt` the vocabulary. Beside them tokenizer_config.json,
special_tokens_map.json and added_tokens.json add tokens and change rules; what they change depends on the tokenizer's
class, which some of transformers' classes build anew from the vocabulary. Here each setting is applied as transformers
5 does, or refused by its name. Left out: vocabularies of SentencePiece and of vocab.json with merges.txt.
"""

import json
from pathlib import Path

from minilora.base.probe import check_safe
from minilora.errors import InputError, shown
from minilora.files import check_regular, read_json

BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
        "mask_token": "[MASK]"}  # fmt: skip
END = "<|endoftext|>"
GPT2 = {"unk_token": END, "bos_token": END, "eos_token": END}
# The classes that transformers builds anew from the vocabulary, with the special tokens that each has by default.
REBUILT = {
    "BertTokenizer": BERT,
    "DistilBertTokenizer": BERT,
    "ElectraTokenizer": BERT,
    "GPT2Tokenizer": GPT2,
    "CodeGenTokenizer": GPT2,
    "GPTNeoXTokenizer": GPT2 | {"pad_token": "<|padding|>"},
    "Qwen2Tokenizer": {"unk_token": END, "eos_token": END, "pad_token": END},
    "RobertaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>",
                         "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"},
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
}  # fmt: skip
# The class where neither tokenizer_config.json nor config.json names one, by config.json's model_type.
CLASS_OF = {
    "bert": "BertTokenizer", "distilbert": "BertTokenizer", "nomic_bert": "BertTokenizer",
    "roberta": "RobertaTokenizer", "gpt2": "GPT2Tokenizer", "phi": "GPT2Tokenizer", "gpt_neox": "GPTNeoXTokenizer",
    "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer",
}  # fmt: skip
AS_THE_FILE = ("modernbert", "phi3")  # models for which transformers reads tokenizer.json whatever the class
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
FLAGS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars", "add_prefix_space", "split_special_tokens",
         "add_bos_token", "add_eos_token", "legacy")  # fmt: skip


class Files:
    """The tokenizer's files in a folder: `path` of the rules, `settings`, and the tokens that are `stated` with ids."""

    def __init__(self, folder):
        folder = Path(folder)
        self.path = next((folder / n for n in ("tokenizer.json", "vocab.txt") if (folder / n).exists()), None)
        if self.path is None:
            raise InputError(f"{folder} has neither tokenizer.json nor vocab.txt: add the tokenizer of the model")
        check_regular(self.path)
        self.where = folder / "tokenizer_config.json"
        self.settings = read_json(self.where) if self.where.exists() else {}
        if "additional_special_tokens" in self.settings and not self.settings.get("extra_special_tokens"):
            self.settings["extra_special_tokens"] = self.settings.pop(
                "additional_special_tokens"
            )  # transformers 5's name
        self.stated = {}  # id -> a tokenizers.AddedToken's fields
        decoder = self.settings.get("added_tokens_decoder")
        if decoder is None:
            self._read_older(folder)
        else:
            for index, token in self._object(decoder, "added_tokens_decoder").items():
                token = self._object(token, f"added_tokens_decoder {index}")
                self.stated[self._index(index, self.where)] = {k: v for k, v in token.items() if k != "__type"}
        config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        self.kind = self._class(config)
        for key in FLAGS:
            if not isinstance(self.settings.get(key), (bool, type(None))):
                raise InputError(f"{self.where}: {key} is {self.settings[key]!r:.80}, but must be true or false")

    def _read_older(self, folder):
        """What older folders have beside it, which is not read where tokenizer_config.json lists its added tokens."""
        for name in ("special_tokens_map.json", "added_tokens.json"):
            if not (folder / name).exists():
                continue
            read = read_json(folder / name)
            if name == "special_tokens_map.json":
                self.settings = self.settings | read
                continue
            special = {content_of(self.settings.get(role)) for role in ROLES}
            special |= {content_of(token) for token in self.extra("extra_special_tokens")}
            for token, index in read.items():
                entry = {"content": token, "normalized": token not in special, "special": token in special}
                self.stated[self._index(index, folder / name)] = entry

    def _class(self, config):
        """transformers' class, without `Fast`; None where tokenizer.json is read as it is."""
        named = self.settings.get("tokenizer_class") or config.get("tokenizer_class")
        named = named if isinstance(named, str) else CLASS_OF.get(str(config.get("model_type")))
        if config.get("model_type") in AS_THE_FILE or named is None:
            return None
        return named.removesuffix("Fast")

    def _object(self, value, key):
        if not isinstance(value, dict):
            raise InputError(f"{self.where}: {key} is {value!r:.80}, but must be an object")
        return value

    def _index(self, index, path):
        if isinstance(index, bool) or not str(index).isdecimal() or int(index) >= 2**31:
            raise InputError(f"{path}: an added token has id {index!r:.80}, which is no id")
        return int(index)

    def flag(self, key, default):
        value = self.settings.get(key)
        return default if value is None else value

    def extra(self, *names):
        """Special tokens without a role, under the first of `names` (default: all that there are) that is there."""
        names = names or ("extra_special_tokens", "additional_special_tokens")
        extra = next((self.settings[name] for name in names if name in self.settings), None) or []
        extra = list(extra.values()) if isinstance(extra, dict) else extra
        if not isinstance(extra, list):
            raise InputError(f"{self.where}: {names[0]} is {extra!r:.80}, but must be a list")
        return extra

    def role(self, role, default=None):
        """The text of a special token, None without one."""
        value = self.settings.get(role)
        text = content_of(value) if value is not None else default
        if text is not None and not isinstance(text, str):
            raise InputError(f"{self.where}: {role} is {value!r:.80}, but must be a token")
        return text


def content_of(token):
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else repr(token)


def build(files):
    """The `tokenizers.Tokenizer` of a folder's `Files`. Raises InputError."""
    from tokenizers import Tokenizer

    if files.path.name == "vocab.txt":
        made, specials = _from_vocabulary(files), BERT
    else:
        check_safe(files.path)
        document = json.loads(files.path.read_text(encoding="utf-8"))
        if (document.get("model") or {}).get("dropout"):
            raise InputError(f"{files.path}: the model's dropout makes a text's tokens random: set it to null")
        specials = _rebuild(document, files)
        if specials is None:
            made, specials = Tokenizer.from_file(str(files.path)), {}
        else:
            made = Tokenizer.from_str(json.dumps(document))
    made.encode_special_tokens = files.flag("split_special_tokens", False)
    _add(made, files, specials)
    _surround(made, files, specials)
    return made


def _rebuild(document, files):
    """Change tokenizer.json's `document` as the tokenizer's class does: the class's special tokens, or None if the
    class, or what the file holds, is not one that transformers builds anew."""
    kind, model = files.kind, (document.get("model") or {}).get("type")
    levels = list(_found(document.get("pre_tokenizer"), "ByteLevel"))
    if kind not in REBUILT:
        return None
    if REBUILT[kind] is BERT:
        if (document.get("normalizer") or {}).get("type") != "BertNormalizer":
            _refuse_flags(files, ("do_lower_case", "strip_accents", "tokenize_chinese_chars"))
            return None
        document["normalizer"] = {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": files.flag("tokenize_chinese_chars", True),
            "strip_accents": files.settings.get("strip_accents"),
            "lowercase": files.flag("do_lower_case", True),
        }
        document["pre_tokenizer"] = {"type": "BertPreTokenizer"}
    elif kind == "LlamaTokenizer":
        if levels:
            return None  # transformers too reads the file as it is
        if model != "BPE":
            _refuse_flags(files, ("add_prefix_space",))
            return None
        scheme = (
            "never"
            if not files.flag("add_prefix_space", True)
            else "always"
            if files.flag("legacy", False)
            else "first"
        )
        document["normalizer"] = None
        document["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": scheme,
            "split": False,
        }
        document["model"] |= {"fuse_unk": True, "byte_fallback": True, "unk_token": None}
    else:
        if model != "BPE" or not levels:
            _refuse_flags(files, ("add_prefix_space",))
            return None
        for level in levels:
            level["add_prefix_space"] = files.flag("add_prefix_space", False)
        if kind in ("GPTNeoXTokenizer", "Qwen2Tokenizer"):
            document["normalizer"] = {"type": "NFC"}
    if files.settings.get("added_tokens_decoder") is None:
        for token in document.get("added_tokens") or []:
            entry = dict(token)
            files.stated[files._index(entry.pop("id", None), files.path)] = entry
    document["added_tokens"] = []
    return REBUILT[kind]


def _found(value, kind):
    """The objects of that `type` inside a JSON value."""
    if isinstance(value, dict) and value.get("type") == kind:
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _found(inner, kind)


def _refuse_flags(files, keys):
    """Raise InputError for a setting whose meaning for this tokenizer.json is not known here."""
    for key in keys:
        if files.settings.get(key) is not None:
            raise InputError(
                f"{files.where}: {key} is not implemented for a {files.kind} whose tokenizer.json has other rules than"
                " that class: remove the setting, or tokenizer_class"
            )


def _from_vocabulary(files):
    """BERT's WordPiece from `vocab.txt`, one token a line."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    if files.kind is not None and REBUILT.get(files.kind) is not BERT:
        raise InputError(f"{files.where}: tokenizer_class {files.kind!r:.80} is not one that reads {files.path.name}")
    with open(files.path, encoding="utf-8") as file:
        vocabulary = {line.rstrip("\n"): index for index, line in enumerate(file)}
    for role, default in BERT.items():
        token = files.role(role, default)
        if token not in vocabulary and token not in {t.get("content") for t in files.stated.values()}:
            raise InputError(f"{files.path}: has no {shown(token)} (the {role}); fetch the checkpoint again")
    made = Tokenizer(models.WordPiece(vocabulary, unk_token=files.role("unk_token", "[UNK]")))
    made.normalizer = normalizers.BertNormalizer(
        lowercase=files.flag("do_lower_case", True),
        strip_accents=files.settings.get("strip_accents"),
        handle_chinese_chars=files.flag("tokenize_chinese_chars", True),
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


def _add(made, files, specials):
    """Add the tokens that the files state and the vocabulary may lack, in transformers' order. Raises InputError for
    one that gets another id than is stated."""
    from tokenizers import AddedToken

    def token(value, **flags):
        if not isinstance(value, dict):
            return AddedToken(value, special=True)
        return AddedToken(**{key: entry for key, entry in value.items() if key in FIELDS} | flags)

    try:
        stated = {index: token(entry) for index, entry in sorted(files.stated.items())}
        there = {repr(entry) for entry in made.get_added_tokens_decoder().values()}
        adding = [entry for entry in stated.values() if repr(entry) not in there]
        known = {entry.content for entry in made.get_added_tokens_decoder().values()}
        known |= {entry.content for entry in adding}
        by_text = {entry.content: entry for entry in stated.values()}
        named = {role: files.settings.get(role) for role in files.settings if role.endswith("_token")}
        named = {role: value for role, value in named.items() if role in ROLES or isinstance(value, (str, dict))}
        named = {role: specials.get(role) for role in ROLES} | {r: v for r, v in named.items() if v is not None}
        for value in [*named.values(), *files.extra()]:
            text = None if value is None else content_of(value)
            if text is not None and text not in known:
                adding.append(by_text.get(text) or token(value, special=True))
                known.add(text)
        roles = {content_of(value) for value in named.values() if value is not None}
        for entry in adding:
            entry.special = entry.special or entry.content in roles
        made.add_tokens(adding)
    except TypeError as error:
        raise InputError(f"{files.where}: an added token is malformed ({error}): fetch the checkpoint again") from None
    for index, entry in stated.items():
        if made.token_to_id(entry.content) != index:
            raise InputError(
                f"{files.path.parent}: the added token {entry.content!r:.80} should have id {index} (added_tokens.json"
                f" or added_tokens_decoder), but gets {made.token_to_id(entry.content)}: correct the file"
            )


def _surround(made, files, specials):
    """The special tokens around a text, where it is the class that says so."""
    from tokenizers import processors

    if specials is BERT or files.kind == "RobertaTokenizer" and specials:
        first, last = (files.role(role, specials[role]) for role in ("cls_token", "sep_token"))
        single = [first, "$A", last]
    elif files.kind == "GPTNeoXTokenizer" and specials:
        single = ["$A"]
    else:
        return
    tokens = [(text, made.token_to_id(text)) for text in dict.fromkeys(single) if text != "$A"]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
