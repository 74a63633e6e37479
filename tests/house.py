"""The house rules as functions: each takes a source text, a module or the README and returns the problems it finds.

`test_house.py` runs them over the scripts, and over small texts with a planted fault that each must report.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeGuard
from unittest import mock

import tyro
from copies import SCRIPTS, fields, string

LIBRARIES = {"numpy", "torch", "gymnasium", "tyro", "tensorboard", "tqdm"}
LAZY_LIBRARIES = {"mujoco", "matplotlib", "moviepy", "wandb", "minari"}
TABULAR = "tabular_mbrl.py"
TABULAR_LIBRARIES = {"numpy", "tyro"}
SIBLINGS = {name.removesuffix(".py") for name in SCRIPTS} | {"envs", "experts", "plots", "tests"}

# Fields that may hold -1, and strings that may hold anything: names and places to write to.
MAY_BE_NEGATIVE = {"target_entropy"}
FREE_STRINGS = {"exp_name", "wandb_project_name", "wandb_entity", "log_dir", "save_data", "save_policy"}

NONSENSE = "no-such-value"


# Rule 1: a script is a whole.


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported name, such as `torch.utils.tensorboard.SummaryWriter`."""

    name: str
    line: int
    in_function: bool

    @property
    def package(self) -> str:
        return self.name.split(".")[0]


def imports(source: str) -> list[Import]:
    """Every import of the file. What stands in a function runs only when it is called."""
    found: list[Import] = []

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, in_function) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found.extend(Import(f"{module}.{alias.name}", node.lineno, in_function) for alias in node.names)
        in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, in_function)

    visit(ast.parse(source), False)
    return found


def import_problems(name: str, source: str) -> list[str]:
    """Six libraries at the top, five more inside functions, and never another script."""
    problems = []
    for item in imports(source):
        where = f"{name}:{item.line}"
        if item.package in SIBLINGS or item.package == "":
            problems.append(f"{where}: imports {item.name}: a script never imports another file of this repository")
        elif item.package in sys.stdlib_module_names:
            continue
        elif name == TABULAR:
            if item.package not in TABULAR_LIBRARIES:
                problems.append(f"{where}: imports {item.name}: this script has only numpy and tyro")
        elif item.package in LAZY_LIBRARIES:
            if not item.in_function:
                problems.append(f"{where}: imports {item.name} at the top: only inside the function that needs it")
        elif item.package not in LIBRARIES:
            problems.append(f"{where}: imports {item.name}: not one of the libraries a script may use")
    return problems


# Runs in a fresh interpreter: import the script, then write down what it changed besides its own names.
PROBE = """
import importlib.util, json, os, random, signal, sys
script, answer, lazy, uses_torch = sys.argv[1], sys.argv[2], sys.argv[3].split(), sys.argv[4] == "True"
import numpy
if uses_torch:
    import gymnasium, torch, torch.utils.tensorboard

def state():
    found = {
        "Python's random state": random.getstate(),
        "numpy's random state": [str(part) for part in numpy.random.get_state()],
        "the environment variables": dict(os.environ),
        "the working directory": os.getcwd(),
        "the signal handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "the import of " + ", ".join(lazy): [name for name in lazy if name in sys.modules],
    }
    if uses_torch:
        found["torch's random state"] = torch.get_rng_state().tolist()
        found["torch's thread count"] = torch.get_num_threads()
        found["torch's default dtype"] = str(torch.get_default_dtype())
        found["torch's deterministic mode"] = torch.are_deterministic_algorithms_enabled()
        found["torch's gradient mode"] = torch.is_grad_enabled()
    return found

before = state()
spec = importlib.util.spec_from_file_location("script_under_test", script)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
after = state()
with open(answer, "w") as file:
    json.dump([what for what in before if before[what] != after[what]], file)
"""


def clean_environment() -> dict[str, str]:
    """The environment variables without a way to find the other scripts."""
    return {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}


def side_effect_problems(script: Path) -> list[str]:
    """Importing a script prints nothing, writes nothing and leaves the process as it was."""
    with tempfile.TemporaryDirectory() as name:
        empty, answer = Path(name) / "empty", Path(name) / "answer.json"
        empty.mkdir()
        uses_torch = any(item.package == "torch" for item in imports(script.read_text(encoding="utf-8")))
        arguments = [str(script.resolve()), str(answer), " ".join(sorted(LAZY_LIBRARIES)), str(uses_torch)]
        command = [sys.executable, "-c", PROBE, *arguments]
        done = subprocess.run(
            command, cwd=empty, env=clean_environment(), capture_output=True, text=True, timeout=120, check=False
        )
        problems = []
        if done.returncode != 0:
            problems.append(f"{script.name}: its import ends with exit code {done.returncode}")
        if done.stdout or done.stderr:
            problems.append(f"{script.name}: its import prints: {done.stdout}{done.stderr}")
        if files := sorted(path.name for path in empty.rglob("*")):
            problems.append(f"{script.name}: its import writes {files}")
        if answer.exists():
            problems += [f"{script.name}: its import changes {what}" for what in json.loads(answer.read_text())]
    return problems


def run_alone(script: Path, folder: Path, flags: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a copy of the script in a folder where it finds none of its neighbours."""
    copy = folder / script.name
    copy.write_bytes(script.read_bytes())
    command = [sys.executable, copy.name, *flags]
    return subprocess.run(
        command, cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=180, check=False
    )


def alone_problems(script: Path, folder: Path, flags: list[str], leaves: Iterable[str] = ()) -> list[str]:
    """Copied alone into an empty folder the script runs, and leaves these files (glob patterns) in its run folder."""
    done = run_alone(script, folder, flags)
    if done.returncode != 0:
        return [f"{script.name} {shlex.join(flags)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"]
    return [f"{script.name}: no {file} in the run folder" for file in leaves if not list(folder.glob(f"runs/*/{file}"))]


# PEP 723 metadata and requirements.txt.

HEADER = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")  # as the PEP has it
PIN = re.compile(r"[A-Za-z0-9._-]+(\[[a-z0-9,-]+\])?==[0-9][A-Za-z0-9.+!]*")


def pins(requirements: str) -> set[str]:
    """The lines of requirements.txt that name a package."""
    lines = [line.strip() for line in requirements.splitlines()]
    return {line for line in lines if line and not line.startswith("#")}


def requirements_problems(requirements: str) -> list[str]:
    """requirements.txt holds exact versions and comments, nothing else."""
    return [
        f"requirements.txt: not an exact version: {line}"
        for line in sorted(pins(requirements))
        if not PIN.fullmatch(line)
    ]


def package_of(pin: str) -> str:
    """`gymnasium[classic-control,mujoco]==1.4.0` -> `gymnasium[classic-control,mujoco]`."""
    return pin.split("==")[0]


def packages_needed(source: str) -> set[str]:
    """What must be installed for every import of the file. wandb and minari are extras that a flag asks for."""
    needed = {item.package for item in imports(source)} & (LIBRARIES | LAZY_LIBRARIES)
    if any(item.name.startswith("torch.utils.tensorboard") for item in imports(source)):
        needed.add("tensorboard")
    if needed & {"gymnasium", "mujoco"}:
        needed = needed - {"gymnasium", "mujoco"} | {"gymnasium[classic-control,mujoco]"}
    return needed - {"wandb", "minari"}


def header_problems(name: str, source: str, requirements: str) -> list[str]:
    """The script opens with metadata that names exactly the packages it imports, at the versions of the tests."""
    found = [match for match in HEADER.finditer(source) if match["type"] == "script"]
    if len(found) != 1 or found[0].start() != 0:
        return [f"{name}: does not begin with one '# /// script' block"]
    lines = found[0]["content"].splitlines()
    try:
        header = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
    except tomllib.TOMLDecodeError as error:
        return [f"{name}: the metadata is not TOML: {error}"]

    problems = []
    if header.get("requires-python") != ">=3.11":
        problems.append(f"{name}: requires-python is {header.get('requires-python')}, not >=3.11")
    dependencies = header.get("dependencies", [])
    known = pins(requirements)
    problems += [f"{name}: {pin} is not a line of requirements.txt" for pin in dependencies if pin not in known]

    listed = {package_of(pin) for pin in dependencies}
    needed = packages_needed(source)
    # gymnasium's extra has no upper bound on mujoco, and its video wrapper imports moviepy: both may be named too.
    allowed = needed | ({"mujoco"} if "gymnasium[classic-control,mujoco]" in needed else set())
    allowed |= {"moviepy"} if "RecordVideo" in source else set()
    problems += [f"{name}: imports {package}, which the metadata lacks" for package in sorted(needed - listed)]
    problems += [f"{name}: the metadata names {package}, not imported" for package in sorted(listed - allowed)]
    return problems


# Rules 2 and 8: the same order, the same main.


def is_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def order_problems(name: str, source: str) -> list[str]:
    """Docstring, then Args, then main, then the guard as the last statement."""
    tree = ast.parse(source)
    order = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    problems = []
    if not ast.get_docstring(tree):
        problems.append(f"{name}: no module docstring")
    if "Args" not in order or "main" not in order or order.index("Args") > order.index("main"):
        problems.append(f"{name}: Args does not come before main")
    if "main" in order and order[-1] != "main":
        problems.append(f"{name}: {order[-1]} comes after main")
    if not tree.body or not is_guard(tree.body[-1]):
        problems.append(f"{name}: does not end with if __name__ == '__main__'")
    return problems


def main_problems(name: str, source: str) -> list[str]:
    """`main(args: Args) -> dict[str, float]`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            result = ast.unparse(node.returns) if node.returns else "nothing"
            if ast.unparse(node.args) == "args: Args" and result == "dict[str, float]":
                return []
            return [f"{name}: main({ast.unparse(node.args)}) -> {result}, not main(args: Args) -> dict[str, float]"]
    return [f"{name}: no main"]


# Rule 7: every argument is used, documented and validated.


def is_args_read(node: ast.AST) -> TypeGuard[ast.Attribute]:
    """`args.field` where its value is wanted, not set."""
    if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
        return False
    return isinstance(node.value, ast.Name) and node.value.id == "args"


def args_problems(path: Path) -> list[str]:
    """Every field of Args has a string under it, and code outside Args reads it as `args.field`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    outside = [node for node in tree.body if not (isinstance(node, ast.ClassDef) and node.name == "Args")]
    read = {node.attr for statement in outside for node in ast.walk(statement) if is_args_read(node)}
    found = fields(path)
    problems = [] if found else [f"{path.name}: Args has no fields"]
    problems += [f"{field}: Args.{field.name} has no docstring" for field in found if not field.doc.strip()]
    problems += [f"{field}: nobody reads args.{field.name}" for field in found if field.name not in read]
    return problems


def bad_values(name: str, hint: typing.Any) -> list[typing.Any]:
    """Values that a field of this name and type must reject."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or is_union(hint) else (hint,)
    bad: list[typing.Any] = []
    if int in options and name not in MAY_BE_NEGATIVE:
        bad.append(-1)
    if float in options:
        bad += [float("nan")] + ([] if name in MAY_BE_NEGATIVE else [-1.0])
    if str in options and name not in FREE_STRINGS:
        bad.append(NONSENSE)
    if any(typing.get_origin(option) is typing.Literal for option in options):
        bad.append(NONSENSE)
    return bad


def is_union(hint: typing.Any) -> bool:
    return typing.get_origin(hint) is typing.Union


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread: a value that is not rejected must not train for an hour."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@contextlib.contextmanager
def no_environment_runs() -> Iterator[None]:
    """Environments may be made and looked at; the first reset or step of one raises."""
    from gymnasium.wrappers import OrderEnforcing

    def trip(*_: object, **__: object) -> None:
        raise RuntimeError("an environment ran before the check")

    with mock.patch.object(OrderEnforcing, "reset", trip), mock.patch.object(OrderEnforcing, "step", trip):
        yield


def rejection_problem(module: types.ModuleType, name: str, bad: object, folder: Path) -> str | None:
    """main ends with exit code 2 and one line that names the field (or quotes the bad string), and writes nothing."""
    default = module.Args()
    args = dataclasses.replace(default, log_dir=type(default.log_dir)(folder / "runs"))
    args = dataclasses.replace(args, **{name: bad})
    errors = io.StringIO()
    outcome: object = "it returned"
    with (
        time_limit(60),
        no_environment_runs(),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
    ):
        try:
            module.main(args)
        except SystemExit as stop:
            outcome = stop.code
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
    lines = [line for line in errors.getvalue().splitlines() if line.strip()]
    if outcome != 2:
        return f"not exit code 2 but: {outcome}"
    if len(lines) != 1:
        return f"not one line on stderr but {len(lines)}: {lines}"
    quoted = isinstance(bad, str) and bad in lines[0]
    if name not in lines[0].replace("-", "_") and not quoted:
        return f"the line does not name the argument: {lines[0]}"
    if files := sorted(str(path.relative_to(folder)) for path in folder.rglob("*")):
        return f"it had already written {files}"
    return None


def validation_problems(module: types.ModuleType) -> list[str]:
    """Each field alone at a bad value: every one must be rejected before any work starts."""
    problems = []
    hints = typing.get_type_hints(module.Args)
    for field in dataclasses.fields(module.Args):
        for bad in bad_values(field.name, hints[field.name]):
            with tempfile.TemporaryDirectory() as folder:
                problem = rejection_problem(module, field.name, bad, Path(folder))
            if problem:
                problems.append(f"{field.name}={bad!r}: {problem}")
    return problems


@functools.cache
def load(path: Path) -> types.ModuleType:
    """Import a file by its path, under a name that no script could import by accident."""
    spec = importlib.util.spec_from_file_location(f"house_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and get_type_hints look the module up
    spec.loader.exec_module(module)
    return module


# Tags: what is logged is explained, what is explained is logged.

TAG = r"(?:charts|eval|check|losses|model|time|pictures)/[A-Za-z0-9_{}./-]+"


def same_braces(tag: str) -> str:
    """`model/mse_{horizon}` and `model/mse_{h}` are one tag."""
    return re.sub(r"\{[^{}]*\}", "{}", tag).rstrip(".")


def tags_in_docstring(source: str) -> set[str]:
    """Tags at the beginning of a line of the module docstring."""
    docstring = ast.get_docstring(ast.parse(source)) or ""
    return {same_braces(tag) for tag in re.findall(rf"(?m)^[ \t]*({TAG})", docstring)}


def text_of(node: ast.AST) -> str | None:
    """The text of a string literal; of an f-string with `{}` for each value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "{}" for part in node.values)
    return None


def looked_up(node: ast.AST) -> list[ast.expr]:
    """Where a string is only asked for, not logged: `metrics[tag]`, `tag in metrics`, `name.startswith(tag)`."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        return [node.slice]
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.args if node.func.attr in ("startswith", "removeprefix", "get") else []
    return []


def tags_in_code(source: str) -> dict[str, int]:
    """String literals that are a tag, with the line of the first; docstrings and look-ups do not count."""
    found: dict[str, int] = {}

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Expr) and string(node):
            return
        text = text_of(node)
        if text is not None:
            if re.fullmatch(TAG, text):
                found.setdefault(same_braces(text), getattr(node, "lineno", 0))
            return
        asked = [part for part in looked_up(node) if text_of(part) is not None]
        for child in ast.iter_child_nodes(node):
            if child not in asked:
                visit(child)

    visit(ast.parse(source))
    return found


def tag_problems(name: str, source: str) -> list[str]:
    """A tag that is logged but not explained, or explained but never logged."""
    logged, explained = tags_in_code(source), tags_in_docstring(source)
    problems = [
        f"{name}:{line}: {tag} is not explained in the docstring"
        for tag, line in logged.items()
        if tag not in explained
    ]
    problems += [f"{name}: the docstring explains {tag}, never logged" for tag in sorted(explained - logged.keys())]
    return problems


# README.md.

FENCE = re.compile(r"^[ \t]*```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^[ \t]*```[ \t]*$", re.M | re.S)
SHELL_LANGUAGES = {"", "bash", "sh", "shell", "console"}


def shell_lines(text: str) -> list[str]:
    """Lines without empty ones, continued lines joined."""
    joined = re.sub(r"\\\n[ \t]*", " ", text)
    return [line.strip().removeprefix("$ ") for line in joined.splitlines() if line.strip()]


def shell_blocks(readme: str) -> list[list[str]]:
    """The lines of each fenced block that holds shell commands."""
    return [shell_lines(match["text"]) for match in FENCE.finditer(readme) if match["language"] in SHELL_LANGUAGES]


def split_commands(line: str) -> list[list[str]]:
    """The words of each command of a line: split at && || ; | & and redirections, without the comment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("();<>|&"):
            commands.append([])
        else:
            commands[-1].append(re.sub(r"\$\{?\w+\}?", "1", word))  # a shell variable: a seed, mostly
    return [command for command in commands if command]


def script_and_flags(command: list[str]) -> tuple[str, list[str]] | None:
    """(`mpc_cem.py`, its flags) of a command that runs a Python file; None for any other command."""
    words = list(command)
    while words and (re.match(r"\w+=", words[0]) or words[0] in ("env", "time", "nohup", "exec", "do", "then")):
        words.pop(0)
    runs_python = bool(words) and re.fullmatch(r"python[0-9.]*", Path(words[0]).name) is not None
    if not runs_python and words[:2] != ["uv", "run"]:
        return None
    if "-m" in words or "-c" in words:  # a module or a line of code, not a file
        return None
    for position, word in enumerate(words):
        if word.endswith(".py"):
            return word, words[position + 1 :]
    return None


def flag_problem(script: Path, flags: list[str]) -> str | None:
    """What tyro says against these flags."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            tyro.cli(load(script).Args, args=flags)
        except SystemExit as stop:
            if stop.code not in (0, None):  # 0: --help
                return errors.getvalue() or f"exit code {stop.code}"
    return None


def docstring_problems(path: Path, source: str) -> list[str]:
    """--help shows the docstring as it stands in the file, and the commands in it parse."""
    shown = ast.get_docstring(ast.parse(source), clean=False) or ""
    if shown not in source:  # a backslash has eaten the line break of a command
        return [f'{path.name}: the docstring is not shown as it stands; begin it with r"""']
    commands = [line for line in shell_lines(shown) if re.match(r"(uv run|python) \S+\.py", line)]
    problems = command_problems("\n".join(["```bash", *commands, "```"]), path.parent)
    return [problem.replace("README.md", path.name) for problem in problems]


def command_problems(readme: str, root: Path) -> list[str]:
    """Every command in README.md runs a file that exists, and a script's flags parse."""
    problems = []
    for line in [line for block in shell_blocks(readme) for line in block if ".py" in line]:
        try:
            commands = split_commands(line)
        except ValueError as error:
            problems.append(f"README.md: {line}: {error}")
            continue
        for script, flags in filter(None, map(script_and_flags, commands)):
            if not (root / script).is_file():
                problems.append(f"README.md: {line}: there is no {script}")
            elif script in SCRIPTS and (problem := flag_problem(root / script, flags)):
                problems.append(f"README.md: {line}\n{problem}")
    return problems


def ci_problems(ci_run: str, readme: str) -> list[str]:
    """The commands that CI runs stand in one code block of README.md, so that a reader can run the same."""
    commands = [line for line in shell_lines(ci_run) if not re.match(r"#|set\b|cd\b", line)]
    if not commands:
        return [".ci/run: no command"]
    for block in shell_blocks(readme):
        if all(command in "\n".join(block) for command in commands):
            return []
    return [f"README.md: no code block with the commands of .ci/run: {commands}"]


TABLE = re.compile(r"<!-- table: (?P<name>[\w.-]+) -->\n(?P<text>.*?)<!-- end table: (?P=name) -->", re.S)
NUMBER = re.compile(r"(?<![A-Za-z0-9_])\d")  # a number, not the digit in a2c or HalfCheetah-v5


def table_problems(readme: str, root: Path, table_markdown: Callable[[Path], str]) -> list[str]:
    """The text between a table's markers is what the figures make of its CSV."""
    problems = []
    matches = list(TABLE.finditer(readme))
    marks = len(re.findall(r"<!-- (?:end )?table:", readme))
    if marks != 2 * len(matches):
        problems.append(f"README.md: {marks} table markers, but {len(matches)} pairs")
    for match in matches:
        csv = root / "plots" / f"{match['name']}.csv"
        if not csv.is_file():
            problems.append(f"README.md: table {match['name']}: there is no plots/{csv.name}")
        elif match["text"].strip() != table_markdown(csv).strip():
            problems.append(f"README.md: table {match['name']} is not what plots/{csv.name} gives")
    return problems


def loose_table_problems(readme: str) -> list[str]:
    """A table with a number in it stands between markers, so that no number is typed by hand."""
    text = FENCE.sub("", TABLE.sub("", readme))
    lines = text.splitlines()
    in_table = set()
    for row, line in enumerate(lines):
        if re.fullmatch(r"[\s|:-]*-[\s|:-]*", line) and "|" in line:  # the line under a table's head
            in_table.add(row - 1)
            for below in range(row + 1, len(lines)):
                if "|" not in lines[below]:
                    break
                in_table.add(below)
        if line.lstrip().startswith("|"):
            in_table.add(row)
    return [
        f"README.md: a number in a table outside markers: {lines[row]}"
        for row in sorted(in_table)
        if NUMBER.search(lines[row])
    ]


# Names of the place where the project was written.

# In pieces, so that this file does not contain them.
PLACES = ("/" + "work/", "/tmp/" + "venv", "." + "library", "farm" + "-bench")


def project_files(root: Path) -> list[Path]:
    """The files git tracks, and those it would add; without git all that is not hidden."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        names = [path.relative_to(root) for path in root.rglob("*")]
        return [root / name for name in names if not any(part.startswith(".") for part in name.parts)]
    return [root / os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def place_problems(files: Iterable[Path]) -> list[str]:
    """No text file names the place where it was written: it would mean nothing to a reader."""
    problems = []
    for path in files:
        data = path.read_bytes() if path.is_file() else b""
        if b"\0" in data:  # not a text file
            continue
        problems += [f"{path.name} contains {place}" for place in PLACES if place.encode() in data]
    return problems
