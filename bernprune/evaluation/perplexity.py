"""Perplexity with its protocol: two figures compare only if their protocols are equal."""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bernprune.backends import find_device
from bernprune.data import evaluation_windows, text_fingerprint, tokenize
from bernprune.errors import ConfigError, LossError, ModelError
from bernprune.models.hooks import hooked
from bernprune.models.loading import load_config, load_model, load_tokenizer
from bernprune.models.products import quick_products
from bernprune.models.view import count_parameters
from bernprune.progress import followed
from bernprune.sections import DataConfig, ModelConfig
from bernprune.text import load_documents

_LARGEST_LOSS = math.log(sys.float_info.max) * (1 - 1e-15)
_LOGIT_BYTES = 256 * 2**20  # most float32 logits at once; logits of one window are always made at once, in its dtype
CHARACTERS_PER_TOKEN = 10  # more than tokenizers reach: enough text, and no more of a huge file is read
_WINDOW: int = DataConfig.model_fields["window"].default


@dataclass(frozen=True)
class Protocol:
    """How a perplexity was taken: disjoint windows in order, each read without its past, mean over all predicted
    tokens. ``tokens`` counts predictions: ``window`` - 1 a window."""

    text: str
    text_sha256: str
    window: int
    windows: int
    tokens: int

    @classmethod
    def of(cls, text: str, windows_WT: torch.Tensor) -> "Protocol":
        count, window = windows_WT.shape
        return cls(text, text_fingerprint(windows_WT.flatten()), window, count, count * (window - 1))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def mean_loss(model: Any, windows_WT: torch.Tensor) -> float:
    """Mean next-token cross-entropy over all windows, nats per token.

    Raises:
        ModelError: windows longer than the model's positions.
        LossError: the loss is not finite, with the first module that gives such numbers.
    """
    check_window(model.config, windows_WT.shape[1])
    device, (count, window) = model.device, windows_WT.shape
    most = max(1, _LOGIT_BYTES // (4 * model.get_output_embeddings().weight.shape[0]))  # tokens
    rows = max(1, most // window)
    total = 0.0
    for tokens_RT in followed(windows_WT.split(rows), "evaluation", unit="pass"):
        tokens_RT = tokens_RT.to(device)
        logits_NV = model(input_ids=tokens_RT, use_cache=False).logits[:, :-1].flatten(0, 1)
        parts = zip(logits_NV.split(most), tokens_RT[:, 1:].flatten().split(most), strict=True)
        total += sum(_summed(logits_PV, targets_P).item() for logits_PV, targets_P in parts)
        if not math.isfinite(total):
            raise LossError(
                f"the loss on the evaluation text is {total}; the model's outputs are not finite"
                f"{first_not_finite(model, tokens_RT)}{advice_on(model.dtype)}"
            )
    return total / (count * (window - 1))


def first_not_finite(model: Any, tokens_RT: torch.Tensor) -> str:
    """The first module without parts whose outputs are not finite, as the end of a sentence; empty if there is none."""
    found: list[torch.nn.Module] = []

    def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point() and not output.isfinite().all():
            found.append(module)

    names = {module: name for name, module in model.named_modules() if not any(module.children())}
    with hooked(*((module, look) for module in names)):
        model(input_ids=tokens_RT, use_cache=False)
    return f", first those of {names[found[0]]}" if found else ""


def _summed(logits_PV: torch.Tensor, targets_P: torch.Tensor) -> torch.Tensor:
    """The summed losses of predictions, at least in float32."""
    return F.cross_entropy(
        logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32)), targets_P, reduction="sum"
    )


def advice_on(dtype: torch.dtype) -> str:
    """What to do about outputs that are not finite, as the end of a sentence."""
    return "; with model.dtype=bfloat16 or float32 they may be" if dtype == torch.float16 else ""


def perplexity(loss: float) -> float:
    """The exponential of a loss; for one beyond 709 nats, the largest number that JSON can hold."""
    return math.exp(min(loss, _LARGEST_LOSS))


def check_window(config: Any, window: int) -> None:
    """Raises ``ModelError`` if the window is longer than the positions the model was made for."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and window > positions:
        raise ModelError(f"a window of {window} tokens is longer than the model's {positions} positions")


def evaluate(
    model: str | Path | ModelConfig,
    text: str | Path,
    *,
    window: int = _WINDOW,
    max_tokens: int | None = None,
    joined_by: str | None = None,
) -> dict[str, Any]:
    """Load a dense or pruned model and measure its perplexity on a text.

    Args:
        model: a local folder, a Hugging Face name, or ``embedded``; or settings, where its number format or device
            matters.
        text: a file, a dataset folder or name, or ``embedded``.
        window: tokens of a window, by default those of a run.
        max_tokens: the text is cut to so many, as by ``data.eval_tokens``; by default it is read to its end.
        joined_by: makes one document of all rows of the text, as ``data.eval_join`` does.

    Returns ``perplexity``, ``loss`` (nats per token), ``parameters`` and ``protocol``.
    """
    if not isinstance(model, ModelConfig):
        model = ModelConfig(path=str(model))
    device = find_device(model.device)
    options: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    config, tokenizer = load_config(model.path, **options), load_tokenizer(model.path, **options)
    check_window(config, window)
    if window < 2:
        raise ConfigError(f"a window needs 2 tokens or more, of which the last is predicted, but was given {window}")
    if max_tokens is not None and max_tokens < window:
        raise ConfigError(f"at least a window of {window} tokens must be evaluated, but {max_tokens} were asked for")
    characters = None if max_tokens is None else CHARACTERS_PER_TOKEN * max_tokens
    text = str(text)
    documents = load_documents(text, split="held-out", max_characters=characters, joined_by=joined_by)
    stream_N = tokenize(tokenizer, documents, vocab_size=config.vocab_size)
    windows_WT = evaluation_windows(stream_N, window, max_windows=None if max_tokens is None else max_tokens // window)
    loaded = load_model(model.path, dtype=model.dtype, device=device, **options)
    with quick_products(device, loaded.dtype):
        loss = mean_loss(loaded, windows_WT)
    return {
        "perplexity": perplexity(loss),
        "loss": loss,
        "parameters": count_parameters(loaded),
        "protocol": Protocol.of(text, windows_WT).to_dict(),
    }
