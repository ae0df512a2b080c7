"""Tiny random models of every family, made in memory, with every size odd enough for a mix-up to show.

``hidden_size`` is not heads times head size; biases are not zero and norm weights not one, so
that a parameter sliced wrongly, forgotten or left out changes the logits.
"""

import random
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bernprune.units import Architecture, KeepPlan, LayerPlan

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 36,  # Llama demands a multiple of every head count below
    "head_dim": 8,
    "intermediate_size": 19,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Shorter than the tests' sequences, so that the window matters; Qwen's is off unless a variant turns it on.
SLIDING_WINDOW = 7
HEADS = {
    "multi_head": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "multi_query": {"num_attention_heads": 3, "num_key_value_heads": 1},
}
SLIDING_LAYERS = {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW, "max_window_layers": 2}


def tiny_config(family: str, **changes: Any) -> Any:
    """Config of a 4-layer model of ``family``; ``changes`` replace its fields."""
    own = {"sliding_window": SLIDING_WINDOW} if family == "mistral" else {}
    return FAMILIES[family][0](**(SIZES | own | changes))


def tiny_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A random causal language model in evaluation mode; equal arguments give equal weights."""
    config = tiny_config(family, **changes)
    with torch.random.fork_rng(devices=[]):  # the constructor draws from torch's global generator
        model = FAMILIES[family][1](config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        # Buffers keep their precision, as when loaded: Module.to would round the rotary frequencies.
        parameter.data = (1 + 0.3 * noise if name.endswith("norm.weight") else 0.3 * noise).to(dtype)
    return model.eval()


@dataclass(frozen=True)
class Variant:
    """One tiny model by name: a family and changes to its config."""

    name: str
    family: str
    changes: dict[str, Any] = field(default_factory=dict)

    def model(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        """A fresh random model of this variant."""
        return tiny_model(self.family, dtype, seed, **self.changes)

    def __str__(self) -> str:
        return self.name


def _variants() -> list[Variant]:
    tied = {"multi_head": True, "grouped": False, "multi_query": True}
    found = [
        Variant(f"{family}-{heads}", family, {**HEADS[heads], "tie_word_embeddings": tied[heads]})
        for family in FAMILIES
        for heads in HEADS
    ]
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    return [
        *found,
        Variant("llama-tied_grouped", "llama", {"tie_word_embeddings": True}),
        Variant("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": rope}),
        Variant("llama-attention_bias", "llama", {"attention_bias": True}),
        Variant("mistral-full_attention", "mistral", {"sliding_window": None}),
        Variant("qwen2-sliding", "qwen2", SLIDING_LAYERS),
        Variant("qwen3-sliding_biases", "qwen3", {**SLIDING_LAYERS, "attention_bias": True}),
    ]


# Use as ``@pytest.mark.parametrize("variant", VARIANTS, ids=str)``.
VARIANTS = _variants()


def random_plan(
    architecture: Architecture,
    seed: int = 0,
    *,
    without_attention: Collection[int] = (),
    without_ffn: Collection[int] = (),
    dropped: Collection[int] = (),
) -> KeepPlan:
    """A random plan that keeps part of every block, but for the layers whose blocks it is told to remove."""
    generator = random.Random(seed)
    layers = []
    for index, shape in enumerate(architecture.layers):
        groups = _random_subset(generator, shape.kv_groups)
        channels = _random_subset(generator, shape.channels)
        no_attention = index in without_attention or index in dropped
        no_ffn = index in without_ffn or index in dropped
        layers.append(LayerPlan(() if no_attention else groups, () if no_ffn else channels))
    return KeepPlan(architecture, tuple(layers))


def _random_subset(generator: random.Random, count: int) -> tuple[int, ...]:
    """Between one and all of ``range(count)``, sorted."""
    return tuple(sorted(generator.sample(range(count), generator.randint(1, count))))


def random_tokens(batch: int = 3, length: int = 12, *, vocabulary: int = 53, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, length]``, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)
