"""What the closed forms of repair are made from: second moments of a projection's inputs and of what it should give.

Letters: N tokens of one forward pass, A inputs of a projection, D its outputs.
"""

import copy
import math

import torch

_ROUNDING = 1e-6  # of E[x^2], below which a variance is what rounding has left of products in float32


class Moments:
    """Sums over tokens of inputs x and targets t, float64 on the device of the model.

    Attributes:
        count: tokens so far or, where they have weights, the sum of these.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count = 0.0
        self._x_A, self._t_D = zeros(inputs), zeros(outputs)
        self._xx_AA = zeros(inputs, inputs)
        self._tx_DA = zeros(outputs, inputs)
        self._tt_D = zeros(outputs)

    @torch.inference_mode()
    def add(self, x_NA: torch.Tensor, t_ND: torch.Tensor, weights_N: torch.Tensor | None = None) -> None:
        """Add tokens, each as often as its weight says; by default once."""
        # Products of one batch are exact enough in float32; adding up many batches is not.
        x_NA, t_ND = (values.to(torch.promote_types(values.dtype, torch.float32)) for values in (x_NA, t_ND))
        weights_N = x_NA.new_ones(len(x_NA)) if weights_N is None else weights_N.to(x_NA.dtype)
        root_N1 = weights_N.sqrt()[:, None]
        x_NA, t_ND = x_NA * root_N1, t_ND * root_N1
        self._x_A += (x_NA * root_N1).sum(0)
        self._t_D += (t_ND * root_N1).sum(0)
        self._xx_AA += x_NA.T @ x_NA
        self._tx_DA += t_ND.T @ x_NA
        self._tt_D += t_ND.square().sum(0)
        self.count += weights_N.sum(dtype=torch.float64).item()

    def merge(self, other: "Moments") -> None:
        """Take in the tokens of ``other``."""
        self.count += other.count
        for mine, theirs in zip(self._sums, other._sums, strict=True):
            mine += theirs

    def of_outputs(self, outputs_S: torch.Tensor) -> "Moments":
        """The moments of these outputs alone; the sums over inputs are shared with them, not copied."""
        part = copy.copy(self)
        part._t_D, part._tx_DA, part._tt_D = (sums[outputs_S] for sums in (self._t_D, self._tx_DA, self._tt_D))
        return part

    @property
    def finite(self) -> bool:
        return all(bool(sums.isfinite().all()) for sums in self._sums)

    @property
    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Means of inputs and targets, ``[A]`` and ``[D]``."""
        return self._x_A / self.count, self._t_D / self.count

    def about(self, x_A: torch.Tensor, t_D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """E[(x - x0)(x - x0)'] and E[(t - t0)(x - x0)'] about the given points, ``[A, A]`` and ``[D, A]``.

        Of an input that is always at its point they are 0, and not what rounding has left.
        """
        mean_A, mean_D = self.means
        gram_AA, cross_DA = self._xx_AA / self.count, self._tx_DA / self.count
        size_A = gram_AA.diagonal().clone()
        gram_AA.addr_(x_A - mean_A, x_A - mean_A).addr_(mean_A, mean_A, alpha=-1)
        cross_DA.addr_(t_D - mean_D, x_A - mean_A).addr_(mean_D, mean_A, alpha=-1)
        constant_A = gram_AA.diagonal() <= _ROUNDING * size_A
        if constant_A.any():
            gram_AA[constant_A] = 0.0
            gram_AA[:, constant_A] = 0.0
            cross_DA[:, constant_A] = 0.0
        return gram_AA, cross_DA

    def error(self, weight_DA: torch.Tensor, bias_D: torch.Tensor | None) -> float:
        """E|t - W x - b|^2, summed over outputs, mean over tokens; infinite where it is not a number."""
        total = self._tt_D.sum() - 2 * (weight_DA * self._tx_DA).sum() + ((weight_DA @ self._xx_AA) * weight_DA).sum()
        if bias_D is not None:
            total += 2 * bias_D @ (weight_DA @ self._x_A - self._t_D) + self.count * bias_D @ bias_D
        error = total.item() / self.count
        return max(0.0, error) if math.isfinite(error) else math.inf

    @property
    def _sums(self) -> tuple[torch.Tensor, ...]:
        return self._x_A, self._t_D, self._xx_AA, self._tx_DA, self._tt_D
