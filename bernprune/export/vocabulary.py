"""A tokenizer as llama.cpp knows it: out of a Hugging Face one, or copied from a GGUF file of the dense model.

Two kinds can be said in a GGUF file: byte-pair encoding of bytes, of which the pattern that splits text first goes by a
name that llama.cpp knows, and byte-pair encoding of characters as SentencePiece has it, which goes by scores: there the
negative rank of the merge that makes a token.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bernprune.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
_OURS = "tokenizer.ggml"
_NFC = {"type": "NFC"}  # which llama.cpp leaves out
_COPY = "copy that of the dense model's GGUF file (--vocabulary)"
_UNREACHED = -1e6  # score of what no merge makes
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What a tokenizer splits text by before it looks at bytes, and the name of that.
PATTERNS = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
}

Value = tuple[Any, str, str | None]  # with the name of its type and, of a list, that of what it holds


@dataclass
class Vocabulary:
    """Tokens and what goes with them, as values of a GGUF file.

    Attributes:
        tokens, types, scores: one a token; there are scores where tokens are made by them.
        values: all others by their keys.
    """

    tokens: list[str]
    types: list[int]
    scores: list[float]
    values: dict[str, Value]

    def add_to(self, writer: Any, gguf: Any, size: int) -> None:
        """Write it with as many tokens as the model embeds."""
        unused = [_filler(number, self.tokens) for number in range(len(self.tokens), size)]
        writer.add_token_list(self.tokens + unused)
        writer.add_token_types(self.types + [UNUSED] * len(unused))
        if self.scores:
            writer.add_token_scores(self.scores + [_UNREACHED] * len(unused))
        for key, (value, kind, held) in self.values.items():
            kinds = gguf.GGUFValueType
            writer.add_key_value(key, value, kinds[kind], None if held is None else kinds[held])


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """Raises ``ModelError`` for a tokenizer that cannot be said in a GGUF file, or by no name that we know."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"a {type(tokenizer).__name__} has no tokenizer.json; {_COPY}")
    stated = json.loads(backend.to_str())
    if stated["model"]["type"] != "BPE":
        raise ModelError(f"a tokenizer of type {stated['model']['type']} has no place in a GGUF file; {_COPY}")
    found = _of_characters(stated) if stated["model"].get("byte_fallback") else _of_bytes(stated)
    found.values |= _specials(tokenizer)
    return found


def _of_bytes(stated: Mapping[str, Any]) -> Vocabulary:
    *before, last = _steps(stated["pre_tokenizer"], "pretokenizers") or [{"type": None}]
    name = None
    if last["type"] == "ByteLevel" and not last["add_prefix_space"] and (stated["normalizer"] or _NFC) == _NFC:
        name = _name_of(before, splits=last["use_regex"])
    if name is None:
        raise ModelError(f"llama.cpp's name for how this tokenizer splits text is not known here; {_COPY}")
    tokens, types = _tokens(stated)
    merges = [" ".join(merge) for merge in _merges(stated)]
    return Vocabulary(
        tokens,
        types,
        scores=[],
        values={
            f"{_OURS}.model": ("gpt2", "STRING", None),
            f"{_OURS}.pre": (name, "STRING", None),
            f"{_OURS}.merges": (merges, "ARRAY", "STRING"),
        },
    )


def _name_of(before: Sequence[Mapping[str, Any]], *, splits: bool) -> str | None:
    """llama.cpp's name for what comes before bytes, which split text themselves, or do not; None if it is not known."""
    if splits:
        digits = [step["type"] == "Digits" and step["individual_digits"] for step in before]
        return "gpt-2" if not digits else "smollm" if digits == [True] else None
    patterns = [step["pattern"].get("Regex") for step in before if step["type"] == "Split"]
    return PATTERNS.get(patterns[0]) if len(patterns) == len(before) == 1 else None


def _of_characters(stated: Mapping[str, Any]) -> Vocabulary:
    normalizers = {step["type"]: step for step in _steps(stated["normalizer"], "normalizers")}
    spaces = {step["type"]: step for step in _steps(stated["pre_tokenizer"], "pretokenizers")}.get("Metaspace")
    replaced = normalizers.get("Replace", {"pattern": None, "content": None})
    if spaces is None and (replaced["pattern"], replaced["content"]) != ({"String": " "}, "▁"):
        raise ModelError(f"this tokenizer does not write spaces as SentencePiece does; {_COPY}")
    prefix = "Prepend" in normalizers or (spaces is not None and spaces.get("prepend_scheme") != "never")
    tokens, types = _tokens(stated)
    unknown = stated["model"].get("unk_token")
    types = [
        UNKNOWN if token == unknown else BYTE if _is_byte(token) else kind
        for token, kind in zip(tokens, types, strict=True)
    ]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(stated)):
        ranks.setdefault(left + right, rank)
    return Vocabulary(
        tokens,
        types,
        [-float(ranks[token]) if token in ranks else _UNREACHED for token in tokens],
        {
            f"{_OURS}.model": ("llama", "STRING", None),
            f"{_OURS}.pre": ("default", "STRING", None),
            f"{_OURS}.add_space_prefix": (prefix, "BOOL", None),
        },
    )


def _steps(stated: Mapping[str, Any] | None, several: str) -> list[Mapping[str, Any]]:
    """What a tokenizer does one after the other."""
    if stated is None:
        return []
    return list(stated[several]) if stated["type"] == "Sequence" else [stated]


def _tokens(stated: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """All tokens by their number, with their types; numbers that are left out are unused."""
    numbers = dict(stated["model"]["vocab"])
    added = {each["content"]: each for each in stated["added_tokens"]}
    numbers |= {content: each["id"] for content, each in added.items()}
    by_number = {number: token for token, number in numbers.items()}
    count = max(by_number) + 1
    tokens = [by_number.get(number) or _filler(number, numbers) for number in range(count)]
    types = [
        (CONTROL if added[token]["special"] else USER_DEFINED)
        if token in added
        else NORMAL
        if token in numbers
        else UNUSED
        for token in tokens
    ]
    return tokens, types


def _filler(number: int, known: Collection[str]) -> str:
    """A name for a number without a token, which none has."""
    name = f"[PAD{number}]"
    while name in known:
        name = f"[{name}]"
    return name


def _merges(stated: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs in the order of their ranks; older files have them as one word with a space."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in stated["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _specials(tokenizer: Any) -> dict[str, Value]:
    """Numbers of special tokens, which of them a text is put between, and the chat template."""
    found: dict[str, Value] = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = getattr(tokenizer, f"{ours}_token_id", None)
        if number is not None:
            found[f"{_OURS}.{theirs}_token_id"] = number, "UINT32", None
    encoded = tokenizer("a")["input_ids"]
    found[f"{_OURS}.add_bos_token"] = encoded[:1] == [tokenizer.bos_token_id], "BOOL", None
    found[f"{_OURS}.add_eos_token"] = encoded[-1:] == [tokenizer.eos_token_id], "BOOL", None
    return found | _chat_templates(getattr(tokenizer, "chat_template", None))


def _chat_templates(given: Any) -> dict[str, Value]:
    """One template, or several by name, of which ``default`` is the one that is used."""
    templates = {"default": given} if isinstance(given, str) else dict(given or {})
    others = sorted(templates.keys() - {"default"})
    found: dict[str, Value] = {f"tokenizer.chat_template.{name}": (templates[name], "STRING", None) for name in others}
    if others:
        found["tokenizer.chat_templates"] = others, "ARRAY", "STRING"
    if "default" in templates:
        found["tokenizer.chat_template"] = templates["default"], "STRING", None
    return found


def vocabulary_from(path: Path, gguf: Any) -> Vocabulary:
    """That of a GGUF file, as it is.

    Raises:
        ModelError: no such file, or one without a vocabulary.
    """
    try:
        read = {key: _value(each) for key, each in gguf.GGUFReader(path).fields.items() if key.startswith("tokenizer.")}
    except (OSError, ValueError, IndexError) as error:
        raise ModelError(f"vocabulary {path} cannot be read as a GGUF file: {error}") from None
    if f"{_OURS}.tokens" not in read or f"{_OURS}.token_type" not in read:
        raise ModelError(f"{path} holds no vocabulary")
    tokens, types = (read.pop(f"{_OURS}.{name}")[0] for name in ("tokens", "token_type"))
    scores: Value = read.pop(f"{_OURS}.scores", ([], "ARRAY", None))
    return Vocabulary(tokens, types, scores[0], read)


def _value(field: Any) -> Value:
    kind, *held = [found.name for found in field.types]
    return (list(field.contents()), kind, held[-1]) if held else (field.contents(), kind, None)
