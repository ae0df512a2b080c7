"""The one modelling file of a pruned model, copied into every saved folder; it must not import bernprune.

A pruned model is a stock model whose decoder layers differ in size. So nothing is modelled here: the stock class
builds everything but the layers, and each layer is built by the stock layer class from its own view of the config,
``config.per_layer_config[i]`` (transformers 5.14 or later). The global fields hold the largest layer. A layer may skip
its ``"attention"`` or its ``"mlp"``: that block and its norm are gone and the residual passes unchanged.

``config.bernprune["added_biases"]`` names, for each layer, the blocks whose last projection has a bias that the
family's own has not: repair puts there what the outputs of removed units came to.
"""

# mypy: disable-error-code="no-untyped-call"

import copy
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.configuration_utils import strict  # type: ignore[attr-defined]
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


class SkippedFfn(nn.Module):
    """Stands where a layer had its FFN; adds nothing to the residual."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """A zero that broadcasts over ``hidden_states``."""
        return hidden_states.new_zeros(())


class SkippedHeads(nn.Module):
    """Stands where a layer had its attention; adds nothing to the residual and has no attention weights to give.

    Its name avoids "Attention": transformers takes a module class so named for an attention of the file's own, and then
    refuses to switch the attention implementation of every model defined here.
    """

    def __init__(self, layer_idx: int, head_dim: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, head_dim

    def forward(
        self, hidden_states: torch.Tensor, cache: Any = None, past_key_values: Any = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """A zero that broadcasts over ``hidden_states`` ``[B, T, D]``, with None for the weights.

        A cache that grows, named ``past_key_values`` by older transformers, is given the keys and values of no head,
        ``[B, 0, T, head_dim]``: of an entry that was never written it could not take tokens back, as speculative
        decoding does. Where rows are repeated or picked, it passes over entries without keys, but for ones that slide:
        so only these have rows.
        """
        grows = cache if cache is not None else past_key_values
        if isinstance(grows, DynamicCache):
            rows, tokens, _hidden = hidden_states.shape
            slides = self.layer_idx < len(grows.layers) and grows.is_sliding[self.layer_idx]
            none = hidden_states.new_zeros((rows if slides else 0, 0, tokens, self.head_dim))
            grows.update(none, none, self.layer_idx)
        return hidden_states.new_zeros(()), None


LAST_PROJECTIONS = {"attention": ("self_attn", "o_proj"), "mlp": ("mlp", "down_proj")}


def layer_config(config: PreTrainedConfig, index: int) -> PreTrainedConfig:
    """What layer ``index`` is built from; transformers 5.14 gives no views of a config whose layers are all equal."""
    views = config.per_layer_config
    return config if views is None else views[index]


def build_layer(layer_class: type[nn.Module], config: PreTrainedConfig, index: int) -> nn.Module:
    """Decoder layer ``index`` in the sizes of its own view of ``config``, without the blocks it skips."""
    view = layer_config(config, index)
    layer = layer_class(view, index)
    skipped = getattr(view, "skip", ())
    if "attention" in skipped:
        layer.self_attn, layer.input_layernorm = SkippedHeads(index, view.head_dim), nn.Identity()
    if "mlp" in skipped:
        layer.mlp, layer.post_attention_layernorm = SkippedFfn(), nn.Identity()
    added = (getattr(config, "bernprune", None) or {}).get("added_biases")
    for block in added[index] if added else ():
        owner, name = (getattr(layer, LAST_PROJECTIONS[block][0]), LAST_PROJECTIONS[block][1])
        bare = getattr(owner, name)
        setattr(owner, name, nn.Linear(bare.in_features, bare.out_features, bias=True))
    return layer


def share_config(model: nn.Module, config: PreTrainedConfig) -> None:
    """Point every module that holds a config at ``config``.

    A module left with a copy, such as its layer's view, would not see a later change of attention implementation.
    Rotary embeddings, which have none, keep what they were built with: some kinds read the number of heads, which
    layers that differ do not have in common.
    """
    for module in model.modules():
        if not hasattr(module, "inv_freq") and isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = config  # type: ignore[assignment]


def _without_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy from which a stock constructor builds no layer, and whose head counts can be read without an error."""
    bare = copy.copy(layer_config(config, 0))
    bare.num_hidden_layers = 0
    return bare


class PrunedModel(PreTrainedModel):
    """Mixed into a stock model class, it replaces how the decoder layers are built."""

    layer_class: type[nn.Module]

    def __init__(self, config: PreTrainedConfig) -> None:
        bare = _without_layers(config)
        super().__init__(bare)
        # Settled by the stock constructor, on the copy it was given.
        config._attn_implementation_internal = bare._attn_implementation_internal
        config._experts_implementation_internal = bare._experts_implementation_internal
        layers = (build_layer(self.layer_class, config, index) for index in range(config.num_hidden_layers))
        self.base_model.layers = nn.ModuleList(layers)
        share_config(self, config)
        self.post_init()


class PrunedConfig:
    """Mixed into a stock config class: sizes are checked layer by layer, and need not divide the hidden size."""

    def validate_architecture(self) -> None:
        """Raises ``ValueError`` for a layer whose query heads are not shared equally by its key/value heads."""
        for index in range(self.num_hidden_layers):  # type: ignore[attr-defined]
            layer = layer_config(self, index)  # type: ignore[arg-type]
            heads, groups = layer.num_attention_heads, layer.num_key_value_heads
            if groups < 1 or heads % groups:
                raise ValueError(f"layer {index} has {heads} query heads for {groups} key/value heads")


@strict  # again, because the parent's decorator has bound the parent's validators
class BernpruneLlamaConfig(PrunedConfig, LlamaConfig):
    """Config of a pruned Llama."""

    model_type = "bernprune_llama"


class BernpruneLlamaModel(PrunedModel, LlamaModel):
    """Pruned Llama decoder."""

    config_class = BernpruneLlamaConfig
    layer_class = LlamaDecoderLayer


class BernpruneLlamaForCausalLM(PrunedModel, LlamaForCausalLM):
    """Pruned Llama with its language-modelling head."""

    config_class = BernpruneLlamaConfig
    layer_class = LlamaDecoderLayer


@strict
class BernpruneMistralConfig(PrunedConfig, MistralConfig):
    """Config of a pruned Mistral."""

    model_type = "bernprune_mistral"


class BernpruneMistralModel(PrunedModel, MistralModel):
    """Pruned Mistral decoder."""

    config_class = BernpruneMistralConfig
    layer_class = MistralDecoderLayer


class BernpruneMistralForCausalLM(PrunedModel, MistralForCausalLM):
    """Pruned Mistral with its language-modelling head."""

    config_class = BernpruneMistralConfig
    layer_class = MistralDecoderLayer


@strict
class BernpruneQwen2Config(PrunedConfig, Qwen2Config):
    """Config of a pruned Qwen2."""

    model_type = "bernprune_qwen2"


class BernpruneQwen2Model(PrunedModel, Qwen2Model):
    """Pruned Qwen2 decoder."""

    config_class = BernpruneQwen2Config
    layer_class = Qwen2DecoderLayer


class BernpruneQwen2ForCausalLM(PrunedModel, Qwen2ForCausalLM):
    """Pruned Qwen2 with its language-modelling head."""

    config_class = BernpruneQwen2Config
    layer_class = Qwen2DecoderLayer


@strict
class BernpruneQwen3Config(PrunedConfig, Qwen3Config):
    """Config of a pruned Qwen3."""

    model_type = "bernprune_qwen3"


class BernpruneQwen3Model(PrunedModel, Qwen3Model):
    """Pruned Qwen3 decoder."""

    config_class = BernpruneQwen3Config
    layer_class = Qwen3DecoderLayer


class BernpruneQwen3ForCausalLM(PrunedModel, Qwen3ForCausalLM):
    """Pruned Qwen3 with its language-modelling head."""

    config_class = BernpruneQwen3Config
    layer_class = Qwen3DecoderLayer


class PrunedClasses(NamedTuple):
    """The pruned form of a family; ``decoder`` is the class that vLLM asks for."""

    config: Any
    decoder: Any
    causal_lm: Any


# By the model type of the dense model.
PRUNED: dict[str, PrunedClasses] = {
    "llama": PrunedClasses(BernpruneLlamaConfig, BernpruneLlamaModel, BernpruneLlamaForCausalLM),
    "mistral": PrunedClasses(BernpruneMistralConfig, BernpruneMistralModel, BernpruneMistralForCausalLM),
    "qwen2": PrunedClasses(BernpruneQwen2Config, BernpruneQwen2Model, BernpruneQwen2ForCausalLM),
    "qwen3": PrunedClasses(BernpruneQwen3Config, BernpruneQwen3Model, BernpruneQwen3ForCausalLM),
}


def auto_map(family: str) -> dict[str, str]:
    """Where the Auto classes find the pruned form of ``family`` in a saved folder that holds this file."""
    file = __name__.rpartition(".")[2]
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    return {name: f"{file}.{part.__name__}" for name, part in zip(names, PRUNED[family], strict=True)}


def register() -> None:
    """Make the Auto classes load pruned folders without ``trust_remote_code``; calling it again does no harm.

    It also makes every ``save_pretrained`` of a pruned model bring this file along, so that a folder saved again by
    plain transformers still loads elsewhere.
    """
    for config_class, model_class, causal_class in PRUNED.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, causal_class, exist_ok=True)
        config_class.register_for_auto_class()
