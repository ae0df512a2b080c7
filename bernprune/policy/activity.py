"""What a channel does where it is active, token by token.

Few tokens have much to do with a given channel: in stories260K 3 % of them receive half the energy that a channel hands
on, in the embedded model 1 %. Cutting it changes little at the others, but the losses there differ between masks all
the same, for the sake of other channels; in a mean over all tokens that is most of the noise. So what token t loses
under mask k is regressed on the channel's activity there, r_t, the size of its entry in the input of the down
projection, by least squares through the origin:

    v = E[sum_t A_kt m_k r_t] / (contrast sum_t r_t^2),    A: advantages of single tokens,

and the channel's effect on a window is v sum_t r_t. That is a multiple of the truth: cutting it does more than in
proportion where it is most active, and what it does to later tokens is not seen. The multiple hardly differs between
the channels of a layer, and is found from the estimates that count all tokens alike (``Calibration``), which are
noisier, but right on average. The activity is taken from one pass over the text under the current selection.

Rounds weigh by variances that are found from the same windows, and are larger where effects happen to be: over many
rounds worths come out somewhat nearer to zero than they are, and deviations too small. In a toy world of short windows
it was a tenth of the worths, and a third of the deviations; weights that do not follow the windows had no such bias,
and twice the error.

Letters: B windows, K masks, C chunks, T tokens, N channels, L layers.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from bernprune.policy.baselines import less_the_others
from bernprune.policy.beliefs import GroupMean
from bernprune.policy.masks import CPU
from bernprune.policy.rounds import copied
from bernprune.policy.search import Reading
from bernprune.policy.sums import MaskSums
from bernprune.units import UnitSpace

_FACTORS = 0.1, 10.0  # between which the multiple must lie: beyond, there is nothing but noise
_HAIR = 1e-9  # by which layers differ through rounding
_TINY = torch.finfo(torch.float64).tiny


class ActivitySums:
    """Sums of one round, over its windows.

    Attributes:
        count: windows.
    """

    def __init__(self, num_channels: int) -> None:
        self.count = self._tokens = 0
        # Sums of A m r and of r^2 over windows of even and of odd number; of r; of squares of a window's sum of A m r.
        self._products_2N, self._squares_2N = torch.zeros(2, 2, num_channels, dtype=torch.float64)
        self._active_N = torch.zeros(num_channels, dtype=torch.float64)
        self._noise_N = torch.zeros(num_channels, dtype=torch.float64)

    def add(self, products_BN: torch.Tensor, squares_BN: torch.Tensor, active_BN: torch.Tensor, *, tokens: int) -> None:
        """Add windows of so many tokens, by each one's sums of A m r (their mean over masks), of r^2, and of r."""
        self.to(products_BN.device)
        for windows, number in ((slice(0, None, 2), self.count % 2), (slice(1, None, 2), 1 - self.count % 2)):
            self._products_2N[number] += products_BN[windows].sum(0)
            self._squares_2N[number] += squares_BN[windows].sum(0)
        self._noise_N += products_BN.square().sum(0)
        self._active_N += active_BN.sum(0)
        self.count += len(products_BN)
        self._tokens += len(products_BN) * tokens

    def to(self, device: torch.device) -> "ActivitySums":
        """Move them, in place."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))
        return self

    @property
    def seen_N(self) -> torch.Tensor:
        """Channels that were active at some token, bool."""
        return self._squares_2N.sum(0) > 0

    @property
    def evenness_N(self) -> torch.Tensor:
        """(mean of r)^2 / mean of r^2: 1 where a channel is equally active at every token, and where it never is."""
        squares_N = self._squares_2N.sum(0)
        share_N = self._active_N.square() / (self._tokens * squares_N).clamp(min=_TINY)
        return torch.where(self.seen_N, share_N, torch.ones_like(share_N))

    def effects(self, contrast_N: torch.Tensor) -> torch.Tensor:
        """What keeping each channel does to the loss of a window by its activity, nats per token: ``[N]``."""
        return self._scaled(self._products_2N.sum(0), self._squares_2N.sum(0)) / contrast_N

    def halves(self, contrast_N: torch.Tensor) -> torch.Tensor:
        """The same from windows of even and from those of odd number, ``[2, N]``."""
        return self._scaled(self._products_2N, self._squares_2N) / contrast_N

    def variance(self, contrast_N: torch.Tensor) -> torch.Tensor:
        """Variance of ``effects``, from how windows differ.

        It is not about their mean: what a channel does to a window is nothing beside the window's noise, and where one
        window holds most of a channel's activity the mean would follow it, as if it were known exactly.
        """
        scales_N: torch.Tensor = self._scaled(1 / contrast_N, self._squares_2N.sum(0))
        return self._noise_N * scales_N.square()

    def _scaled(self, products: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """A window's sum of activities times the slope; 0 for a channel that is never active."""
        slopes = torch.where(squares > 0, products / squares, 0.0)
        return self._active_N / self.count * slopes


class Calibration:
    """One factor a layer: the ratio of what all tokens tell of its channels to what active ones do.

    Sums over a layer's channels hold little noise, so their ratio is the factor; the ratios are drawn to what they have
    in common as far as their noise explains that they differ (random effects; DerSimonian and Laird, 1986).
    """

    def __init__(self, num_layers: int) -> None:
        self._plain_L, self._active_L, self._noise_L = torch.zeros(3, num_layers, dtype=torch.float64)

    def learn(self, layer: int, plain_N: torch.Tensor, noise_N: torch.Tensor, active_N: torch.Tensor) -> None:
        """One more round of a layer: what all tokens told of its channels (and its variance), and active ones."""
        weights_N = 1 / noise_N
        self._plain_L[layer] += weights_N @ plain_N
        self._active_L[layer] += weights_N @ active_N
        self._noise_L[layer] += weights_N.sum()

    def factors(self) -> torch.Tensor:
        """The factor of each layer, ``[L]``, float64; 1 before anything is learned."""
        precision_L = self._active_L.square() / self._noise_L.clamp(min=_TINY)
        weighted_L = self._plain_L * self._active_L / self._noise_L.clamp(min=_TINY)
        total = precision_L.sum()
        if total <= 0:
            return torch.ones_like(precision_L)
        common = weighted_L.sum() / total
        told_L = precision_L > 0  # a layer without active channels says nothing
        unlike_L = (self._plain_L - common * self._active_L).square() / self._noise_L.clamp(min=_TINY)
        excess = unlike_L[told_L].sum() - told_L.sum() + 1
        freedom = total - precision_L.square().sum() / total
        apart = excess / freedom if excess > _HAIR and freedom > _HAIR * total else 0.0
        factors_L: torch.Tensor = (common + apart * weighted_L) / (1 + apart * precision_L)
        return factors_L.clamp(*_FACTORS)


class ActiveTokens:
    """What active tokens tell of all channels, round by round."""

    def __init__(self, space: UnitSpace) -> None:
        self._channels_U, self._layers = space.of_kind("channel"), space.by_layer("channel")
        self._groups = space.of_groups("channel")
        self._sums = ActivitySums(int(self._channels_U.sum()))
        self._calibration = Calibration(len(self._layers))

    def add(
        self,
        sums: MaskSums,
        reading: Reading,
        predicted_BKC: torch.Tensor,
        *,
        levels_BKCG: torch.Tensor | None,
        amplitude_U: torch.Tensor,
    ) -> int:
        """Add the windows of a step, read now; returns how many were left out as some activity in them is not finite.

        Args:
            sums: over the masks that had the losses.
            predicted_BKC: what was predicted of the losses; it is spread over all tokens alike.
            levels_BKCG: levels of masks that swing; what losses owe to them tells of layers, and is taken out.
        """
        windows, num_masks, window = reading.losses_BKT.shape
        size = window // predicted_BKC.shape[2]
        predicted_BKT = predicted_BKC.repeat_interleave(size, dim=2) / window
        advantages_BKT = less_the_others(reading.losses_BKT.double().cpu() - predicted_BKT) / num_masks
        swung_BTL = None
        if levels_BKCG is not None:
            by_chunk_BKCT, levels_BKCL = advantages_BKT.unflatten(2, (-1, size)), levels_BKCG[..., self._groups]
            swung_BTL = torch.einsum("bkct,bkcl->bctl", by_chunk_BKCT, levels_BKCL).flatten(1, 2)
            swung_BTL = swung_BTL.to(sums.device, torch.float32)
        amplitude_U, advantages_BKT = amplitude_U.to(sums.device), advantages_BKT.to(sums.device, torch.float32)
        found_3BN = torch.zeros(3, windows, int(self._channels_U.sum()), dtype=torch.float64, device=sums.device)
        starts = [0, *itertools.accumulate(len(members_N) for members_N in self._layers)]

        def see(layer: int, some: slice, active_RTF: torch.Tensor) -> None:
            members_F, at = self._layers[layer], slice(starts[layer], starts[layer + 1])
            units = slice(int(members_F[0]), int(members_F[-1]) + 1)
            summed_3RF = sums.active(units, some, active_RTF, advantages_BKT[some]).double()
            if swung_BTL is not None:
                swung_RF = (swung_BTL[some, None, :, layer] @ active_RTF.abs().float())[:, 0]
                summed_3RF[0] -= swung_RF.double() * amplitude_U[units]
            found_3BN[:, some, at] = summed_3RF

        reading.look(see)
        fine_B = found_3BN.isfinite().all(2).all(0)
        self._sums.add(*found_3BN[:, fine_B], tokens=window)
        return windows - int(fine_B.sum())

    def forget_round(self) -> None:
        """Drop what was gathered in this round."""
        self._sums = ActivitySums(int(self._channels_U.sum()))

    def conclude_round(
        self,
        observed_U: torch.Tensor,
        noise_U: torch.Tensor,
        halves: tuple[torch.Tensor, torch.Tensor],
        *,
        contrast_U: torch.Tensor,
        worth_U: torch.Tensor,
        means: Sequence[GroupMean] = (),
    ) -> bool:
        """Put what active tokens told of channels in the place of what all tokens did; False if they told nothing.

        A channel that was never active stays with what all tokens told.

        Args:
            observed_U, noise_U: each unit's worth as observed, and its variance; changed in place.
            halves: effects in either half of the text, that is worths with the other sign; changed in place.
            worth_U: worths by which losses were predicted.
            means: what all tokens told of the channels of each layer together.
        """
        sums = self._sums.to(CPU)
        self.forget_round()
        if not sums.count:
            return False
        at, contrast_N, seen_N = self._channels_U, contrast_U[self._channels_U], sums.seen_N
        # What was taken out of the losses was spread over all tokens alike, and is seen as far as a channel is even.
        back_N = sums.evenness_N * worth_U[at]
        active_U, variance_U, shape_U = observed_U.clone(), torch.zeros_like(noise_U), torch.ones_like(noise_U)
        active_U[at] = (back_N - sums.effects(contrast_N)) * seen_N
        variance_U[at] = sums.variance(contrast_N)
        shape_U[at] = sums.evenness_N / contrast_N  # to which a layer's variances are taken to be in proportion
        seen_U = at.clone()
        seen_U[at] = seen_N
        layers = [members_N[seen_U[members_N]] for members_N in self._layers]
        for layer, members_N in enumerate(layers):
            self._calibration.learn(layer, observed_U[members_N], noise_U[members_N], active_U[members_N])
        for layer, group in enumerate(means):
            active = group.weights_N @ active_U[group.members_N]
            self._calibration.learn(layer, group.mean[None], group.noise[None], active[None])
        factors_U = torch.ones_like(noise_U)
        for members_N, factor in zip(layers, self._calibration.factors(), strict=True):
            if not len(members_N):
                continue
            common = (variance_U[members_N] / shape_U[members_N]).mean()
            if common > 0:  # else none of them was seen to change
                noise_U[members_N] = factor**2 * common * shape_U[members_N]
                observed_U[members_N] = factor * active_U[members_N]
                factors_U[members_N] = factor
        for half_U, effects_N in zip(halves, sums.halves(contrast_N), strict=True):
            half_U[seen_U] = (factors_U[at] * (effects_N - back_N))[seen_N]
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"sums": copied(vars(self._sums)), "calibration": copied(vars(self._calibration))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self._sums).update(copied(state["sums"]))
        vars(self._calibration).update(copied(state["calibration"]))
