"""Text to token windows that are addressed by step.

Letters: N tokens of the stream, W windows, B windows of one batch, T tokens of a window.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bernprune.errors import ConfigError, DataError, ModelError
from bernprune.seeding import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A document up to this length is encoded in one go, so that token counts agree with everybody's (WikiText-2 is
# 1.3 million characters). A tokenizer that does not split at spaces first gets slower with length, hence the limit.
WHOLE_CHARACTERS = 2_000_000
PIECE_CHARACTERS = 256_000
BATCH_CHARACTERS = 4_000_000  # encoded per call, which bounds the encoder's memory: about 100 bytes a token
PASSAGE = 64  # tokens, a power of two: so many in a row are hardly written twice, but copied
_FACTOR = 0x9E3779B97F4A7C15  # odd
_FIRST_BITS = 24


def tokenize(tokenizer: "PreTrainedTokenizerBase", documents: Iterable[str], *, vocab_size: int) -> Tensor:
    """All documents as one stream of token ids, int64 [N].

    Each document is preceded by the tokenizer's BOS if it has one; otherwise documents are separated by its EOS if
    it has one, and otherwise by nothing. Documents of more than ``WHOLE_CHARACTERS`` are encoded in pieces cut at
    line ends; a tokenizer that marks the beginning of a text (as Llama's) then adds one token a cut.

    ``vocab_size`` is the number of ids that the model knows; an id beyond it raises ``ModelError``.
    """
    bos = tokenizer.bos_token_id
    mark = bos if bos is not None else tokenizer.eos_token_id
    parts: list[Tensor] = []
    for batch in _batches(documents):
        encoded = _encode(tokenizer, [piece for _, piece in batch])
        for (opens, _), ids in zip(batch, encoded, strict=True):
            wanted = opens and mark is not None and (bos is not None or bool(parts))
            if wanted and ids[:1].tolist() != [mark]:  # some texts, and some tokenizers, bring the mark themselves
                parts.append(torch.tensor([mark]))
            parts.append(ids)
    stream_N = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    _check_ids(stream_N, vocab_size)
    return stream_N


class TokenWindows:
    """Windows of ``window`` tokens, drawn for ever from a stream and addressed by step.

    An epoch shows every one of the ``num_windows`` = N // window windows once, in an order drawn from (seed, epoch).
    The stream is taken as a ring: epoch 0 cuts it at its beginning, later ones at a place drawn from (seed, epoch),
    so that they show other windows, and the N % window tokens left out are others too. From epoch 1 on one window
    may thus join the end of the stream to its beginning, as windows join one document to the next.

    Nothing depends on which batches were asked for before, so a step is all that a run has to remember.
    """

    def __init__(self, stream_N: Tensor, *, window: int, seed: int, at_least: int = 1) -> None:
        """``at_least`` is the number of windows without which the stream is refused by ``DataError``."""
        self.num_windows = _count_windows(stream_N, window, at_least=at_least)
        self.window = window
        self.seed = seed
        self._stream_N = stream_N
        self._cached: tuple[int, Tensor] | None = None  # the epoch last used and where its windows begin

    def batch(self, step: int, count: int) -> Tensor:
        """Windows number step * count ... step * count + count - 1 of the endless sequence, int64 [count, window].

        With the same ``count`` at every step no window is left out or repeated within an epoch; ``count`` may
        exceed ``num_windows``, and a batch may span epochs.
        """
        _require("step", step, least=0)
        return self.windows(step * count, count)

    def windows(self, first: int, count: int) -> Tensor:
        """Windows number first ... first + count - 1 of the endless sequence, int64 [count, window]."""
        _require("first", first, least=0)
        _require("count", count, least=1)
        starts_B = torch.cat(list(self._starts(first, first + count)))
        index_BT = starts_B[:, None] + torch.arange(self.window)
        return self._stream_N[index_BT % self._stream_N.numel()]

    def _starts(self, first: int, end: int) -> Iterator[Tensor]:
        while first < end:
            epoch, position = divmod(first, self.num_windows)
            chosen = self._epoch(epoch)[position : position + end - first]
            yield chosen
            first += chosen.numel()

    def _epoch(self, epoch: int) -> Tensor:
        """Where the windows of an epoch begin, in its order: int64 [W]."""
        if self._cached is None or self._cached[0] != epoch:
            random = generator(self.seed, "windows", epoch)
            order_W = torch.randperm(self.num_windows, generator=random)
            cut = torch.randint(self._stream_N.numel(), (), generator=random) if epoch else 0
            self._cached = (epoch, order_W * self.window + cut)
        return self._cached[1]


def evaluation_windows(stream_N: Tensor, window: int, *, max_windows: int | None = None) -> Tensor:
    """The stream cut into disjoint windows from its beginning, in order: int64 [W, window], a view of the stream.

    What does not fill a window is dropped. At most the first ``max_windows`` are given; ``DataError`` if there is none.
    """
    num_windows = _count_windows(stream_N, window, at_least=1)
    if max_windows is not None:
        _require("max_windows", max_windows, least=1)
        num_windows = min(num_windows, max_windows)
    return stream_N[: num_windows * window].view(num_windows, window)


def text_fingerprint(stream_N: Tensor) -> str:
    """Sixteen hexadecimal digits that tell which tokens were used, for the record of a measurement."""
    return hashlib.sha256(stream_N.cpu().numpy().astype("<i8").tobytes()).hexdigest()[:16]


def repeated(stream_N: Tensor, other_M: Tensor) -> Tensor:
    """Which tokens of a stream lie in a passage of ``PASSAGE`` tokens or more that stands in another, too: bool [N]."""
    in_other_P = _shared(_passages(stream_N), _passages(other_M))  # of the passage that begins there
    change_N = np.zeros(len(stream_N) + 1, dtype=np.int64)
    change_N[: len(in_other_P)] += in_other_P
    change_N[PASSAGE : PASSAGE + len(in_other_P)] -= in_other_P
    return torch.from_numpy(change_N.cumsum()[:-1] > 0)


def _passages(stream_N: Tensor) -> np.ndarray:
    """A number for each passage of ``PASSAGE`` tokens, by its tokens alone, uint64 [N - PASSAGE + 1].

    Two numbers of half as long passages make one as long passages each: polynomials modulo 2^64 (Karp and Rabin, 1987).
    """
    numbers_P, factor, length = stream_N.numpy().astype(np.uint64), _FACTOR, 1
    while length < PASSAGE:
        numbers_P = numbers_P[:-length] * np.uint64(factor) + numbers_P[length:]
        factor, length = factor * factor % 2**64, 2 * length
    return numbers_P


def _shared(one_P: np.ndarray, other_Q: np.ndarray) -> np.ndarray:
    """Which numbers stand among others, too, bool [P]; sorted are only those whose first bits are those of others."""
    first_P, first_Q = (numbers >> np.uint64(64 - _FIRST_BITS) for numbers in (one_P, other_Q))
    seen_2 = np.zeros((2, 2**_FIRST_BITS), dtype=bool)
    seen_2[0, first_P], seen_2[1, first_Q] = True, True
    shared_P = seen_2[1, first_P]
    shared_P[shared_P] = np.isin(one_P[shared_P], other_Q[seen_2[0, first_Q]])
    return shared_P


def _batches(documents: Iterable[str]) -> Iterator[list[tuple[bool, str]]]:
    """Groups of about ``BATCH_CHARACTERS`` of pieces of documents, each with whether it opens its document."""
    batch: list[tuple[bool, str]] = []
    size = 0
    for document in documents:
        for number, piece in enumerate(_pieces(document)):
            if batch and size + len(piece) > BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
            batch.append((number == 0, piece))
            size += len(piece)
    if batch:
        yield batch


def _pieces(document: str) -> Iterator[str]:
    """The document, cut after line ends if it is too long to be encoded whole; the pieces join to the document."""
    start = 0
    if len(document) > WHOLE_CHARACTERS:
        while len(document) - start > PIECE_CHARACTERS:
            limit = start + PIECE_CHARACTERS
            end = document.rfind("\n", start, limit) + 1 or limit
            yield document[start:end]
            start = end
    yield document[start:]


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[Tensor]:
    """Token ids of each text, int64, without special tokens."""
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning that a text exceeds the model's context: the stream is cut to windows anyway
    )
    return [torch.tensor(ids, dtype=torch.int64) for ids in encoded["input_ids"]]


def _check_ids(stream_N: Tensor, vocab_size: int) -> None:
    largest = int(stream_N.max()) if stream_N.numel() else 0
    if largest >= vocab_size:
        raise ModelError(
            f"tokenizer mismatch: the tokenizer gave the token id {largest}, but the model knows only ids below "
            f"{vocab_size}; use the tokenizer that the model was trained with"
        )


def _count_windows(stream_N: Tensor, window: int, *, at_least: int) -> int:
    """How many whole windows a stream holds; ``DataError`` if fewer than ``at_least``."""
    _require("window", window, least=1)
    _require("at_least", at_least, least=1)
    if stream_N.ndim != 1 or stream_N.dtype != torch.int64:
        raise DataError(f"tokens must be one stream of int64 [N], not {stream_N.dtype} {list(stream_N.shape)}")
    num_tokens = stream_N.numel()
    num_windows = num_tokens // window
    if num_windows < at_least:
        raise DataError(
            f"the text is too short: it has {num_tokens:,} tokens, but {at_least:,} x {window:,} = "
            f"{at_least * window:,} are needed for {at_least:,} window(s) of {window:,} tokens"
        )
    return num_windows


def _require(name: str, value: int, *, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")
