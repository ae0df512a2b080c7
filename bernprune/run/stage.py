"""Everything a run works with, loaded and checked against each other before anything is written."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bernprune.backends import MaskedOps, find_device, load_backend
from bernprune.config import RunConfig
from bernprune.costs import Costs, measure
from bernprune.data import TokenWindows, evaluation_windows, repeated, text_fingerprint, tokenize
from bernprune.embedded import EMBEDDED
from bernprune.errors import DataError, ModelError, prefixed
from bernprune.evaluation.perplexity import CHARACTERS_PER_TOKEN, Protocol, check_window
from bernprune.losses import TokenLoss
from bernprune.models.masking import choose_ops
from bernprune.models.shortening import int8_quantiser, release
from bernprune.models.view import ModelView, weights_fingerprint
from bernprune.names import ObjectiveName, SearchDtype
from bernprune.objective import MaskedObjective, masked_objective
from bernprune.policy.allocation import shares_by_kind
from bernprune.policy.budget import Budget
from bernprune.policy.selection import Limits
from bernprune.run.initial import check_scores, check_scoring
from bernprune.run.methods import check_methods
from bernprune.run.opening import check_family, is_large, open_tokenizer, open_view
from bernprune.run.workload import (
    Workload,
    check_budget,
    fitting_windows,
    judging_windows,
    make_budget,
    make_limits,
    plan_work,
)
from bernprune.text import load_documents
from bernprune.units import UnitSpace

logger = logging.getLogger(__name__)

# With one source for both, the last tenth of its tokens is for evaluation alone.
_HELD_OUT_TENTHS = 1
_EMBEDDED_HELD_OUT = "embedded, held out"
_KNOWN = 0.1  # share of the text to evaluate on, above which a user is told that it is learned from, too
_KEPT_BACK = 10  # one in so many windows to learn from, at most, is kept back for the final choice
_ROWS = 64  # in one pass on a processor: with more, it is no faster
_ACTIVATION_BYTES, _MOST_ROWS_LOG2 = 1.5 * 2**30, 8  # on a GPU, however much memory it has
_LEAST_KEPT_BACK = 32  # windows; a choice on fewer would be worse than one on text that was learned from


@dataclass
class Stage:
    """A model with its units, a budget, and text.

    ``kept_back`` is for the final choice: windows that are not in ``train``. It is None if the search reads no window
    twice, or the text is too short; then the choice goes on in ``train`` where the search ended.

    Attributes:
        full_dtype: number format of the model itself.
        dtype: that of the weights, ``same`` if it is the model's own.
        own_weights: fingerprint of the model itself, if that is another one.
    """

    config: RunConfig
    view: ModelView
    tokenizer: Any
    ops: MaskedOps
    budget: Budget
    limits: Limits
    workload: Workload
    train: TokenWindows
    kept_back: TokenWindows | None
    initial_windows_WT: torch.Tensor
    eval_windows_WT: torch.Tensor
    protocol: Protocol
    text_sha256: str
    rows: int  # in one forward pass, at most; fewer once a GPU was full
    full_dtype: torch.dtype
    costs: Costs = field(default_factory=Costs)
    dtype: SearchDtype = "same"
    own_weights: str | None = None

    @property
    def weights(self) -> str:
        """Fingerprint of the model itself, whatever its weights are in."""
        return self.own_weights or weights_fingerprint(self.view.model)

    def with_weights(self, dtype: SearchDtype) -> "Stage":
        """This stage with the weights in a number format, ``same`` for the model's own.

        If they are in another now, these are given up first, so that both are never held at once. What does not fit on
        a GPU stays on the processor.

        Raises:
            ModelError: what lies there now is another model.
        """
        if dtype == self.dtype:
            return self
        device, began = self.view.device, self.weights
        release(self.view.model)
        opened = open_view(self.config, find_device(self.config.model.device), dtype, anywhere=True)
        known = not self.ops.dtypes or opened.view.model.dtype in self.ops.dtypes
        same = known and opened.view.device == device
        name = "auto" if self.config.backend == "triton" and not same else self.config.backend
        found = replace(
            self,
            view=opened.view,
            dtype=opened.dtype,
            own_weights=opened.own_weights,
            ops=choose_ops(name, opened.view),
            rows=rows_per_forward(self.config, opened.view),
            costs=Costs(),
        )
        if (now := found.weights) != began:
            raise ModelError(
                f"the weights of {self.config.model.path} are not those that were searched any more (fingerprint "
                f"{began}, but now {now}); give them back"
            )
        return found

    @contextmanager
    def objective(
        self, kind: ObjectiveName | TokenLoss = "cross-entropy", before_pass: Callable[[int], object] | None = None
    ) -> Iterator[MaskedObjective]:
        """The losses of masks, for the length of the block; see ``bernprune.objective``."""
        with masked_objective(
            self.view,
            self.ops,
            kind=kind,
            rows_per_forward=self.rows,
            before_pass=before_pass,
            costs=self.costs,
        ) as objective:
            try:
                yield objective
            finally:
                self.rows = objective.rows

    def measured_costs(self) -> Costs:
        """What forward passes cost here, unless the model is so small that it does not matter."""
        if not is_large(self.view) or self.config.search.costs == "fixed":
            return Costs()
        return measure(self.view, self.ops, self.config.data.window, self.rows)


def rows_per_forward(config: RunConfig, view: ModelView) -> int:
    """Most windows in one forward pass; on a GPU, as its memory is now."""
    given, device = config.search.rows_per_forward, view.device
    if given != "auto":
        return given
    if device.type != "cuda":
        return _ROWS
    free = min(torch.cuda.mem_get_info(device)[0] / 2, _ACTIVATION_BYTES)
    return 2 ** min(_MOST_ROWS_LOG2, int(math.log2(max(1.0, free / row_bytes(config, view)))))


def row_bytes(config: RunConfig, view: ModelView) -> int:
    """Bytes that one row's activations take: gate, up, their product, and a few residual streams, of one layer."""
    widest = max(layer.channels for layer in view.architecture.layers)
    entries = config.data.window * (3 * widest + 6 * view.architecture.hidden_size)
    return entries * view.model.dtype.itemsize


def set_stage(config: RunConfig, *, chooses: bool = True) -> Stage:
    """Load and check everything that a run needs; nothing is written.

    Args:
        chooses: whether there will be a choice among finalists, which may have too little text of its own.

    Raises:
        BernpruneError: of the kind that says what does not exist, fit or suffice.
    """
    check_scores(config)
    check_methods(config)
    device = find_device(config.model.device)
    load_backend(config.backend, device)  # or it fails before anything is read
    model_config = check_family(config)
    check_window(model_config, config.longest_window)
    if config.search.dtype == "int8":
        int8_quantiser()  # before text is read
    tokenizer = open_tokenizer(config)
    # Text before weights: a typing error in its name must not cost the loading of a large model.
    stream, held_out, eval_name = read_texts(config, tokenizer, model_config.vocab_size)
    with prefixed(config.data.text, DataError):
        _windows(config, stream)
        _initial_windows(config, stream)
    with prefixed(eval_name, DataError):
        windows_WT = evaluation_windows(
            held_out, config.data.window, max_windows=config.data.eval_tokens // config.data.window
        )
    view, dtype, full, own_weights = open_view(config, device, config.search.dtype)
    budget, limits = make_budget(config, view.space), make_limits(config)
    try_budget(config, budget, limits)
    workload = plan_work(config, view.space)
    learned, kept_back = _keep_back(config, stream, workload, view.space, warn=chooses)
    with prefixed(config.data.text, DataError):
        train, initial_WT = _windows(config, learned), _initial_windows(config, learned)
    check_scoring(config, view, initial_WT)
    logger.info(
        "%s on %s, %d units, %d training windows", config.model.path, device, view.space.size, train.num_windows
    )
    protocol = Protocol.of(eval_name, windows_WT)
    return Stage(
        config=config,
        view=view,
        tokenizer=tokenizer,
        ops=choose_ops(config.backend, view),
        budget=budget,
        limits=limits,
        workload=workload,
        train=train,
        kept_back=kept_back,
        initial_windows_WT=initial_WT,
        eval_windows_WT=windows_WT,
        protocol=protocol,
        text_sha256=text_fingerprint(stream),
        rows=rows_per_forward(config, view),
        full_dtype=full,
        dtype=dtype,
        own_weights=own_weights,
    )


def try_budget(config: RunConfig, budget: Budget, limits: Limits) -> None:
    """An impossible budget fails before the work, not after it."""
    if config.initial.kv_sparsity is not None:
        shares_by_kind(budget.space, budget.costs_U, 1 - budget.sparsity, 1 - config.initial.kv_sparsity)
    for sparsity in (budget.sparsity, *config.plans.sparsities):
        check_budget(config, make_budget(config, budget.space, sparsity), limits)


def read_texts(config: RunConfig, tokenizer: Any, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, str]:
    """The stream to learn from, the stream to evaluate on, and the name of the latter."""
    own = evaluation_text(config, tokenizer, vocab_size)  # first, as there is less of it
    stream = learning_text(config, tokenizer, vocab_size)
    if own is not None:
        warn_of_known(config, stream, *own)
        return stream, *own
    return cut_for_evaluation(config, stream)


def cut_for_evaluation(config: RunConfig, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, str]:
    """A stream as what to learn from and what to evaluate on, and the name of the latter."""
    cut = len(stream) * (10 - _HELD_OUT_TENTHS) // 10
    return stream[:cut], stream[cut:], f"{config.data.text}, last tenth"


def evaluation_text(config: RunConfig, tokenizer: Any, vocab_size: int) -> tuple[torch.Tensor, str] | None:
    """The stream to evaluate on and its name; None where that is a part of ``data.text``."""
    data = config.data
    source = EMBEDDED if data.eval_text is None and data.text == EMBEDDED else data.eval_text
    if source is None:
        return None
    characters = CHARACTERS_PER_TOKEN * data.eval_tokens
    held_out = _tokens(tokenizer, vocab_size, source, "held-out", characters, joined_by=data.eval_join)
    return held_out, _EMBEDDED_HELD_OUT if source == EMBEDDED else source


def learning_text(config: RunConfig, tokenizer: Any, vocab_size: int) -> torch.Tensor:
    """The stream of all of ``data.text`` that may be learned from."""
    data = config.data
    if config.model.path != EMBEDDED and "text" not in data.model_fields_set:
        logger.warning(
            "no calibration text was given: for %s it is the embedded one, documentation of Python packages; "
            "data.text (--text) names another",
            config.model.path,
        )
    return _tokens(tokenizer, vocab_size, data.text, "train", data.max_characters)


def warn_of_known(config: RunConfig, stream: torch.Tensor, held_out: torch.Tensor, eval_name: str) -> None:
    """Tell of text to evaluate on that is learned from, too; of the embedded text's two parts the README tells."""
    if (config.data.text, eval_name) == (EMBEDDED, _EMBEDDED_HELD_OUT):
        return
    share = repeated(held_out[: config.data.eval_tokens], stream).double().mean().item()
    if share > _KNOWN:
        logger.warning(
            "%.0f%% of %s stands in %s, too: perplexities flatter what is learned from that",
            100 * share,
            eval_name,
            config.data.text,
        )


def _windows(config: RunConfig, stream: torch.Tensor) -> TokenWindows:
    return TokenWindows(stream, window=config.data.window, seed=config.seed, at_least=config.search.windows)


def _keep_back(
    config: RunConfig, stream: torch.Tensor, workload: Workload, space: UnitSpace, *, warn: bool
) -> tuple[torch.Tensor, TokenWindows | None]:
    """The stream to learn from and, if it may be read more than once, what of it the final choice has for itself."""
    window, num_windows = config.data.window, len(stream) // config.data.window
    learning, choosing = workload.windows_read(config.search, space)
    if config.fits_to_policy:  # whatever repair follows: that may change on the way
        choosing = max(choosing, judging_windows(fitting_windows(space.architecture, config.data.window)))
    if not config.searches or not choosing or learning + choosing <= num_windows:
        return stream, None
    count = int(
        min(math.ceil(min(choosing, num_windows)), num_windows // _KEPT_BACK, num_windows - config.search.windows)
    )
    if count < _LEAST_KEPT_BACK:
        if warn:
            logger.warning(
                "%d windows of text are too few to keep some back: finalists are judged on text that was learned from",
                num_windows,
            )
        return stream, None
    cut = len(stream) - count * window
    return stream[:cut], TokenWindows(stream[cut:], window=window, seed=config.seed)


def _initial_windows(config: RunConfig, stream: torch.Tensor) -> torch.Tensor:
    """The windows that the metric sees: the first ones of the search, if both are of one length."""
    source = TokenWindows(stream, window=config.initial.window or config.data.window, seed=config.seed)
    return source.batch(0, min(config.initial.windows, source.num_windows))


def _tokens(
    tokenizer: Any, vocab_size: int, source: str, split: Any, max_characters: int, *, joined_by: str | None = None
) -> torch.Tensor:
    documents = load_documents(source, split=split, max_characters=max_characters, joined_by=joined_by)
    return tokenize(tokenizer, documents, vocab_size=vocab_size)
