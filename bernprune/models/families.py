"""The model families: one table entry each, naming where a decoder layer keeps its parts.

To add a family, name its parts below, declare the classes of its pruned form in ``modeling_bernprune`` (configuration,
decoder, causal language model) and list them in its ``PRUNED``, so that it can be loaded, and add a tiny
configuration to ``tests/tiny_models.py``: the invariants of masking, slicing and saving then run over it. The table
assumes pre-norm decoder layers with separate q, k, v, o projections (rotary or not), a gated FFN, and query heads that
share key/value heads in equal, contiguous groups. All entries have the same names so far, which ``modeling_bernprune``
takes for granted, as it cannot import the table.
"""

from dataclasses import dataclass
from typing import Any, Literal

from bernprune.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Attribute names, from the causal-LM model down to one layer's parts.

    Attributes:
        windowed: which layers attend to ``config.sliding_window`` tokens alone, if that is set: none, all, or those
            that ``config.layer_types`` names. transformers heeds no other field in a pass without a cache.
    """

    decoder: str = "model"
    layers: str = "layers"
    final_norm: str = "norm"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    ffn: str = "mlp"
    ffn_norm: str = "post_attention_layernorm"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    windowed: Literal["none", "all", "typed"] = "none"


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(windowed="all"),
    "qwen2": Family(windowed="typed"),
    "qwen3": Family(windowed="typed"),
}


def family_of(model_type: str) -> Family:
    """The table entry for a ``config.model_type``.

    Raises:
        ModelError: the type is not in the table, or that of a pruned model.
    """
    if model_type.startswith("bernprune_"):
        raise ModelError("this model is already pruned; start from the dense model it was made of")
    if model_type not in FAMILIES:
        raise ModelError(
            f"model type {model_type!r} is not supported; known are {', '.join(FAMILIES)} "
            "(to add one, see the head of bernprune/models/families.py)"
        )
    return FAMILIES[model_type]


def attention_window(family: Family, config: Any, index: int) -> int | None:
    """As many tokens as one attends to at most in layer ``index``; None for all of them."""
    if family.windowed == "none" or (family.windowed == "typed" and config.layer_types[index] != "sliding_attention"):
        return None
    window: int | None = config.sliding_window
    return window
