"""Which of the closed forms a projection gets: the one with the least error on text that it was not fitted on.

Weaker ones come first, and a stronger one must be better. Then it is fitted once more, on both texts.

Letters: A kept inputs of a projection, E all its inputs, D its outputs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from bernprune.names import RepairName, TargetName
from bernprune.repair.closed import Linear, compensated, reconstructed, reformed, rescaled
from bernprune.repair.moments import Moments
from bernprune.repair.pairs import Pair
from bernprune.repair.places import Place
from bernprune.repair.weights import put

Form = Callable[[Moments], Linear]


@dataclass(frozen=True)
class Choice:
    """What a projection got: the repair, its ridge if it has one, and the mean squared error on the checking text.

    ``before`` is that of the projection without any repair, summed over outputs, as is ``after``.
    """

    repair: str
    ridge: float | None
    before: float
    after: float


@dataclass(frozen=True)
class Fitter:
    """Fits on the windows of one pair and checks on those of the other.

    Args:
        method: of the repairs, and neither ``none`` nor ``auto``.
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
        as_it_is = Linear(dense.weight_DA * kept_A, dense.bias_D)
        forms: list[tuple[str, float | None, Form]] = [("none", None, lambda _: as_it_is)]
        if biased:
            forms.append(("bias", None, lambda moments: compensated(moments, as_it_is)))
        forms += self._forms(dense, kept_A, place.units, biased)
        choice, chosen = _choose(forms, fit, check)
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
        bias_D = torch.cat([projection.bias[rows] for projection, rows in rows]).detach() if biased else None
        fit, check = (pair.first(place, weight_DA, bias_D) for pair in (self.fit, self.check))
        dense = Linear(weight_DA.double(), None if bias_D is None else bias_D.double())
        choice, chosen = _choose([("none", None, lambda _: dense), *self._ridges(dense, biased)], fit, check)
        start = 0
        for projection, kept in rows:
            span = slice(start, start + len(kept))
            projection.weight.data[kept] = chosen.weight_DA[span].to(projection.weight.dtype)
            if chosen.bias_D is not None:
                projection.bias.data[kept] = chosen.bias_D[span].to(projection.bias.dtype)
            start = span.stop
        return choice

    @property
    def _target(self) -> TargetName:
        """One number a unit or output is too little to mend earlier layers with, and tried to makes things worse."""
        return "own" if self.method in ("bias", "scale") else self.target

    def _forms(
        self, dense: Linear, kept_A: torch.Tensor, units: int, biased: bool
    ) -> Iterator[tuple[str, float | None, Form]]:
        if self.method == "admm":
            yield "admm", None, lambda moments: reformed(moments, dense, kept_A, biased=biased)
        elif self.method == "scale":
            for ridge in sorted(self.ridges, reverse=True):
                yield "scale", ridge, _rescaling(dense, ridge, units, biased)
        elif self.method != "bias":
            yield from self._ridges(dense, biased)

    def _ridges(self, dense: Linear, biased: bool) -> Iterator[tuple[str, float | None, Form]]:
        """The one that changes most comes last."""
        for ridge in sorted(self.ridges, reverse=True):
            yield "ridge", ridge, _reconstructing(dense, ridge, biased)


def _reconstructing(dense: Linear, ridge: float, biased: bool) -> Form:
    return lambda moments: reconstructed(moments, dense, ridge, biased=biased)


def _rescaling(dense: Linear, ridge: float, units: int, biased: bool) -> Form:
    return lambda moments: rescaled(moments, dense, ridge, units=units, biased=biased)


def _choose(forms: list[tuple[str, float | None, Form]], fit: Moments, check: Moments) -> tuple[Choice, Linear]:
    """The first of the best; ``fit`` has the tokens of both afterwards."""
    errors = []
    for _, _, form in forms:
        fitted = form(fit)
        errors.append(check.error(fitted.weight_DA, fitted.bias_D))
    best = min(range(len(forms)), key=errors.__getitem__)
    name, ridge, form = forms[best]
    fit.merge(check)
    return Choice(name, ridge, errors[0], errors[best]), form(fit)


def _linear(projection: nn.Linear, inputs_A: torch.Tensor) -> Linear:
    weight_DE, bias_D = projection.weight.detach(), projection.bias
    weight_DA = weight_DE.index_select(1, inputs_A.to(weight_DE.device)).double()
    return Linear(weight_DA, None if bias_D is None else bias_D.detach().double())
