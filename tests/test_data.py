"""Tokenising, and windows addressed by step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bernprune import data
from bernprune.data import PASSAGE, TokenWindows, evaluation_windows, repeated, text_fingerprint, tokenize
from bernprune.errors import BernpruneError, ConfigError, DataError, ModelError
from bernprune.seeding import generator
from bernprune.text import load_documents

SHARED = Path(__file__).parents[2] / "shared"
BOS, EOS = 0, 1
WORDS = ["<s>", "</s>", "a", "b", "c", "d"]
SIZES = [(10, 10), (19, 10), (23, 5), (64, 8), (7, 1), (100, 33), (4096, 16)]  # tokens, window


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} of the shared data, which is not on this machine")
    return path


def word_tokenizer(**marks: str) -> PreTrainedTokenizerFast:
    """Ids are positions in ``WORDS``; left to itself it puts <s> before every text; its context is two tokens."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=2, **marks)


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, [BOS, 2, 3, BOS, 4, BOS, 2]),
        ({"eos_token": "</s>"}, [2, 3, EOS, 4, EOS, 2]),
        ({"bos_token": "</s>", "eos_token": "</s>"}, [EOS, 2, 3, EOS, 4, EOS, 2]),
        ({}, [2, 3, 4, 2]),
    ],
)
def test_documents_are_marked_once(marks: dict[str, str], expected: list[int]) -> None:
    stream = tokenize(word_tokenizer(**marks), ["a b", "c", "a"], vocab_size=6)
    assert stream.dtype == torch.int64
    assert stream.tolist() == expected


def test_a_mark_in_the_text_is_not_doubled() -> None:
    assert tokenize(word_tokenizer(bos_token="<s>"), ["<s> a", "b"], vocab_size=6).tolist() == [BOS, 2, BOS, 3]


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_gives_no_window(texts: list[str]) -> None:
    stream = tokenize(word_tokenizer(), texts, vocab_size=6)
    assert stream.dtype == torch.int64
    assert stream.tolist() == []
    with pytest.raises(DataError, match="too short: it has 0 tokens"):
        TokenWindows(stream, window=1, seed=0)


def test_pieces_and_batches_leave_the_stream_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a b\nc d a\n" * 20, "a", "", "b\n" * 9, "a\n\n" + "d" + " c" * 40 + "\n"]
    whole = tokenize(word_tokenizer(bos_token="<s>"), texts, vocab_size=6)
    monkeypatch.setattr(data, "WHOLE_CHARACTERS", 20)
    for piece, batch in ((10, 10), (10, 1), (14, 40), (20, 10**6)):
        monkeypatch.setattr(data, "PIECE_CHARACTERS", piece)
        monkeypatch.setattr(data, "BATCH_CHARACTERS", batch)
        assert torch.equal(tokenize(word_tokenizer(bos_token="<s>"), texts, vocab_size=6), whole)


def test_pieces_join_to_the_document_and_end_at_line_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "WHOLE_CHARACTERS", 30)
    monkeypatch.setattr(data, "PIECE_CHARACTERS", 12)
    for document in ("one line\n" * 9, "no end of line" * 5, "\n" * 50, "x" * 30 + "\n"):
        pieces = list(data._pieces(document))
        assert "".join(pieces) == document
        assert max(map(len, pieces)) <= 12
        assert all(piece.endswith("\n") for piece in pieces[:-1]) or "\n" not in document[:30]
    assert list(data._pieces("a\n" * 15)) == ["a\n" * 15]


def test_long_documents_raise_no_warning(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = word_tokenizer(bos_token="<s>")
    assert tokenizer.model_max_length == 2
    tokenize(tokenizer, ["a b c d a b c d"], vocab_size=6)
    assert "longer than" not in caplog.text + capfd.readouterr().err


def test_ids_beyond_the_vocabulary_are_a_mismatch() -> None:
    assert tokenize(word_tokenizer(), ["a c"], vocab_size=5).tolist() == [2, 4]
    with pytest.raises(ModelError, match=r"tokenizer mismatch.* token id 4, .*below 4"):
        tokenize(word_tokenizer(), ["a c"], vocab_size=4)
    with pytest.raises(ModelError, match="tokenizer mismatch"):
        tokenize(word_tokenizer(eos_token="</s>"), ["<s>", "<s>"], vocab_size=1)


@pytest.mark.parametrize(("num_tokens", "window"), SIZES)
def test_every_epoch_shows_every_window_once(num_tokens: int, window: int) -> None:
    stream = torch.arange(num_tokens)
    windows = TokenWindows(stream, window=window, seed=3)
    assert windows.num_windows == num_tokens // window
    for epoch in range(4):
        shown = windows.batch(epoch, windows.num_windows)
        assert shown.dtype == torch.int64
        assert shown.shape == (num_tokens // window, window)
        assert shown.unique().numel() == shown.numel()
        assert torch.all((shown[:, 1:] - shown[:, :-1]) % num_tokens == 1)
        starts = shown[:, 0].sort().values
        gaps = torch.cat([starts[1:], starts[:1] + num_tokens]) - starts  # around the ring
        assert gaps.sort().values.tolist() == [window] * (len(starts) - 1) + [window + num_tokens % window]
    first = windows.batch(0, windows.num_windows)
    assert torch.equal(first[first[:, 0].argsort()], evaluation_windows(stream, window))


@pytest.mark.parametrize(("num_tokens", "window"), SIZES)
def test_batches_of_any_size_walk_the_same_sequence(num_tokens: int, window: int) -> None:
    total = 60
    sequence = TokenWindows(torch.arange(num_tokens), window=window, seed=1).batch(0, total)
    for count in (1, 4, 10, 30):
        windows = TokenWindows(torch.arange(num_tokens), window=window, seed=1)
        assert torch.equal(torch.cat([windows.batch(step, count) for step in range(total // count)]), sequence)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    stream = torch.arange(230)
    windows = TokenWindows(stream, window=7, seed=5)
    state = torch.get_rng_state()
    in_order = [windows.batch(step, 6) for step in range(40)]
    for step in torch.randperm(40, generator=generator(0, "order")).tolist():
        assert torch.equal(windows.batch(step, 6), in_order[step])
        assert torch.equal(TokenWindows(stream, window=7, seed=5).batch(step, 6), in_order[step])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(TokenWindows(stream, window=7, seed=6).batch(0, 6), in_order[0])
    assert windows.batch(10**12, 6).shape == (6, 7)


def test_later_epochs_are_cut_elsewhere_and_miss_other_tokens() -> None:
    windows = TokenWindows(torch.arange(107), window=10, seed=0)
    epochs = [windows.batch(epoch, 10) for epoch in range(12)]
    assert len({int(epoch[0, 0]) % 10 for epoch in epochs}) > 3
    assert torch.cat(epochs).unique().numel() == 107
    assert len({tuple(epoch[:, 0].tolist()) for epoch in epochs}) == 12


def test_evaluation_windows_are_the_stream_from_its_beginning() -> None:
    stream = torch.arange(23)
    assert torch.equal(evaluation_windows(stream, 5).flatten(), stream[:20])
    assert torch.equal(evaluation_windows(stream, 5, max_windows=2).flatten(), stream[:10])
    assert evaluation_windows(stream, 5, max_windows=99).shape == (4, 5)
    assert evaluation_windows(stream, 23).shape == (1, 23)
    with pytest.raises(DataError, match=r"it has 23 tokens, but .*24 are needed"):
        evaluation_windows(stream, 24)


def test_too_few_windows_are_refused_with_the_numbers() -> None:
    assert TokenWindows(torch.arange(2560), window=128, seed=0, at_least=20).num_windows == 20
    with pytest.raises(DataError, match=r"it has 2,559 tokens, but 20 x 128 = 2,560 are needed"):
        TokenWindows(torch.arange(2559), window=128, seed=0, at_least=20)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ConfigError, lambda stream: TokenWindows(stream, window=0, seed=0)),
        (ConfigError, lambda stream: TokenWindows(stream, window=2, seed=0, at_least=0)),
        (ConfigError, lambda stream: TokenWindows(stream, window=2, seed=0).batch(-1, 1)),
        (ConfigError, lambda stream: TokenWindows(stream, window=2, seed=0).batch(0, 0)),
        (ConfigError, lambda stream: evaluation_windows(stream, -1)),
        (ConfigError, lambda stream: evaluation_windows(stream, 2, max_windows=0)),
        (DataError, lambda stream: TokenWindows(stream[None], window=2, seed=0)),
        (DataError, lambda stream: evaluation_windows(stream.float(), 2)),
    ],
)
def test_window_settings_out_of_range_are_refused(error: type[BernpruneError], call: Any) -> None:
    with pytest.raises(error, match="must be"):
        call(torch.arange(8))


def test_fingerprint_tells_streams_apart() -> None:
    stream = torch.arange(50)
    assert text_fingerprint(stream) == text_fingerprint(stream.clone()) == text_fingerprint(stream.int())
    others = [stream[:49], stream.flip(0), stream + 1, stream[:0]]
    assert len({text_fingerprint(other) for other in [stream, *others]}) == 5
    assert len(text_fingerprint(stream)) == 16


@pytest.mark.parametrize("length", [PASSAGE - 1, PASSAGE, PASSAGE + 1, 3 * PASSAGE + 5])
@pytest.mark.parametrize("at", [0, 1, 700], ids=["beginning", "near_it", "end"])
def test_passages_of_another_text_are_found(length: int, at: int) -> None:
    """By every token, wherever they stand in either; of shorter ones nothing is said."""
    stream_N, other_M = torch.randint(50, (2, 1000), generator=torch.Generator().manual_seed(0))
    at = min(at, 1000 - length) if at < 700 else 1000 - length
    other_M[333 : 333 + length] = stream_N[at : at + length]
    expected_N = torch.zeros(1000, dtype=torch.bool)
    expected_N[at : at + length] = length >= PASSAGE
    assert repeated(stream_N, other_M).equal(expected_N)
    assert int(repeated(other_M, stream_N).sum()) == int(expected_N.sum())


def test_of_short_texts_nothing_is_repeated() -> None:
    for size in (0, 1, PASSAGE - 1):
        tokens_N = torch.arange(size)
        assert not repeated(tokens_N, torch.arange(1000)).any()
        assert not repeated(torch.arange(1000), tokens_N).any()
        assert repeated(tokens_N, tokens_N).shape == (size,)


def test_real_stories_give_back_their_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared("models/stories260K"))
    stories = load_documents(str(shared("data/tinystories/train.jsonl")), split="train", max_characters=50_000)
    stream = tokenize(tokenizer, stories, vocab_size=512)
    is_bos = stream == tokenizer.bos_token_id
    assert int(is_bos.sum()) == len(stories)
    assert is_bos[0]
    assert not torch.any(is_bos[1:] & is_bos[:-1])
    assert TokenWindows(stream, window=128, seed=0).batch(0, 8).max() < 512
    starts = [*is_bos.nonzero().flatten().tolist(), len(stream)]
    for story, start, end in zip(stories[:20], starts, starts[1:], strict=False):
        assert tokenizer.decode(stream[start + 1 : end]).strip() == story.strip()
