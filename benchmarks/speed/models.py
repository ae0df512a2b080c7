"""Models of known shapes with random weights, or a folder; units, text and masks for them.

Letters: B windows, T tokens, K masks, C chunks, U units.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bernprune.models.loading import load_model
from bernprune.models.view import ModelView, describe

STORIES = Path(__file__).parents[3] / "shared/models/stories260K"
_LLAMA_2 = {"vocab_size": 32_000, "max_position_embeddings": 4096}
_SMALL = {
    "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}  # fmt: skip
# By the names that users know them by: family and what its configuration says of sizes.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-25m": (
        "llama",
        {
            **_SMALL, "vocab_size": 8192, "num_hidden_layers": 7,
        },
    ),
    "llama-25m-32k": (
        "llama",
        {
            **_SMALL, "vocab_size": 32_000, "num_hidden_layers": 3,
        },
    ),
    "llama2-7b": (
        "llama",
        {
            **_LLAMA_2, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32,
        },
    ),
    "llama2-13b": (
        "llama",
        {
            **_LLAMA_2, "hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40,
            "num_attention_heads": 40, "num_key_value_heads": 40,
        },
    ),
    "llama3-8b": (
        "llama",
        {
            "vocab_size": 128_256, "max_position_embeddings": 8192, "hidden_size": 4096, "intermediate_size": 14_336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        },
    ),
    "qwen3-8b": (
        "qwen3",
        {
            "vocab_size": 151_936, "max_position_embeddings": 32_768, "hidden_size": 4096, "intermediate_size": 12_288,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        },
    ),
}  # fmt: skip
NAMES = ["stories260K", *SHAPES]
SMALL = NAMES[:3]  # enough for a processor


def missing(name: str) -> str:
    """Why a model cannot be had here, or nothing."""
    return f"{STORIES} does not exist" if name == "stories260K" and not STORIES.is_dir() else ""


def build(name: str, dtype: torch.dtype, device: torch.device, *, layers: int | None = None) -> ModelView:
    """The model with its units; ``layers`` makes it shorter. Random weights are the same in every run."""
    if name == "stories260K":
        return describe(load_model(str(STORIES), dtype=str(dtype).removeprefix("torch."), device=device))
    family, sizes = SHAPES[name]
    config = AutoConfig.for_model(family, **sizes, use_cache=False)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return describe(model.eval().requires_grad_(False))


def text(view: ModelView, windows: int, window: int) -> torch.Tensor:
    """Random tokens, ``[B, T]``."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(view.model.config.vocab_size, (windows, window), generator=generator)


def masks(view: ModelView, density: float, shape: tuple[int, ...]) -> torch.Tensor:
    """Random masks, bool ``[*shape, U]``, that each keep a share of the units of every kind in every layer.

    Those that keep all lack a channel of the first layer each, a different one: what is the same is computed once.
    """
    generator, parts = torch.Generator().manual_seed(2), []
    for group in view.space.groups:
        places = torch.rand(*shape, group.count, generator=generator).argsort(-1).argsort(-1)
        parts.append(places < max(1, round(density * group.count)))
    found = torch.cat(parts, dim=-1)
    if density == 1:
        masks_KU = found.view(-1, view.space.size)
        channels = view.space.span("channel", 0)
        numbers = torch.arange(len(masks_KU))
        masks_KU[numbers, channels.start + numbers % (channels.stop - channels.start)] = False
    return found
