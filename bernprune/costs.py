"""What forward passes cost on a machine, and which way of running masks is the cheapest.

Masks may go through one after the other, each with weights gathered for what it keeps; or together, with weights
gathered for what any of them keeps, and a prefix of layers run once for those that agree on it. Where each has rows of
its own, kernels may go by lists of what it keeps. The unit of cost is the time of one token in a large batch of the
dense model.

Letters: K masks, L layers, U units, B windows, T tokens.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from bernprune.backends import MaskedOps
from bernprune.losses import token_losses
from bernprune.models.masking import masked
from bernprune.models.sharing import Branching
from bernprune.models.view import ModelView
from bernprune.units import UnitSpace

NEVER = 2.0**40  # so costly that it is not done
Way = Literal["dense", "gathered", "listed"]  # of running masks that keep half
_LISTED_TOKENS = 64  # of one mask: with fewer, tiles of products would be mostly empty
_MEASURED_ROWS = {"cpu": (4, 16), "cuda": (8, 64)}  # few and many, or as many as a pass may have
_MEASURED_PASSES = 5  # of which the median is taken, after one that warms up
_MEASURED_SECONDS = 5.0  # after which no other pass is timed


@dataclass(frozen=True)
class Costs:
    """What forward passes of one model cost on one machine.

    Attributes:
        passing: cost of a pass, however small.
        copying: cost of gathering the weights of all units.
        blocks: share of a token's time that products with the weights of units take.
        listing: time of these products by kernels that go by lists, over the share that is kept times their time with
            all weights.
    """

    passing: float = 256.0
    copying: float = 64.0
    blocks: float = 0.75
    listing: float = NEVER

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def gathers(self, tokens: int, share: float) -> bool:
        """Whether gathering a share of a layer's weights pays for so many tokens."""
        return self.copying < NEVER and self.copying * share < self.blocks * tokens * (1 - share)

    def lists(self, tokens: int, share: float, kept: float) -> bool:
        """Whether going by lists pays for so many tokens, a share of a layer at work and so much kept by each mask."""
        return self.listing < NEVER and self.listing * kept < (share if self.gathers(tokens, share) else 1.0)

    def of_weights(self, tokens: int, share: float, kept: float = 1.0) -> float:
        """Cost of so many tokens in the products of all layers, a share of each at work, in the way that pays."""
        if self.lists(tokens, share, kept):
            return self.blocks * tokens * self.listing * kept
        if self.gathers(tokens, share):
            return self.blocks * tokens * share + self.copying * share
        return self.blocks * tokens

    @classmethod
    def measured(cls, seconds: Callable[[int, Way], float], few: int, many: int, ways: Sequence[Way] = ()) -> "Costs":
        """Costs from the times of passes of a few tokens and of many, dense and in such ``ways`` as there are.

        They are rounded to powers of 2 and to eighths, so that measuring again gives the same, or nearly always.
        """
        dense = [seconds(tokens, "dense") for tokens in (few, many)]
        halved = [seconds(tokens, "gathered") for tokens in (few, many)] if "gathered" in ways else dense
        token = (dense[1] - dense[0]) / (many - few)
        token_halved = (halved[1] - halved[0]) / (many - few)
        if not 0 < token_halved < token:  # too small a model, or too busy a machine: nothing is gained by gathering
            return cls(_rounded(dense[0] / max(token, dense[1] / many)), NEVER, 0.5)
        passing, blocks = max(0.0, dense[0] / token - few), min(1.0, 2 * (1 - token_halved / token))
        copying = 2 * max(0.0, halved[0] / token - passing - few * (1 - blocks / 2))
        listing = NEVER
        if "listed" in ways:  # timed on many tokens alone: few are over before the next operation is asked for
            listing = max(1, math.ceil(8 * 2 * (seconds(many, "listed") / dense[1] - 1 + blocks) / blocks)) / 8
        return cls(_rounded(passing), _rounded(copying), max(1, round(8 * blocks)) / 8, listing)


def _rounded(cost: float) -> float:
    return 2.0 ** round(math.log2(cost)) if cost >= 1 else 1.0


def timed(run: Callable[[int], object], most: int, enough: float, *, warmup: int = 1, least: int = 1) -> list[float]:
    """Seconds of ``most`` runs, or of ``least`` or more that took ``enough`` together, after some that warm up; each
    is told its number."""
    times = list[float]()
    while len(times) < warmup + most and (len(times) < warmup + least or sum(times[warmup:]) < enough):
        started = time.perf_counter()
        run(len(times))
        times.append(time.perf_counter() - started)
    return times[warmup:]


@torch.inference_mode()
def measure(view: ModelView, ops: MaskedOps, window: int, rows: int = 64) -> Costs:
    """What forward passes of this model cost here.

    Each way takes 6 passes of few windows and 6 of many, lists those of many alone, or fewer where they take long; each
    has ``rows`` at most, or two; half as many as long as a GPU is too small.
    """
    least, most = _MEASURED_ROWS["cuda" if view.device.type == "cuda" else "cpu"]
    most = max(2, min(most, rows))
    while True:
        try:
            return _measured(view, ops, window, least, most)
        except torch.OutOfMemoryError:
            if most == 2:
                raise
        torch.cuda.empty_cache()  # by now the error has let go of what the pass held
        most = max(2, most // 2)


def _measured(view: ModelView, ops: MaskedOps, window: int, least: int, most: int) -> Costs:
    """The same in passes of so many windows."""
    space, device = view.space, view.device
    few, many = min(least, most // 2) * window, most * window
    tokens_RT = torch.arange(many, device=device).view(-1, window) % view.model.config.vocab_size
    half_U = _half(space)
    all_U = torch.ones_like(half_U)
    random_RU = torch.rand(many // window, space.size, generator=torch.Generator().manual_seed(0)) < 0.5
    random_RU |= ~_finest(space)

    def seconds(tokens: int, way: Way) -> float:
        if way == "listed":
            live.set(random_RU[: tokens // window], listed_U=all_U)
        else:
            live.set((half_U if way == "gathered" else all_U)[None], working_U=half_U if way == "gathered" else None)
        tokens_BT = tokens_RT[: tokens // window]

        def run(_: int) -> None:
            hidden_BTD = view.decoder(input_ids=tokens_BT, use_cache=False).last_hidden_state
            token_losses(view.model.get_output_embeddings(), hidden_BTD, tokens_BT, ops).sum().item()

        return statistics.median(timed(run, _MEASURED_PASSES, _MEASURED_SECONDS))

    ways: list[Way] = [] if view.opaque is not None else ["gathered", "listed"] if ops.packs else ["gathered"]
    with masked(view, ops) as live:
        return Costs.measured(seconds, few, many, ways)


def _finest(space: UnitSpace) -> torch.Tensor:
    """Units in which no others lie, bool ``[U]``."""
    return torch.stack([space.of_kind(kind) for kind in space.finest]).any(0)


def _half(space: UnitSpace) -> torch.Tensor:
    """A mask that keeps half of each group of units, of groups of one those of every other layer; bool ``[U]``."""
    some = [
        torch.arange(group.count) < group.count // 2 if group.count > 1 else torch.tensor([group.layer % 2 == 0])
        for group in space.groups
    ]
    return torch.cat(some) | ~_finest(space)


class Planner:
    """Chooses how masks are run."""

    def __init__(self, space: UnitSpace, costs: Costs) -> None:
        self._space, self._costs = space, costs
        self._weights_U = space.costs_U() / space.costs_U().sum()
        self._weights_L = self._by_layer(self._weights_U)

    @property
    def may_list(self) -> bool:
        """Whether kernels can go by lists at all."""
        return self._costs.listing < NEVER and not {"kv_group", "channel"}.isdisjoint(self._space.kinds)

    def _by_layer(self, values_U: torch.Tensor) -> torch.Tensor:
        return torch.stack([values_U[span].sum() for span in self._space.layer_spans])

    def _shares(self, kept_U: torch.Tensor) -> list[float]:
        """The share of each layer's weights that belongs to these units."""
        return (self._by_layer(self._weights_U * kept_U) / self._weights_L).nan_to_num(1.0).tolist()

    def ways(
        self, possible_U: torch.Tensor, kept_U: torch.Tensor | None, tokens: int | Sequence[int], *, each: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Units to compute, see ``working``, and those whose products go by lists, see ``listed``.

        ``kept_U`` may be None: then nothing is listed.
        """
        listed_U = None if kept_U is None else self.listed(possible_U, kept_U, tokens, each=each)
        return self.working(possible_U, tokens, listed_U), listed_U

    def working(
        self, possible_U: torch.Tensor, tokens: int | Sequence[int], listed_U: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Which units to compute, bool, out of those that masks may keep; None: all.

        A layer in which gathering does not pay, or that goes by lists, is computed whole. ``tokens`` as in ``listed``.
        """
        if possible_U.all():
            return None
        pairs = zip(self._tokens_L(tokens), self._shares(possible_U), strict=True)
        pays_U = torch.tensor([self._costs.gathers(*pair) for pair in pairs])[self._space.layer_U]
        if listed_U is not None:
            pays_U &= ~listed_U
        return possible_U | ~pays_U if pays_U.any() else None

    def listed(
        self, possible_U: torch.Tensor, kept_U: torch.Tensor, tokens: int | Sequence[int], *, each: int
    ) -> torch.Tensor | None:
        """Units, bool, of the layers of which masks keep so little that kernels had better go by lists; None: none.

        Args:
            possible_U: units that masks may keep.
            kept_U: the share of masks that keep each unit.
            tokens: of all masks together; one number, or one for each layer.
            each: tokens in a row under one mask.
        """
        if each < _LISTED_TOKENS or not self.may_list:
            return None
        triples = zip(self._tokens_L(tokens), self._shares(possible_U), self._shares(kept_U), strict=True)
        lists_L = torch.tensor([self._costs.lists(*triple) for triple in triples])
        return lists_L[self._space.layer_U] if lists_L.any() else None

    def _tokens_L(self, tokens: int | Sequence[int]) -> Sequence[int]:
        return [tokens] * len(self._weights_L) if isinstance(tokens, int) else tokens

    def together(self, alive_KU: torch.Tensor, windows: int, tokens: int, *, rows: int) -> bool:
        """Whether masks on the same windows had better go through together than one after the other."""
        if len(alive_KU) == 1:
            return True
        together, alone_L = 0.0, [1] * len(self._weights_L)
        for part_KU in alive_KU.split(rows):
            classes_L = [len(masks) for masks in Branching.of(self._space, part_KU).masks_of_layers]
            at_once = min(windows, max(1, rows // len(part_KU)))
            together += windows / at_once * self._of_pass(part_KU, classes_L, at_once * tokens)
        at_once = min(windows, rows)
        apart = sum(self._of_pass(mask_1U, alone_L, at_once * tokens) for mask_1U in alive_KU.split(1))
        return together <= windows / at_once * apart

    def _of_pass(self, alive_KU: torch.Tensor, classes_L: Sequence[int], tokens: int) -> float:
        """Cost of one pass in which layer l runs ``classes_L[l]`` different masks on ``tokens`` tokens each."""
        costs, kept_L = self._costs, [math.inf] * len(self._weights_L)
        if tokens >= _LISTED_TOKENS and self.may_list:
            kept_L = self._shares(alive_KU.mean(0, dtype=torch.float64))
        weights: float = sum(
            layer * costs.of_weights(classes * tokens, share, kept)
            for layer, classes, share, kept in zip(
                self._weights_L.tolist(), classes_L, self._shares(alive_KU.any(0)), kept_L, strict=True
            )
        )
        return costs.passing + weights + (1 - costs.blocks) * classes_L[-1] * tokens
