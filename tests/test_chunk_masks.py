"""Masks of chunks: a chunk runs as if the model had changed in mid-sentence, with all that it had read in its cache."""

import pytest
import torch
import torch.nn.functional as F
from test_objective import OPS, all_objectives, log_probs, losses_of, random_masks
from tiny_models import VARIANTS, Variant, random_tokens, tiny_model
from tolerances import EXACT, LOGITS, assert_close

from bernprune.errors import ConfigError
from bernprune.models.masking import masked
from bernprune.models.view import ModelView, describe
from bernprune.names import Kind, ObjectiveName
from bernprune.objective import masked_objective
from bernprune.units import KINDS


def token_losses_of(
    view: ModelView, masks_BKCU: torch.Tensor, tokens_BT: torch.Tensor, kind: ObjectiveName = "cross-entropy"
) -> torch.Tensor:
    with masked_objective(view, OPS, kind=kind, rows_per_forward=3) as objective:
        return objective.token_losses(masks_BKCU, tokens_BT)


def chunk_masks(view: ModelView, windows: int, masks: int, chunks: int) -> torch.Tensor:
    return random_masks(view, windows * masks * chunks).view(windows, masks, chunks, -1)


@torch.no_grad()
def read_in_turn(view: ModelView, masks_CU: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
    """Log probabilities ``[T, V]`` of a model that reads chunk after chunk, each under one mask, from its cache."""
    cache, parts = None, []
    with masked(view, OPS) as live:
        for mask_U, chunk in zip(masks_CU, tokens_T.chunk(len(masks_CU)), strict=True):
            live.set(mask_U[None])
            output = view.model(input_ids=chunk[None], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits[0].double().log_softmax(-1))
    return torch.cat(parts)


@all_objectives
@pytest.mark.parametrize("granularity", [("kv_group", "channel"), KINDS], ids=["finest", "all"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_chunk_continues_from_the_cache(variant: Variant, granularity: tuple[Kind, ...], kind: ObjectiveName) -> None:
    """Every position's loss is that of reading the window in turn, its chunks under their masks."""
    view, tokens_BT = describe(variant.model(), granularity), random_tokens(2, 12)
    masks_BKCU = chunk_masks(view, 2, 2, 3)
    expected = torch.zeros(2, 2, 12, dtype=torch.float64)
    for b, tokens_T in enumerate(tokens_BT):
        ours = log_probs(view.model, tokens_T[None])[0]
        for k in range(2):
            theirs = read_in_turn(view, masks_BKCU[b, k], tokens_T)
            if kind == "kl":
                expected[b, k] = (ours.exp() * (ours - theirs)).sum(-1)
            else:
                expected[b, k, :-1] = F.nll_loss(theirs[:-1], tokens_T[1:], reduction="none")
    assert_close(token_losses_of(view, masks_BKCU, tokens_BT, kind), expected, LOGITS[torch.float64])


@all_objectives
def test_one_chunk_is_a_mask_of_the_whole_window(kind: ObjectiveName) -> None:
    """Summed over positions, the losses of a mask are its mean loss times the predictions."""
    view, tokens_BT = describe(tiny_model("qwen3")), random_tokens(3, 9)
    masks_KU = random_masks(view, 2)
    losses_BKT = token_losses_of(view, masks_KU[None, :, None].expand(3, -1, -1, -1), tokens_BT, kind)
    predictions = 9 if kind == "kl" else 8
    assert_close(losses_BKT.sum((0, 2)) / (3 * predictions), losses_of(view, masks_KU, tokens_BT, kind), EXACT)


@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_equal_masks_make_one(chunks: int) -> None:
    """A window cut into chunks under the same mask is a window."""
    view, tokens_BT = describe(tiny_model("llama")), random_tokens(2, 8)
    masks_BKCU = chunk_masks(view, 2, 3, 1)
    whole = token_losses_of(view, masks_BKCU, tokens_BT)
    assert_close(token_losses_of(view, masks_BKCU.expand(-1, -1, chunks, -1), tokens_BT), whole, EXACT)


@pytest.mark.parametrize("spoil", ["chunks", "windows", "units", "none", "flat"])
def test_chunks_that_do_not_fit_are_refused(spoil: str) -> None:
    """With what is needed and what was given."""
    view, tokens_BT = describe(tiny_model("llama")), random_tokens(2, 8)
    masks_BKCU = chunk_masks(view, 2, 2, 2)
    bad = {
        "chunks": masks_BKCU.repeat(1, 1, 3, 1)[:, :, :3],
        "windows": masks_BKCU[:1],
        "units": masks_BKCU[..., 1:],
        "none": masks_BKCU[:, :0],
        "flat": masks_BKCU[:, 0],
    }
    assert token_losses_of(view, masks_BKCU, tokens_BT).isfinite().all()
    with pytest.raises(ConfigError, match="do not divide a window of 8" if spoil == "chunks" else "must be"):
        token_losses_of(view, bad[spoil], tokens_BT)
