"""What a run left, in another format."""

from pathlib import Path
from typing import Any

import torch

from bernprune.errors import ConfigError, RunError
from bernprune.export.checking import check_gguf
from bernprune.export.gguf import DTYPES, context_length, import_gguf, write_gguf
from bernprune.export.vocabulary import vocabulary_from, vocabulary_of
from bernprune.models.loading import load_model, load_tokenizer
from bernprune.models.view import count_parameters
from bernprune.names import unknown
from bernprune.run.folder import CONFIG, MODEL, RECOVERY_CONFIG, REPORT
from bernprune.storage import check_writable, no_empty_folders, writing, written_file

SUFFIX = ".gguf"
_CHECKED_TOKENS = 64
_WIDENED = 2e9  # a model of so many parameters at most is checked in float32, whose rounding hides nothing


def export_gguf(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    vocabulary: str | Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a pruned model as a GGUF file, and check it with llama.cpp if llama-cpp-python is installed.

    Args:
        source: the folder of a finished run or recovery, or of a model that bernprune saved.
        dtype: number format of the matrices: the model's own (``auto``), ``float32``, ``float16`` or ``bfloat16``.
        vocabulary: a GGUF file, of the dense model, whose vocabulary to copy rather than to write the tokenizer's.
        trust_remote_code: let a tokenizer run code of its own that came with the model.

    Raises:
        ConfigError: an unknown ``dtype``.
        ModelError: a model or tokenizer that llama.cpp does not know, with the reason.
        RunError: the run is not finished, ``out`` exists or cannot be written, gguf is not installed, or llama.cpp
            runs the file otherwise.
    """
    if dtype not in DTYPES:
        raise ConfigError(unknown("dtype", dtype, DTYPES))
    gguf, source, out = import_gguf(), Path(source), Path(out)
    if out.suffix != SUFFIX:
        raise RunError(f"the name of a GGUF file must end in {SUFFIX}, but is {str(out)!r}")
    if out.exists():
        raise RunError(f"output {out} exists already; give a file that does not")
    check_writable(out.parent)
    is_run = any((source / name).exists() for name in (CONFIG, RECOVERY_CONFIG, MODEL))
    if is_run and not (source / REPORT).is_file():
        raise RunError(f"the run in {source} is not finished: no model of it was verified")
    folder = str(source / MODEL if is_run else source)
    model, tokenizer = load_model(folder), load_tokenizer(folder, trust_remote_code=trust_remote_code)
    words = vocabulary_of(tokenizer) if vocabulary is None else vocabulary_from(Path(vocabulary), gguf)
    tokens_T = torch.arange(min(_CHECKED_TOKENS, context_length(model.config))) % model.config.vocab_size
    with writing(out), no_empty_folders(out.parent), written_file(_made(out)) as temporary:
        architecture = write_gguf(model, words, temporary, dtype=dtype)
        if model.num_parameters() <= _WIDENED:
            model = model.float()
        checked = check_gguf(temporary, model, tokenizer, tokens_T)
    return {
        "architecture": architecture,
        "parameters": count_parameters(model),
        "bytes": out.stat().st_size,
        "checked": checked,
    }


def _made(path: Path) -> Path:
    """The path, with all folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
