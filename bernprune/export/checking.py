"""A GGUF file as llama.cpp runs it, in a process of its own, beside the model that it was made of."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bernprune.errors import RunError

# Run by another interpreter: what fails in llama.cpp may end the process.
_RUN = """
import json
import sys
import llama_cpp
import numpy as np

path, exchange, text, verbose = sys.argv[1:]
tokens = json.load(open(exchange + "/tokens.json"))
cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
size = {"n_ctx": len(tokens), "n_batch": len(tokens)}
model = llama_cpp.Llama(path, **size, **cache, logits_all=True, verbose=bool(verbose))
model.eval(tokens)
np.save(exchange + "/logits.npy", model.scores[: len(tokens)])
json.dump(model.tokenize(text.encode()), open(exchange + "/read.json", "w"))
"""
# Words, numbers, spaces, lines and other scripts, which tokenizers split in ways of their own.
TEXT = "It's 1024 words,\n\n    and   some\tmore: naïve façade, привет, 你好! (x_1 == 3.14) they'll go\r\nHOME again..."
_TOLERANCE = 0.05  # of the root mean square of logits; half precision makes about a hundredth


def check_gguf(path: Path, model: Any, tokenizer: Any, tokens_T: torch.Tensor) -> dict[str, Any]:
    """Compare logits on some tokens, and the tokens of a text; empty where llama-cpp-python is not installed.

    Returns:
        ``max_logit_difference``, ``relative_error`` of all logits, and ``same_choice``, the share of positions at which
        the most likely token is the same.

    Raises:
        RunError: llama.cpp does not load the file, or gives other logits or tokens.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return {}
    with torch.no_grad():
        ours_TV = model(input_ids=tokens_T[None].to(model.device)).logits[0].float().cpu().numpy()
    with tempfile.TemporaryDirectory(prefix="bernprune-gguf-") as exchange:
        Path(exchange, "tokens.json").write_text(json.dumps(tokens_T.tolist()))
        if _run(path, exchange, verbose=False).returncode:
            done = _run(path, exchange, verbose=True)  # which costs another failure, and says why
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["it gives no reason"]
            raise RunError(f"llama.cpp cannot run what was made of the model: {lines[0].strip()}")
        theirs_TV = np.load(Path(exchange, "logits.npy"))
        read = json.loads(Path(exchange, "read.json").read_text())
    error = float(np.sqrt(np.square(theirs_TV - ours_TV).mean() / np.square(ours_TV).mean()))
    if not error <= _TOLERANCE:
        raise RunError(f"llama.cpp gives other logits than the model: their relative error is {error:.3g}")
    if read != tokenizer(TEXT)["input_ids"]:
        raise RunError(
            "llama.cpp reads other tokens from a text than the model's tokenizer does; copy the vocabulary of a GGUF "
            "file that was made of the dense model (--vocabulary), or of another one"
        )
    return {
        "max_logit_difference": float(np.abs(theirs_TV - ours_TV).max()),
        "relative_error": error,
        "same_choice": float((theirs_TV.argmax(1) == ours_TV.argmax(1)).mean()),
    }


def _run(path: Path, exchange: str, *, verbose: bool) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", _RUN, str(path.resolve()), exchange, TEXT, "verbose" if verbose else ""]
    return subprocess.run(command, cwd=exchange, capture_output=True, text=True, check=False)
