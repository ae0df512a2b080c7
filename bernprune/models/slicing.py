"""Cutting a dense model down to what a plan keeps.

The result is built by the bundled class from the config that will be saved, on the meta device, and then given the
dense model's tensors. So what runs in memory is what is loaded later, shapes are checked by the same constructor, and
no dense-sized memory is allocated. Converting the dense model module by module would leave a model that only
resembles the saved one.
"""

import hashlib
import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from bernprune.embedded import EMBEDDED, MODEL_FOLDER
from bernprune.errors import ModelError
from bernprune.models.architecture import architecture_of, first_opaque, part, projections
from bernprune.models.families import Family, family_of
from bernprune.models.modeling_bernprune import PRUNED, auto_map, share_config
from bernprune.models.shortening import release
from bernprune.units import Architecture, KeepPlan, LayerPlan, LayerShape

FORMAT = 1
# Which dimension of a projection's weight holds the units; an output-side one (0) has them in its bias too.
SLICED_DIM = {"query": 0, "key": 0, "value": 0, "output": 1, "gate": 0, "up": 0, "down": 1}


def slice_model(model: PreTrainedModel, plan: KeepPlan) -> PreTrainedModel:
    """The pruned model: physically smaller, and of the class that a saved folder loads as.

    The dense ``model`` is used up: each of its weights is released before the next is sliced, so memory peaks at the
    dense model plus one weight, and its parts move into the result. It cannot be used afterwards.
    Kept are dtype, device, ``requires_grad``, tied embeddings, training mode, ``generation_config`` and
    ``name_or_path``; hooks on sliced modules and an enabled gradient checkpointing are not.

    A layer without kv group loses its attention block and norm, one without channel its FFN and norm (and with a
    block goes the bias of its last projection); a layer with neither is dropped and the following ones move up. A bias
    of a last projection that the family does not know, as repair gives, is kept and declared in the config.

    Raises:
        ModelError: the plan is for another architecture, leaves the first kept layer without attention or keeps
            nothing; or the model is pruned, quantised, adapted or spread over devices.
    """
    check_plan(model, plan)
    config = pruned_config(model.config, plan)
    if any(added := _added_biases(model, plan)):
        config.bernprune["added_biases"] = added
    family = family_of(plan.architecture.model_type)
    with torch.device("meta"):
        pruned = PRUNED[plan.architecture.model_type].causal_lm(config)
    _check_same_parts(model, pruned)
    pruned.name_or_path = model.name_or_path
    if model.generation_config is not None:
        pruned.generation_config = model.generation_config
    pruned.train(model.training)
    _move(model, pruned, plan, family)
    share_config(pruned, config)
    tensors = chain(pruned.parameters(), pruned.buffers())
    assert not any(tensor.is_meta for tensor in tensors), "a tensor of the pruned model was given no value"
    return cast(PreTrainedModel, pruned)


def pruned_config(config: PreTrainedConfig, plan: KeepPlan) -> Any:
    """The config of what ``plan`` keeps of a model with the dense ``config``.

    Global fields hold the largest layer, ``per_layer_config`` the others, ``bernprune`` where it all comes from.
    """
    model_type = plan.architecture.model_type
    replaced = ("model_type", "architectures", "transformers_version", "auto_map", "per_layer_config", "layer_types")
    values = {name: value for name, value in config.to_dict().items() if name not in replaced}
    kept = [layer for layer in plan.layers if not layer.is_empty]
    shapes = _kept_shapes(plan)
    values |= {
        "num_hidden_layers": len(kept),
        "head_dim": plan.architecture.head_dim,
        "num_attention_heads": max(shape.query_heads for shape in shapes),
        "num_key_value_heads": max(shape.kv_groups for shape in shapes),
        # Where no layer keeps an FFN the width is never used, but readers expect a size.
        "intermediate_size": max(shape.channels for shape in shapes) or plan.architecture.layers[0].channels,
    }
    if getattr(config, "layer_types", None) is not None:
        values["layer_types"] = _layer_types(config.layer_types, plan)
    return PRUNED[model_type].config(
        **values,
        per_layer_config={index: _layer_fields(shape) for index, shape in enumerate(shapes)},
        attn_implementation=config._attn_implementation,
        name_or_path=config.name_or_path,
        auto_map=auto_map(model_type),
        bernprune={"format": FORMAT, "plan_hash": plan_hash(plan), "base_model": _public_name(config.name_or_path)},
    )


def _added_biases(model: PreTrainedModel, plan: KeepPlan) -> list[list[str]]:
    """For each layer that remains, the blocks whose last projection has a bias where the family's own has none."""
    model_type = plan.architecture.model_type
    family = family_of(model_type)
    with torch.device("meta"):
        stock = PRUNED[model_type].causal_lm.layer_class(model.config, 0)
    places = {"attention": (family.attention, family.output), "mlp": (family.ffn, family.down)}
    unknown = [block for block, place in places.items() if part(stock, *place).bias is None]
    found = []
    for layer, kept in zip(part(model, family.decoder, family.layers), plan.layers, strict=True):
        remaining = {"attention": kept.kv_groups, "mlp": kept.channels}
        if not kept.is_empty:
            added = [block for block in unknown if remaining[block] and part(layer, *places[block]).bias is not None]
            found.append(added)
    return found


def plan_hash(plan: KeepPlan) -> str:
    """16 hexadecimal digits that tell plans apart; saved with the model."""
    return hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def _public_name(name: str | None) -> str:
    """A hub name as it is; of a path only the last part, since the rest tells about one machine alone."""
    name = name or ""
    if name == str(MODEL_FOLDER):
        return EMBEDDED
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def _kept_shapes(plan: KeepPlan) -> list[LayerShape]:
    """Sizes of the layers that remain, in order."""
    shapes = []
    for layer, dense in zip(plan.layers, plan.architecture.layers, strict=True):
        if not layer.is_empty:
            groups = len(layer.kv_groups)
            shapes.append(LayerShape(groups * dense.queries_per_group, groups, len(layer.channels)))
    return shapes


def _layer_fields(shape: LayerShape) -> dict[str, Any]:
    """One layer's entry of ``per_layer_config``; transformers leaves out what equals the global field."""
    fields: dict[str, Any] = {}
    skipped = []
    if shape.kv_groups:
        fields |= {"num_attention_heads": shape.query_heads, "num_key_value_heads": shape.kv_groups}
    else:
        skipped.append("attention")
    if shape.channels:
        fields["intermediate_size"] = shape.channels
    else:
        skipped.append("mlp")
    return fields | ({"skip": skipped} if skipped else {})


def _layer_types(dense: list[str], plan: KeepPlan) -> list[str]:
    """Attention types of the layers that remain.

    transformers sizes the mask of a type by the cache of the first layer of that type, which stays empty if the layer
    has no attention. Such a layer therefore takes the type of the layer before it.
    """
    types: list[str] = []
    for name, layer in zip(dense, plan.layers, strict=True):
        if not layer.is_empty:
            types.append(name if layer.kv_groups else types[-1])
    return types


def check_architecture(plan: KeepPlan, architecture: Architecture) -> None:
    """Raises ``ModelError`` unless the plan was made for a model like this."""
    difference = plan.architecture.difference(architecture)
    if difference is not None:
        raise ModelError(f"the plan was made for another model: {difference} (the plan's against the model's)")


def check_plan(model: PreTrainedModel, plan: KeepPlan) -> None:
    """Raises ``ModelError`` unless the model can be sliced by the plan."""
    architecture, opaque = architecture_of(model), first_opaque(model)
    if opaque is not None:
        raise ModelError(
            f"{opaque}, of which rows and columns cannot be taken; a model that was searched quantised or adapted is "
            "pruned by applying its plan to the original (bernprune apply)"
        )
    check_architecture(plan, architecture)
    kept = [layer for layer in plan.layers if not layer.is_empty]
    if not kept:
        raise ModelError("the plan keeps no layer at all")
    if not kept[0].kv_groups:
        raise ModelError("the plan leaves the first kept layer without attention, where the cache's length is read")


def _check_same_parts(model: PreTrainedModel, pruned: PreTrainedModel) -> None:
    """Refuse anything other than decoder and head, e.g. a classifier: it would be lost without a word."""
    found, wanted = _child_names(model), _child_names(pruned)
    if found != wanted:
        raise ModelError(f"the model has the parts {sorted(found)}, but a causal language model {sorted(wanted)}")


def _child_names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _move(model: PreTrainedModel, pruned: PreTrainedModel, plan: KeepPlan, family: Family) -> None:
    """Move every part of ``model`` into ``pruned``, slicing the layers on the way."""
    source, target = part(model, family.decoder), part(pruned, family.decoder)
    layers = list(getattr(source, family.layers))
    delattr(source, family.layers)
    _move_children(model, pruned, but=family.decoder)
    _move_children(source, target, but=family.layers)
    targets = iter(getattr(target, family.layers))
    for kept, shape in zip(plan.layers, plan.architecture.layers, strict=True):
        layer = layers.pop(0)
        if not kept.is_empty:
            indices = _indices(kept, shape, plan.architecture.head_dim, family)
            _move_layer(layer, next(targets), indices)
        release(layer)


def _move_children(source: nn.Module, target: nn.Module, *, but: str) -> None:
    for name in sorted(_child_names(source) - {but}):
        setattr(target, name, getattr(source, name))
        delattr(source, name)


def _indices(kept: LayerPlan, shape: LayerShape, head_dim: int, family: Family) -> dict[str, tuple[int, torch.Tensor]]:
    """For each projection, by its dotted name in a layer, the dimension to slice and the int64 indices to keep."""
    queries = adjacent_rows(kept.kv_groups, shape.queries_per_group * head_dim)
    keys = adjacent_rows(kept.kv_groups, head_dim)
    channels = torch.tensor(kept.channels, dtype=torch.int64)
    indices = {"query": queries, "key": keys, "value": keys, "output": queries}
    indices |= {"gate": channels, "up": channels, "down": channels}
    names = projections(family)
    return {".".join(names[role]): (SLICED_DIM[role], index) for role, index in indices.items()}


def adjacent_rows(groups: Iterable[int], width: int) -> torch.Tensor:
    """Where ``groups`` of ``width`` adjacent rows each lie."""
    starts = torch.tensor(tuple(groups), dtype=torch.int64) * width
    return (starts[:, None] + torch.arange(width)).flatten()


def _move_layer(source: nn.Module, target: nn.Module, indices: dict[str, tuple[int, torch.Tensor]]) -> None:
    """Give ``target`` what it has room for of each parameter, taking it from ``source`` for good."""
    for name in [name for name, _ in target.named_parameters()]:
        owner, _, leaf = name.rpartition(".")
        full = getattr(source.get_submodule(owner), leaf)
        delattr(source.get_submodule(owner), leaf)
        dim, index = indices.get(owner, (None, None))
        if leaf == "bias" and dim == 1:  # belongs to the outputs, which all stay
            dim = None
        sliced = full if dim is None or index is None else _take(full, dim, index)
        del full  # the dense weight goes before the next is sliced
        place = target.get_submodule(owner)
        assert getattr(place, leaf).shape == sliced.shape, f"{name} was sliced to {tuple(sliced.shape)}"
        setattr(place, leaf, sliced)


def _take(full: nn.Parameter, dim: int, index: torch.Tensor) -> nn.Parameter:
    if len(index) == full.shape[dim]:
        return full
    return nn.Parameter(full.detach().index_select(dim, index.to(full.device)), requires_grad=full.requires_grad)
