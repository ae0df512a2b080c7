"""Low-rank adapters beside the projections of a model (LoRA; Hu et al., 2021, arXiv 2106.09685), by peft.

peft is an optional dependency, imported where it is needed.

Letters: L layers.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bernprune.errors import ConfigError
from bernprune.models.architecture import part
from bernprune.models.families import Family
from bernprune.models.view import ModelView
from bernprune.seeding import generator


def check_adaptable() -> None:
    """Raises ``ConfigError`` if peft is not installed."""
    _peft()


class Adapters:
    """Adapters on every linear projection of a model's layers: each adds ``scale * B A x`` to what it gives.

    A is random at first and B zero, so that nothing changes. All other parameters are frozen. They are trained in
    float32 at least.

    Attributes:
        parameters: by name, those that are trained; also while masks hide them from the model.
    """

    def __init__(
        self, model: PreTrainedModel, family: Family, ranks_L: Sequence[int], *, scale: float, seed: int
    ) -> None:
        """Raises ``ConfigError`` if peft is not installed.

        Args:
            model: dense or pruned; its projections are wrapped in place.
            ranks_L: the rank in each of its layers; in a projection with fewer inputs or outputs, their number.
        """
        ranks = _ranks_by_name(model, family, ranks_L)
        peft = _peft()
        settings = peft.LoraConfig(
            target_modules=list(ranks),
            rank_pattern=ranks,
            alpha_pattern={name: scale * rank for name, rank in ranks.items()},
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # from transformers, in which peft uses an old name
            self._adapted = peft.get_peft_model(model, settings)
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        self._draw(generator(seed, "adapters"))

    @torch.no_grad()
    def _draw(self, random: torch.Generator) -> None:
        """Draw A as peft does, but from a generator of its own."""
        for name, parameter in self.parameters.items():
            if ".lora_A." in name:
                bound = parameter.shape[1] ** -0.5
                parameter.copy_((2 * torch.rand(parameter.shape, generator=random, dtype=torch.float64) - 1) * bound)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A copy of the parameters on the processor."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raises ``KeyError`` if one is missing."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])

    def merge(self) -> Any:
        """The model with plain weights again, to which what the adapters add was added."""
        model: Any = self._adapted.merge_and_unload()
        return model.requires_grad_(False)


def adapted_view(view: ModelView) -> ModelView:
    """The units of a model that was described before it was adapted: masks then act on what enters the adapters."""
    family = view.family
    layers = tuple(
        replace(layer, output=getattr(layer.attention, family.output), down=getattr(layer.ffn, family.down))
        for layer in view.layers
    )
    return replace(view, layers=layers, opaque="its projections are adapted")


def _ranks_by_name(model: PreTrainedModel, family: Family, ranks_L: Sequence[int]) -> dict[str, int]:
    names = {module: name for name, module in model.named_modules()}
    return {
        names[module]: min(rank, module.in_features, module.out_features)
        for layer, rank in zip(part(model, family.decoder, family.layers), ranks_L, strict=True)
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    }


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError('recovery is done by the package peft; install it: pip install ".[recover]"') from None
    return peft
