"""Reading documents: from files, folders and dataset names, and what is refused."""

import inspect
import json
import lzma
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bernprune.embedded import prose
from bernprune.errors import ConfigError, DataError
from bernprune.seeding import generator
from bernprune.text import load_documents

SHARED = Path(__file__).parents[2] / "shared"


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} of the shared data, which is not on this machine")
    return path


def documents(source: Path | str, **settings: Any) -> list[str]:
    return load_documents(str(source), split="train", **settings)


def json_lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_a_text_file_is_one_document_with_line_ends_unified(tmp_path: Path) -> None:
    path = tmp_path / "a.TXT"
    path.write_bytes("\ufeffzoë\r\n\r\nb\n".encode())
    assert documents(path) == ["zoë\n\nb\n"]


def test_json_lines_are_one_document_each_without_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines("a\nb", " \n", "é") + b"\n" + json_lines("last"))
    assert documents(path) == ["a\nb", "é", "last"]


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", "zoë\r\n" * 9), ("a.jsonl", json_lines("ab", "ü", "c").decode())]
)
@pytest.mark.parametrize("max_characters", [None, 1, 3, 1000])
def test_compressed_files_read_as_plain_ones(
    tmp_path: Path, name: str, content: str, max_characters: int | None
) -> None:
    plain, packed = tmp_path / name, tmp_path / f"{name}.xz"
    plain.write_bytes(content.encode())
    packed.write_bytes(lzma.compress(content.encode()))
    assert documents(packed, max_characters=max_characters) == documents(plain, max_characters=max_characters)


@pytest.mark.parametrize("max_characters", [1, 4, 5, 6, 9, 10, 10**15])
def test_max_characters_takes_a_prefix_of_the_documents(tmp_path: Path, max_characters: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines("abcd", "  ", "efghi"))
    kept = documents(path, max_characters=max_characters)
    assert "".join(kept) == "abcdefghi"[:max_characters]
    assert kept[0] == "abcd"[:max_characters]
    assert len(kept) == (1 if max_characters <= 4 else 2)


@pytest.mark.parametrize("name", ["a.txt.xz", "a.jsonl.xz"])
def test_nothing_is_read_behind_max_characters(tmp_path: Path, name: str) -> None:
    codes = torch.randint(ord("a"), ord("z") + 1, (400_000,), generator=generator(0, "letters"))
    letters = codes.to(torch.uint8).numpy().tobytes().decode()
    content = letters.encode() if name == "a.txt.xz" else json_lines(*[letters[:1000]] * 4000)
    path = tmp_path / name
    path.write_bytes(lzma.compress(content)[:-100])
    assert "".join(documents(path, max_characters=500)) == letters[:500]
    with pytest.raises(DataError, match="broken xz file"):
        documents(path)


def test_joined_rows_keep_blank_ones_and_are_cut_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines("", "ab", "", "cd"))
    assert documents(path, joined_by="\n\n") == ["\n\nab\n\n\n\ncd"]
    assert documents(path, joined_by="\n\n", max_characters=5) == ["\n\nab\n"]


def test_half_surrogates_become_question_marks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\\ud83d b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert documents(path) == ["a? b", "\U0001f600"]


def test_half_surrogates_between_rows_do_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert load_documents(str(tmp_path / "a.jsonl"), split="train", joined_by="\ud800") == ["a?b"]


def test_prose_is_in_one_of_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All docstrings that are long enough, each once; a share of the files has a share of them."""
    monkeypatch.setattr(prose, "_collected", prose._collected.__wrapped__)  # not kept
    monkeypatch.setattr(prose, "_roots", lambda: iter([Path(prose.__file__).parents[1]]))
    train, held_out = prose.documents("train"), prose.documents("held-out")
    assert {prose.__doc__.strip(), inspect.getdoc(prose.documents)} <= {*train, *held_out}
    assert len({*train, *held_out}) == len(train) + len(held_out) and min(map(len, train)) >= prose.MIN_CHARACTERS
    assert 0 < len(held_out) < len(train) / 4
    assert set(prose.documents("train", one_file_in=2)) < set(train)


def test_embedded_prose_has_its_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prose, "documents", lambda split, one_file_in: [f"{split} {one_file_in}", "x" * 50])
    assert load_documents("embedded", split="held-out", max_characters=12) == ["held-out 6", "xx"]


PACKED = lzma.compress(b"some text " * 50)
# name, broken content (None: no file), a valid neighbour, what the message says
BROKEN_FILES = {
    "missing": ("a.txt", None, b"a", ["does not exist"]),
    "missing in a missing folder": ("no/such/a.jsonl", None, None, ["does not exist"]),
    "empty": ("a.txt", b"", b"a", ["is empty"]),
    "empty json lines": ("a.jsonl", b"", json_lines("a"), ["is empty"]),
    "empty text compressed": ("a.txt.xz", lzma.compress(b""), lzma.compress(b"a"), ["is empty"]),
    "blank": ("a.md", b" \n\n\t", b" \n\n\ta", ["holds no text", "blank"]),
    "blank documents": ("a.jsonl", json_lines(" ", "\n"), json_lines(" ", "a"), ["holds no text", "blank"]),
    "latin-1": ("a.txt", "caf\xe9 noir".encode("latin-1"), "caf\xe9 noir".encode(), ["not UTF-8", "offset 3"]),
    "bad byte far on": ("a.txt", b"a" * 3_000_000 + b"\xff", b"a" * 3_000_000, ["not UTF-8", "offset 3000000"]),
    "bad byte across blocks": (
        "a.raw",
        b"a" * ((1 << 16) - 1) + b"\xc3\xc3",
        b"a" * ((1 << 16) - 1) + b"\xc3\xa9",
        ["not UTF-8", "offset 65535"],
    ),
    "end within a character": ("a.txt", b"caf\xc3", b"caf\xc3\xa9", ["not UTF-8", "offset 3"]),
    "latin-1 json line": ("a.jsonl", b'{"text": "\xe9"}', b'{"text": "\xc3\xa9"}', ["not UTF-8", "offset 10"]),
    "utf-16": ("a.txt", "ab".encode("utf-16-le"), b"ab", ["not UTF-8", "zero byte at offset 1"]),
    "binary": ("a.txt", b"\x7fELF\0\0", b"ELF", ["not UTF-8", "zero byte at offset 4"]),
    "xz named txt": ("a.txt", PACKED, b"some text", ["not UTF-8"]),
    "broken json": (
        "a.jsonl",
        b'{"text": "a"}\n\n{"text": a}',
        json_lines("a"),
        ["line 3", "not valid JSON", "column 10"],
    ),
    "control character in json": (
        "a.jsonl",
        b'{"text": "a\x01"}',
        json_lines("a"),
        ["line 1", "not valid JSON: Invalid control character at column 12"],
    ),
    "json nested too deeply": ("a.jsonl", b'{"text":' + b"[" * 100_000, json_lines("a"), ["line 1", "JSON"]),
    "json list": ("a.jsonl", b'["a"]\n', json_lines("a"), ["line 1", "JSON object", "a list"]),
    "no field text": ("a.jsonl", b'{"id": 1, "body": "a"}', json_lines("a"), ["line 1", 'no field "text"', "id, body"]),
    "no field at all": ("a.jsonl", json_lines("a") + b"{}", json_lines("a"), ["line 2", 'no field "text"', "none"]),
    "text is a number": (
        "a.jsonl",
        b'{"text": 1.5}',
        json_lines("1.5"),
        ["line 1", '"text" must be a string', "a number"],
    ),
    "text is null": ("a.jsonl", b'{"text": null}', json_lines("null"), ["line 1", '"text" must be a string', "null"]),
    "text is a boolean": ("a.jsonl", b'{"text": true}', json_lines("true"), ["line 1", "true or false"]),
    "truncated xz": ("a.txt.xz", PACKED[:-9], PACKED, ["broken xz file", "ended before"]),
    "corrupt xz": ("a.txt.xz", PACKED[:30] + b"\0\1\2" + PACKED[33:], PACKED, ["broken xz file", "corrupt"]),
    "text named xz": ("a.txt.xz", b"some text", PACKED, ["broken xz file", "not supported"]),
    "nothing named xz": ("a.txt.xz", b"", PACKED, ["broken xz file"]),
    "unknown suffix": ("a.json", b'["a"]', None, ["no suffix of a text file", ".jsonl", ".xz"]),
    "no suffix": ("a", b"a", None, ["no suffix of a text file", ".txt"]),
    "xz of unknown suffix": ("a.csv.xz", PACKED, None, ["no suffix of a text file", ".txt"]),
}


@pytest.mark.parametrize(("name", "broken", "valid", "says"), BROKEN_FILES.values(), ids=BROKEN_FILES.keys())
def test_broken_files_are_refused_in_one_sentence(
    tmp_path: Path, name: str, broken: bytes | None, valid: bytes | None, says: list[str]
) -> None:
    path = tmp_path / name
    if broken is not None:
        path.write_bytes(broken)
    check_refusal(path, says)
    if valid is not None:
        path.write_bytes(valid)
        assert documents(path)


def check_refusal(source: Path | str, says: list[str], **settings: Any) -> None:
    with pytest.raises(DataError) as caught:
        documents(source, **settings)
    message = str(caught.value)
    assert all(part in message for part in [str(source).split(":")[0], *says]), message
    assert "\n" not in message


@pytest.mark.parametrize("source", ["", " "])
def test_a_blank_source_is_refused(source: str) -> None:
    check_refusal(source, ["source is blank", "embedded"])


@pytest.mark.parametrize(
    "source", ["a.txt", "a.JSONL", "b.jsonl.xz", "a.md:en", "./a", "../a/b", "/a", "~/a", "~nobody/a", "a/b/c"]
)
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(source: str, hub: list[Any]) -> None:
    check_refusal(source, ["does not exist"])
    assert hub == []


def test_what_is_neither_file_nor_folder_is_refused() -> None:
    check_refusal(os.devnull, ["neither a file nor a folder"])
    check_refusal("/" + "a" * 5000, ["cannot be read"])


@pytest.fixture
def no_rights(closed: Path) -> Iterator[None]:
    """Root may read everything, so it acts as nobody for a while."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


@pytest.fixture
def closed() -> Iterator[Path]:
    """An open folder (which ``tmp_path`` is not) with a file and a folder that only root can read."""
    import datasets  # noqa: F401  (while it may still be read)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "folder"
        folder.mkdir()
        closed_paths = [Path(name) / "a.txt", folder / "a.txt", folder]
        for path in closed_paths[:2]:
            path.write_bytes(b"a")
            assert documents(path) == ["a"]
        Path(name).chmod(0o755)
        for path in closed_paths[::2]:
            path.chmod(0)
        yield Path(name)
        folder.chmod(0o700)


@pytest.mark.parametrize("name", ["a.txt", "folder/a.txt", "folder"])
def test_what_may_not_be_read_is_refused(closed: Path, name: str, no_rights: None) -> None:
    check_refusal(closed / name, ["ermission denied"])


@pytest.mark.parametrize("setting", [{"split": "test"}, {"max_characters": 0}, {"max_characters": -5}])
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(setting))} must be"):
        load_documents("a.txt", **{"split": "train", **setting})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A hub that holds one dataset with three rows, and the list of calls made to it."""
    import datasets

    calls = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        calls.append((name, config, split, streaming))
        if name == "down/down":
            raise ConnectionError("Couldn't reach the hub\nand more")
        if name == "breaks/off":
            return breaking_rows()
        return iter([{"text": "a", "id": 1}, {"text": ""}, {"text": "bc"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def breaking_rows() -> Any:
    yield {"text": "a"}
    raise OSError("connection lost")


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("imdb", ("imdb", None, "train", True)),
        ("allenai/c4:en", ("allenai/c4", "en", "train", True)),
        ("Salesforce/wikitext:wikitext-2-raw-v1:test", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", True)),
        ("a/b::test", ("a/b", None, "test", True)),
    ],
)
def test_other_names_are_streamed_from_the_hub(source: str, call: tuple[Any, ...], hub: list[Any]) -> None:
    assert documents(source) == ["a", "bc"]
    assert documents(source, max_characters=2) == ["a", "b"]
    assert hub == [call, call]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("down/down", ["no local file or folder", "cannot be loaded", "Couldn't reach the hub"]),
        ("breaks/off", ["cannot be loaded", "connection lost"]),
        ("a:b:c:d", ["name:config:split"]),
        (":en", ["name:config:split"]),
    ],
)
def test_hub_failures_are_one_sentence(source: str, says: list[str], hub: list[Any]) -> None:
    check_refusal(source, says)
    assert documents("up/up")
    assert documents("breaks/off", max_characters=1) == ["a"]


def save(folder: Path, **splits: dict[str, list[Any]]) -> Path:
    from datasets import Dataset, DatasetDict

    DatasetDict({name: Dataset.from_dict(columns) for name, columns in splits.items()}).save_to_disk(str(folder))
    return folder


def test_a_saved_dataset_folder_gives_the_split_asked_for(tmp_path: Path) -> None:
    folder = save(tmp_path / "a:b", train={"text": ["a", "", "bc"]}, test={"text": ["d"]})
    assert documents(folder) == ["a", "bc"]
    single = save(tmp_path / "saved", train={"text": ["a"]}, test={"text": ["d"]})
    assert documents(f"{single}::test") == ["d"]
    assert documents(single / "test") == ["d"]
    check_refusal(f"{single}::valid", ['no split "valid"', "train, test"])
    check_refusal(f"{single}:en", ['no config "en"'])


def test_a_folder_of_data_files_is_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(json_lines("a", "", "bc"))
    (tmp_path / "test.jsonl").write_bytes(json_lines("d"))
    assert documents(tmp_path) == ["a", "bc"]
    assert documents(f"{tmp_path}:default:test") == ["d"]
    check_refusal(f"{tmp_path}::valid", ["cannot be loaded", "valid"])


def test_the_folder_at_hand_is_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under its shortest name."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    assert load_documents(".", split="train") == ["a"]


def test_folders_that_are_no_dataset_are_refused(tmp_path: Path) -> None:
    check_refusal(tmp_path, ["folder", "cannot be loaded as a dataset"])
    other = save(tmp_path / "other", train={"body": ["a"], "id": [1]})
    check_refusal(other, ["row 1", 'no column "text"', "body, id"])
    numbers = save(tmp_path / "numbers", train={"text": [1]})
    check_refusal(numbers, ["row 1", '"text" must be a string', "a number"])
    blank = save(tmp_path / "blank", train={"text": ["", " "]})
    check_refusal(blank, ["holds no text"])


def test_real_files_are_read() -> None:
    stories = documents(shared("data/tinystories/train.jsonl"))
    assert len(stories) == 4042
    assert stories[0].startswith("One day")
    [article] = documents(shared("data/wikitext-2-raw/wiki.test.raw"))
    assert article.count("\n") == 4358
    assert "Robert Boulter" in article[:100]
    [novel] = documents(shared("data/english-novels/train.txt.xz"), max_characters=100_000)
    assert len(novel) == 100_000
    assert novel.count(" the ") > 100


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("words")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_documents("~/a.txt", split="train") == ["words"]
