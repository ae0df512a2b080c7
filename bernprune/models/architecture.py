"""The sizes of a dense model, read from its config and checked against its modules."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bernprune.errors import ModelError
from bernprune.models.families import Family, family_of
from bernprune.models.linear import is_plain, kind_of
from bernprune.units import Architecture, LayerShape


def architecture_of(model: PreTrainedModel) -> Architecture:
    """The family and every size of a dense causal language model that masking and slicing depend on.

    Raises:
        ModelError: the family is unknown, the model is already pruned, its layers differ by config or it is spread over
            devices, or a module is missing or has another size than the config says.
    """
    config = model.config
    family = family_of(config.model_type)
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise ModelError(f"the model is spread over {', '.join(devices)}; load it on one device")
    if config.is_heterogeneous:
        raise ModelError("this model's layers differ by per_layer_config; only models of equal layers can be pruned")
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
        raise ModelError("rotary embeddings of the kind 'longrope' need equal layers: such models cannot be pruned")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % groups:
        raise ModelError(f"{heads} query heads are not shared equally by {groups} key/value heads")
    shape = LayerShape(query_heads=heads, kv_groups=groups, channels=config.intermediate_size)
    architecture = Architecture(config.model_type, config.hidden_size, head_dim, (shape,) * config.num_hidden_layers)
    _check_modules(model, architecture, family)
    return architecture


def part(root: nn.Module, *names: str) -> Any:
    """The module reached from ``root`` by attribute ``names``; ``ModelError`` if there is none."""
    found: Any = root
    for name in names:
        found = getattr(found, name, None)
        if found is None:
            raise ModelError(f"{type(root).__name__} has no module {'.'.join(names)}; is it a causal language model?")
    return found


def projections(family: Family) -> dict[str, tuple[str, str]]:
    """For each projection of a layer its block and its name within it, keyed by its role in ``Family``."""
    attention = {role: (family.attention, getattr(family, role)) for role in ("query", "key", "value", "output")}
    return attention | {role: (family.ffn, getattr(family, role)) for role in ("gate", "up", "down")}


def first_opaque(model: PreTrainedModel) -> str | None:
    """In words, the first projection that is no plain linear layer, such as a quantised one; None if all are plain."""
    family = family_of(model.config.model_type)
    for index, layer in enumerate(part(model, family.decoder, family.layers)):
        for role, names in projections(family).items():
            module = part(layer, *names)
            if not is_plain(module):
                return f"the {role} projection of layer {index} is a {kind_of(module)}"
    return None


def _check_modules(model: PreTrainedModel, architecture: Architecture, family: Family) -> None:
    layers = part(model, family.decoder, family.layers)
    if len(layers) != len(architecture.layers):
        raise ModelError(f"the model has {len(layers)} layers, but its config says {len(architecture.layers)}")
    for index, (layer, shape) in enumerate(zip(layers, architecture.layers, strict=True)):
        for role, wanted in _sizes(architecture, shape).items():
            module = part(layer, *projections(family)[role])
            if not isinstance(module, nn.Linear):
                raise ModelError(
                    f"the {role} projection of layer {index} is a {kind_of(module)}, not a linear layer; prune the "
                    "model before quantising or adapting it"
                )
            found = (getattr(module, "in_features", None), getattr(module, "out_features", None))
            if found != wanted:
                raise ModelError(f"the {role} projection of layer {index} maps {found}, but the config says {wanted}")


def _sizes(architecture: Architecture, shape: LayerShape) -> dict[str, tuple[int, int]]:
    """Input and output width of each projection."""
    hidden, queries = architecture.hidden_size, shape.query_heads * architecture.head_dim
    keys = shape.kv_groups * architecture.head_dim
    return {
        "query": (hidden, queries),
        "key": (hidden, keys),
        "value": (hidden, keys),
        "output": (queries, hidden),
        "gate": (hidden, shape.channels),
        "up": (hidden, shape.channels),
        "down": (shape.channels, hidden),
    }
