"""What a repair needs, asked before the work: enough text, and a place for a bias."""

from collections.abc import Sequence

from bernprune.errors import ConfigError, DataError
from bernprune.models.view import ModelView
from bernprune.names import RepairName
from bernprune.units import Architecture, LayerPlan, LayerShape

CHECKED = 4  # of so many windows, one is not fitted on
TOKENS_PER_INPUT = 2  # fitted on, at least: with as many as inputs, anything is fitted


def check_biases(view: ModelView) -> None:
    """Raises ``ConfigError`` unless each last projection of a branch has a bias of its own."""
    for layer in view.layers:
        if layer.output.bias is None or layer.down.bias is None:
            raise ConfigError(
                f"repair.method 'bias' needs biases of the attention output and down projections, which this "
                f"{view.architecture.model_type} model has not; with repair.biases 'always' it gets them, as the "
                "saved config declares, and 'ridge' can do without"
            )


def check_tokens(
    architecture: Architecture,
    windows: Sequence[int],
    method: RepairName,
    kept: Sequence[LayerPlan] | None = None,
) -> None:
    """Raises ``DataError`` if text of ``[windows, tokens]`` is too short for a method.

    ``kept``: what is kept of each layer; None: whatever may be kept.
    """
    count, window = windows
    inputs = _inputs(architecture, method, kept)
    needed = needed_windows(inputs, window)
    if count < needed:
        raise DataError(
            f"the calibration text is too short for repair {method!r}: it has {count:,} windows of {window:,} tokens, "
            f"but {needed:,} ({needed * window:,} tokens) are needed, {TOKENS_PER_INPUT} tokens for each of {inputs:,} "
            f"inputs and one window of {CHECKED} to check; give more text, or raise repair.windows if that is the limit"
        )


def needed_windows(inputs: int, window: int, tokens: int = TOKENS_PER_INPUT) -> int:
    """The fewest windows of which so many tokens are fitted on for each of so many inputs."""
    fitted = max(1, -(-tokens * inputs // window))
    return fitted + max(1, (fitted - 1) // (CHECKED - 1))


def _inputs(architecture: Architecture, method: RepairName, kept: Sequence[LayerPlan] | None) -> int:
    """Unknowns of the largest Gram matrix that a method solves with; 0 for none."""
    if method == "bias":
        return 0
    sizes = [architecture.hidden_size] if method == "two-step" else [0]
    everything = kept is None or method == "admm"
    for index, shape in enumerate(architecture.layers):
        layer = _all_of(shape) if kept is None or everything else kept[index]
        group = 1 if method == "scale" else shape.queries_per_group * architecture.head_dim
        sizes += [group * len(layer.kv_groups), len(layer.channels)]
    return max(sizes)


def _all_of(shape: LayerShape) -> LayerPlan:
    return LayerPlan(tuple(range(shape.kv_groups)), tuple(range(shape.channels)))
