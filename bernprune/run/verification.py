"""A saved model is the one in memory: it is loaded in a clean process, and their logits are compared."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from bernprune.errors import LossError, RunError
from bernprune.evaluation.perplexity import advice_on, first_not_finite
from bernprune.models.products import plain_products
from bernprune.models.saving import verify_saved, write_pruned, written_whole
from bernprune.storage import reason
from bernprune.units import KeepPlan

# Largest difference of a logit between the model in memory and the saved folder, as a share of the largest logit, by
# number format; for the short ones two roundings or so.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}

_WINDOWS, _TOKENS = 2, 256  # of 128,000 words in 16 bits their logits take 131 MB


@torch.inference_mode()
@plain_products()
def save_and_verify(
    model: Any, tokenizer: Any, target: Path, plan: KeepPlan, tokens_BT: torch.Tensor
) -> dict[str, float]:
    """Save, load in a clean process, compare; only then does the new folder ``target`` have its name.

    The model is used up: its weights are let go before another process takes as much memory.

    Args:
        tokens_BT: what both read, as far as a few windows of it.

    Raises:
        LossError: the model's outputs are not finite; before it is saved.
        RunError: there is such a folder, or outputs differ by more than the tolerance; nothing is left then.
    """
    tokens_BT = tokens_BT[:_WINDOWS, :_TOKENS]
    with _full_precision():
        logits = model(input_ids=tokens_BT.to(model.device)).logits.cpu()
    if not logits.isfinite().all():
        first = first_not_finite(model, tokens_BT.to(model.device))
        raise LossError(f"the pruned model's outputs are not finite{first}{advice_on(model.dtype)}")
    tolerance, device = TOLERANCE[model.dtype] * logits.abs().max().item(), model.device
    with written_whole(target) as folder:
        write_pruned(model, tokenizer, folder, plan=plan)
        model.to("meta")
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            difference = verify_saved(folder, tokens_BT, logits, device=str(device))
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"the model saved for {target} could not be verified, which takes a process of its own and room for "
                f"temporary files: {reason(error)}"
            ) from error
        if math.isinf(difference) or difference > tolerance:
            raise RunError(
                f"the model saved for {target} is not the one in memory: its logits differ by {difference:.3g}, more "
                f"than the {tolerance:g} allowed for {model.dtype}"
            )
    return {"max_logit_difference": difference, "tolerance": tolerance}


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply float32 in float32 within the block, as in a clean process, whatever is set here for all devices."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for each kind of device by itself
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
