"""Everything a run works with, loaded and checked against each other before anything is written."""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from bernprune.backends import MaskedOps, find_device, load_backend
from bernprune.config import RunConfig
from bernprune.data import TokenWindows, evaluation_windows, fingerprint, tokenize
from bernprune.embedded import EMBEDDED
from bernprune.evaluation.perplexity import CHARACTERS_PER_TOKEN, Protocol, check_window
from bernprune.models.families import family_of
from bernprune.models.loading import load_config, load_model, load_tokenizer
from bernprune.models.view import ModelView, describe
from bernprune.policy.budget import Budget
from bernprune.policy.selection import Limits, select
from bernprune.text import load_documents

logger = logging.getLogger(__name__)

# With one source for both, the last tenth of its tokens is for evaluation alone.
_HELD_OUT_TENTHS = 1


@dataclass(frozen=True)
class Stage:
    """A model with its units, a budget, and text."""

    config: RunConfig
    view: ModelView
    tokenizer: Any
    ops: MaskedOps
    budget: Budget
    limits: Limits
    train: TokenWindows
    eval_windows_WT: torch.Tensor
    protocol: Protocol
    text_sha256: str


def set_stage(config: RunConfig) -> Stage:
    """Load and check everything that a run needs; nothing is written.

    Raises:
        BernpruneError: of the kind that says what does not exist, fit or suffice.
    """
    device = find_device(config.model.device)
    ops = load_backend(config.backend, device)
    check_family(config)
    tokenizer = load_tokenizer(
        config.model.path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
    )
    model = open_model(config, device)
    view = describe(model, config.granularity, sequence_length=config.budget.flops_window)
    budget = Budget(view.space, config.budget.sparsity, measure=config.budget.measure, pools=config.budget.pools)
    limits = Limits(config.budget.min_kv_groups, config.budget.min_channels, config.budget.channel_multiple)
    select(
        torch.full((view.space.size,), 0.5), budget, limits=limits
    )  # an impossible budget fails here, not at the end
    check_window(model.config, config.data.window)
    train, held_out, text_sha256, eval_name = _text(config, tokenizer, model.config.vocab_size)
    windows_WT = evaluation_windows(
        held_out, config.data.window, max_windows=max(1, config.data.eval_tokens // config.data.window)
    )
    logger.info(
        "%s on %s, %d units, %d training windows", config.model.path, device, view.space.size, train.num_windows
    )
    protocol = Protocol.of(eval_name, windows_WT)
    return Stage(config, view, tokenizer, ops, budget, limits, train, windows_WT, protocol, text_sha256)


def check_family(config: RunConfig) -> None:
    """Refuse an unknown model type before its weights are read."""
    model_config = load_config(
        config.model.path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
    )
    family_of(model_config.model_type)


def open_model(config: RunConfig, device: torch.device) -> Any:
    """A fresh copy of the dense model."""
    return load_model(
        config.model.path,
        dtype=config.model.dtype,
        device=device,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
    )


def _text(config: RunConfig, tokenizer: Any, vocab_size: int) -> tuple[TokenWindows, torch.Tensor, str, str]:
    """Windows to learn from, the stream to evaluate on, the digest of the former, the name of the latter."""
    data = config.data
    stream = _tokens(data.text, "train", data.max_characters, tokenizer, vocab_size)
    eval_characters = CHARACTERS_PER_TOKEN * data.eval_tokens
    if data.eval_text is not None:
        held_out, name = _tokens(data.eval_text, "held-out", eval_characters, tokenizer, vocab_size), data.eval_text
    elif data.text == EMBEDDED:
        held_out, name = _tokens(EMBEDDED, "held-out", eval_characters, tokenizer, vocab_size), "embedded, held out"
    else:
        cut = len(stream) * (10 - _HELD_OUT_TENTHS) // 10
        stream, held_out, name = stream[:cut], stream[cut:], f"{data.text}, last tenth"
    needed = max(config.search.windows, 1)
    train = TokenWindows(stream, window=data.window, seed=config.seed, at_least=needed)
    return train, held_out, fingerprint(stream), name


def _tokens(source: str, split: Any, max_characters: int, tokenizer: Any, vocab_size: int) -> torch.Tensor:
    documents = load_documents(source, split=split, max_characters=max_characters)
    return tokenize(tokenizer, documents, vocab_size=vocab_size)
