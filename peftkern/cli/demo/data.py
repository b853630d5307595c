"""Labelled text: docstrings of the standard library, or a file; splits and batches.

Nothing here needs torch: the same code feeds the demo's children and its report.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import random
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

LABELS = ("module", "class", "function", "method")

# Top-level packages and modules that Python 3.11, 3.12 and 3.13 all have, in two fixed halves, so
# that every supported Python trains on nearly the same texts. The halves were drawn by hash of
# the name (about one third held out of each class); twins such as posixpath and ntpath stay on
# one side. `encodings` is left out: its 92 module docstrings are one sentence with 92 names.
HELD_OUT_PACKAGES = frozenset(
    """_collections_abc _strptime argparse asyncio bz2 calendar code codecs colorsys csv ctypes
    curses difflib fileinput getpass gettext http inspect keyword locale lzma mailbox mimetypes
    multiprocessing netrc operator pickle pkgutil poplib pprint py_compile pyclbr queue quopri
    random re rlcompleter shutil smtplib ssl string stringprep tarfile tempfile tokenize
    tracemalloc turtledemo urllib uuid venv warnings weakref xml""".split()
)
TRAIN_PACKAGES = frozenset(
    """__future__ _aix_support _compression _markupbase _osx_support _py_abc _pydecimal _pyio
    _sitebuiltins _threading_local abc antigravity ast base64 bdb bisect cProfile cmd codeop
    collections compileall concurrent configparser contextlib copy copyreg dataclasses dbm dis
    doctest email enum filecmp fnmatch fractions ftplib functools genericpath getopt glob graphlib
    gzip hashlib heapq hmac html idlelib imaplib importlib io ipaddress json linecache logging
    modulefinder ntpath numbers nturl2path opcode optparse os pathlib pdb pickletools platform
    plistlib posixpath profile pstats pty pydoc reprlib runpy sched secrets selectors shelve shlex
    signal site socket socketserver sqlite3 stat statistics subprocess symtable sysconfig tabnanny
    textwrap threading timeit tkinter tomllib trace traceback turtle types typing unittest wave
    webbrowser wsgiref xmlrpc zipapp zipfile zipimport zoneinfo""".split()
)
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
MIN_CHARS = 41
PER_LABEL = 600
_PER_PACKAGE = 60  # no package may fill a class by itself (tkinter alone has 480 methods)


@dataclass(frozen=True)
class Example:
    """One labelled text; `group` is what a split never cuts (a package, a document)."""

    text: str
    label: int
    group: str


@dataclass(frozen=True)
class TextDataset:
    """Labelled texts in two halves that share no group.

    Args:
        name: short name for tables.
        description: what it is and how it was split, one or two sentences.
        labels: label names; `Example.label` indexes them.
        train: what is trained on.
        held_out: what accuracy is measured on.
    """

    name: str
    description: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    notes: tuple[str, ...] = field(default=())

    def majority(self) -> float:
        """Held-out accuracy of always answering the most frequent training label."""
        counts = Counter(example.label for example in self.train)
        answer = min(counts, key=lambda label: (-counts[label], label))
        return sum(e.label == answer for e in self.held_out) / len(self.held_out)

    def counts(self) -> dict[str, dict[str, int]]:
        """Texts by half and label."""
        return {
            half: {
                name: sum(e.label == index for e in examples)
                for index, name in enumerate(self.labels)
            }
            for half, examples in (("train", self.train), ("held_out", self.held_out))
        }

    def limit(self, train: int, held_out: int) -> TextDataset:
        """At most so many texts of each half, every label keeping its share; deterministic."""
        return TextDataset(
            self.name,
            self.description,
            self.labels,
            _limit(self.train, train),
            _limit(self.held_out, held_out),
            self.notes,
        )

    def part(self, fraction: float) -> TextDataset:
        """The same held-out half and this share of the training half, at least two of a label."""
        least = 2 * len({example.label for example in self.train})
        return self.limit(max(least, round(fraction * len(self.train))), len(self.held_out))

    def sentence_pairs(self, count: int = 120) -> tuple[list[str], list[str]]:
        """Beginnings of held-out texts, and how each goes on: a fixed task for a sentence encoder.

        Args:
            count: most pairs; fewer where the texts have fewer with a sentence to cut after.

        Returns:
            First sentences, and what follows each of them.
        """
        pairs = []
        for example in sorted(self.held_out, key=lambda e: _hash(e.text)):
            first, stop, rest = example.text.partition(". ")
            if stop and min(len(first), len(rest)) >= MIN_CHARS:
                pairs.append((first + ".", rest))
        return [first for first, _ in pairs[:count]], [rest for _, rest in pairs[:count]]

    def save(self, path: Path) -> None:
        """Write as JSON (what `load` reads)."""
        path.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> TextDataset:
        """Read what `save` wrote."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            raw["name"],
            raw["description"],
            tuple(raw["labels"]),
            tuple(Example(**e) for e in raw["train"]),
            tuple(Example(**e) for e in raw["held_out"]),
            tuple(raw["notes"]),
        )


def docstrings_of(source: str | bytes, group: str) -> Iterator[Example]:
    """Docstrings longer than 40 characters of one source file, labelled by the syntax tree.

    Args:
        source: Python source; bytes may declare their encoding.
        group: top-level package it belongs to.

    Raises:
        SyntaxError: the source is not valid for the running Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old sources are not our news
        tree = ast.parse(source)
    yield from _visit(tree, "module", group)


def _visit(node: ast.AST, kind: str, group: str) -> Iterator[Example]:
    assert isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    text = " ".join((ast.get_docstring(node, clean=False) or "").split())
    if len(text) >= MIN_CHARS:
        yield Example(text, LABELS.index(kind), group)
    inside_class = isinstance(node, ast.ClassDef)
    pending: list[ast.AST] = list(ast.iter_child_nodes(node))
    while pending:  # definitions below `if` and `try` belong to the same scope
        child = pending.pop(0)
        if isinstance(child, ast.ClassDef):
            yield from _visit(child, "class", group)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _visit(child, "method" if inside_class else "function", group)
        elif isinstance(child, ast.stmt | ast.excepthandler):
            pending[:0] = list(ast.iter_child_nodes(child))


def stdlib_docstrings(root: Path | None = None, per_label: int = PER_LABEL) -> TextDataset:
    """Docstrings of the running Python's standard library and the kind of object they document.

    Args:
        root: folder of the standard library; default: that of the running Python.
        per_label: most texts of one label over both halves; a third of them is held out.

    Returns:
        Deduplicated texts, balanced as far as the library goes, split by top-level package: the
        held-out packages are a fixed list, so that no package stands in both halves.

    Raises:
        FileNotFoundError: the library's sources are not installed.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, Example] = {}
    clashing: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        group = parts[0].removesuffix(".py")
        if group not in TRAIN_PACKAGES and group not in HELD_OUT_PACKAGES:
            continue
        if _TEST_FOLDERS.intersection(parts):
            continue
        try:
            found = list(docstrings_of(path.read_bytes(), group))
        except (SyntaxError, ValueError):
            continue  # 2to3-style fixtures; not documentation
        for example in found:
            key = example.text.casefold()
            known = texts.setdefault(key, example)
            if known.label != example.label:
                clashing.add(key)  # one text, two right answers: no use to anyone
    if not texts:
        raise FileNotFoundError(
            f"no Python sources under {root}: this Python carries its standard library without "
            "sources; pass --data FILE instead"
        )
    kept = [example for key, example in texts.items() if key not in clashing]
    train = _balanced(kept, TRAIN_PACKAGES, per_label - per_label // 3)
    held_out = _balanced(kept, HELD_OUT_PACKAGES, per_label // 3)
    packages = [len({e.group for e in half}) for half in (train, held_out)]
    return TextDataset(
        name="stdlib docstrings",
        description=(
            "English docstrings (more than 40 characters) of the installed Python's standard "
            "library; the task is to tell what kind of object a docstring documents: module, "
            "class, function or method. Labels come from the syntax tree. Duplicates and tests "
            f"are left out. Split by top-level package: {packages[0]} packages to train on, "
            f"{packages[1]} others held out."
        ),
        labels=LABELS,
        train=train,
        held_out=held_out,
    )


def load_file(path: Path, held_out: float = 0.3) -> TextDataset:
    """Labelled texts of a user's file.

    Args:
        path: `.jsonl` or `.csv` with the columns `text` and `label` (optional: `split` with
            "train" and anything else, or `group` that the split must not cut), or `.txt`/`.tsv`
            with `label<TAB>text` in every line.
        held_out: share held out where the file has no `split`; by hash of group or text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, a line cannot be read, there are fewer than two labels,
            or a half is left empty; the message names the line and what was expected.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--data: no such file: {path}")
    readers = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".csv": _read_csv}
    readers |= {".txt": _read_tabs, ".tsv": _read_tabs}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"--data: got {path.name!r}, expected a file ending in .jsonl, .csv, .txt or .tsv"
        )
    rows: dict[str, tuple[str, str, str | None]] = {}
    for line, row in reader(path):
        # Only None is missing: 0 and false are labels.
        text, label = (
            "" if row.get(key) is None else str(row[key]).strip() for key in ("text", "label")
        )
        if not text or not label:
            missing = "text" if not text else "label"
            raise ValueError(
                f"--data: {path.name}, line {line}: no {missing!r} (columns found: "
                f"{', '.join(map(str, row)) or 'none'}); expected columns 'text' and 'label'"
            )
        group, split = str(row.get("group") or ""), row.get("split")
        rows.setdefault(text, (label, group or text, str(split) if split else None))
    labels = tuple(sorted({label for label, _, _ in rows.values()}))
    if len(labels) < 2:
        raise ValueError(f"--data: {path.name}: got {len(labels)} label(s), expected at least 2")
    halves: tuple[list[Example], list[Example]] = ([], [])
    with_split = any(split for _, _, split in rows.values())
    for text, (label, group, split) in rows.items():
        if with_split:
            held = split != "train"
        else:
            held = _hash(group) / 2**64 < held_out
        halves[held].append(Example(text, labels.index(label), group))
    for half, name in zip(halves, ("train", "held-out"), strict=True):
        if not half:
            raise ValueError(
                f"--data: {path.name}: the {name} half is empty; give more texts or a 'split' "
                "column with both 'train' and 'test'"
            )
    how = "its own 'split' column" if with_split else f"hash, {held_out:.0%} held out"
    return TextDataset(
        name=path.name,
        description=f"{len(rows)} labelled texts of {path.name}, split by {how}.",
        labels=labels,
        train=tuple(halves[0]),
        held_out=tuple(halves[1]),
    )


def batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Shuffled batches of texts of like length, the same for every method.

    Args:
        lengths: tokens per text.
        batch_size: texts per batch; the last may be smaller.
        seed: with `epoch` the only source of chance.
        epoch: counts from 0.

    Returns:
        Lists of indices; every text exactly once.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    # Sorting only inside pools keeps batches mixed while it removes most of the padding.
    pool = batch_size * 16
    made: list[list[int]] = []
    for start in range(0, len(order), pool):
        chunk = sorted(order[start : start + pool], key=lambda index: lengths[index])
        made += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    rng.shuffle(made)
    return made


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def _balanced(
    examples: Sequence[Example], packages: frozenset[str], per_label: int
) -> tuple[Example, ...]:
    """At most `per_label` of each label, chosen by hash of the text: alike on every Python."""
    taken: list[Example] = []
    by_label: dict[int, int] = defaultdict(int)
    by_package: dict[tuple[int, str], int] = defaultdict(int)
    for example in sorted(examples, key=lambda e: _hash(e.text)):
        if example.group not in packages or by_label[example.label] == per_label:
            continue
        place = (example.label, example.group)
        if by_package[place] == _PER_PACKAGE:
            continue
        by_package[place] += 1
        by_label[example.label] += 1
        taken.append(example)
    return tuple(taken)


def _limit(examples: tuple[Example, ...], most: int) -> tuple[Example, ...]:
    if len(examples) <= most:
        return examples
    counts = Counter(example.label for example in examples)
    room = {label: max(1, count * most // len(examples)) for label, count in counts.items()}
    kept = []
    for example in examples:
        if room[example.label] > 0:
            room[example.label] -= 1
            kept.append(example)
    return tuple(kept)


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"--data: {path.name}, line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"--data: {path.name}, line {number}: got a {type(row).__name__}, expected "
                    'an object such as {"text": "...", "label": "..."}'
                )
            yield number, row


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        names = [name.strip().lower() for name in reader.fieldnames or []]
        if not {"text", "label"} <= set(names):
            raise ValueError(
                f"--data: {path.name}: got the columns {', '.join(names) or 'none'}; expected a "
                "header line with 'text' and 'label'"
            )
        reader.fieldnames = names
        for row in reader:
            yield reader.line_num, dict(row)


def _read_tabs(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            label, tab, text = line.rstrip("\n").partition("\t")
            if not tab:
                raise ValueError(
                    f"--data: {path.name}, line {number}: no tab; expected label<TAB>text"
                )
            yield number, {"label": label, "text": text}
