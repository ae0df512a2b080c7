"""A pruned model on disk: written whole or not at all, and checked the way a stranger would load it.

The folder is an ordinary Hugging Face one. ``AutoModelForCausalLM.from_pretrained`` loads it with
``trust_remote_code=True`` anywhere, and without where bernprune is imported, so there is no loader of our own.
"""

import fcntl
import glob
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from bernprune.errors import ModelError, RunError
from bernprune.models import modeling_bernprune
from bernprune.models.slicing import plan_hash
from bernprune.storage import sync, write_json
from bernprune.units import KeepPlan

logger = logging.getLogger(__name__)

# Run by a clean interpreter. Its last line makes sure that the folder, and not an installed bernprune, did the work.
CLEAN_LOAD = """
import os
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, exchange, dtype, device = sys.argv[1:]
tokens = load_file(exchange + "/tokens.safetensors")["tokens"].to(device)
dtype = getattr(torch, dtype)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).to(device).eval()
with torch.no_grad():
    logits = model(input_ids=tokens).logits
save_file({"logits": logits.cpu().contiguous()}, exchange + "/logits.safetensors")
if os.path.exists(folder + "/tokenizer_config.json"):
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
if "bernprune" in sys.modules:
    raise ImportError("the saved folder imports bernprune")
"""


def save_pruned(model: PreTrainedModel, tokenizer: Any, folder: str | Path, *, plan: KeepPlan) -> Path:
    """Write a sliced model to a new ``folder`` and return its path; what it holds, ``write_pruned`` tells.

    Raises:
        ModelError: the model was not sliced by ``slice_model``, or by another plan.
        RunError: the folder exists already or cannot be written; nothing of it is left then.
    """
    with written_whole(Path(folder)) as temporary:
        write_pruned(model, tokenizer, temporary, plan=plan)
    return Path(folder)


def write_pruned(model: PreTrainedModel, tokenizer: Any, folder: Path, *, plan: KeepPlan) -> None:
    """Write a sliced model into a folder that is there.

    It gets the config (native ``per_layer_config``, ``auto_map``, and a ``bernprune`` block with format version,
    plan hash and base model), safetensors weights, generation config, the bundled modelling file, and the files of
    ``tokenizer`` unless that is None.

    Raises:
        ModelError: the model was not sliced by ``slice_model``, or by another plan.
        RunError: the tokenizer cannot be written.
        OSError, SafetensorError, ValueError: something else cannot be; ``written_whole`` explains them.
    """
    _check_provenance(model, plan)
    with _generation_config_apart(model, folder):
        model.save_pretrained(folder)
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)
    source = Path(modeling_bernprune.__file__)
    shutil.copyfile(source, folder / source.name)
    for weights in folder.glob("*.safetensors"):  # written for their owner alone, which a server often is not
        shutil.copymode(folder / "config.json", weights)


def verify_saved(folder: str | Path, tokens_BT: torch.Tensor, logits: torch.Tensor, *, device: str = "cpu") -> float:
    """Load ``folder`` as a user without bernprune would, and return the largest absolute difference of its logits.

    A clean interpreter (off-line, with its own cache of remote code) loads the folder in the dtype of
    ``logits`` on ``device`` and runs ``tokens_BT`` (int64 ``[B, T]``). The result is compared in float32 with
    ``logits`` ``[B, T, V]``, those of the model in memory on the same tokens. Infinity if a logit is not finite on
    one side.

    Raises:
        RunError: the folder does not load there, or gives logits of another shape; with the last line of its error.
    """
    with tempfile.TemporaryDirectory(prefix="bernprune-verify-") as exchange:
        save_file({"tokens": tokens_BT.detach().cpu().contiguous()}, Path(exchange, "tokens.safetensors"))
        dtype = str(logits.dtype).removeprefix("torch.")
        _run_clean(Path(folder).resolve(), exchange, dtype, device)
        loaded = load_file(Path(exchange, "logits.safetensors"))["logits"]
    if loaded.shape != logits.shape:
        raise RunError(
            f"the saved model gives logits of shape {tuple(loaded.shape)}, the one in memory {tuple(logits.shape)}"
        )
    difference = (loaded.float() - logits.detach().cpu().float()).abs()
    return float(difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max())


def _check_provenance(model: PreTrainedModel, plan: KeepPlan) -> None:
    block = getattr(model.config, "bernprune", None)
    if block is None:
        raise ModelError(f"a {type(model).__name__} was not sliced by bernprune; call slice_model before saving")
    if block["plan_hash"] != plan_hash(plan):
        raise ModelError(f"the model was sliced by plan {block['plan_hash']}, but plan {plan_hash(plan)} was given")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that is synced and takes its name at the end, or vanishes if anything fails on the
    way, so that the target is complete or absent; what processes left that were killed on the way goes, too. Raises
    ``RunError`` if it exists already or cannot be written."""
    if target.exists() or target.is_symlink():
        raise _taken(target)
    # Not tempfile's: its folder would be readable by its owner alone, and keep that when renamed.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        for left in target.parent.glob(f"{glob.escape(f'.{target.name}.')}????????.part"):
            with suppress(OSError), _at_work(left):
                shutil.rmtree(left)
        temporary.mkdir(parents=True)
        with _at_work(temporary):
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            if target.exists():  # by now
                raise _taken(target)
            temporary.rename(target)
        sync(target.parent)
    # Full disks reach us as SafetensorError, generation settings that contradict each other as ValueError.
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"could not save to {target}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _at_work(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, as long as it lives. Raises ``OSError`` if another one does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _generation_config_apart(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """Save the generation config as it was loaded, after what is saved in the block.

    Some of transformers' versions that we allow refuse to write what they read with a warning, such as a temperature
    without sampling, which many models come with.
    """
    settings: Any = model.generation_config
    if settings is None:
        yield
        return
    model.generation_config = type(settings)()
    try:
        yield
    finally:
        model.generation_config = settings
    settings.to_json_file(folder / "generation_config.json")


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
        _settle_tokenizer(tokenizer, folder)
    except Exception as error:  # tokenizers raises plain ones, also for a full disk
        raise RunError(f"could not save the tokenizer: {error}") from error


def _settle_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Let the saved tokenizer give the tokens that the one in memory does, and name no code that was not run."""
    path = folder / "tokenizer_config.json"
    if not path.is_file() or type(tokenizer).__module__.startswith("transformers_modules"):  # code of the model's own
        return
    stated = json.loads(path.read_text(encoding="utf-8"))
    if stated.pop("auto_map", None) is not None:
        write_json(path, stated)
    if _tokens_of(AutoTokenizer.from_pretrained(folder)) == _tokens_of(tokenizer):
        return
    write_json(path, stated | {"tokenizer_class": "PreTrainedTokenizerFast"})  # which takes tokenizer.json as it is
    if _tokens_of(AutoTokenizer.from_pretrained(folder)) != _tokens_of(tokenizer):
        logger.warning("the tokenizer in %s gives other tokens than the dense model's", folder)


def _tokens_of(tokenizer: Any) -> tuple[list[int], str]:
    """Of a text with spaces and special tokens, which some classes set up in their own way as they are loaded."""
    ids = tokenizer("".join(f"{token}a b,  it's 12" for token in ("", *tokenizer.all_special_tokens)))["input_ids"]
    return ids, tokenizer.decode(ids)


def _taken(target: Path) -> RunError:
    return RunError(f"{target} exists already; give a folder that does not")


def _run_clean(folder: Path, exchange: str, dtype: str, device: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(exchange, "modules"))}
    command = [sys.executable, "-P", "-c", CLEAN_LOAD, str(folder), exchange, dtype, device]
    done = subprocess.run(command, cwd=exchange, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RunError(f"the saved model does not load in a clean process: {lines[-1]}")
