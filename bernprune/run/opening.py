"""The model and tokenizer that a configuration names, opened or refused in one sentence."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from bernprune.backends import has_bfloat16_units
from bernprune.config import RunConfig
from bernprune.errors import ModelError
from bernprune.models.families import family_of
from bernprune.models.loading import load_config, load_model, load_tokenizer, stated_type
from bernprune.models.shortening import int8_quantiser, shorten, stored_bytes
from bernprune.models.view import ModelView, describe, weights_fingerprint
from bernprune.names import SearchDtype

logger = logging.getLogger(__name__)

_LARGE = 10_000_000  # prunable parameters
_SPARE_BYTES = 2 * 2**30  # of a GPU's memory, for activations and logits


def check_family(config: RunConfig) -> Any:
    """The model's configuration. Refuses an unknown model type, and quantised weights, before weights are read."""
    family_of(stated_type(config.model.path, revision=config.model.revision))
    found: Any = load_config(
        config.model.path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
    )
    if getattr(found, "quantization_config", None):
        raise ModelError(
            f"the weights of {config.model.path} are saved quantised, of which rows and columns cannot be taken; give "
            "the original, which search.dtype=int8 searches quantised"
        )
    return found


def open_tokenizer(config: RunConfig) -> Any:
    """The model's tokenizer."""
    return load_tokenizer(
        config.model.path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
    )


def open_model(config: RunConfig, device: torch.device) -> Any:
    """A fresh copy of the dense model. Raises ``ModelError`` also if the GPU's memory is full."""
    with _room_for(config, device):
        return load_model(
            config.model.path,
            dtype=config.model.dtype,
            device=device,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )


@contextmanager
def _room_for(config: RunConfig, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the memory of {device} is full before {config.model.path} is loaded; another model.device, or a shorter "
            "model.dtype, may do"
        ) from error


class Opened(NamedTuple):
    """A model with its units, the number format of its weights, and that of the model itself; and the fingerprint of
    the model itself, if its weights are in another."""

    view: ModelView
    dtype: SearchDtype
    full: torch.dtype
    own_weights: str | None


def open_view(config: RunConfig, device: torch.device, dtype: SearchDtype, *, anywhere: bool = False) -> Opened:
    """The model on the device with its weights in a number format; ``Opened.dtype`` says what ``auto`` resolved to.

    To be shortened they are loaded on the processor, where there must be room for the model itself.

    Args:
        anywhere: leave it on the processor if it does not fit on the device.

    Raises:
        ModelError: as ``open_model``, or the weights cannot have this format.
    """
    if dtype == "int8":
        int8_quantiser()  # whether there is one, before weights are read
    direct = not anywhere and dtype in ("auto", "same")
    model = open_model(config, device if direct else torch.device("cpu"))
    view, full = _describe(config, model), model.dtype
    chosen = _chosen_dtype(config, view) if dtype == "auto" else dtype
    if chosen == str(full).removeprefix("torch."):
        chosen = "same"
    own_weights = None
    if chosen in ("bfloat16", "int8"):
        own_weights = weights_fingerprint(model)
        shorten(model, chosen)
        view = _describe(config, model)
    if not anywhere:
        with _room_for(config, device):
            model.to(device)
    elif _fits(model, device):
        try:
            model.to(device)
        except torch.OutOfMemoryError:
            model.to("cpu")
            _warn_of_processor(model, device)
    return Opened(view, chosen, full, own_weights)


def _describe(config: RunConfig, model: Any) -> ModelView:
    return describe(model, config.granularity, sequence_length=config.budget.flops_window)


def _chosen_dtype(config: RunConfig, view: ModelView) -> SearchDtype:
    model = view.model
    pays = model.device.type == "cpu" and model.dtype == torch.float32 and is_large(view) and has_bfloat16_units()
    return "bfloat16" if pays and config.model.dtype == "auto" else "same"


def _fits(model: Any, device: torch.device) -> bool:
    """Whether a GPU has room for the model and its activations; logs if not."""
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    fits: bool = torch.cuda.mem_get_info(device)[0] >= stored_bytes(model) + _SPARE_BYTES
    if not fits:
        _warn_of_processor(model, device)
    return fits


def _warn_of_processor(model: Any, device: torch.device) -> None:
    logger.warning("%s has no room for the model in %s: it stays on the processor", device, model.dtype)


def is_large(view: ModelView) -> bool:
    """Whether the model is so large that costs are worth measuring, and a shorter number format pays."""
    return view.space.costs_U().sum().item() >= _LARGE
