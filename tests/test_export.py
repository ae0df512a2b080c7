"""Pruned models as GGUF files: what stands in them, what llama.cpp makes of them, and what is refused."""

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import run_gguf
from tiny_models import VARIANTS, Variant, random_plan, random_tokens, tiny_model
from tiny_run import Place, run, succeed, tiny_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tolerances import LOGITS, assert_close
from transformers import PreTrainedTokenizerFast

from bernprune.errors import ModelError, RunError
from bernprune.export import checking
from bernprune.export.checking import check_gguf
from bernprune.export.gguf import neighbouring, write_gguf
from bernprune.export.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    PATTERNS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    vocabulary_from,
    vocabulary_of,
)
from bernprune.models.architecture import architecture_of
from bernprune.models.slicing import slice_model
from bernprune.run import exporting

VOCABULARY = 270
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
QWEN3 = [
    Variant(f"{each}-tied", "qwen3", {**each.changes, "tie_word_embeddings": True})
    for each in VARIANTS
    if each.family == "qwen3" and not each.changes.get("attention_bias")
]
KNOWN = [each for each in VARIANTS if each.family != "qwen3"] + QWEN3
KNOWN.append(Variant("llama-scaled_rope", "llama", {"rope_parameters": LLAMA3}))
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)


def pruned(variant: Variant, *, biases: bool = False) -> Any:
    """A model of four layers of their own sizes, in float32, where the architecture allows with one gone, and one whose
    attention is."""
    model = tiny_model(variant.family, torch.float32, **{**variant.changes, "vocab_size": VOCABULARY})
    if biases:
        for layer in model.model.layers:
            layer.mlp.down_proj.bias = torch.nn.Parameter(torch.linspace(-1, 1, 36))
            layer.self_attn.o_proj.bias = torch.nn.Parameter(torch.linspace(2, -1, 36))
    gone: Mapping[str, Any] = {} if variant.family == "qwen3" else {"without_attention": (2,), "dropped": (3,)}
    return slice_model(model, random_plan(architecture_of(model), 5, **gone))


def written(model: Any, path: Path, dtype: str = "float32") -> gguf.GGUFReader:
    write_gguf(model, vocabulary_of(tiny_tokenizer(VOCABULARY)), path, dtype=dtype)
    return gguf.GGUFReader(path)


# Weights and sizes


@pytest.mark.parametrize("variant", KNOWN, ids=str)
def test_every_weight_has_its_place(variant: Variant, tmp_path: Path) -> None:
    """None is missing, twice there, or changed but for the order of rows and, for vectors, the format."""
    model = pruned(variant)
    reader = written(model, tmp_path / "a.gguf")
    tensors = {each.name: torch.from_numpy(np.array(each.data)) for each in reader.tensors}
    assert sum(each.numel() for name, each in tensors.items() if name != "rope_freqs.weight") == model.num_parameters()
    for index, layer in enumerate(model.model.layers):
        ffn = layer.mlp
        if hasattr(ffn, "down_proj"):
            assert tensors[f"blk.{index}.ffn_down.weight"].equal(ffn.down_proj.weight)
            assert tensors[f"blk.{index}.ffn_gate.weight"].equal(ffn.gate_proj.weight)
    assert ("rope_freqs.weight" in tensors) == ("rope_parameters" in variant.changes)
    query, head_dim = model.model.layers[0].self_attn.q_proj.weight, model.config.head_dim
    if variant.family == "qwen3":
        assert tensors["blk.0.attn_qkv.weight"][: len(query)].equal(query)
    else:
        assert tensors["blk.0.attn_q.weight"].equal(neighbouring(query, head_dim))
    lists = {
        name: reader.fields[f"{reader.fields['general.architecture'].contents()}.{name}"].contents()
        for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    }
    views = [model.config.per_layer_config[index] for index in range(model.config.num_hidden_layers)]
    skipped = [getattr(view, "skip", ()) for view in views]
    assert list(lists["attention.head_count_kv"]) == [
        0 if "attention" in skip else view.num_key_value_heads for view, skip in zip(views, skipped, strict=True)
    ]
    assert list(lists["feed_forward_length"]) == [view.intermediate_size for view in views]


@pytest.mark.parametrize("variant", KNOWN, ids=str)
def test_what_is_written_runs_as_the_model_does(variant: Variant, tmp_path: Path) -> None:
    """By the file alone, with figures of the model's own where others are usual, and by llama.cpp's rules."""
    changes = {"rms_norm_eps": 1e-2}
    if "rope_parameters" not in variant.changes:
        changes["rope_parameters"] = {"rope_type": "default", "rope_theta": 77.0}
    model = pruned(Variant(variant.name, variant.family, variant.changes | changes), biases=variant.family == "llama")
    tokens_T = random_tokens(1, 7, vocabulary=VOCABULARY)[0]
    with torch.inference_mode():
        expected_TV = model(tokens_T[None]).logits[0]
    assert_close(run_gguf(written(model, tmp_path / "a.gguf"), tokens_T), expected_TV, LOGITS[torch.float32])


WINDOWED = {"use_sliding_window": True, "sliding_window": 7}


@pytest.mark.parametrize(
    ("family", "changes", "length"),
    [
        ("llama", {}, 64),
        ("mistral", {}, 7),
        ("mistral", {"sliding_window": None}, 64),
        ("llama", {"sliding_window": 7}, 7),  # of a family of which caches alone heed a window
        ("mistral", {"layer_types": ["full_attention"] * 4}, 7),  # and of one that heeds no types
        ("qwen2", {**WINDOWED, "max_window_layers": 1}, 7),
        ("qwen2", {**WINDOWED, "max_window_layers": 4}, 64),
    ],
)
def test_no_more_text_than_the_model_attends_to(family: str, changes: Any, length: int, tmp_path: Path) -> None:
    """llama.cpp would attend beyond the window, if any layer has one."""
    reader = written(pruned(Variant(family, family, changes)), tmp_path / "a.gguf")
    assert reader.fields["deci.context_length"].contents() == length


def test_rotary_pairs_become_neighbours() -> None:
    """Of each head by itself: first and first of the second half, and so on."""
    rows = torch.arange(12)
    assert neighbouring(rows, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrices_have_the_format_that_is_asked_for(dtype: str, tmp_path: Path) -> None:
    """Vectors stay in float32."""
    reader = written(pruned(KNOWN[0]), tmp_path / "a.gguf", dtype)
    kind = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert {each.tensor_type.name for each in reader.tensors if len(each.shape) > 1} == {kind}
    assert {each.tensor_type.name for each in reader.tensors if len(each.shape) == 1} == {"F32"}


@pytest.mark.parametrize(
    ("family", "changes", "plan", "said"),
    [
        ("qwen3", {"tie_word_embeddings": False}, {}, "openelm ties the output"),
        ("qwen3", {"tie_word_embeddings": True}, {"without_attention": (2,)}, "no layers without attention"),
        ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}, {}, "knows no biases"),
        ("llama", {}, {"without_ffn": (1,)}, "a layer has attention but no FFN"),
        ("llama", {"hidden_act": "gelu"}, {}, "activation is 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, {}, "is 'dynamic'"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(family: str, changes: Any, plan: Any, said: str, tmp_path: Path) -> None:
    model = tiny_model(family, torch.float32, **{**changes, "vocab_size": VOCABULARY})
    sliced = slice_model(model, random_plan(architecture_of(model), 5, **plan))
    with pytest.raises(ModelError, match=said):
        written(sliced, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


# Vocabularies


def characters() -> PreTrainedTokenizerFast:
    """Byte-pair encoding of characters, with bytes to fall back on, as SentencePiece has it."""
    pairs = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("l", "l"), ("t", "h")]  # the last would split 'the' otherwise
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thel'", *map("".join, pairs)]
    model = models.BPE(
        {token: number for number, token in enumerate(tokens)}, pairs, unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def split_by(pattern: str) -> PreTrainedTokenizerFast:
    """The tiny byte-level tokenizer, splitting text by a pattern first."""
    tokenizer = tiny_tokenizer(VOCABULARY)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def splitting_digits() -> PreTrainedTokenizerFast:
    """The tiny byte-level tokenizer, taking digits apart first."""
    tokenizer = tiny_tokenizer(VOCABULARY)
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    return tokenizer


TOKENIZERS = {"gpt-2": lambda: tiny_tokenizer(VOCABULARY), "default": characters, "smollm": splitting_digits}
TOKENIZERS |= {name: lambda pattern=pattern: split_by(pattern) for pattern, name in PATTERNS.items()}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_vocabularies_are_read_as_they_were_written(name: str, tmp_path: Path) -> None:
    """And a copy of one is the same, with the same unused tokens at the end."""
    words = vocabulary_of(TOKENIZERS[name]())
    assert words.values["tokenizer.ggml.pre"][0] == name
    model = pruned(KNOWN[0])
    for turn, path in enumerate((tmp_path / "a.gguf", tmp_path / "b.gguf")):
        write_gguf(model, words, path, dtype="float32")
        copied = vocabulary_from(path, gguf)
        assert copied.values == words.values and copied.tokens[: len(words.tokens)] == words.tokens
        assert len(copied.tokens) == len(copied.types) == VOCABULARY and (not turn or copied == words)
        words = copied


def test_tokens_have_their_types() -> None:
    """Special and added ones, bytes to fall back on, and what stands for the unknown."""
    tokenizer = characters()
    tokenizer.add_tokens(["plain"])
    tokenizer.chat_template = "{{ messages }}"
    words = vocabulary_of(tokenizer)
    types = dict(zip(words.tokens, words.types, strict=True))
    assert [types[each] for each in ("<unk>", "<s>", "<0x0A>")] == [UNKNOWN, CONTROL, BYTE]
    assert types["▁the"] == NORMAL and types["plain"] == USER_DEFINED
    scores = dict(zip(words.tokens, words.scores, strict=True))
    assert scores["▁t"] > scores["he"] > scores["th"] > scores["<unk>"]  # in the order of the merges
    assert words.values["tokenizer.ggml.add_space_prefix"][0]
    assert words.values["tokenizer.chat_template"] == ("{{ messages }}", "STRING", None)
    assert "tokenizer.chat_template" not in vocabulary_of(characters()).values


def test_several_chat_templates_are_kept(tmp_path: Path) -> None:
    """By the names that gguf itself would give them; the default one is that which llama.cpp takes."""
    tokenizer = characters()
    tokenizer.chat_template = {"tool_use": "{{ tools }}", "default": "{{ messages }}"}
    expected = gguf.GGUFWriter(tmp_path / "a.gguf", "deci")
    expected.add_chat_template([{"name": name, "template": text} for name, text in tokenizer.chat_template.items()])
    (stated,) = expected.kv_data
    stated = {key: value.value for key, value in stated.items() if key.startswith("tokenizer")}
    found = {key: value[0] for key, value in vocabulary_of(tokenizer).values.items() if "chat" in key}
    assert found == stated and len(found) == 3
    path, model = tmp_path / "b.gguf", tiny_model("llama", torch.float32, vocab_size=VOCABULARY)
    write_gguf(slice_model(model, random_plan(architecture_of(model), 5)), vocabulary_of(tokenizer), path)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert fields["tokenizer.chat_templates"].contents() == ["tool_use"]


def test_a_tokenizer_that_knows_no_letter_puts_nothing_around_text() -> None:
    """Nor does it fail for that."""
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "b": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>"))
    assert [words.values[f"tokenizer.ggml.add_{each}_token"][0] for each in ("bos", "eos")] == [False, False]


def test_vocabularies_that_are_not_known_are_refused(tmp_path: Path) -> None:
    """With what to do."""
    unknown = {
        "for how this tokenizer splits text is not known": split_by(r"\d"),
        "of type WordLevel": PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))),
    }
    spaced, lowered = split_by(next(iter(PATTERNS))), tiny_tokenizer(VOCABULARY)
    spaced.backend_tokenizer.pre_tokenizer[1].add_prefix_space = True
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    replaced = characters()
    replaced.backend_tokenizer.normalizer = normalizers.Replace("x", "y")
    for tokenizer in (spaced, lowered, replaced):
        with pytest.raises(ModelError, match="copy that of the dense model's GGUF file"):
            vocabulary_of(tokenizer)
    for said, tokenizer in unknown.items():
        with pytest.raises(ModelError, match=f"{said}.*copy that of the dense model's GGUF file"):
            vocabulary_of(tokenizer)
    with pytest.raises(ModelError, match="cannot be read as a GGUF file"):
        vocabulary_from(tmp_path / "nowhere.gguf", gguf)
    writer = gguf.GGUFWriter(tmp_path / "bare.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="holds no vocabulary"):
        vocabulary_from(tmp_path / "bare.gguf", gguf)


def test_damaged_vocabularies_are_refused(tmp_path: Path) -> None:
    """Wherever the file ends."""
    written(pruned(KNOWN[0]), tmp_path / "a.gguf")
    whole = (tmp_path / "a.gguf").read_bytes()
    for length in range(0, 6000, 500):
        (tmp_path / "b.gguf").write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cannot be read as a GGUF file|holds no vocabulary"):
            vocabulary_from(tmp_path / "b.gguf", gguf)


def test_fillers_are_no_tokens(tmp_path: Path) -> None:
    """llama.cpp stops at a token that is there twice."""
    words = vocabulary_of(tiny_tokenizer(VOCABULARY - 2))
    words.tokens[5] = f"[PAD{VOCABULARY - 1}]"
    write_gguf(pruned(KNOWN[0]), words, tmp_path / "a.gguf", dtype="float32")
    found = vocabulary_from(tmp_path / "a.gguf", gguf)
    assert len(set(found.tokens)) == VOCABULARY and found.types == [*words.types, UNUSED, UNUSED]


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = pruned(KNOWN[0])
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = -1e5
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight holds numbers that float16 cannot"):
        written(model, tmp_path / "a.gguf", "float16")


# llama.cpp


@needs_llama_cpp
@pytest.mark.parametrize("variant", KNOWN, ids=str)
def test_llama_cpp_runs_it_as_we_do(variant: Variant, tmp_path: Path) -> None:
    """Of every family, heads shared or not, biases of the family or of a repair, scaled rotary embeddings."""
    model = pruned(variant, biases=variant.name == "llama-grouped")
    written(model, tmp_path / "a.gguf")
    length = 7 if getattr(model.config, "sliding_window", None) else 12
    tokens_T = random_tokens(1, length, vocabulary=VOCABULARY)[0]
    checked = check_gguf(tmp_path / "a.gguf", model, tiny_tokenizer(VOCABULARY), tokens_T)
    assert checked["relative_error"] < LOGITS[torch.float32] and checked["same_choice"] == 1


@needs_llama_cpp
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_reads_text_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    """Or else it is found out."""
    model, tokenizer = pruned(KNOWN[0]), TOKENIZERS[name]()
    write_gguf(model, vocabulary_of(tokenizer), tmp_path / "a.gguf", dtype="float32")
    tokens_T = random_tokens(1, 9, vocabulary=VOCABULARY)[0]
    assert check_gguf(tmp_path / "a.gguf", model, tokenizer, tokens_T)
    with pytest.raises(RunError, match="reads other tokens"):
        check_gguf(tmp_path / "a.gguf", model, characters() if name != "default" else split_by(r"\d"), tokens_T)


@needs_llama_cpp
def test_a_file_of_another_model_is_found_out(tmp_path: Path) -> None:
    written(pruned(KNOWN[0]), tmp_path / "a.gguf")
    other = tiny_model("llama", torch.float32, seed=1, vocab_size=VOCABULARY)
    with pytest.raises(RunError, match="gives other logits"):
        check_gguf(tmp_path / "a.gguf", other, tiny_tokenizer(VOCABULARY), torch.arange(9))
    (tmp_path / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:4000])
    with pytest.raises(RunError, match=r"llama\.cpp cannot run .*: .*(failed|error)"):
        check_gguf(tmp_path / "b.gguf", other, tiny_tokenizer(VOCABULARY), torch.arange(9))


# The command


def test_a_model_is_checked_in_float32(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose rounding hides nothing; the file has the model's own format."""
    checked: list[torch.dtype] = []
    monkeypatch.setattr(exporting, "check_gguf", lambda path, model, *_: checked.append(model.dtype) or {})
    succeed(*place.prune("model.dtype=bfloat16", "search.sequences=0", out=tmp_path / "run"))
    succeed("export", str(tmp_path / "run"), str(tmp_path / "a.gguf"))
    assert checked == [torch.float32]
    assert {each.tensor_type.name for each in gguf.GGUFReader(tmp_path / "a.gguf").tensors} == {"BF16", "F32"}


def test_a_run_is_exported(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its folder or its model's; not over what is there, and nothing is left of what fails."""
    monkeypatch.setattr(checking.importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "run"
    succeed(*place.prune(out=out))
    told = succeed("export", str(out), str(tmp_path / "new" / "a.gguf"), "--dtype=float16").out
    assert "architecture deci" in told and "llama-cpp-python is not installed" in told
    succeed("export", str(out / "model"), str(tmp_path / "b.gguf"), f"--vocabulary={tmp_path / 'new' / 'a.gguf'}")
    first, second = (gguf.GGUFReader(path).tensors for path in (tmp_path / "new" / "a.gguf", tmp_path / "b.gguf"))
    assert [each.name for each in first] == [each.name for each in second]
    assert_close(torch.tensor(np.array(first[0].data)), torch.tensor(np.array(second[0].data)), LOGITS[torch.float16])
    before = {path.name for path in tmp_path.iterdir()}
    said = {
        (str(out), str(tmp_path / "b.gguf")): "exists already",
        (str(out), str(tmp_path / "c.bin")): "must end in .gguf",
        (str(place.model), str(tmp_path / "d" / "e" / "c.gguf")): "was not sliced by bernprune; llama.cpp's own",
        (str(tmp_path / "nowhere"), str(tmp_path / "c.gguf")): "does not exist",
        (str(out), str(tmp_path / "c.gguf"), "--dtype=int4"): "dtype 'int4' is unknown",
        (str(out), str(tmp_path / "c.gguf"), "--vocabulary=no.gguf"): "cannot be read as a GGUF file",
    }
    for arguments, sentence in said.items():
        done = run("export", *arguments)
        assert done.code == 2 and sentence in done.err and done.err.count("\n") == 1
    (out / "report.json").unlink()  # as in a run that was killed while its model was verified
    assert "is not finished" in run("export", str(out), str(tmp_path / "c.gguf")).err
    shutil.rmtree(out / "model")
    assert "is not finished" in run("export", str(out), str(tmp_path / "c.gguf")).err
    assert {path.name for path in tmp_path.iterdir()} == before


def test_what_opens_a_text_is_told() -> None:
    """By what the tokenizer puts before it."""
    tokenizer = characters()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    values = vocabulary_of(tokenizer).values
    assert [values[f"tokenizer.ggml.add_{which}_token"][0] for which in ("bos", "eos")] == [True, False]


@pytest.mark.parametrize(("scheme", "prefix"), [("first", True), ("never", False)])
def test_whether_a_space_comes_first_is_told(scheme: str, prefix: bool) -> None:
    tokenizer = characters()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    assert vocabulary_of(tokenizer).values["tokenizer.ggml.add_space_prefix"][0] is prefix


def test_more_tokens_than_the_model_embeds_are_refused(tmp_path: Path) -> None:
    words = vocabulary_of(tiny_tokenizer(VOCABULARY))
    words.tokens.append("more")
    words.types.append(NORMAL)
    with pytest.raises(ModelError, match=f"has {VOCABULARY + 1} tokens, but the model embeds {VOCABULARY}"):
        write_gguf(pruned(KNOWN[0]), words, tmp_path / "a.gguf", dtype="float32")
