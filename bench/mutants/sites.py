"""The ways in which a file can be made wrong: one small change each, named by what it changes.

C++ is changed line by line with patterns, Python through its syntax tree. What cannot change a
result is left out: how many threads are worth their start, sizes of tiles, prefetches, messages.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """One change.

    Args:
        path: the file, relative to the sources.
        line: where, counted from 1.
        kind: what sort of change it is.
        before: the text that goes, as one line.
        after: what takes its place.
        place: what :func:`changed` needs to make it again: the line, or the number of a node and
            which of its changes.
    """

    path: str
    line: int
    kind: str
    before: str
    after: str
    place: tuple[int, str | int]

    @property
    def name(self) -> str:
        """Stays the same while the line does, wherever it moves."""
        text = f"{self.path}\0{self.kind}\0{self.before}\0{self.after}"
        return hashlib.sha256(text.encode()).hexdigest()[:10]


# --- C++ -----------------------------------------------------------------------------------------
_CPP_CHANGES: tuple[tuple[str, str, str], ...] = (
    ("comparison", r" < ", " <= "),
    ("comparison", r" <= ", " < "),
    ("comparison", r" >= ", " > "),
    ("comparison", r" > ", " >= "),
    ("comparison", r" == ", " != "),
    ("comparison", r" != ", " == "),
    ("sign", r" \+ ", " - "),
    ("sign", r" - ", " + "),
    ("sign", r" \+= ", " -= "),
    ("sign", r"V::sub\(", "V::add("),
    ("product", r" \* ", " + "),
    ("product", r" / ", " * "),
    ("remainder", r" % ", " / "),
    ("shift", r" >> (\d)", r" >> 1 + \1"),
    ("shift", r" << (\d)", r" << 1 + \1"),
    ("nibble", r"0x0?f\b", "0x7"),
    ("logic", r" && ", " || "),
    ("logic", r" \|\| ", " && "),
    ("bound", r"\bmin64\(", "max64("),
    ("bound", r"V::max\(", "V::min("),
    ("constant", r"\b0\.0f\b", "1.0f"),
    ("constant", r"\b1\.0f\b", "2.0f"),
    ("constant", r"(?<![\w.])0(?![\w.])", "1"),
    ("constant", r"(?<![\w.])1(?![\w.])", "2"),
    ("constant", r"\btrue\b", "false"),
    ("constant", r"\bfalse\b", "true"),
    ("stale", r"^(\s+)(?!return|using|const|static|auto)[\w:>.\-\[\] ]+ [-+*]?= .*;$", r"\1;"),
    ("stale", r"^(\s+)(\w+_run|V::store\w*|store_\w+|scale_\w+|add_\w+|mul_\w+)\(.*\);$", r"\1;"),
)  # fmt: skip

# Lines that decide how fast something is, or nothing at run time.
_CPP_SKIPPED = re.compile(
    r"^\s*(//|#|template|static_assert|static constexpr|using|namespace|constexpr|struct|PK_TABLE)"
    r"|^\s*(extern|case) "
    r"|worthwhile_threads|kSpeed|prefetch|microseconds|\bthreads\b|madvise|snprintf|GCC|alignas"
    r"|double (us|work|weights|elements|grams|squares)\b|\[\[|PK_INLINE|kHuge|next_chunk"
)


def cpp_mutants(root: Path, path: str) -> Iterator[Mutant]:
    """Every change of a C++ file."""
    lines = (root / path).read_text().split("\n")
    for i, line in enumerate(lines):
        code = line.split("//")[0].rstrip()
        if not code.strip() or _CPP_SKIPPED.search(code):
            continue
        if re.match(r"^[\w:<>*& ]+\([^;]*[,{]$", code):  # the head of a function
            continue
        for kind, pattern, replacement in _CPP_CHANGES:
            for match in re.finditer(pattern, code):
                if kind == "stale" and re.match(r"\s+[\w:<>]+[*&]? [*&]?\w+(\[.*\])? = ", code):
                    continue  # a declaration
                changed = code[: match.start()] + match.expand(replacement) + code[match.end() :]
                yield Mutant(path, i + 1, kind, code.strip(), changed.strip(), (i, changed))


# --- Python --------------------------------------------------------------------------------------
_COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_BINARY: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
}
_QUIET = re.compile(r"^(_LOG|warnings|logging)\b")


def _changes_of(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(kind, the node that takes this one's place)"""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARE:
        ops = [_COMPARE[type(node.ops[0])](), *node.ops[1:]]
        yield "comparison", ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        yield "operator", ast.BinOp(node.left, _BINARY[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "logic", ast.BoolOp(other, node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "logic", node.operand
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign", node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "constant", ast.Constant(node.value + 1)
    elif isinstance(node, ast.If | ast.IfExp):
        test = ast.UnaryOp(ast.Not(), node.test)
        if isinstance(node, ast.If):
            yield "condition", ast.If(test, node.body, node.orelse)
        else:
            yield "condition", ast.IfExp(test, node.body, node.orelse)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        if not _QUIET.match(ast.unparse(node)):
            yield "stale", ast.Pass()
    elif isinstance(node, ast.AugAssign):
        yield "stale", ast.Pass()


def _code_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes whose change changes what a function does: no annotations, messages or docstrings."""

    def walk(node: ast.AST, inside: bool) -> Iterator[ast.AST]:
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.JoinedStr):
                    continue
                deep = inside or isinstance(node, ast.FunctionDef)
                if deep:
                    yield child
                yield from walk(child, deep)

    yield from walk(tree, False)


def python_mutants(root: Path, path: str) -> Iterator[Mutant]:
    """Every change of a Python file."""
    text = (root / path).read_text()
    lines = text.split("\n")
    for number, node in enumerate(_code_nodes(ast.parse(text))):
        for choice, (kind, replacement) in enumerate(_changes_of(node)):
            line = getattr(node, "lineno", 0)
            before = ast.unparse(node).split("\n")[0]
            after = ast.unparse(ast.fix_missing_locations(replacement)).split("\n")[0]
            where = lines[line - 1].strip()
            yield Mutant(path, line, kind, f"{before} | {where}", after, (number, choice))


class _Swap(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def changed(root: Path, mutant: Mutant) -> str:
    """The whole file with the change; a Python file loses its formatting and comments."""
    text = (root / mutant.path).read_text()
    number, what = mutant.place
    if isinstance(what, str):
        lines = text.split("\n")
        return "\n".join([*lines[:number], what, *lines[number + 1 :]])
    tree = ast.parse(text)
    old = list(_code_nodes(tree))[number]
    new = ast.copy_location(list(_changes_of(old))[what][1], old)
    return ast.unparse(ast.fix_missing_locations(_Swap(old, new).visit(tree)))


def drawn(root: Path, paths: list[str], count: int, seed: int) -> list[Mutant]:
    """``count`` mutants of these files, as evenly over files and kinds as there are any."""
    pools: dict[tuple[str, str], list[Mutant]] = {}
    make: Callable[[Path, str], Iterator[Mutant]]
    for path in paths:
        make = python_mutants if path.endswith(".py") else cpp_mutants
        for mutant in make(root, path):
            pools.setdefault((path, mutant.kind), []).append(mutant)
    dice = random.Random(seed)
    for pool in pools.values():
        dice.shuffle(pool)
    chosen: dict[str, Mutant] = {}
    while len(chosen) < count and pools:
        for key in sorted(pools, key=lambda _: dice.random()):
            mutant = pools[key].pop()
            chosen.setdefault(mutant.name, mutant)
            if not pools[key]:
                del pools[key]
            if len(chosen) == count:
                break
    return sorted(chosen.values(), key=lambda m: (m.path, m.line, m.kind))
