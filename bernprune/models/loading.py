"""Dense models and tokenizers from a folder or from the Hugging Face hub, with errors that say what to mend."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from bernprune.embedded import EMBEDDED, MODEL_FOLDER
from bernprune.errors import ModelError

# The public loading of transformers is imported where it is used: it takes seconds that a typo should not cost.


def resolve(path: str) -> str:
    """A folder that holds a config, or what can only be a name on the hub.

    Raises:
        ModelError: a path that does not exist or is no model folder.
    """
    if path == EMBEDDED:
        return str(MODEL_FOLDER)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model folder {path} holds no config.json")
        return str(folder)
    if folder.exists():
        raise ModelError(f"model {path} is a file, but a folder or a Hugging Face name is needed")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        raise ModelError(f"model folder {path} does not exist")
    return path


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's configuration. Raises ``ModelError``."""
    from transformers import AutoConfig

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
    from transformers import AutoModelForCausalLM

    with _explained(path, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve(path),
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"model {path} lacks {len(missing)} weights of its configuration, e.g. {missing[0]}")
    return model.to(device or torch.device("cpu")).eval().requires_grad_(False)


def load_tokenizer(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises ``ModelError``."""
    from transformers import AutoTokenizer

    with _explained(path, "tokenizer"):
        return AutoTokenizer.from_pretrained(resolve(path), revision=revision, trust_remote_code=trust_remote_code)


class _explained:
    """Turn what transformers may raise on a bad folder or name into one sentence."""

    def __init__(self, path: str, what: str) -> None:
        self.path, self.what = path, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, OSError | ValueError | KeyError | RuntimeError | SafetensorError | TypeError):
            return
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= 300 else reason[:297] + "..."
        local = self.path == EMBEDDED or Path(self.path).expanduser().is_dir()
        where = "" if local else ", neither as a local folder nor from the Hugging Face hub"
        raise ModelError(f"the {self.what} of {self.path} cannot be loaded{where}: {reason}") from error
