"""Dense models and tokenizers from a folder or from the Hugging Face hub, with errors that say what to mend."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from bernprune.embedded import EMBEDDED, MODEL_FOLDER
from bernprune.errors import BernpruneError, ModelError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def resolve(path: str) -> str:
    """A folder that holds a config, or what can only be a name on the hub.

    Raises:
        ModelError: a path that does not exist or is no model folder.
    """
    if path == EMBEDDED:
        return str(MODEL_FOLDER)
    folder = os.path.expanduser(path)
    if os.path.isdir(folder):
        if not os.path.isfile(os.path.join(folder, "config.json")):
            inner = os.path.join(path, "model")
            is_run = os.path.isfile(os.path.join(folder, "model", "config.json"))
            advice = f"; the model that was made there is {inner}" if is_run else ""
            raise ModelError(f"model folder {path} holds no config.json{advice}")
        return folder
    if os.path.exists(folder):
        raise ModelError(f"model {path} is a file, but a folder or a Hugging Face name is needed")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        raise ModelError(f"model folder {path} does not exist")
    return path


def stated_type(path: str, *, revision: str | None = None) -> str:
    """The ``model_type`` that a model states, read alone: transformers builds no configuration of one it does not know.

    Raises:
        ModelError: as ``load_config``, or there is no model type.
    """
    with _explained(path, "configuration"):
        stated: Any = PreTrainedConfig.get_config_dict(resolve(path), revision=revision)[0]
    model_type = stated.get("model_type") if isinstance(stated, dict) else None
    if not isinstance(model_type, str):
        raise ModelError(f"the configuration of {path} states no model_type")
    return model_type


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's configuration. Raises ``ModelError``."""
    with _explained(path, "configuration"):
        return AutoConfig.from_pretrained(resolve(path), revision=revision, trust_remote_code=trust_remote_code)


def load_model(
    path: str,
    *,
    dtype: str = "auto",
    device: torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model in evaluation mode, without gradients, on the device.

    Raises:
        ModelError: missing, unreadable, corrupt, or weights that do not fit the configuration.
    """
    with _explained(path, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve(path),
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    model, info = loaded
    _check_complete(path, info)
    return model.to(device or torch.device("cpu")).eval().requires_grad_(False)


def _check_complete(path: str, info: Any) -> None:
    """Refuse a folder that did not give all weights, as the others have random values."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"model {path} lacks {len(missing)} weight(s) of its configuration, e.g. {missing[0]}")
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ModelError(f"weight {name} of model {path} is {list(found)}, but the configuration says {list(wanted)}")
    unknown = sorted(name for name in info["unexpected_keys"] if ".layers." in name)
    if unknown:  # of layers that the configuration leaves out, say: what was pruned would not be this model
        raise ModelError(f"model {path} holds {len(unknown)} weight(s) beyond its configuration, e.g. {unknown[0]}")


def load_tokenizer(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises ``ModelError``."""
    folder = resolve(path)
    if os.path.isdir(folder) and not any(os.path.exists(os.path.join(folder, name)) for name in _TOKENIZER_FILES):
        raise ModelError(f"model folder {path} holds no tokenizer (none of {', '.join(_TOKENIZER_FILES)})")
    with _explained(path, "tokenizer"):
        found = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
        if type(found).__name__ == "MistralCommonBackend":  # of mistral-common: it saves nothing that others can load
            found = PreTrainedTokenizerFast.from_pretrained(folder, revision=revision or "main")
        return found


@contextmanager
def _explained(path: str, what: str) -> Iterator[None]:
    """Turn what transformers may raise on a bad folder or name into one sentence."""
    try:
        yield
    except BernpruneError:
        raise
    except Exception as error:  # transformers and what it calls raise nearly every kind
        told = isinstance(error, OSError | ValueError | ImportError | RuntimeError) and bool(str(error).strip())
        reason = " ".join((str(error) if told else f"{type(error).__name__}: {error}").split())
        reason = reason if len(reason) <= 300 else reason[:297] + "..."
        local = path == EMBEDDED or os.path.isdir(os.path.expanduser(path))
        where = "" if local else ", neither as a local folder nor from the Hugging Face hub"
        raise ModelError(f"the {what} of {path} cannot be loaded{where}: {reason}") from error
