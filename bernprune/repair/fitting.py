"""Which of the closed forms a projection gets: the one with the least error on text that it was not fitted on.

Weaker ones come first, and a stronger one must be better. Then it is fitted once more, on both texts. Where outputs are
many, a random part of them decides: all are fitted on the same inputs, each by itself, and so by the same ridge.

Letters: A kept inputs of a projection, E all its inputs, D its outputs, S those that decide.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from bernprune.errors import ModelError, prefixed
from bernprune.names import RepairName, TargetName
from bernprune.repair.closed import Linear, compensated, reconstructed, reformed, rescaled
from bernprune.repair.moments import Moments
from bernprune.repair.pairs import Pair
from bernprune.repair.places import Place
from bernprune.repair.weights import put
from bernprune.seeding import generator

Form = Callable[[Moments, Linear], Linear]  # takes what the projection did before to what it will do

DECIDING = 512  # outputs


@dataclass(frozen=True)
class Choice:
    """What a projection got: the repair, its ridge if it has one, and the mean squared error on the checking text.

    ``before`` is that of the projection without any repair, summed over outputs, as is ``after``; both are estimates
    where not all outputs decide. Tokens count as they did in the fit.
    """

    repair: str
    ridge: float | None
    before: float
    after: float


@dataclass(frozen=True)
class Fitter:
    """Fits on the windows of one pair and checks on those of the other.

    Args:
        method: a repair other than ``none`` and ``auto``.
        ridges: to choose from, relative to the mean square of an input.
        biases: whether a projection may get a bias that it has not.
    """

    fit: Pair
    check: Pair
    method: RepairName
    target: TargetName
    ridges: tuple[float, ...]
    biases: bool

    def last(self, place: Place) -> Choice:
        """Repair the last projection of a branch; what its removed inputs gave, it gives no longer."""
        projection, every = place.last, self.method == "admm"
        biased = self.biases or projection.bias is not None
        inputs_A = torch.arange(projection.in_features) if every else place.kept_A
        fit, check = (pair.last(place, inputs_A, self._target) for pair in (self.fit, self.check))
        dense = _linear(projection, inputs_A)
        kept = torch.zeros(projection.in_features, dtype=torch.bool)
        kept[place.kept_A] = True
        kept_A = kept[inputs_A].to(dense.weight_DA.device)
        forms: list[tuple[str, float | None, Form]] = [("none", None, partial(_without, kept_A=kept_A))]
        if biased:
            forms.append(("bias", None, partial(_compensating, kept_A=kept_A)))
        forms += self._forms(kept_A, place.units, biased)
        with prefixed(f"{place.name} cannot be fitted", ModelError):
            choice, chosen = _choose(forms, dense, fit, check, alone=self.method != "scale")
        weight_DE = torch.zeros_like(projection.weight, dtype=torch.float64)
        weight_DE[:, inputs_A.to(weight_DE.device)] = chosen.weight_DA
        put(projection, weight_DE, chosen.bias_D)
        return choice

    def first(self, place: Place) -> Choice:
        """Refit the projections into the kept units to what they give in the dense model (GOA: 2024, arXiv 2407.19126).

        The inputs all stay; they differ from the dense model's since layers before have been pruned.
        """
        rows = [(projection, rows.to(projection.weight.device)) for projection, rows in place.first]
        biased = all(projection.bias is not None for projection, _ in rows)
        weight_DA = torch.cat([projection.weight[rows] for projection, rows in rows]).detach()
        fit, check = (pair.first(place, weight_DA) for pair in (self.fit, self.check))
        change_D = torch.zeros_like(weight_DA[:, 0], dtype=torch.float64) if biased else None
        dense = Linear(weight_DA.double(), change_D)
        forms: list[tuple[str, float | None, Form]] = [("none", None, lambda _, dense: dense), *self._ridges(biased)]
        with prefixed(f"what enters the {place.branch} of layer {place.layer} cannot be fitted", ModelError):
            choice, chosen = _choose(forms, dense, fit, check)
        start = 0
        for projection, kept in rows:
            span = slice(start, start + len(kept))
            projection.weight.data[kept] = chosen.weight_DA[span].to(projection.weight.dtype)
            if chosen.bias_D is not None:
                bias_D = projection.bias.data[kept].double() + chosen.bias_D[span]
                projection.bias.data[kept] = bias_D.to(projection.bias.dtype)
            start = span.stop
        return choice

    @property
    def _target(self) -> TargetName:
        """``own`` for one number a unit or output: that cannot mend earlier layers, and trying makes things worse."""
        return "own" if self.method in ("bias", "scale") else self.target

    def _forms(self, kept_A: torch.Tensor, units: int, biased: bool) -> Iterator[tuple[str, float | None, Form]]:
        if self.method == "admm":
            yield "admm", None, partial(reformed, kept_A=kept_A, biased=biased)
        elif self.method == "scale":
            for ridge in sorted(self.ridges, reverse=True):
                yield "scale", ridge, partial(rescaled, ridge=ridge, units=units, biased=biased)
        elif self.method != "bias":
            yield from self._ridges(biased)

    def _ridges(self, biased: bool) -> Iterator[tuple[str, float | None, Form]]:
        """Ridge regressions; the one that changes most comes last."""
        for ridge in sorted(self.ridges, reverse=True):
            yield "ridge", ridge, partial(reconstructed, ridge=ridge, biased=biased)


def _without(moments: Moments, dense: Linear, kept_A: torch.Tensor) -> Linear:
    """The projection as it was, on kept inputs alone."""
    return Linear(dense.weight_DA * kept_A, dense.bias_D)


def _compensating(moments: Moments, dense: Linear, kept_A: torch.Tensor) -> Linear:
    return compensated(moments, _without(moments, dense, kept_A))


def _choose(
    forms: list[tuple[str, float | None, Form]], dense: Linear, fit: Moments, check: Moments, *, alone: bool = True
) -> tuple[Choice, Linear]:
    """The first of the best, fitted on both texts; ``fit`` has the tokens of both afterwards.

    Args:
        dense: what the projection did before.
        alone: each output is fitted by itself.
    """
    outputs, errors = len(dense.weight_DA), []
    deciding, of_fit, of_check = dense, fit, check
    if alone and outputs > DECIDING:
        chosen_S = torch.randperm(outputs, generator=generator(0, "deciding outputs"))[:DECIDING]
        chosen_S = chosen_S.sort().values.to(dense.weight_DA.device)
        deciding = Linear(dense.weight_DA[chosen_S], None if dense.bias_D is None else dense.bias_D[chosen_S])
        of_fit, of_check = (moments.of_outputs(chosen_S) for moments in (fit, check))
    for _, _, form in forms:
        fitted = form(of_fit, deciding)
        errors.append(of_check.error(fitted.weight_DA, fitted.bias_D) * outputs / len(deciding.weight_DA))
    best = min(range(len(forms)), key=errors.__getitem__)
    name, ridge, form = forms[best]
    fit.merge(check)
    return Choice(name, ridge, errors[0], errors[best]), form(fit, dense)


def _linear(projection: nn.Linear, inputs_A: torch.Tensor) -> Linear:
    weight_DE, bias_D = projection.weight.detach(), projection.bias
    weight_DA = weight_DE.index_select(1, inputs_A.to(weight_DE.device)).double()
    return Linear(weight_DA, None if bias_D is None else bias_D.detach().double())
