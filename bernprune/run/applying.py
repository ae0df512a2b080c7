"""A plan on any copy of the model that it was made for, without a run."""

from pathlib import Path
from typing import Any

import torch

from bernprune.backends import find_device
from bernprune.config import RunConfig
from bernprune.errors import RunError
from bernprune.models.products import quick_products
from bernprune.models.slicing import check_plan, slice_model
from bernprune.models.view import count_parameters
from bernprune.run.opening import check_family, open_model, open_tokenizer
from bernprune.run.repairs import Workshop, repair_text
from bernprune.run.verification import save_and_verify
from bernprune.storage import check_writable, no_empty_folders, writing
from bernprune.units import KeepPlan


def apply_plan(config: RunConfig, plan: KeepPlan, out: str | Path) -> dict[str, Any]:
    """Slice any copy of a model by a plan, save it in the new folder ``out`` and verify it there.

    Before that it is repaired on ``config.data.text``, if ``config.repair`` says so.

    Raises:
        ModelError: a plan of another architecture.
        RunError: ``out`` exists or cannot be written.
        DataError: text that is missing, or too short for the repair.
        ConfigError: a repair with finalists to judge, of which there are none.
    """
    out = Path(out)
    check_writable(out)
    if out.exists():
        raise RunError(f"output {out} exists already; give a folder that does not")
    model_config, tokenizer = check_family(config), open_tokenizer(config)
    stream_N = None
    if config.repair.method != "none":
        stream_N = repair_text(config, tokenizer, model_config)  # before weights are read
    model = open_model(config, find_device(config.model.device))
    check_plan(model, plan)
    dense = count_parameters(model)
    workshop = None if stream_N is None else Workshop.of_model(config, model, stream_N)
    with quick_products(model.device, model.dtype):
        record = {"method": "none"} if workshop is None else workshop.repair(plan)
    sliced = slice_model(model, plan)
    counts = {"dense_parameters": dense, "pruned_parameters": count_parameters(sliced)}
    tokens_BT = torch.arange(min(64, sliced.config.max_position_embeddings))[None] % sliced.config.vocab_size
    with writing(out), no_empty_folders(out.parent):
        verified = save_and_verify(sliced, tokenizer, out, plan, tokens_BT)
    return {**counts, "repair": record, **verified}
