"""Where text comes from: the embedded prose, files, folders and Hugging Face datasets, all as a list of documents."""

import codecs
import json
import lzma
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from bernprune.embedded import EMBEDDED, prose
from bernprune.errors import ConfigError, DataError

PLAIN_SUFFIXES = (".txt", ".text", ".raw", ".md", ".rst")
JSON_LINES_SUFFIX = ".jsonl"
XZ_SUFFIX = ".xz"

_EMBEDDED_ONE_FILE_IN = 6  # all files take half a minute to read, and 3 MB of text is plenty
_DEFAULT_DATASET_SPLIT = "train"
_BLOCK = 1 << 16  # characters, or bytes, read at once


def load_documents(
    source: str, *, split: prose.Split, max_characters: int | None = None, joined_by: str | None = None
) -> list[str]:
    """The documents of a source that are not blank; only the first ``max_characters`` of them all if that is given.

    ``source`` is the first of these that fits:

    - ``embedded``: the prose of ``bernprune.embedded``, which alone has two parts, chosen by ``split``;
    - a text file (.txt, .text, .raw, .md, .rst): the whole file is one document;
    - a file of JSON lines (.jsonl): a document a line, in the string field ``text``;
    - either of them compressed, as ``x.txt.xz`` or ``x.jsonl.xz``; no more is unpacked than is needed;
    - ``folder``, ``folder:config`` or ``folder:config:split``: a local dataset for the ``datasets`` package, written
      by its ``save_to_disk`` or made of data files; a document a row, in the column ``text`` (.txt files in such a
      folder have a row a line);
    - ``name``, ``name:config`` or ``name:config:split``: a dataset of the Hugging Face hub, streamed, as in
      ``allenai/c4:en:train``. An empty config is the default one (``name::test``); the default split is train.

    ``joined_by`` makes one document of all rows, blank ones too, with this string between them: the rows of
    ``Salesforce/wikitext:wikitext-2-raw-v1:test`` are lines, and published perplexities join them by a blank line.

    Files are UTF-8, and half surrogates, which no tokenizer takes, become question marks. ``DataError`` says in one
    sentence what is wrong with a source, with its path and line where there is one.
    """
    if split not in ("train", "held-out"):
        raise ConfigError(f'split must be "train" or "held-out", got "{split}"')
    if max_characters is not None and max_characters < 1:
        raise ConfigError(f"max_characters must be at least 1, got {max_characters}")
    texts: Iterator[str] = map(_without_surrogates, _texts(source, split, max_characters))
    if joined_by is not None:
        texts = iter([_without_surrogates(joined_by).join(_first_characters(texts, max_characters))])
    documents = list(_first_characters((text for text in texts if text.strip()), max_characters))
    if not documents:
        raise DataError(f'"{source}" holds no text: all that was read of it is blank')
    return documents


def _without_surrogates(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _first_characters(texts: Iterable[str], max_characters: int | None) -> Iterator[str]:
    """Texts until they have so many characters in all; the last one is shortened, and no further one is asked for."""
    if max_characters is None:
        yield from texts
        return
    for text in texts:
        yield text[:max_characters]
        max_characters -= len(text)
        if max_characters <= 0:
            return


def _texts(source: str, split: prose.Split, max_characters: int | None) -> Iterable[str]:
    """Every text of a source in order, blank ones too, lazily where the source allows."""
    if source == EMBEDDED:
        return prose.documents(split, one_file_in=_EMBEDDED_ONE_FILE_IN)
    if not source.strip():
        raise DataError(f'the text source is blank; give "{EMBEDDED}", a file, a folder or a dataset name')
    path = Path(os.path.expanduser(source))
    mode = _mode(path)
    if mode is None:
        return _named_dataset_texts(source)
    if stat.S_ISDIR(mode):  # before any colon is given a meaning: a folder's own name may hold one
        return _dataset_texts(os.path.abspath(path), is_folder=True)  # datasets takes "." for no name
    if not stat.S_ISREG(mode):
        raise DataError(f'"{path}" is neither a file nor a folder')
    return _file_texts(path, max_characters)


def _mode(path: Path) -> int | None:
    """What stands at a path, as ``stat`` codes it; None if nothing does."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise DataError(f'"{path}" cannot be read: {error.strerror}') from None


def _file_texts(path: Path, max_characters: int | None) -> Iterator[str]:
    suffix = (path.with_suffix("") if _is_xz(path) else path).suffix.lower()
    if suffix not in (*PLAIN_SUFFIXES, JSON_LINES_SUFFIX):
        allowed = ", ".join((*PLAIN_SUFFIXES, JSON_LINES_SUFFIX))
        raise DataError(f'"{path}" has no suffix of a text file; allowed are {allowed}, and each of them with .xz')
    with _reading(path) as stream:
        if suffix == JSON_LINES_SUFFIX:
            yield from _json_lines(path, stream)
        else:
            blocks = iter(lambda: stream.read(_BLOCK), "")
            yield "".join(_first_characters(blocks, max_characters))


def _is_xz(path: Path) -> bool:
    return path.suffix.lower() == XZ_SUFFIX


@contextmanager
def _reading(path: Path) -> Iterator[TextIOWrapper]:
    """The file as text with line ends read as ``\\n``; whatever goes wrong in reading becomes a ``DataError``."""
    try:
        with _open(path) as binary:
            head = binary.peek(1)
            if not head:
                raise DataError(f'text file "{path}" is empty')
            if b"\0" in head:
                raise DataError(f'"{path}" is not UTF-8 text: it has a zero byte at offset {head.index(0)}')
            yield TextIOWrapper(binary, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        offset = _bad_byte_offset(path)
        raise DataError(f'"{path}" is not UTF-8 text: {error.reason} at byte offset {offset}') from None
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f'"{path}" is a broken xz file: {str(error).lower()}') from None
    except OSError as error:
        raise DataError(f'"{path}" cannot be read: {error.strerror or error}') from None


def _open(path: Path) -> Any:
    return lzma.open(path) if _is_xz(path) else path.open("rb")


def _bad_byte_offset(path: Path) -> int:
    """Where in the (unpacked) file the first bytes that are not UTF-8 begin; for a message, so it may read it again."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the next block
    with _open(path) as binary:
        while block := binary.read(_BLOCK):
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                carried_over = len(error.object) - len(block)
                return offset - carried_over + error.start
            offset += len(block)
    return offset - len(decoder.getstate()[0])  # the file ends within a character


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f'"{path}", line {number}'
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
            ) from None
        except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
            raise DataError(f"{where}: not readable as JSON: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f'{where}: must be a JSON object with a field "text", got {_kind(record)}')
        yield _text_field(record, where, noun="field")


def _text_field(record: Mapping[str, Any], where: str, *, noun: str) -> str:
    if "text" not in record:
        found = ", ".join(map(str, record)) or "none"
        raise DataError(f'{where}: there is no {noun} "text"; the {noun}s are: {found}')
    text = record["text"]
    if not isinstance(text, str):
        raise DataError(f'{where}: the {noun} "text" must be a string, got {_kind(text)}')
    return text


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _named_dataset_texts(source: str) -> Iterator[str]:
    """Texts of ``name[:config[:split]]`` where no file or folder is called that as a whole."""
    name, *rest = source.split(":")
    if not name or len(rest) > 2:
        whole = "; a split is taken whole, and data.max_characters takes its beginning" if "[" in source else ""
        raise DataError(f'"{source}" is no dataset name; write name, name:config or name:config:split{whole}')
    path = Path(os.path.expanduser(name))
    is_folder = (mode := _mode(path)) is not None and stat.S_ISDIR(mode)
    if not is_folder and (_looks_like_path(name) or _looks_like_path(source)):
        raise DataError(f'text file or folder "{source}" does not exist')
    if name == EMBEDDED and not is_folder:
        raise DataError(f'the embedded text has no parts to choose, as in "{source}"; write "{EMBEDDED}"')
    config, split = [part or None for part in (*rest, "", "")][:2]
    return _dataset_texts(os.path.abspath(path) if is_folder else name, config, split, is_folder=is_folder)


def _looks_like_path(name: str) -> bool:
    """Whether a name is meant as a path: a typing error in it must not become a look-up on the hub."""
    suffixes = (*PLAIN_SUFFIXES, JSON_LINES_SUFFIX, XZ_SUFFIX)
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.lower().endswith(suffixes)


def _dataset_texts(name: str, config: str | None = None, split: str | None = None, *, is_folder: bool) -> Iterator[str]:
    what = f'folder "{name}"' if is_folder else f'"{name}"'
    try:
        rows = _dataset_rows(name, config, split or _DEFAULT_DATASET_SPLIT, is_folder=is_folder)
        for number, row in enumerate(rows, start=1):
            yield _text_field(row, f"{what}, row {number}", noun="column")
    except DataError:
        raise
    except Exception as error:  # datasets and what it calls raise nearly every kind
        local = "" if is_folder else "is no local file or folder, and "
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{what} {local}cannot be loaded as a dataset: {reason}") from error


def _dataset_rows(name: str, config: str | None, split: str, *, is_folder: bool) -> Iterable[Mapping[str, Any]]:
    import datasets  # here because importing it takes seconds

    if not is_folder or {"state.json", "dataset_dict.json"}.isdisjoint(os.listdir(name)):
        return datasets.load_dataset(name, config, split=split, streaming=True)
    saved = datasets.load_from_disk(name)
    splits: dict[str, Any] = saved if isinstance(saved, dict) else {str(saved.split or _DEFAULT_DATASET_SPLIT): saved}
    if config is not None:
        raise DataError(f'folder "{name}" was written by save_to_disk and has no config "{config}"; leave it empty')
    if split not in splits:
        raise DataError(f'folder "{name}" has no split "{split}"; its splits are: {", ".join(splits)}')
    rows = splits[split]
    return rows
