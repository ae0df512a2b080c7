"""A model folder that is broken in any way is refused in one sentence that says what to mend."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_run import Place
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from bernprune.embedded import EMBEDDED, MODEL_FOLDER
from bernprune.errors import ModelError
from bernprune.models import loading
from bernprune.models.loading import load_config, load_model, load_tokenizer, resolve, stated_type

Loader = Callable[..., Any]
LOADERS: dict[str, Loader] = {"config": load_config, "model": load_model, "tokenizer": load_tokenizer}
WEIGHTS, WEIGHT = "model.safetensors", "model.layers.1.mlp.up_proj.weight"

all_loaders = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its tokenizer; not to be written to."""
    folder = tmp_path_factory.mktemp("sound")
    tiny_model("llama", torch.float32).save_pretrained(folder)
    words = {f"w{index}": index for index in range(53)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="w1").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def test_a_sound_folder_is_loaded(sound: Path) -> None:
    """The neighbour of every broken one below: all of it, with the values that were saved."""
    model, tokenizer = load_model(str(sound)), load_tokenizer(str(sound))
    assert load_config(str(sound)).model_type == "llama"
    assert tokenizer.bos_token_id == 1
    saved = tiny_model("llama", torch.float32).state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_dtype_is_the_checkpoints_or_the_one_given(sound: Path, dtype: str, expected: torch.dtype) -> None:
    """Weights and logits have it."""
    model = load_model(str(sound), dtype=dtype)
    assert model.dtype == model(input_ids=torch.tensor([[3, 4]])).logits.dtype == expected


# Broken folders


Spoil = Callable[[Path], Any]


def _config(**changes: Any) -> Spoil:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _text(name: str, text: str) -> Spoil:
    return lambda folder: (folder / name).write_text(text)


def _weights(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def write(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return write


def _without(*names: str) -> Spoil:
    return lambda folder: [(folder / name).unlink() for name in names]


def _flipped(index: int) -> Spoil:
    return _weights(lambda data: data[:index] + bytes([data[index] ^ 0x40]) + data[index + 1 :])


def _no_model(folder: Path) -> None:
    shutil.rmtree(folder)


def _a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("weights")


EVERYWHERE = tuple(LOADERS)
BROKEN: dict[str, tuple[Spoil, tuple[str, ...], str]] = {
    "missing_folder": (_no_model, EVERYWHERE, "model folder .*model does not exist"),
    "file_for_folder": (_a_file, EVERYWHERE, "model .*model is a file, but a folder or a Hugging Face name is needed"),
    "no_config": (_without("config.json"), EVERYWHERE, "model folder .*model holds no config.json"),
    "config_cut_off": (_text("config.json", '{"model_type": "lla'), EVERYWHERE, "not a valid JSON"),
    "config_empty": (_text("config.json", ""), EVERYWHERE, "not a valid JSON"),
    "config_is_a_list": (_text("config.json", "[1]"), ("config", "model"), "Unrecognized model"),
    "config_is_null": (_text("config.json", "null"), EVERYWHERE, "cannot be loaded: TypeError"),
    "unknown_type": (_config(model_type="abacus"), ("config", "model"), "abacus"),
    "no_type": (_config(model_type=None), ("config", "model"), "model type `None`"),
    "size_is_a_word": (_config(hidden_size="large"), ("config", "model"), "'hidden_size' expected int, got str"),
    "no_heads": (_config(num_attention_heads=0, head_dim=None), ("config", "model"), "ZeroDivisionError"),
    "heads_do_not_divide": (_config(num_attention_heads=7), ("config", "model"), "not a multiple"),
    "unknown_activation": (_config(hidden_act="abacus"), ("model",), "KeyError: 'abacus'"),
    "no_language_model": (_config(model_type="t5"), ("model",), "Unrecognized configuration class"),
    "missing_quantiser": (_config(quantization_config={"quant_method": "gptq", "bits": 4}), ("model",), "optimum"),
    "no_weights": (_without(WEIGHTS), ("model",), "no file named model.safetensors"),
    "weights_empty": (_weights(lambda data: data[:0]), ("model",), "header too small"),
    "weights_cut_in_header": (_weights(lambda data: data[:999]), ("model",), "invalid header length|header"),
    "weights_cut_in_data": (_weights(lambda data: data[:-4]), ("model",), "file not fully covered"),
    "header_length_flipped": (_flipped(6), ("model",), "header too large"),
    "header_flipped": (_flipped(20), ("model",), "header"),
    "weight_missing": (
        _tensors(lambda tensors: tensors.pop(WEIGHT)),
        ("model",),
        rf"lacks 1 weight\(s\).*, e.g. {WEIGHT}$",
    ),
    "more_layers": (
        _config(num_hidden_layers=5, layer_types=None),
        ("model",),
        r"lacks 9 weight\(s\) .*model.layers.4",
    ),
    "fewer_layers": (
        _config(num_hidden_layers=3, layer_types=None),
        ("model",),
        r"holds 9 weight\(s\) beyond its configuration, e.g. model.layers.3",
    ),
    "weight_narrow": (
        _tensors(lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:-1].clone()})),
        ("model",),
        rf"^weight {WEIGHT} of model .* is \[18, 36\], but the configuration says \[19, 36\]$",
    ),
    "other_width": (_config(intermediate_size=20), ("model",), r"mlp.*the configuration says \[(36, 20|20, 36)\]$"),
    "tokenizer_cut_off": (_text("tokenizer.json", '{"version":'), ("tokenizer",), "the tokenizer of .* line 1"),
    "tokenizer_of_nothing": (_text("tokenizer.json", "{}"), ("tokenizer",), "KeyError: 'added_tokens'"),
    "no_tokenizer": (
        _without("tokenizer.json", "tokenizer_config.json"),
        ("tokenizer",),
        r"holds no tokenizer \(none of tokenizer.json, ",
    ),
}


@pytest.mark.parametrize(
    ("spoil", "load", "message"),
    [
        pytest.param(spoil, LOADERS[what], message, id=f"{name}-{what}")
        for name, (spoil, loaders, message) in BROKEN.items()
        for what in loaders
    ],
)
def test_a_broken_folder_is_refused(folder: Path, spoil: Spoil, load: Loader, message: str) -> None:
    """By ``ModelError``, in one line that names the folder and what is wrong with it."""
    load(str(folder))
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load(str(folder))
    sentence = str(caught.value)
    assert str(folder) in sentence
    assert "\n" not in sentence
    assert len(sentence) < 400 + len(str(folder))


def test_weights_that_no_module_takes_do_no_harm(folder: Path) -> None:
    """Checkpoints carry extra tensors, such as buffers of other versions."""
    _tensors(lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))(folder)
    assert torch.equal(load_model(str(folder)).lm_head.weight, tiny_model("llama", torch.float32).lm_head.weight)


def test_the_type_is_read_alone(folder: Path) -> None:
    """Also that of a model which transformers does not know; one that states none is refused."""
    assert stated_type(str(folder)) == "llama"
    _config(model_type="abacus")(folder)
    assert stated_type(str(folder)) == "abacus"
    _config(model_type=None)(folder)
    with pytest.raises(ModelError, match="states no model_type"):
        stated_type(str(folder))


# Names and paths


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is looked up by transformers, which knows nothing."""
    names: list[str] = []

    def refuse(name: str, **_: Any) -> None:
        names.append(name)
        raise OSError(f"{name} is not on the hub,\n\n  really.")

    for auto in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, auto), "from_pretrained", refuse)
    return names


@all_loaders
@pytest.mark.parametrize("name", ["gpt2", "org/name", "Org-1/Some_Model-1.5b", "0x/y.z"])
def test_what_may_be_a_name_is_tried_on_the_hub(asked: list[str], load: Loader, name: str) -> None:
    """Once and as it is; the error says that neither a folder nor the hub has it, in one line."""
    with pytest.raises(ModelError) as caught:
        load(name)
    assert asked == [name]
    assert f"of {name} cannot be loaded, neither as a local folder nor from the Hugging Face hub" in str(caught.value)
    assert str(caught.value).endswith(f": {name} is not on the hub, really.")


PATHS = ["a/b/c", "./model", "../model", "/no/such/model", "org/name/", "~/no/such", "~nobody/model", "", " ", "a b"]


@all_loaders
@pytest.mark.parametrize("path", [*PATHS, "nul\0l", "C:\\model"], ids=ascii)
def test_what_is_meant_as_a_path_is_never_tried_on_the_hub(asked: list[str], load: Loader, path: str) -> None:
    """A typing error in a path must not become a look-up."""
    with pytest.raises(ModelError, match="does not exist"):
        load(path)
    assert asked == []


@all_loaders
def test_a_local_folder_is_never_tried_on_the_hub(
    asked: list[str], load: Loader, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder called like a name wins over the hub, and an error about it does not mention the hub."""
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ModelError) as caught:
        load("model")
    assert asked == ["model"]  # which transformers, too, takes for the folder
    assert "neither" not in str(caught.value)


def test_paths_are_resolved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home folder is expanded, the embedded model has its place, and a name stays a name."""
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("~/model") == str(folder)
    assert resolve(EMBEDDED) == str(MODEL_FOLDER)
    assert resolve("org/name") == "org/name"


def test_a_tokenizer_of_mistral_common_is_not_taken(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that library is installed, transformers prefers it for models that bring a file of its own."""
    theirs = type("MistralCommonBackend", (), {})()
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda *_, **__: theirs)
    found = load_tokenizer(str(place.model))
    assert isinstance(found, PreTrainedTokenizerFast) and found("ab")["input_ids"]


def test_the_embedded_model_is_no_folder_of_that_name(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder called so in the current one has nothing to do with it."""
    (tmp_path / EMBEDDED).mkdir()
    monkeypatch.chdir(tmp_path)
    for load in LOADERS.values():
        with pytest.raises(ModelError, match="not on the hub"):
            load(EMBEDDED)
    assert asked == [str(MODEL_FOLDER)] * len(LOADERS)


def test_a_path_of_any_length_is_refused(asked: list[str]) -> None:
    """Where the file system gives up, too."""
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_config("x" * 5000)
    with pytest.raises(ModelError, match="does not exist"):
        load_config("/" + "x" * 5000)
    assert len(asked) == 1


@all_loaders
def test_options_reach_transformers(monkeypatch: pytest.MonkeyPatch, load: Loader) -> None:
    """Revision and trust are passed on; code of others is not trusted by default."""
    given: list[tuple[Any, Any]] = []

    def record(name: str, *, revision: Any, trust_remote_code: Any, **_: Any) -> None:
        given.append((revision, trust_remote_code))
        raise OSError("no")

    for auto in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, auto), "from_pretrained", record)
    for options in ({}, {"revision": "v2", "trust_remote_code": True}):
        with pytest.raises(ModelError):
            load("org/name", **options)
    assert given == [(None, False), ("v2", True)]


@all_loaders
def test_an_interruption_stays_one(monkeypatch: pytest.MonkeyPatch, load: Loader) -> None:
    """Ctrl-C during a download is no error of the model."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for auto in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, auto), "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load("org/name")
