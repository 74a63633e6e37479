"""Rule 3: the same name means the same bytes.

A top-level class or function that two scripts define under one name is byte-identical in both, decorators included.
The first script in reading order that defines it is its home. A copy may differ when the line directly above it (above
its decorators) gives the reason:

    # Differs: no reward head, the table is exact here

`Args` and `main` are exempt, but an `Args` field of one name has one type and one docstring everywhere; its default may
differ.

    python tests/copies.py               show every difference, exit 1 when there is one
    python tests/copies.py --fix         rewrite the copies from their homes (fields of Args are only reported)
    python tests/copies.py --self-test   flip one character of a copy and see that the check reports it
"""

import argparse
import ast
import difflib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# In reading order: the first script that defines a name is the name's home.
SCRIPTS = (
    "mbrl_dynamics.py",
    "mpc_random_shooting.py",
    "mpc_cem.py",
    "pets.py",
    "mbpo_sac.py",
    "bc_variants.py",
    "adversarial_imitation.py",
    "a2c.py",
    "tabular_mbrl.py",
)
EXEMPT = ("Args", "main")
MARK = re.compile(r"# Differs: *\S")

PLANTED = 'def double(x: int) -> int:\n    """Twice x."""\n    return 2 * x\n'


@dataclass(frozen=True)
class Block:
    """A top-level class or function: lines `start` to `end` (counted from 0, end not included) of `path`."""

    path: Path
    name: str
    start: int
    end: int
    text: str
    differs: bool

    def __str__(self) -> str:
        return f"{self.path.name}:{self.start + 1}"


@dataclass(frozen=True)
class Field:
    """A field of `Args`: its annotation and the string under it."""

    path: Path
    name: str
    line: int
    annotation: str
    doc: str

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"


def scripts(root: Path = ROOT) -> list[Path]:
    """The scripts that exist under `root`, in reading order."""
    return [root / name for name in SCRIPTS if (root / name).is_file()]


def read(path: Path) -> str:
    """The text with its line ends as they are: a copy with other line ends is not the same bytes."""
    return path.read_bytes().decode("utf-8")


def blocks(path: Path) -> list[Block]:
    """All top-level classes and functions of one script."""
    source = read(path)
    lines = source.split("\n")
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in EXEMPT:
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            end = node.end_lineno or node.lineno
            differs = start > 0 and MARK.match(lines[start - 1]) is not None
            found.append(Block(path, node.name, start, end, "\n".join(lines[start:end]), differs))
    return found


def pairs(root: Path = ROOT) -> list[tuple[Block, Block]]:
    """(home, copy) for every name that is defined more than once."""
    homes: dict[str, Block] = {}
    found = []
    for path in scripts(root):
        for block in blocks(path):
            if block.name in homes:
                found.append((homes[block.name], block))
            else:
                homes[block.name] = block
    return found


def diff(home: Block, copy: Block) -> str:
    """A unified diff that turns the home into the copy."""
    lines = difflib.unified_diff(home.text.split("\n"), copy.text.split("\n"), str(home), str(copy), lineterm="")
    return "\n".join(lines)


def block_problems(root: Path = ROOT) -> list[str]:
    """Copies that differ without a reason, and reasons that no longer have a difference to excuse."""
    problems = []
    for home, copy in pairs(root):
        if copy.text != home.text and not copy.differs:
            problems.append(f"{copy}: {copy.name} differs from its home {home}\n{diff(home, copy)}")
        if copy.text == home.text and copy.differs:
            problems.append(f"{copy}: {copy.name} says that it differs from {home}, but it is the same")
    return problems


def fields(path: Path) -> list[Field]:
    """The fields of the script's `Args`."""
    found = []
    for node in ast.parse(read(path)).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for statement, below in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    annotation = ast.unparse(statement.annotation)
                    found.append(Field(path, statement.target.id, statement.lineno, annotation, string(below)))
    return found


def string(node: ast.stmt | None) -> str:
    """The text of a statement that is nothing but a string, else the empty string."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return node.value.value
    return ""


def field_problems(root: Path = ROOT) -> list[str]:
    """Fields of `Args` that have one name but two types or two docstrings."""
    homes: dict[str, Field] = {}
    problems = []
    for path in scripts(root):
        for field in fields(path):
            home = homes.setdefault(field.name, field)
            for what, here, there in (
                ("type", field.annotation, home.annotation),
                ("docstring", field.doc, home.doc),
            ):
                if here != there:
                    problems.append(f"{field}: the {what} of Args.{field.name} differs from {home}\n-{there}\n+{here}")
    return problems


def all_problems(root: Path = ROOT) -> list[str]:
    """Everything that breaks rule 3 under `root`."""
    return block_problems(root) + field_problems(root)


def write(path: Path, text: str) -> None:
    """Replace the file in one step, so that an interrupted run leaves the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode("utf-8"))
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def fix(root: Path = ROOT) -> int:
    """Rewrite every unmarked copy that differs from its home; return how many there were."""
    wrong = [(home, copy) for home, copy in pairs(root) if copy.text != home.text and not copy.differs]
    for path in scripts(root):
        lines = read(path).split("\n")
        # From the bottom up, so that the line numbers of the blocks above stay true.
        here = sorted((pair for pair in wrong if pair[1].path == path), key=lambda pair: -pair[1].start)
        for home, copy in here:
            lines[copy.start : copy.end] = home.text.split("\n")
        if here:
            write(path, "\n".join(lines))
    return len(wrong)


def flip(block: Block) -> str:
    """The script's text with the case of one letter inside the block changed, so that it is still valid Python."""
    lines = read(block.path).split("\n")
    for position in reversed(range(len(block.text))):
        letter = block.text[position]
        if letter.isascii() and letter.isalpha():
            changed = block.text[:position] + letter.swapcase() + block.text[position + 1 :]
            source = "\n".join([*lines[: block.start], changed, *lines[block.end :]])
            try:
                ast.parse(source)
            except SyntaxError:  # a letter of an escape sequence, say: take the one before it
                continue
            return source
    raise ValueError(f"no letter to flip in {block.name}")


def self_test(root: Path = ROOT, check: Callable[[Path], list[str]] = all_problems) -> bool:
    """Flip one character in a copy of the scripts; true when `check` reports that block and did not before."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in scripts(root):
            shutil.copy(path, folder)
        equal = [copy for home, copy in pairs(folder) if copy.text == home.text and not copy.differs]
        if not equal:  # nothing is shared yet: plant a pair
            for script in SCRIPTS[:2]:
                (folder / script).write_text(PLANTED, encoding="utf-8")
            equal = [copy for _, copy in pairs(folder) if copy.name == "double"]
        before = check(folder)
        write(equal[0].path, flip(equal[0]))
        return any(equal[0].name in problem for problem in check(folder) if problem not in before)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rule 3: the same name means the same bytes.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder with the scripts")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--fix", action="store_true", help="rewrite the copies from their homes")
    mode.add_argument("--self-test", action="store_true", help="flip one character and see that it is reported")
    options = parser.parse_args(arguments)

    if options.self_test:
        seen = self_test(options.root)
        print("self-test: the flipped character was reported" if seen else "self-test: the check saw nothing")
        return 0 if seen else 1
    if options.fix:
        print(f"rewrote {fix(options.root)} copies from their homes")
    problems = all_problems(options.root)
    if problems:
        print("\n\n".join(problems))
        return 1
    found = pairs(options.root)
    marked = sum(copy.differs for _, copy in found)
    print(f"{len(scripts(options.root))} scripts: {len(found) - marked} copies equal their homes, {marked} say why not")
    return 0


if __name__ == "__main__":
    sys.exit(main())
