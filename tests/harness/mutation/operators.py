"""Find the small changes that can be made to a source file, each of which could be a programmer's mistake.

Texts of messages, annotations, assertions, log lines and constants of modules and classes are left alone: the first
change no result, and a test that holds a tuning constant to its value says nothing.
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One changed stretch of a file, [start, stop) in its characters.

    `key` names it in results and reasons: by texts, so that it stays the same while other lines move."""

    key: str
    file: str
    operator: str
    start: int
    stop: int
    replacement: str

    def applied_to(self, source: str) -> str:
        return source[: self.start] + self.replacement + source[self.stop :]


COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
OPPOSITE = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "rpartition": "partition",
    "partition": "rpartition",
}


def faults_of(file: str, source: str) -> list[Fault]:
    """Return every fault that fits into a file."""
    found, seen = [], Counter[str]()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    data = source.encode()

    def place(line: int, column: int) -> int:
        return len(data[: starts[line - 1] + column].decode())

    for where, operator, old, new in _Finder(ast.parse(source)).found:
        texts = " ".join(ast.unparse(old).split()), " ".join(new.split())
        key = f"{file} {where}: {texts[0]} -> {texts[1]}"
        seen[key] += 1
        key += f" #{seen[key]}" if seen[key] > 1 else ""
        start = place(old.lineno, old.col_offset)
        stop = place(old.end_lineno or 0, old.end_col_offset or 0)
        found.append(Fault(key, file, operator, start, stop, new))
    return found


def sample(faults: list[Fault], seed: int, count: int) -> list[Fault]:
    """Choose `count` faults: first one of each operator, then a second of each, and so on.

    The order within an operator is that of a hash, so that a change elsewhere leaves the choice as it is."""
    ordered = sorted(faults, key=lambda fault: hashlib.sha256(f"{seed} {fault.key}".encode()).digest())
    rank, ranked = Counter[str](), []
    for fault in ordered:
        ranked.append((rank[fault.operator], fault))
        rank[fault.operator] += 1
    return [fault for _, fault in sorted(ranked, key=lambda item: item[0])][:count]


class _Finder(ast.NodeVisitor):
    """`found`: (name of the function, operator, old node, new text) of each change."""

    def __init__(self, tree: ast.Module) -> None:
        self.found: list[tuple[str, str, ast.expr | ast.stmt, str]] = []
        self.names: list[str] = []
        self.depth = 0  # of functions
        self.visit(tree)

    def add(self, operator: str, old: ast.expr | ast.stmt, new: str | ast.AST) -> None:
        if self.depth:
            text = new if isinstance(new, str) else f"({ast.unparse(ast.fix_missing_locations(new))})"
            self.found.append((".".join(self.names), operator, old, text))

    # ---- names, and what is left alone

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.names.append(node.name)
        self.depth += 1
        for statement in node.body:
            self.visit(statement)
        self.depth -= 1
        self.names.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.names.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self.names.pop()

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.body)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    def visit_Raise(self, node: ast.Raise) -> None:
        self.add("drop a raise", node, "pass")

    # ---- statements

    def visit_If(self, node: ast.If) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        if not isinstance(node.test, ast.Constant):
            self._negate(node.test)
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant) or _is_log(node.value):
            return
        if isinstance(node.value, ast.Call):
            self.add("drop a call", node, "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            self.add("drop an assignment", node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add("drop an assignment", node, "pass")
        self.generic_visit(node)

    def visit_Continue(self, node: ast.Continue) -> None:
        self.add("drop a jump", node, "pass")

    def visit_Break(self, node: ast.Break) -> None:
        self.add("drop a jump", node, "pass")

    def visit_Return(self, node: ast.Return) -> None:
        if node.col_offset > 4 * len(self.names):  # inside an `if` or a loop: then what follows is done as well
            self.add("drop a jump", node, "pass")
        self.generic_visit(node)

    # ---- expressions

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._negate(test)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for place, operator in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[place] = COMPARISONS[type(operator)]()
            self.add("change a comparison", node, changed)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        changed = copy.deepcopy(node)
        changed.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        self.add("exchange and/or", node, changed)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self.add("negate a condition", node, ast.unparse(node.operand).join("()"))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in ARITHMETIC:
            changed = copy.deepcopy(node)
            changed.op = ARITHMETIC[type(node.op)]()
            self.add("change arithmetic", node, changed)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add("change a constant", node, str(not node.value))
        elif isinstance(node.value, int):
            self.add("change a constant", node, str(node.value + 1))
            if node.value > 0:
                self.add("change a constant", node, str(node.value - 1))

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        has_order = len(node.args) > 1 and not isinstance(node.args[0], ast.Starred) and name not in ("min", "max")
        if has_order and not isinstance(node.args[1], ast.Starred):
            changed = copy.deepcopy(node)
            changed.args[:2] = changed.args[1::-1]
            self.add("exchange arguments", node, changed)
        for place, keyword in enumerate(node.keywords):
            if keyword.arg not in (None, "hint", "strict"):
                changed = copy.deepcopy(node)
                del changed.keywords[place]
                self.add("drop an argument", node, changed)
        if name in OPPOSITE:
            changed = copy.deepcopy(node)
            if isinstance(changed.func, ast.Attribute):
                changed.func.attr = OPPOSITE[name]
            elif isinstance(changed.func, ast.Name):
                changed.func.id = OPPOSITE[name]
            self.add("call the opposite", node, changed)
        self.generic_visit(node)

    def _negate(self, test: ast.expr) -> None:
        if not isinstance(test, ast.UnaryOp | ast.Compare):  # those have changes of their own
            self.add("negate a condition", test, f"(not ({ast.unparse(test)}))")


def _is_log(call: ast.expr) -> bool:
    function = call.func if isinstance(call, ast.Call) else None
    return isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "log"
