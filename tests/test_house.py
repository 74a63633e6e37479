"""The house rules, over every script that exists; and for every check a planted fault that it must report."""

import subprocess
import sys
import types
from pathlib import Path

import copies
import house
import pytest
import torch

ROOT = copies.ROOT
SCRIPTS = copies.scripts()

# A tiny real run of each script, alone in an empty folder. A script without a row fails.
PLANNER_TINY = (
    "--env-id Pendulum-v1 --max-episode-steps 10 --num-iterations 2 --initial-steps 30 --steps-per-iteration 10"
    " --train-steps 5 --num-layers 1 --hidden-size 8 --ensemble-size 2 --horizon 3 --num-candidates 12"
    " --eval-episodes 2 --no-cuda --num-threads 1"
)
TINY = {
    "mbrl_dynamics.py": "--env-id Pendulum-v1 --initial-steps 400 --train-steps 20 --num-layers 1 --hidden-size 8"
    " --ensemble-size 2 --no-cuda --num-threads 1",
    "mpc_random_shooting.py": f"{PLANNER_TINY}",
    "mpc_cem.py": f"{PLANNER_TINY} --num-elites 3",
    "pets.py": f"{PLANNER_TINY} --num-elites 3 --num-particles 2",
    "mbpo_sac.py": "--env-id Pendulum-v1 --max-episode-steps 10 --total-timesteps 60 --initial-steps 30 --eval-every 30"
    " --eval-episodes 2 --interim-episodes 1 --batch-size 16 --units 8 --utd-ratio 1 --model-every 20 --num-layers 1"
    " --hidden-size 8 --rollouts-per-step 2 --max-train-steps 5 --no-cuda --num-threads 1",
    "bc_variants.py": "--env-id Pendulum-v1 --max-episode-steps 10 --data demonstrations.pt --train-steps 20"
    " --eval-every 10 --eval-episodes 2 --interim-episodes 1 --hidden-size 8 --no-cuda --num-threads 1",
    "adversarial_imitation.py": "--env-id Pendulum-v1 --max-episode-steps 10 --data demonstrations.pt --units 8"
    " --total-timesteps 60 --initial-steps 30 --eval-every 30 --eval-episodes 2 --interim-episodes 1 --batch-size 16"
    " --discriminator-units 8 --no-cuda --num-threads 1",
    "a2c.py": "--env-id Pendulum-v1 --max-episode-steps 10 --total-timesteps 64 --num-envs 2 --batch-size 8"
    " --eval-every 30 --eval-episodes 2 --interim-episodes 1 --hidden-size 8 --no-cuda --num-threads 1",
    "tabular_mbrl.py": "--num-draws 3 --num-samples 5 10",
}

# What the run leaves in its run folder.
LEAVES: dict[str, list[str]] = {
    "mbrl_dynamics.py": [
        "args.json",
        "metrics.csv",
        "result.json",
        "model.pt",
        "checkpoint.pt",
        "events.out.tfevents.*",
    ],
}

REQUIREMENTS = """
# a comment
torch==2.13.0
gymnasium[classic-control,mujoco]==1.4.0
mujoco==4.0.0
numpy==2.4.6
tyro==1.0.17
tensorboard==2.21.0
matplotlib==3.11.2
moviepy==2.2.1
"""

# A script that keeps every rule. The planted faults are small changes of it.
TOY = '''# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy==2.4.6",
#     "tyro==1.0.17",
# ]
# ///
"""A toy.

Logged:
    losses/toy          explained
    model/mse_{h}       explained
"""

import dataclasses
import math
import sys
from typing import Literal

import numpy as np
import tyro


@dataclasses.dataclass
class Args:
    log_dir: str = "runs"
    """Where the run folder goes."""
    horizon: int | None = 3
    """How far to look."""
    rate: float = 0.1
    """How fast to learn."""
    kind: Literal["a", "b"] = "a"
    """Which of the two."""
    expert: str = ""
    """A file."""


def check(args: Args) -> None:
    """Rejects what cannot work."""
    problem = ""
    if args.horizon is not None and args.horizon < 1:
        problem = f"--horizon {args.horizon}: at least 1"
    if not 0 < args.rate < math.inf:
        problem = f"--rate {args.rate}: above 0"
    if args.kind not in ("a", "b"):
        problem = f"--kind {args.kind}: a or b"
    if args.expert:
        problem = f"no file {args.expert}"
    if not args.log_dir:
        problem = "--log-dir: empty"
    if problem:
        print(problem, file=sys.stderr)
        sys.exit(2)


def main(args: Args) -> dict[str, float]:
    check(args)
    name = f"model/mse_{args.horizon}"
    return {"losses/toy": float(np.zeros(1)[0]), name: 0.0}


if __name__ == "__main__":
    main(tyro.cli(Args))
'''


def changed(old: str, new: str) -> str:
    """The toy with one thing changed."""
    assert TOY.count(old) == 1, old
    return TOY.replace(old, new)


def reports(problems: list[str], *words: str) -> bool:
    """Exactly one problem, and it has all these words."""
    return len(problems) == 1 and all(word in problems[0] for word in words)


def assert_none(problems: list[str]) -> None:
    assert not problems, "\n" + "\n\n".join(problems)


def toy_file(folder: Path, source: str = TOY, name: str = "toy.py") -> Path:
    path = folder / name
    path.write_text(source, encoding="utf-8")
    return path


@pytest.fixture(params=SCRIPTS, ids=[path.stem for path in SCRIPTS])
def script(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture
def source(script: Path) -> str:
    return script.read_text(encoding="utf-8")


@pytest.fixture
def requirements() -> str:
    return (ROOT / "requirements.txt").read_text(encoding="utf-8")


@pytest.fixture
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_there_are_scripts() -> None:
    assert SCRIPTS


# Rule 1: a script is a whole.


def test_imports(script: Path, source: str) -> None:
    assert_none(house.import_problems(script.name, source))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("toy.py", "import mujoco"),
        ("toy.py", "from matplotlib import pyplot"),
        ("toy.py", "import pandas"),
        ("toy.py", "try:\n    import wandb\nexcept ImportError:\n    pass"),
        ("toy.py", "from mpc_cem import plan"),
        ("toy.py", "from . import plan"),
        ("toy.py", "def f() -> None:\n    import envs"),
        ("toy.py", "def f() -> None:\n    import boto3"),
        ("tabular_mbrl.py", "import torch"),
        ("tabular_mbrl.py", "def f() -> None:\n    import matplotlib"),
    ],
)
def test_imports_planted(name: str, line: str) -> None:
    assert reports(house.import_problems(name, f"import os\n{line}\n"), f"{name}:")


def test_imports_allowed() -> None:
    lines = "from torch.utils.tensorboard import SummaryWriter\nimport gymnasium as gym\nfrom tqdm import tqdm\n"
    assert_none(house.import_problems("toy.py", lines + "def f() -> None:\n    import matplotlib.pyplot as plt\n"))


def test_import_has_no_side_effects(script: Path) -> None:
    assert_none(house.side_effect_problems(script))


def test_import_has_no_side_effects_planted(tmp_path: Path) -> None:
    """All faults in one file, so that torch is imported once."""
    lines = [
        "import random, signal, sys, os, torch, numpy, mujoco",
        "print('hello')",
        "print('warning', file=sys.stderr)",
        "open('left_behind', 'w').close()",
        "torch.manual_seed(1); torch.set_num_threads(torch.get_num_threads() + 1)",
        "torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False)",
        "torch.use_deterministic_algorithms(True)",
        "random.seed(1); numpy.random.seed(1)",
        "os.environ['TOY'] = '1'; signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    ]
    problems = "\n".join(house.side_effect_problems(toy_file(tmp_path, "\n".join(lines))))
    for words in (
        "hello",
        "warning",
        "left_behind",
        "changes torch's random state",
        "changes torch's thread count",
        "changes torch's default dtype",
        "changes torch's gradient mode",
        "changes torch's deterministic mode",
        "changes Python's random state",
        "changes numpy's random state",
        "changes the environment variables",
        "changes the signal handlers",
        "changes the import of",
    ):
        assert words in problems


def test_import_failure_planted(tmp_path: Path) -> None:
    assert "exit code 1" in house.side_effect_problems(toy_file(tmp_path, "import neighbour\n"))[0]


def test_help_alone(script: Path, tmp_path: Path) -> None:
    assert_none(house.alone_problems(script, tmp_path, ["--help"]))


def test_tiny_run_alone(script: Path, tmp_path: Path) -> None:
    assert script.name in TINY, f"{script.name} has no row in TINY"
    if "demonstrations.pt" in TINY[script.name]:  # the imitation scripts need something to imitate
        rows = {"observations": torch.randn(30, 3), "actions": torch.rand(30, 1), "mean_reward": -1.0}
        torch.save(rows, tmp_path / "demonstrations.pt")
    assert_none(house.alone_problems(script, tmp_path, TINY[script.name].split(), LEAVES.get(script.name, [])))


def test_alone_planted(tmp_path: Path) -> None:
    """A neighbour that is imported inside main, and a file that the run does not leave."""
    home, alone = tmp_path / "home", tmp_path / "alone"
    home.mkdir()
    alone.mkdir()
    toy_file(home, "x = 1\n", "neighbour.py")
    needy = toy_file(home, changed("    check(args)\n", "    import neighbour\n"))
    assert reports(house.alone_problems(needy, alone, []), "exit code 1", "neighbour")
    assert reports(house.alone_problems(toy_file(home), alone, ["--no-such-flag"]), "exit code 2")
    assert reports(house.alone_problems(toy_file(home), alone, [], ["args.json"]), "no args.json")
    assert_none(house.alone_problems(toy_file(home), alone, ["--help"]))


# Metadata and requirements.


def test_requirements(requirements: str) -> None:
    assert house.pins(requirements)
    assert_none(house.requirements_problems(requirements))


@pytest.mark.parametrize("line", ["torch", "torch>=2", "torch==2.*", "-r other.txt", "torch==2.13.0 --no-deps"])
def test_requirements_planted(line: str) -> None:
    assert reports(house.requirements_problems(REQUIREMENTS + line), line)
    assert_none(house.requirements_problems(REQUIREMENTS))


def test_header(script: Path, source: str, requirements: str) -> None:
    assert_none(house.header_problems(script.name, source, requirements))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("# /// script\n", "\n# /// script\n", "does not begin"),
        ("# ///\n", "#\n", "does not begin"),
        ("# dependencies = [", "# dependencies = [[", "not TOML"),
        (">=3.11", ">=3.10", "requires-python"),
        ("numpy==2.4.6", "numpy==2.4.5", "numpy==2.4.5 is not a line"),
        ('#     "numpy==2.4.6",\n', "", "imports numpy"),
        ('"tyro==1.0.17"', '"tyro==1.0.17", "torch==2.13.0"', "names torch"),
        ('"tyro==1.0.17"', '"tyro==1.0.17", "mujoco==4.0.0"', "names mujoco"),
        ('"tyro==1.0.17"', '"tyro==1.0.17", "moviepy==2.2.1"', "names moviepy"),
        ("import tyro\n", "import tyro\nimport gymnasium\n", "imports gymnasium[classic-control,mujoco]"),
        ("    check(args)\n", "    import matplotlib\n", "imports matplotlib"),
    ],
)
def test_header_planted(old: str, new: str, words: str) -> None:
    assert reports(house.header_problems("toy.py", changed(old, new), REQUIREMENTS), words)


def test_header_tensorboard_planted() -> None:
    """torch.utils.tensorboard needs a second package."""
    source = changed("import tyro\n", "import tyro\nfrom torch.utils.tensorboard import SummaryWriter\n")
    with_torch = source.replace('"tyro==1.0.17"', '"tyro==1.0.17", "torch==2.13.0"')
    assert reports(house.header_problems("toy.py", with_torch, REQUIREMENTS), "imports tensorboard")
    with_both = with_torch.replace('"tyro==1.0.17"', '"tyro==1.0.17", "tensorboard==2.21.0"')
    assert_none(house.header_problems("toy.py", with_both, REQUIREMENTS))


def test_header_allowed() -> None:
    """mujoco beside gymnasium, moviepy for gymnasium's video wrapper, and no pin for an extra."""
    assert_none(house.header_problems("toy.py", TOY, REQUIREMENTS))
    source = changed("import tyro\n", "import tyro\nfrom gymnasium.wrappers import RecordVideo\n")
    source = source.replace("    check(args)\n", "    import wandb\n    import minari\n")
    extra = '"tyro==1.0.17", "gymnasium[classic-control,mujoco]==1.4.0", "mujoco==4.0.0", "moviepy==2.2.1"'
    assert_none(house.header_problems("toy.py", source.replace('"tyro==1.0.17"', extra), REQUIREMENTS))


# Rules 2 and 8: order, and main's signature.


def test_order(script: Path, source: str) -> None:
    assert_none(house.order_problems(script.name, source))


def test_order_planted() -> None:
    assert_none(house.order_problems("toy.py", TOY))
    assert reports(house.order_problems("toy.py", changed('"""A toy.', 'x = """A toy.')), "no module docstring")
    assert reports(house.order_problems("toy.py", changed("class Args", "class Arguments")), "Args")
    assert reports(house.order_problems("toy.py", TOY + "\nx = 1\n"), "does not end")
    late = changed('if __name__ == "__main__"', 'def late() -> None:\n    pass\n\n\nif __name__ == "__main__"')
    assert reports(house.order_problems("toy.py", late), "late comes after main")


def test_main(script: Path, source: str) -> None:
    assert_none(house.main_problems(script.name, source))


def test_main_planted() -> None:
    assert_none(house.main_problems("toy.py", TOY))
    assert reports(house.main_problems("toy.py", changed("-> dict[str, float]:", "-> None:")), "None")
    assert reports(house.main_problems("toy.py", changed("def main(args: Args)", "def main(a: Args)")), "main(a: Args)")
    assert reports(house.main_problems("toy.py", changed("def main(", "def run(")), "no main")


# Rule 3: the same name means the same bytes.


def test_copies() -> None:
    assert_none(copies.all_problems())


def test_copies_self_test() -> None:
    """The check reports a flipped character; a check that sees nothing fails the self-test."""
    assert copies.self_test()
    assert not copies.self_test(check=lambda root: [])


def pair(folder: Path, first: str, second: str) -> tuple[Path, Path]:
    """Two scripts in reading order."""
    return toy_file(folder, first, copies.SCRIPTS[0]), toy_file(folder, second, copies.SCRIPTS[1])


BLOCK = "@cache\ndef f(x: int) -> int:\n    return x\n"


@pytest.mark.parametrize("root_is_empty", [True, False])
def test_copies_self_test_elsewhere(tmp_path: Path, root_is_empty: bool) -> None:
    """It plants a pair where nothing is shared, and is not satisfied with a fault that was there before."""
    if not root_is_empty:
        pair(tmp_path, BLOCK + "def g():\n    print('a\\n')\n", BLOCK.replace("cache", "Cache") + "def g():\n    1\n")
    assert copies.self_test(tmp_path)
    assert not copies.self_test(tmp_path, check=lambda root: ["f: an old problem"])


@pytest.mark.parametrize(
    "second",
    [
        BLOCK.replace("return x", "return X"),
        BLOCK.replace("@cache", "@lru_cache"),
        BLOCK.replace("@cache\n", ""),
        BLOCK.replace("return x", "return x "),
        BLOCK.replace("return x", "return x  # why"),
        BLOCK.replace("\n", "\r\n"),
        "# Differs: \n" + BLOCK.replace("return x", "return -x"),
        "# Differs: too far above\n\n" + BLOCK.replace("return x", "return -x"),
        "# Differs: there is nothing to excuse\n" + BLOCK,
        "class f:\n    pass\n",
    ],
)
def test_copies_planted(tmp_path: Path, second: str) -> None:
    pair(tmp_path, "import os\n" + BLOCK, "")
    (tmp_path / copies.SCRIPTS[1]).write_bytes(second.encode())
    assert reports(copies.all_problems(tmp_path), "f", copies.SCRIPTS[0], copies.SCRIPTS[1])


def test_copies_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal blocks, a reason, and different Args and main."""
    args = "class Args:\n    lr: float = {}\n    'How fast.'\ndef main():\n    return {}\n"
    reason = "# Differs: the other sign\n" + BLOCK.replace("return x", "return -x").replace("f(", "g(")
    first, second = pair(tmp_path, BLOCK + BLOCK.replace("f(", "g(") + args.format(1, 1), args.format(2, 2) + BLOCK)
    second.write_text(second.read_text() + reason)
    assert copies.main(["--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "2 scripts: 1 copies equal their homes, 1 say why not\n"
    assert first.exists()


def test_copies_of_fields_planted(tmp_path: Path) -> None:
    args = "class Args:\n    lr: float = 1.0\n    'How fast.'\n"
    pair(tmp_path, args, args.replace("float", "int"))
    assert reports(copies.all_problems(tmp_path), "type of Args.lr", "-float", "+int")
    pair(tmp_path, args, args.replace("fast", "slow"))
    assert reports(copies.all_problems(tmp_path), "docstring of Args.lr", "-How fast.", "+How slow.")


def test_copies_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--fix copies from the home, leaves what is marked, and only reports the fields."""
    other = BLOCK.replace("f(", "g(")
    args = "class Args:\n    lr: float = 1.0\n    'How fast.'\n"
    drifted = "x = 1\n" + BLOCK.replace("@cache\n", "") + "# why\n" + other.replace("return x", "return x\n\n    pass")
    marked = "# Differs: the other sign\n" + BLOCK.replace("return x", "return -x") + "\n" + other
    pair(tmp_path, BLOCK + other, drifted)
    toy_file(tmp_path, marked, copies.SCRIPTS[2])
    assert copies.main(["--root", str(tmp_path)]) == 1
    assert "-@cache" in capsys.readouterr().out
    assert copies.main(["--root", str(tmp_path), "--fix"]) == 0
    assert (tmp_path / copies.SCRIPTS[1]).read_text() == "x = 1\n" + BLOCK + "# why\n" + other
    assert (tmp_path / copies.SCRIPTS[2]).read_text() == marked
    pair(tmp_path, args, args.replace("fast", "slow"))
    assert copies.main(["--root", str(tmp_path), "--fix"]) == 1
    assert "slow" in (tmp_path / copies.SCRIPTS[1]).read_text()
    assert len(list(tmp_path.iterdir())) == 3  # no temporary file is left


def test_copies_command() -> None:
    """The tool as a command, the way a person calls it."""
    command = [sys.executable, str(ROOT / "tests" / "copies.py"), "--self-test"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "self-test: the flipped character was reported\n")


# Rule 7: every argument is used, documented and validated.


def test_args(script: Path) -> None:
    assert_none(house.args_problems(script))


def test_args_planted(tmp_path: Path) -> None:
    assert reports(house.args_problems(toy_file(tmp_path, "x = 1\n")), "no fields")
    silent = toy_file(tmp_path, changed('    """How far to look."""\n', ""))
    assert reports(house.args_problems(silent), "horizon has no docstring")
    unread = changed("    kind:", '    extra: int = 1\n    """Never read."""\n    kind:')
    assert reports(house.args_problems(toy_file(tmp_path, unread)), "nobody reads args.extra")
    only_set = unread.replace("    check(args)\n", "    args.extra = 2\n")
    assert reports(house.args_problems(toy_file(tmp_path, only_set)), "nobody reads args.extra")


def test_wrong_values_are_rejected(script: Path) -> None:
    assert_none(house.validation_problems(house.load(script)))


def toy_module(source: str) -> types.ModuleType:
    module = types.ModuleType("house_toy")
    sys.modules[module.__name__] = module
    exec(source, module.__dict__)
    return module


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("if args.horizon is not None and args.horizon < 1:", "if False:", ("horizon=-1", "it returned")),
        ("if not 0 < args.rate < math.inf:", "if args.rate <= 0:", ("rate=nan", "it returned")),
        ("if not 0 < args.rate < math.inf:", "if math.isnan(args.rate):", ("rate=-1.0", "it returned")),
        ('if args.kind not in ("a", "b"):', "if False:", ("kind=", "it returned")),
        ("if args.expert:", "if False:", ("expert=", "it returned")),
        ('problem = f"no file {args.expert}"', "raise OSError('no file')", ("expert=", "OSError")),
        ('f"--horizon {args.horizon}: at least 1"', '"at least 1, not -1"', ("horizon=", "does not name")),
        ('f"--horizon {args.horizon}: at least 1"', '"--horizon:\\nat least 1"', ("horizon=", "not one line")),
    ],
)
def test_wrong_values_planted(old: str, new: str, words: tuple[str, ...]) -> None:
    assert reports(house.validation_problems(toy_module(changed(old, new))), *words)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sys.exit(1)", "not exit code 2 but: 1"),
        ("open('left_behind', 'w').close()", "already written ['left_behind']"),
        ("import os; os.makedirs(args.log_dir)", "already written ['runs']"),
        ("import gymnasium; gymnasium.make('CartPole-v1').reset()", "an environment ran"),
        ("raise ValueError('bad')", "ValueError: bad"),
    ],
)
def test_late_checks_planted(line: str, words: str) -> None:
    problems = house.validation_problems(toy_module(changed("    check(args)\n", f"    {line}\n    check(args)\n")))
    assert len(problems) == 5 and all(words in problem for problem in problems)  # each of the five wrong values


def test_wrong_values_time_limit_planted() -> None:
    """A value that is not rejected does not train for an hour."""
    with pytest.raises(TimeoutError), house.time_limit(1):
        while True:
            pass


def test_wrong_values_allowed() -> None:
    assert_none(house.validation_problems(toy_module(TOY)))


# Tags.


def test_tags(script: Path, source: str) -> None:
    assert_none(house.tag_problems(script.name, source))


def test_tags_planted() -> None:
    assert_none(house.tag_problems("toy.py", TOY))
    unexplained = changed("    losses/toy          explained\n", "    the losses/toy\n")
    assert reports(house.tag_problems("toy.py", unexplained), "losses/toy is not explained")
    unlogged = changed('"losses/toy":', '"toy":')
    assert reports(house.tag_problems("toy.py", unlogged), "explains losses/toy, never logged")
    no_longer = changed('f"model/mse_{args.horizon}"', '"mse"')
    assert reports(house.tag_problems("toy.py", no_longer), "explains model/mse_{}, never logged")
    for look_up in ('x["losses/toy"]', '"losses/toy" in x', 'x.startswith("losses/toy")', 'x.get("losses/toy")'):
        asked = unlogged.replace("    check(args)\n", f"    check(args)\n    print({look_up})\n")
        assert reports(house.tag_problems("toy.py", asked), "explains losses/toy, never logged")
    formatted = changed('f"model/mse_{args.horizon}"', 'f"model/mae_{args.horizon:03d}"')
    assert len(house.tag_problems("toy.py", formatted)) == 2


# README.md.


def test_readme_commands(readme: str) -> None:
    assert_none(house.command_problems(readme, ROOT))


@pytest.fixture
def toy_root(tmp_path: Path) -> Path:
    """A repository whose one script is the toy, under a name from the list."""
    toy_file(tmp_path, TOY, copies.SCRIPTS[2])
    toy_file(tmp_path, "", "other.py")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        "python mpc_cem.py --horizonn 3",
        "python mpc_cem.py --horizon 5e3",
        ".venv/bin/python mpc_cem.py --kind c",
        "uv run mpc_cem.py --no-such-flag",
        "MUJOCO_GL=egl python3 mpc_cem.py --no-such-flag",
        "cd somewhere && python mpc_cem.py --no-such-flag",
        "python mpc_cem.py --horizon 3 && python mpc_cem.py --no-such-flag  # both",
        "python mpc_cem.py --horizon 3 \\\n    --no-such-flag",
        "for s in 1 2; do python mpc_cem.py --horizon $s --no-such-flag; done",
        "$ python mpc_cem.py --no-such-flag > log.txt 2>&1",
        "python missing.py",
        "python mpc_cem.py --expert 'open",
    ],
)
def test_readme_commands_planted(toy_root: Path, command: str) -> None:
    assert len(house.command_problems(f"Text\n\n```bash\n{command}\n```\n", toy_root)) == 1


def test_readme_commands_allowed(toy_root: Path) -> None:
    readme = """
    python mpc_cem.py --no-such-flag, outside a code block

```bash
python -m venv .venv && .venv/bin/python -m pip install -r requirements.txt
A=1 python mpc_cem.py --horizon 3 \\
    --kind b  # a comment with --no-such-flag
for seed in 1 2 3; do uv run mpc_cem.py --horizon $seed; done
python mpc_cem.py --help
python other.py --no-such-flag
```

```python
python mpc_cem.py --no-such-flag
```
"""
    assert_none(house.command_problems(readme, toy_root))


def test_docstring_commands(script: Path, source: str) -> None:
    assert_none(house.docstring_problems(script, source))


def test_docstring_commands_planted(toy_root: Path) -> None:
    path, command = toy_root / copies.SCRIPTS[2], "python mpc_cem.py --horizon 3 \\\n    --kind b"
    assert_none(house.docstring_problems(path, f'r"""Toy.\n\n    {command}\n"""\n'))
    assert reports(house.docstring_problems(path, f'"""Toy.\n\n    {command}\n"""\n'), "not shown as it stands")
    wrong = command.replace("--kind", "--kin")
    assert reports(house.docstring_problems(path, f'r"""Toy.\n\n    {wrong}\n"""\n'), "mpc_cem.py")


def test_readme_has_the_test_command(readme: str) -> None:
    assert_none(house.ci_problems((ROOT / ".ci" / "run").read_text(encoding="utf-8"), readme))


def test_readme_has_the_test_command_planted() -> None:
    ci_run = "#!/bin/sh\n# why\nset -eu\ncd here\npip install -r requirements.txt\npython -m pytest\n"
    assert_none(house.ci_problems(ci_run, "```bash\npip install -r requirements.txt\npython -m pytest\n```\n"))
    assert_none(house.ci_problems(ci_run, "```\npip install -r requirements.txt && python -m pytest\n```\n"))
    assert reports(house.ci_problems(ci_run, "```bash\npython -m pytest\n```\n"), "no code block")
    assert reports(house.ci_problems(ci_run, "pip install -r requirements.txt\npython -m pytest\n"), "no code block")
    assert reports(house.ci_problems("#!/bin/sh\nset -e\n", ""), "no command")


def test_readme_tables(readme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "plots")  # figures.py imports its neighbour, as it may
    figures = house.load(ROOT / "plots" / "figures.py")
    assert_none(house.table_problems(readme, ROOT, figures.table_markdown))


def test_readme_tables_planted(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "speed.csv").write_text("| a |\n|---|\n| 12 |\n")
    readme = "<!-- table: speed -->\n\n| a |\n|---|\n| 12 |\n\n<!-- end table: speed -->\n"
    assert_none(house.table_problems(readme, tmp_path, Path.read_text))
    assert reports(house.table_problems(readme.replace("12", "13"), tmp_path, Path.read_text), "is not what")
    assert reports(house.table_problems(readme.replace("speed", "size"), tmp_path, Path.read_text), "there is no")
    assert reports(
        house.table_problems(readme.replace("end table: s", "end table: "), tmp_path, Path.read_text), "pair"
    )


def test_readme_numbers_stand_between_markers(readme: str) -> None:
    assert_none(house.loose_table_problems(readme))


def test_readme_numbers_planted() -> None:
    table = "| script | return |\n|---|---|\n| a2c.py | 12 |\n"
    assert reports(house.loose_table_problems(table), "a2c.py | 12")
    assert reports(house.loose_table_problems("script | return\n--- | ---\na2c.py | -12.5\n"), "-12.5")
    assert_none(house.loose_table_problems(f"<!-- table: x -->\n{table}<!-- end table: x -->\n```\n{table}```\n"))
    assert_none(house.loose_table_problems(table.replace("12", "Pendulum-v1") + "\n12 | 13 in a sentence\n"))


# Names of the place where the project was written.


def test_no_place_names() -> None:
    assert_none(house.place_problems(house.project_files(ROOT)))


def test_no_place_names_planted(tmp_path: Path) -> None:
    for place in house.PLACES:
        assert reports(house.place_problems([toy_file(tmp_path, f"see {place}file\n")]), place)
    assert_none(house.place_problems([toy_file(tmp_path, "nothing here\n")]))
    assert ROOT / "tests" / "test_house.py" in house.project_files(ROOT)


# Lint and types.


@pytest.mark.parametrize("tool", [["ruff", "check", "."], ["mypy"]], ids=["ruff", "mypy"])
def test_tool(tool: list[str]) -> None:
    """The settings are in pyproject.toml."""
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tool_planted(tmp_path: Path) -> None:
    """ruff and mypy with this repository's settings report an unused import and a wrong type."""
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    toy_file(tmp_path, settings, "pyproject.toml")
    toy_file(tmp_path, "import os\n\n\ndef f(x) -> int:\n    return 'a'\n")
    for tool, words in ((["ruff", "check", "."], "F401"), (["mypy"], "no-untyped-def")):
        done = subprocess.run([sys.executable, "-m", *tool], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and words in done.stdout
