"""A saved folder loads as what was in memory, with bernprune and without, and is never half there."""

import ast
import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VARIANTS, Variant, random_plan, random_tokens, tiny_model
from tokenizers import Tokenizer, models, normalizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bernprune.errors import ModelError, RunError
from bernprune.models import modeling_bernprune, saving
from bernprune.models.architecture import architecture_of
from bernprune.models.loading import load_tokenizer
from bernprune.models.saving import save_pruned, verify_saved
from bernprune.models.slicing import plan_hash, slice_model
from bernprune.units import KeepPlan

REMOVED: dict[str, Any] = {"without_ffn": (1,), "without_attention": (2,), "dropped": (3,)}
BY_NAME = {variant.name: variant for variant in VARIANTS}


@pytest.fixture(autouse=True)
def _registered() -> None:
    modeling_bernprune.register()


def pruned(variant: Variant, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, KeepPlan]:
    model = variant.model(dtype)
    plan = random_plan(architecture_of(model), 5, **REMOVED)
    return slice_model(model, plan), plan


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(53)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0")


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens).logits


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_registered_classes_load_it_without_remote_code(variant: Variant, tmp_path: Path) -> None:
    (model, plan), tokens = pruned(variant), random_tokens()
    save_pruned(model, None, tmp_path / "out", plan=plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(loaded) is type(model)
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
    tied = variant.changes.get("tie_word_embeddings", False)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(tokens, **settings), model.generate(tokens, **settings))


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_rotary_embeddings_that_read_the_config_survive(family: str, kind: str, tmp_path: Path) -> None:
    """Also where layers differ in heads, of which some kinds ask how many there are."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
    changes = {"rope_parameters": rope, "num_attention_heads": 6, "num_key_value_heads": 3}
    (model, plan), tokens = pruned(Variant(kind, family, changes)), random_tokens(length=23)
    assert len({len(layer.kv_groups) for layer in plan.layers}) > 2
    save_pruned(model, None, tmp_path / "out", plan=plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))


def test_rotary_embeddings_that_need_equal_layers_are_refused_at_once() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
    factors = {name: [1.0] * 2 for name in ("short_factor", "long_factor")}
    model = tiny_model("llama")
    model.config.rope_parameters = rope | factors
    with pytest.raises(ModelError, match="'longrope' need equal layers"):
        architecture_of(model)


def test_a_clean_process_loads_it_with_remote_code(tmp_path: Path) -> None:
    (model, plan), tokens = pruned(BY_NAME["qwen3-sliding_biases"]), random_tokens()
    folder = save_pruned(model, tiny_tokenizer(), tmp_path / "out", plan=plan)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert verify_saved(folder, tokens, logits_of(model, tokens)) <= 1e-5
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_folder_is_whole_and_names_no_path(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model("llama", torch.float32).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    plan = random_plan(architecture_of(model), 5, **REMOVED)
    tokenizer = tiny_tokenizer()
    folder = save_pruned(slice_model(model, plan), tokenizer, tmp_path / "new" / "out", plan=plan)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "modeling_bernprune.py"}
    assert AutoTokenizer.from_pretrained(folder)("w7 w8")["input_ids"] == tokenizer("w7 w8")["input_ids"]
    config = json.loads((folder / "config.json").read_text())
    assert config["bernprune"] == {"format": 1, "plan_hash": plan_hash(plan), "base_model": "base"}
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_bernprune.BernpruneLlamaForCausalLM"
    assert config["dtype"] == "float32"
    for path in folder.glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # whoever may read one may read all


def test_decoder_alone_and_a_second_save(tmp_path: Path) -> None:
    """vLLM asks AutoModel for the decoder; and a folder saved again by plain transformers is still complete."""
    (model, plan), tokens = pruned(BY_NAME["mistral-grouped"]), random_tokens()
    save_pruned(model, None, tmp_path / "first", plan=plan)
    decoder = AutoModel.from_pretrained(tmp_path / "first")
    with torch.no_grad():
        assert torch.equal(model.lm_head(decoder(input_ids=tokens).last_hidden_state), logits_of(model, tokens))
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    assert first == second
    assert (tmp_path / "second" / "modeling_bernprune.py").exists()


def test_a_model_can_be_built_from_its_config_alone(tmp_path: Path) -> None:
    model, plan = pruned(BY_NAME["qwen2-grouped"])
    save_pruned(model, None, tmp_path / "out", plan=plan)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "out"))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in fresh.state_dict().items()} == shapes
    assert logits_of(fresh, random_tokens()).isfinite().all()
    assert fresh.config._attn_implementation == fresh.model.config._attn_implementation == "sdpa"


def test_low_precision_survives(tmp_path: Path) -> None:
    model, plan = pruned(BY_NAME["llama-grouped"], torch.bfloat16)
    save_pruned(model, None, tmp_path / "out", plan=plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits_of(loaded, random_tokens()), logits_of(model, random_tokens()))


@pytest.mark.parametrize("failing", ["save_pretrained", "copyfile", "fsync", "mkdir"])
def test_a_full_disk_leaves_nothing_behind(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = pruned(BY_NAME["llama-grouped"])

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owners: dict[str, Any] = {"save_pretrained": model, "copyfile": saving.shutil, "fsync": saving.os, "mkdir": Path}
    with monkeypatch.context() as patched:
        patched.setattr(owners[failing], failing, full)
        with pytest.raises(RunError, match=r"could not save to .*out: .*No space left"):
            save_pruned(model, None, tmp_path / "out", plan=plan)
    assert list(tmp_path.iterdir()) == []
    save_pruned(model, None, tmp_path / "out", plan=plan)  # and the next try works
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_unforeseen_errors_leave_nothing_behind_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = pruned(BY_NAME["llama-grouped"])
    monkeypatch.setattr(saving.shutil, "copyfile", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pruned(model, None, tmp_path / "out", plan=plan)
    assert list(tmp_path.iterdir()) == []


def test_generation_settings_are_saved_as_the_model_came_with_them(tmp_path: Path) -> None:
    """Many models come with a temperature but no sampling, which some of transformers' versions refuse to write."""
    model, plan = pruned(BY_NAME["llama-grouped"])
    settings = model.generation_config
    settings.do_sample, settings.temperature = False, 0.5
    with pytest.raises(ValueError, match="temperature"):
        settings.save_pretrained(tmp_path / "strictly")
    save_pruned(model, None, tmp_path / "out", plan=plan)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.5
    assert model.generation_config is settings


def test_a_saved_tokenizer_gives_the_same_tokens(tmp_path: Path) -> None:
    """Also where its class sets itself up in another way once it is told less: this one forgets that it is legacy."""
    base, (model, plan) = tmp_path / "base", pruned(BY_NAME["llama-grouped"])
    tiny_model("llama", torch.float32).save_pretrained(base)
    pieces = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a"])}
    tokenizer = Tokenizer(models.BPE(pieces, [("▁", "a")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(base)
    stated = json.loads((base / "tokenizer_config.json").read_text())
    own_code = {"auto_map": {"AutoTokenizer": ["elsewhere--tok.Own", None]}}
    more = {"tokenizer_class": "LlamaTokenizer", "legacy": True, **own_code}
    (base / "tokenizer_config.json").write_text(json.dumps(stated | more))
    loaded = load_tokenizer(str(base))
    assert type(loaded).__name__ == "LlamaTokenizer"
    folder = save_pruned(model, loaded, tmp_path / "out", plan=plan)
    text = "a</s>a b</s> b"
    assert loaded.tokenize(text) == AutoTokenizer.from_pretrained(folder).tokenize(text)
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    assert "auto_map" not in stated, "code that nobody trusted"
    assert stated["tokenizer_class"] == "PreTrainedTokenizerFast", "the test needs a class that forgets"


def test_a_tokenizer_that_cannot_be_saved(tmp_path: Path) -> None:
    """Their library raises plain exceptions for a full disk."""
    model, plan = pruned(BY_NAME["llama-grouped"])

    class Full:
        def save_pretrained(self, folder: Path) -> None:
            raise Exception("No space left on device (os error 28)")

    with pytest.raises(RunError, match=r"tokenizer.*No space left"):
        save_pruned(model, Full(), tmp_path / "out", plan=plan)
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path: Path) -> None:
    model, plan = pruned(BY_NAME["llama-grouped"])
    (tmp_path / "there").mkdir()
    with pytest.raises(RunError, match="exists already"):
        save_pruned(model, None, tmp_path / "there", plan=plan)
    with pytest.raises(ModelError, match="sliced by plan"):
        save_pruned(model, None, tmp_path / "out", plan=random_plan(plan.architecture, 6))
    with pytest.raises(ModelError, match="not sliced by bernprune"):
        save_pruned(tiny_model("llama"), None, tmp_path / "out", plan=plan)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


# Standing in for the clean process, which is slow to start, by one that only reads and writes the exchange files.
PRETEND = """
import sys
from safetensors.numpy import load_file, save_file
folder, exchange, dtype, device = sys.argv[1:]
logits = load_file(exchange + "/tokens.safetensors")["tokens"].astype("float32")[..., None]
save_file({"logits": logits}, exchange + "/logits.safetensors")
"""


def test_verification_measures_the_largest_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "CLEAN_LOAD", PRETEND)
    tokens = random_tokens()
    logits = tokens.float()[..., None].clone()
    logits[1, 2, 0] += 0.5
    assert verify_saved(tmp_path, tokens, logits) == 0.5
    for value in ("nan", "inf"):
        logits[0, 0, 0] = float(value)
        assert verify_saved(tmp_path, tokens, logits) == float("inf")
    with pytest.raises(RunError, match="shape"):
        verify_saved(tmp_path, tokens, logits[:, :3])


def test_verification_reports_why_a_folder_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "CLEAN_LOAD", "raise OSError('no config.json here')")
    with pytest.raises(RunError, match=r"does not load in a clean process: OSError: no config\.json here"):
        verify_saved(tmp_path, random_tokens(), torch.zeros(3, 12, 53))


def test_the_bundled_file_stands_alone() -> None:
    tree = ast.parse(Path(modeling_bernprune.__file__).read_text())
    froms = {node.module.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    plain = {
        alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert froms | plain <= {"copy", "typing", "torch", "transformers"}
