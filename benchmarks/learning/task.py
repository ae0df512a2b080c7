"""What every method is given: a model with its units, a budget, three texts that share no document, and a meter.

- *Training*: the first nine tenths of the learning text's tokens. All that is scored, searched and selected on.
- *Development*: its last tenth. For choosing settings; never for learning.
- *Held-out*: another text, on which a result is reported, once.

Letters: K masks, U units, B windows, T tokens.
"""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning.gates import gated
from bernprune.config import make_config
from bernprune.data import evaluation_windows, tokenize
from bernprune.embedded import EMBEDDED
from bernprune.errors import BernpruneError
from bernprune.evaluation.perplexity import CHARACTERS_PER_TOKEN, Protocol
from bernprune.losses import token_losses
from bernprune.models.loading import load_config, load_tokenizer
from bernprune.models.products import quick_products
from bernprune.names import Scope
from bernprune.objective import masked_objective
from bernprune.policy.bernoulli import graded
from bernprune.policy.selection import select
from bernprune.run.stage import set_stage
from bernprune.scores import SCORES, Options, initial_scores
from bernprune.settings import merge
from bernprune.storage import write_bytes
from bernprune.text import load_documents

Settings = Mapping[str, Any]

SHARED = Path(__file__).parents[3] / "shared"
REPORT_TOKENS = 131_072  # of development and of held-out text
PASSES_OF_A_GRADIENT = 3  # a forward and a backward pass cost as much as three forward passes


class OverBudget(BernpruneError):
    """A method asked for more windows than it was given."""


@dataclass(frozen=True)
class Source:
    """A model, the text to learn from and the text to report on: local paths, or 'embedded'.

    ``config``: what of bernprune's configuration is not its default.
    """

    model: str
    text: str
    held_out: str
    config: Settings = field(default_factory=dict)

    @property
    def missing(self) -> str | None:
        """The first path that is not there."""
        paths = (self.model, self.text, self.held_out)
        return next((path for path in paths if path != EMBEDDED and not Path(path).exists()), None)


SOURCES = {
    "stories": Source(
        model=str(SHARED / "models/stories260K"),
        text=str(SHARED / "data/tinystories/train.jsonl"),
        held_out=str(SHARED / "data/tinystories/valid.jsonl"),
    ),
    "embedded": Source(EMBEDDED, EMBEDDED, EMBEDDED),
    "novels": Source(  # made by train_novels.py
        model=str(Path(__file__).parent / "novels"),
        text=str(SHARED / "data/english-novels/train.txt.xz"),
        held_out=str(SHARED / "data/english-novels/valid.txt"),
    ),
}


def at_hand(models: Iterable[str]) -> Iterator[str]:
    """Those whose files are there; of the others it is said that they are skipped."""
    for model in models:
        if SOURCES[model].missing is None:
            yield model
        else:
            print(f"{model} is skipped: {SOURCES[model].missing} does not exist")


class Meter:
    """Counts the windows that a method runs forward, and those of them it runs backward; refuses to exceed its limit.

    The limit is on forward passes alone: methods that back-propagate are given the same number, gradients on top.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.sequences, self.backward = limit, 0, 0

    @property
    def left(self) -> int:
        """Windows that may still be run."""
        return self.limit - self.sequences

    @property
    def equivalent(self) -> int:
        """Forward passes that would have cost as much."""
        return self.sequences + (PASSES_OF_A_GRADIENT - 1) * self.backward

    def spend(self, windows: int, *, backward: bool = False) -> None:
        """Before they are run. Raises ``OverBudget``."""
        if windows > self.left:
            raise OverBudget(
                f"{windows:,} more windows were asked for, but only {self.left:,} of {self.limit:,} are left"
            )
        self.sequences += windows
        self.backward += windows * backward


class Task:
    """One model at one sparsity with the windows of one seed.

    Args:
        folder: where a copy of the embedded training text may lie.
        limit: windows a method may run forward, all counted.

    Raises:
        BernpruneError: a model or text that is missing or does not fit.
    """

    def __init__(self, source: Source, folder: Path, *, sparsity: float, seed: int, limit: int) -> None:
        self.source, self.meter = source, Meter(limit)
        given: Settings = {
            "model": {"path": source.model},
            "data": {"text": learning_text(source, folder), "eval_tokens": REPORT_TOKENS},
            "budget": {"sparsity": sparsity},
            "seed": seed,
        }
        self.given = merge(given, source.config)
        self.stage = set_stage(make_config(self.given))
        self.view, self.budget, self.limits = self.stage.view, self.stage.budget, self.stage.limits
        self.space, self.window = self.view.space, self.stage.config.data.window
        # Of each kind in each layer, the indices of its units.
        self.groups = torch.arange(self.space.size).split([group.count for group in self.space.groups])
        self._read = 0

    def as_in_a_run(self) -> AbstractContextManager[None]:
        """For the length of the block, products are taken as a run would take them."""
        return quick_products(self.view.device, self.view.model.dtype)

    # What a method may use, and pays for

    @property
    def seed(self) -> int:
        """Of all that is drawn."""
        return self.stage.config.seed

    def text(self, count: int) -> torch.Tensor:
        """The next training windows, ``[B, T]``; reading is free, running is not."""
        first, self._read = self._read, self._read + count
        return self.stage.train.windows(first, count)

    def rewind(self) -> None:
        """Read from the first window again."""
        self._read = 0

    def losses(self, masks_KU: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Mean loss of each mask, float64 ``[K]``, nats per token."""
        self.meter.spend(len(masks_KU) * len(tokens_BT))
        return self._losses(masks_KU, tokens_BT)

    def gated_loss(self, gates_U: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Mean loss under soft or hard gates, to be differentiated once: both passes are paid for here."""
        self.meter.spend(len(tokens_BT), backward=True)
        tokens_BT = tokens_BT.to(self.view.device)
        with gated(self.view, gates_U):
            hidden_BTD = self.view.decoder(input_ids=tokens_BT, use_cache=False).last_hidden_state
        return token_losses(self.view.model.get_output_embeddings(), hidden_BTD, tokens_BT).mean()

    def scores(
        self, name: str = "wanda-sp", *, tokens_BT: torch.Tensor | None = None, mask_U: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A metric's scores, float64 ``[U]``, on the usual calibration windows or others, of the model or a part."""
        tokens_BT = self.stage.initial_windows_WT if tokens_BT is None else tokens_BT
        self.meter.spend(len(tokens_BT))
        return self._scores(name, tokens_BT, mask_U)

    def scores_in_turn(self, name: str) -> torch.Tensor:
        """A metric's scores, float64 ``[U]``, layer by layer behind what is already pruned, which runs each twice."""
        tokens_BT = self.stage.initial_windows_WT
        self.meter.spend(2 * len(tokens_BT))
        options = Options(sparsity=self.budget.sparsity, pruned_inputs=True)
        return initial_scores(self.view, tokens_BT, SCORES[name], seed=self.seed, ops=self.stage.ops, options=options)

    def select(self, priorities_U: torch.Tensor, tie_break_U: torch.Tensor | None = None) -> torch.Tensor:
        """The mask, bool ``[U]``, of the most wanted units within budget and limits."""
        return select(priorities_U, self.budget, limits=self.limits, tie_break_U=tie_break_U)

    def select_by(self, scores_U: torch.Tensor, scope: Scope) -> torch.Tensor:
        """As ``select``; each kind loses the same share in every layer, or over all layers, or all are pooled."""
        return self.select(graded(self.space, scores_U, scope), scores_U)

    # What the benchmark itself looks at, unmetered

    def uniform_mask(self) -> torch.Tensor:
        """What Wanda-sp removes when every kind in every layer loses the same share."""
        return self.select_by(self._scores("wanda-sp", self.stage.initial_windows_WT, None), "layer")

    def report(self, masks_KU: torch.Tensor, *, held_out: bool) -> tuple[list[float], Protocol]:
        """Loss of each mask on held-out or on development text, nats per token, and how it was taken."""
        if held_out:
            tokens_BT = _held_out(self.source.model, self.source.held_out, self.window)
            protocol = Protocol.of("held-out", tokens_BT)
        else:
            tokens_BT = self.stage.eval_windows_WT
            protocol = Protocol.of("development", tokens_BT)
        return self._losses(masks_KU, tokens_BT).tolist(), protocol

    def _losses(self, masks_KU: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        with masked_objective(self.view, self.stage.ops) as objective:
            return objective.losses(masks_KU, tokens_BT)

    def _scores(self, name: str, tokens_BT: torch.Tensor, mask_U: torch.Tensor | None) -> torch.Tensor:
        gates_U = torch.ones(self.space.size) if mask_U is None else mask_U.float()
        with gated(self.view, gates_U):  # first, so that what the metric sees has passed the gates
            return initial_scores(self.view, tokens_BT, SCORES[name], seed=self.stage.config.seed)


def learning_text(source: Source, folder: Path) -> str:
    """The path of a learning text; the embedded one, which has no last tenth of its own, is written into the folder."""
    if source.text != EMBEDDED:
        return source.text
    path = folder / "embedded.jsonl"
    if not path.is_file():
        documents = load_documents(EMBEDDED, split="train", max_characters=64_000_000)
        write_bytes(path, "".join(json.dumps({"text": document}) + "\n" for document in documents).encode())
    return str(path)


@functools.cache
def _held_out(model: str, text: str, window: int) -> torch.Tensor:
    documents = load_documents(text, split="held-out", max_characters=CHARACTERS_PER_TOKEN * REPORT_TOKENS)
    stream_N = tokenize(load_tokenizer(model), documents, vocab_size=load_config(model).vocab_size)
    return evaluation_windows(stream_N, window, max_windows=REPORT_TOKENS // window)
