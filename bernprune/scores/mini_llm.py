"""MINI-LLM: magnitude times activation times gradient, the gradient estimated by forward passes only (Cheng, Zhang and
Shi, 2024, arXiv 2407.11681), from differences of the loss in random directions (SPSA: Spall, 1992; with noise that is
made again rather than kept: Malladi et al., 2023).

An estimate from P directions among n numbers has a variance of about n / P times the mean squared gradient. A model
has hundreds of thousands of gates of units, but billions of weights: ``mini-llm`` moves gates, ``mini-llm-weights``
weights, of which only sums over a unit mean anything. Training has made the mean gradients small, beside those of
single windows: the note on signal to noise tells what is left.

Letters: P directions, B windows of a batch, U units, O, I rows and columns of a weight, R rows, T tokens.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from bernprune.errors import ConfigError
from bernprune.losses import token_losses
from bernprune.models.forwards import forwarding
from bernprune.models.statistics import POINTS, RunningMoments
from bernprune.names import Kind
from bernprune.objective import masked_objective
from bernprune.scores.base import Context, Metric
from bernprune.scores.stream import COUPLED, LayerPass, Scores, by_layer, of_parts, of_units, projection_of
from bernprune.scores.wanda_sp import WANDA_SP
from bernprune.seeding import generator

_READ = {"key": "query", "value": "query", "up": "gate"}  # projections that read the same as another
GATE_STEP = 2**-4  # which every number format holds exactly
WEIGHT_STEP = 1e-3


def gate_gradients(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the loss by a gate on each unit, and the variance of each estimate, float64 ``[U]`` both.

    Every window has directions z of its own, of plus and minus one a gate; the estimate is the mean over them of
    z (L(1 + step z) - L(1 - step z)) / (2 step), where gates are what the model's number format makes of them.

    Raises:
        ConfigError: a step that the number format does not tell from none.
    """
    step = context.options.step or GATE_STEP
    dtype = context.view.model.dtype
    size = context.view.space.size
    above, below = torch.tensor([1 + step, 1 - step], dtype=torch.float64).to(dtype).tolist()
    if above == below:
        raise ConfigError(f"initial.step must change 1 in {dtype}, but is {step:g}; {torch.finfo(dtype).eps:g} does")
    sum_U = torch.zeros(size, dtype=torch.float64)
    squares = 0.0
    count = 0
    with masked_objective(context.view, context.ops, rows_per_forward=context.rows_per_forward) as objective:
        for pair in range(context.options.pairs):
            for batch, tokens_BT in enumerate(context.windows_WT.split(context.rows_per_forward)):
                source = generator(context.seed, "mini-llm", pair, batch)
                signs_BU = torch.randint(0, 2, (len(tokens_BT), size), generator=source).float() * 2 - 1
                ways_B2U = torch.stack([signs_BU, -signs_BU], dim=1)
                gates_B2CU = torch.where(ways_B2U > 0, above, below)[:, :, None]
                above_B, below_B = objective.token_shares(gates_B2CU, tokens_BT).sum(-1).T
                slope_B = (above_B - below_B) / (above - below)
                sum_U += slope_B @ signs_BU.double()
                squares, count = squares + slope_B.square().sum().item(), count + len(tokens_BT)
    mean_U = sum_U / count
    return mean_U, (squares / count - mean_U.square()).clamp(min=0) / max(1, count - 1)


def _of_gates(context: Context) -> torch.Tensor:
    grad_U, variance_U = gate_gradients(context)
    if context.options.pairs * len(context.windows_WT) > 1:
        _note(context, grad_U.square().mean().item(), variance_U.mean().item())
    return WANDA_SP.run(context) * grad_U.abs()


def _note(context: Context, observed: float, noise: float) -> None:
    """Note how reliable gradients are: what their mean square exceeds the mean variance of estimates by is signal."""
    context.notes["standard error of a gradient"] = noise**0.5
    context.notes["signal to noise of gradients, in variances"] = max(0.0, observed - noise) / max(noise, 1e-300)


class _Direction:
    """Noise for every weight that belongs to a unit, made from the same numbers whenever it is asked for."""

    def __init__(self, context: Context, pair: int, batch: int) -> None:
        self._context, self._labels = context, (pair, batch)

    def of(self, layer: int, name: str, weight: torch.Tensor) -> torch.Tensor:
        seed = generator(self._context.seed, "mini-llm-weights", *self._labels, layer, name).initial_seed()
        source = torch.Generator(weight.device).manual_seed(seed)
        return torch.randn(weight.shape, generator=source, device=weight.device, dtype=torch.float32)

    @contextmanager
    def applied(self, step: float) -> Iterator[None]:
        """For the length of the block, weights are that far along; they are not written to."""
        view, names = self._context.view, [name for names in COUPLED.values() for name in names]
        with ExitStack() as moved:
            for (index, layer), name in itertools.product(enumerate(view.layers), names):
                projection = projection_of(view, layer, name)
                moved.enter_context(forwarding(projection, self._moved(projection, index, name, step)))
            yield

    def _moved(self, projection: nn.Linear, layer: int, name: str, step: float) -> Callable[..., torch.Tensor]:
        def forward(x_RTI: torch.Tensor) -> torch.Tensor:
            weight_OI = projection.weight
            noise_OI = self.of(layer, name, weight_OI)
            return F.linear(x_RTI, (weight_OI + step * noise_OI).to(weight_OI.dtype), projection.bias)

        return forward


def _slopes(context: Context) -> list[tuple[_Direction, float]]:
    """Every direction, and how fast the loss of its windows grows along it, times their share of the text."""
    step, slopes = context.options.step or WEIGHT_STEP, []
    for pair in range(context.options.pairs):
        for batch, tokens_BT in enumerate(context.windows_WT.split(context.rows_per_forward)):
            direction, losses = _Direction(context, pair, batch), []
            for sign in (1, -1):
                with direction.applied(sign * step):
                    losses.append(_loss(context, tokens_BT))
            share = len(tokens_BT) / (context.options.pairs * len(context.windows_WT))
            slopes.append((direction, share * (losses[0] - losses[1]) / (2 * step)))
    return slopes


@torch.inference_mode()
def _loss(context: Context, tokens_BT: torch.Tensor) -> float:
    tokens_BT = tokens_BT.to(context.view.device)
    hidden_BTD = context.view.decoder(input_ids=tokens_BT, use_cache=False).last_hidden_state
    head = context.view.model.get_output_embeddings()
    return token_losses(head, hidden_BTD, tokens_BT).double().mean().item()


def _of_weights(context: Context) -> torch.Tensor:
    slopes, squares = _slopes(context), list[tuple[float, int]]()  # sums and numbers, of each weight's gradients

    def of_layer(at: LayerPass) -> Scores:
        seen = at.moments(("query", "output", "gate", "down"))

        def of_kind(kind: Kind, count: int) -> torch.Tensor:
            return of_units([salience(at, name, seen[_READ.get(name, name)]) for name in COUPLED[kind]], count)

        return of_parts(of_kind("kv_group", at.layer.shape.kv_groups), of_kind("channel", at.layer.shape.channels))

    def salience(at: LayerPass, name: str, inputs: RunningMoments) -> torch.Tensor:
        """Sums of |W_ij| |g_ij| |x_j| over each row of a weight, or each column of one that reads units, ``[O]``."""
        weight_OI = at.projection(name).weight.detach()
        grad_OI = torch.zeros_like(weight_OI, dtype=torch.float32)
        for direction, slope in slopes:
            grad_OI += slope * direction.of(at.index, name, weight_OI)
        squares.append((grad_OI.square().sum().item(), grad_OI.numel()))
        salience_OI = (weight_OI * grad_OI).abs().double() * inputs.second_moment_E.sqrt().to(weight_OI.device)
        return salience_OI.sum(0 if name in POINTS else 1)

    scores_U = by_layer(of_layer)(context)
    observed = sum(total for total, _ in squares) / sum(numbers for _, numbers in squares)
    if len(slopes) > 1:
        _note(context, observed, _noise([slope for _, slope in slopes], observed))
    return scores_U


def _noise(slopes: list[float], observed: float) -> float:
    """Mean variance, over weights, of the sum of slopes times directions, from how far its terms differ.

    Squares of directions are one on average, those of the sums ``observed``.
    """
    count = len(slopes)
    return max(0.0, sum(slope**2 for slope in slopes) - observed / count) * count / (count - 1)


_SOURCE = "Cheng, Zhang and Shi, 2024"

MINI_LLM = Metric(
    "mini-llm",
    "wanda-sp times the size of the loss's gradient by a gate on the unit, estimated by forward passes",
    _SOURCE,
    _of_gates,
    passes=lambda layers, options: 2.0 * options.pairs + 1,
    reads=("pairs", "step"),
)
MINI_LLM_WEIGHTS = Metric(
    "mini-llm-weights",
    "weight times activation times gradient over a unit's weights, estimated by forward passes: mostly noise",
    _SOURCE,
    _of_weights,
    plain=True,
    passes=lambda layers, options: 2.0 * options.pairs + 1,
    reads=("pairs", "step"),
)
