"""A saved model is the one in memory: it is loaded in a clean process, and their logits are compared."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from bernprune.errors import LossError, RunError
from bernprune.evaluation.perplexity import advice_on
from bernprune.models.saving import save_pruned, verify_saved
from bernprune.units import KeepPlan

# Largest difference of a logit between the model in memory and the saved folder, as a share of the largest logit, by
# number format; for the short ones two roundings or so.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def reason(error: OSError | SafetensorError) -> str:
    """The reason of a failure to write, in a few words."""
    return getattr(error, "strerror", None) or str(error)


@torch.inference_mode()
def save_and_verify(
    model: Any, tokenizer: Any, target: Path, plan: KeepPlan, tokens_BT: torch.Tensor
) -> dict[str, float]:
    """Save in the new folder ``target``, load in a clean process, compare. On an error nothing of it is left.

    Raises:
        LossError: the model's outputs are not finite; before it is saved.
        RunError: there is such a folder, or outputs differ by more than the tolerance.
    """
    with _full_precision():
        logits = model(input_ids=tokens_BT.to(model.device)).logits.cpu()
    if not logits.isfinite().all():
        raise LossError(f"the pruned model's outputs are not finite{advice_on(model.dtype)}")
    save_pruned(model, tokenizer, target, plan=plan)
    try:
        return _verified(model, target, tokens_BT, logits)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _verified(model: Any, target: Path, tokens_BT: torch.Tensor, logits: torch.Tensor) -> dict[str, float]:
    device = model.device
    tolerance = TOLERANCE[model.dtype] * logits.abs().max().item()
    if device.type == "cuda":  # the other process needs room for its own copy
        model.to("cpu")
        torch.cuda.empty_cache()
    try:
        difference = verify_saved(target, tokens_BT, logits, device=str(device))
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"the model saved in {target} could not be verified, which takes a process of its own and room for "
            f"temporary files: {reason(error)}"
        ) from error
    if math.isinf(difference) or difference > tolerance:
        raise RunError(
            f"the model saved in {target} is not the one in memory: its logits differ by {difference:.3g}, more than "
            f"the {tolerance:g} allowed for {model.dtype}"
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
