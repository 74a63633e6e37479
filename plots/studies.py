"""The catalogue of studies: which commands make each figure and table of the README, and a launcher for them.

    python plots/studies.py list                      what there is, what it costs, how much of it is finished
    python plots/studies.py show q1                   the commands, one per line, to paste
    python plots/studies.py run q1 --workers 2        run what is missing, two processes at a time
    python plots/figures.py q1                        the figure and the table from the finished runs

A study is data: a new experiment is a new `Study(...)` in STUDIES below, never new code. Every run is one ordinary
command with `--exp-name {study}-{run} --seed {seed} --num-threads 1` added; its run folder, which the script writes, is
`{log_dir}/{env_id}__{exp_name}__{seed}__{unix time}/`. The launcher reads two things from it: `result.json` (there: the
run is finished and is skipped) and `checkpoint.pt` (there without a result: the run broke off and is resumed). It adds
`study.json`, which says from which command and commit the run came.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

ROOT = Path(__file__).resolve().parents[1]  # the scripts are run from here


# ---------------------------------------------------------------------------------------------------------------------
# What a study is
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One setting: a command that is repeated with several seeds."""

    name: str
    command: str
    """What a reader can paste; without --seed and --exp-name, which `full_command` adds."""
    minutes: float
    """Rough cost of one seed on one core."""
    label: str
    """The setting in the figure's legend and in the table's first column."""
    exp_name: str = ""
    """Empty: `{study}-{run}`. To share a run with another study, name the other's, with the same command."""
    reported: str = ""
    """What others reported for this setting, as it stands in the table."""
    target: str = ""
    """What this repository wants to reach, as it stands in the table."""
    picture: str = ""
    """Image tag in TensorBoard that becomes plots/{study}-{run}.png (first seed)."""
    extra_flags: str = "--num-threads 1"
    """Added to every command. Empty for tabular_mbrl.py, which is numpy only and has no such flag."""


@dataclass(frozen=True)
class Reported:
    """A value from elsewhere, drawn as a dashed line."""

    label: str
    value: float
    source: str


@dataclass(frozen=True)
class Series:
    """A line of error bars. Each point is (x, run name, tag): the tag's last value, mean ± std over the run's seeds."""

    label: str
    points: tuple[tuple[float, str, str], ...]


@dataclass(frozen=True)
class Panel:
    """One set of axes: the curve of `tag` over its steps for each run, or, where `series` is given, error bars."""

    tag: str
    y_label: str
    x_label: str = "environment steps"
    x_tag: str = ""
    """A tag whose values are the x axis, such as time/minutes. Empty: the steps."""
    title: str = ""
    runs: tuple[str, ...] = ()
    """Names of the runs in this panel. Empty: all of the study."""
    log_x: bool = False
    log_y: bool = False
    reported: tuple[Reported, ...] = ()
    series: tuple[Series, ...] = ()
    heat: bool = False
    """With `series`: a heat map instead, a row for each series and a column for each x."""
    tags: tuple[tuple[str, str], ...] = ()
    """Instead of `tag`: a curve for each (tag, label) of the first run in `runs`."""


@dataclass(frozen=True)
class Column:
    """One metric of the table: a tag made one number per seed."""

    heading: str
    tag: str
    take: Literal["last", "max", "mean", "steps", "first_below", "first_above"] = "last"
    """The last, largest or mean value, the last step, or the first step with a value below (above) `threshold`."""
    threshold: float = float("nan")


@dataclass(frozen=True)
class Study:
    """Runs, and what figures.py makes of them: one figure (its panels side by side) and one table."""

    name: str
    title: str
    shows: str
    """What the study shows, in a sentence or two."""
    runs: tuple[Run, ...]
    panels: tuple[Panel, ...]
    columns: tuple[Column, ...]
    seeds: int = 3


@dataclass(frozen=True)
class Headline:
    """A row of the README's first table: a run of a study whose finished seeds are on file."""

    task: str
    study: str
    run: str
    acts: bool = True
    """False: the steps of the run are those of a gradient, not of the environment."""


# ---------------------------------------------------------------------------------------------------------------------
# The catalogue
# ---------------------------------------------------------------------------------------------------------------------

Q1 = (
    "python mbrl_dynamics.py --env-id envs:PostureCheetah-v0 --num-envs 1 --initial-steps 20_000 --batch-size 512"
    " --learning-rate 1e-3 --input-noise 0.01 --ensemble-size 3 --activation tanh --no-wrap-angles"
)
Q1_HORIZONS = (1, 5, 15, 50)

# The course's model and training, in every one of its planning studies.
COURSE = (
    "--num-envs 1 --ensemble-size 3 --num-layers 2 --hidden-size 250 --activation tanh --learning-rate 1e-3"
    " --batch-size 512 --input-noise 0.01 --no-wrap-angles --reset-every None"
)
RETURN = Column("return", "eval/episodic_return")
PLAN_MS = Column("plan, ms", "time/plan_ms", "mean")
RS = "python mpc_random_shooting.py --env-id envs:"
# The course's CEM: uniform first iteration, the elites alone make the next Gaussian, nothing is remembered.
CEM = (
    "python mpc_cem.py --start uniform --num-elites 5 --cem-alpha 1 --noise-beta 0 --keep-elites 0 --no-shift-plan"
    " --candidate-decay 1 --no-mean-candidate --no-terminal-value --gamma 1 --no-thompson --horizon {horizon}"
    " --num-candidates {candidates} --cem-iterations {iterations} --env-id envs:"
)


def course_cem(horizon: int = 15, candidates: str = "1_000", iterations: int = 4) -> str:
    return CEM.format(horizon=horizon, candidates=candidates, iterations=iterations)


REACHER = f"Reacher7DoF-v0 --steps-per-iteration 800 --eval-every 800 --train-steps 1_000 --num-iterations 15 {COURSE}"
POSTURE = f"PostureCheetah-v0 --steps-per-iteration 5_000 --train-steps 1_500 {COURSE}"


# Steps of 10 ms: slow noise, many of them ahead, a small model and no value.
SHORT_STEPS = (
    "python mpc_cem.py --env-id envs:PostureCheetah-v0 --num-iterations {iterations} --horizon 20"
    " --num-candidates 250 --noise-beta {beta} --ensemble-size 3 --num-layers 2 --hidden-size 250 --gamma 1"
    " --no-terminal-value --no-thompson --reset-every None"
)


def ablation_run(name: str, label: str, beta: int = 1, flag: str = "") -> Run:
    """Planning for short steps, with one refinement taken away."""
    command = f"{SHORT_STEPS.format(iterations=6, beta=beta)} {flag}".strip()
    return Run(name=name, command=command, minutes=12, label=label)


def q4_run(
    name: str, label: str, minutes: float, ensemble: int = 3, candidates: str = "1_000", horizon: int = 10
) -> Run:
    """Reacher7DoF-v0 with one setting changed."""
    command = f"{RS}{REACHER.replace('--ensemble-size 3', f'--ensemble-size {ensemble}')}"
    command += f" --num-candidates {candidates} --horizon {horizon}"
    return Run(name=name, command=command, minutes=minutes, label=label)


def any_run(name: str, env_id: str, iterations: int, minutes: float, reported: str, target: str) -> Run:
    """The default command. Fewer iterations than its own change nothing in those that are run."""
    command = f"python mpc_cem.py --env-id {env_id} --num-iterations {iterations} --eval-episodes 20"
    return Run(name=name, command=command, minutes=minutes, label=env_id, reported=reported, target=target)


def return_panel(title: str, *runs: str, reported: tuple[Reported, ...] = ()) -> Panel:
    return Panel(tag="eval/episodic_return", y_label="evaluation return", title=title, runs=runs, reported=reported)


# 1.7 times as many steps of SAC in the same time: see the speed table.
FAST = "--train-dtype bfloat16 --compile"
# The course's Dyna: deterministic members, averaged; one buffer for real and imagined steps; updates after each 5,000.
Q6 = (
    "python mbpo_sac.py --env-id envs:PostureCheetah-v0 --total-timesteps 50_000 --batch-size 1_500 --alpha 0.1"
    " --real-ratio None --average-members --no-probabilistic --ensemble-size 3 --elite-members 3 --num-layers 2"
    " --hidden-size 250 --activation tanh --model-batch-size 512 --max-train-steps 1_500 --patience None"
    " --input-noise 0.01 --weight-decay 0 --no-wrap-angles --rollouts-per-step 1"
    f" --model-every 5_000 --update-every 5_000 {FAST}"
)
# What A2C owes to each of its parts: one of them switched off.
A2C_PARTS = (
    ("no-obs", "--no-normalize-obs", "observations as they are"),
    ("no-scale", "--no-scale-rewards", "rewards as they are"),
    ("no-advantage", "--no-normalize-advantages", "advantages as they are"),
    ("no-anneal", "--no-anneal", "constant step size"),
    ("one-step", "--baseline-steps 1", "one step of the critic instead of 20"),
    ("small-batch", "--batch-size 256 --learning-rate 7e-4 --baseline-steps 4", "batches of 256, smaller steps"),
    ("large-batch", "--batch-size 2_048", "batches of 2,048"),
    ("no-lambda", "--gae-lambda None", "λ = 1"),
    ("no-baseline", "--gae-lambda None --no-use-baseline --batch-size 8_000", "no baseline, whole episodes"),
)
BC = "python bc_variants.py --env-id HalfCheetah-v5 --eval-episodes 100"
BC_NAMES = ("mse", "gaussian", "gmm", "diffusion", "autoregressive")
# What is trained on grows with each round: fewer steps for each of them.
DAGGER = "--dagger-rounds 5 --train-steps 10_000"
BC_BATCHES, BC_RATES = (500, 1_000, 2_000, 4_000), ("1e-3", "5e-4", "1e-4")
SAC = f"python mbpo_sac.py --rollout-length 0 --utd-ratio 1 {FAST}"


def imitation(name: str, env_id: str, steps: int, minutes: float, algos: tuple[str, ...]) -> Study:
    labels = {"gail": "GAIL", "airl": "AIRL", "control": "paid for staying alive"}
    clone = f"python bc_variants.py --env-id {env_id} --eval-episodes 100 --variant mse --num-episodes 10"
    return Study(
        name=name,
        title=f"Adversarial imitation of {env_id} from 10 episodes",
        shows="GAIL and AIRL, beside cloning and DAgger; where episodes can end, what a constant reward earns.",
        runs=(
            *(
                Run(
                    name=algo,
                    command=f"python adversarial_imitation.py --env-id {env_id} --algo {algo}"
                    f" --total-timesteps {steps:_} --checkpoint-every 50_000 {FAST}",
                    minutes=minutes,
                    label=labels[algo],
                    target="" if algo == "control" else "≥ 0.9 of the expert's",
                )
                for algo in algos
            ),
            Run(name="bc", command=clone, minutes=3, label="cloning, mse"),
            Run(name="dagger", command=f"{clone} {DAGGER}", minutes=5, label="cloning with DAgger, mse"),
        ),
        panels=(
            Panel(
                tag="eval/expert_fraction",
                y_label="return, as a share of the expert's",
                x_label="environment steps (of cloning: gradient steps)",
                log_x=True,
            ),
        ),
        columns=(RETURN, Column("share of the expert's", "eval/expert_fraction")),
        seeds=2,
    )


STUDIES: tuple[Study, ...] = (
    Study(
        name="q1",
        title="Dynamics model of PostureCheetah-v0 from 20,000 random transitions",
        shows="How fast a small network learns to predict one step, and what 500 gradient steps instead of 5 do for the"
        " open-loop prediction of a larger one.",
        runs=(
            Run(
                name="1x32-500",
                command=f"{Q1} --num-layers 1 --hidden-size 32 --train-steps 500",
                minutes=0.2,
                label="1 × 32, 500 steps",
                reported="loss < 0.2 by step 500",
                target="loss < 0.2 before step 250",
                picture="pictures/predictions",
            ),
            Run(
                name="2x250-5",
                command=f"{Q1} --num-layers 2 --hidden-size 250 --train-steps 5",
                minutes=0.2,
                label="2 × 250, 5 steps",
                picture="pictures/predictions",
            ),
            Run(
                name="2x250-500",
                command=f"{Q1} --num-layers 2 --hidden-size 250 --train-steps 500",
                minutes=0.2,
                label="2 × 250, 500 steps",
                reported="best of the three",
                target="best of the three",
                picture="pictures/predictions",
            ),
        ),
        panels=(
            Panel(
                tag="model/train_loss",
                title="Training",
                x_label="gradient step",
                y_label="training loss (normalised MSE)",
                log_y=True,
                reported=(Reported("0.2 by step 500", 0.2, "course handout"),),
            ),
            Panel(
                tag="model/open_loop_mse",
                title="Prediction",
                x_label="steps predicted ahead",
                y_label="open-loop MSE (variances)",
                log_x=True,
                log_y=True,
                series=(
                    *(
                        Series(label, tuple((h, run, f"model/open_loop_mse_{h}") for h in Q1_HORIZONS))
                        for run, label in (
                            ("1x32-500", "1 × 32, 500 steps"),
                            ("2x250-5", "2 × 250, 5 steps"),
                            ("2x250-500", "2 × 250, 500 steps"),
                        )
                    ),
                    Series(
                        "nothing changes", tuple((h, "2x250-500", f"model/open_loop_baseline_{h}") for h in Q1_HORIZONS)
                    ),
                ),
            ),
        ),
        columns=(
            Column("first step with loss < 0.2", "model/train_loss", "first_below", 0.2),
            Column("final train loss", "model/train_loss"),
            Column("holdout MSE", "model/holdout_mse"),
            Column("open-loop MSE after 5", "model/open_loop_mse_5"),
            Column("after 15", "model/open_loop_mse_15"),
            Column("after 50", "model/open_loop_mse_50"),
            Column("nothing changes, after 15", "model/open_loop_baseline_15"),
        ),
    ),
    Study(
        name="q2",
        title="Random shooting on Obstacles-v0, model from 5,000 random steps",
        shows="Planning in a model that has seen random data only and was trained for 20 gradient steps.",
        runs=(
            Run(
                name="rs",
                command="python mpc_random_shooting.py --env-id envs:Obstacles-v0 --horizon 10 --num-candidates 1_000"
                f" --initial-steps 5_000 --train-steps 20 --num-iterations 1 --eval-episodes 100 {COURSE}",
                minutes=9,
                label="random shooting, horizon 10",
                reported="−70…−50 (handout), −29.98",
                target="≥ −30",
            ),
        ),
        panels=(),
        columns=(
            RETURN,
            Column("std over episodes", "eval/episodic_return_std"),
            Column("length", "eval/episodic_length"),
        ),
    ),
    Study(
        name="q3",
        title="Random shooting with on-policy data",
        shows="The same planner, but the model is fitted again on what the planner's own actions led to.",
        runs=(
            Run(
                name="obstacles",
                command=f"{RS}Obstacles-v0 --horizon 10 --num-candidates 1_000 --initial-steps 5_000"
                f" --steps-per-iteration 1_000 --eval-every 1_000 --train-steps 20 --num-iterations 12 {COURSE}"
                " --eval-episodes 100",
                minutes=14,
                label="Obstacles-v0",
                reported="−25…−20 (handout), −21, −17.75",
                target="≥ −17.75",
            ),
            Run(
                name="reacher",
                command=f"{RS}Reacher7DoF-v0 --horizon 10 --num-candidates 1_000 --steps-per-iteration 5_000"
                f" --train-steps 1_000 --num-iterations 15 {COURSE}",
                minutes=60,
                label="Reacher7DoF-v0",
                reported="−300…−250 (handout), −273, −258.87",
                target="≥ −258",
            ),
            Run(
                name="posture",
                command=f"{RS}{POSTURE} --horizon 15 --num-candidates 1_000 --num-iterations 20",
                minutes=115,
                label="PostureCheetah-v0",
                reported="250…350 (handout), 297, 419.8",
                target="≥ 420",
            ),
        ),
        panels=(
            return_panel("Obstacles-v0", "obstacles", reported=(Reported("best", -17.75, "reported"),)),
            return_panel("Reacher7DoF-v0", "reacher", reported=(Reported("best", -258.87, "reported"),)),
            return_panel("PostureCheetah-v0", "posture", reported=(Reported("best", 419.8, "reported"),)),
        ),
        columns=(RETURN, PLAN_MS),
    ),
    Study(
        name="q5",
        title="Random shooting and CEM on PostureCheetah-v0",
        shows="What refining the candidates buys, with the same model, data and number of candidates.",
        runs=(
            Run(
                name="rs",
                command=f"{RS}{POSTURE} --horizon 15 --num-candidates 1_000 --num-iterations 5",
                minutes=35,
                label="random shooting",
            ),
            Run(
                name="cem2",
                command=f"{course_cem(iterations=2)}{POSTURE} --num-iterations 5",
                minutes=65,
                label="CEM, 2 iterations",
                target="between the other two",
            ),
            Run(
                name="cem4",
                command=f"{course_cem()}{POSTURE} --num-iterations 5",
                minutes=120,
                label="CEM, 4 iterations",
                reported="≥ 800 (handout)",
                target="≥ 1000",
            ),
        ),
        panels=(return_panel("", reported=(Reported("CEM", 800, "course handout"),)),),
        columns=(RETURN, PLAN_MS),
    ),
    Study(
        name="best-posture",
        title="The refined planner on PostureCheetah-v0",
        shows="mpc_cem.py, with noise as slow as steps of 10 ms ask for, against the course's CEM: less time a step,"
        " more return.",
        runs=(
            Run(
                name="500",
                command=SHORT_STEPS.format(iterations=21, beta=1),
                minutes=45,
                label="mpc_cem.py",
                reported="1587 (a trial)",
                target="≥ 2 × the course's CEM in half its time",
            ),
            Run(
                name="cem4",
                exp_name="q5-cem4",
                command=f"{course_cem()}{POSTURE} --num-iterations 5",
                minutes=120,
                label="the course's CEM, 4 iterations",
            ),
            Run(
                name="1000",
                command=f"{SHORT_STEPS.format(iterations=21, beta=1)} --max-episode-steps 1_000",
                minutes=65,
                label="mpc_cem.py, 1000-step episodes",
                reported="2303 ± 43 (the course's CEM)",
                target="≥ 4600",
            ),
        ),
        panels=(
            return_panel("500-step episodes", "500", "cem4"),
            return_panel("1000-step episodes", "1000", reported=(Reported("the course's CEM", 2303, "reported"),)),
        ),
        columns=(RETURN, PLAN_MS),
    ),
    Study(
        name="ablation",
        title="PostureCheetah-v0: the planner without one of its refinements",
        shows="What each refinement of CEM is worth, at 10,000 steps.",
        runs=(
            ablation_run("all", "all of them"),
            ablation_run("no-shift", "the mean begins in the middle", flag="--no-shift-plan"),
            ablation_run("no-elites", "no elites kept", flag="--keep-elites 0"),
            ablation_run("white", "white noise", beta=0),
            ablation_run("no-decay", "250 candidates in each iteration", flag="--candidate-decay 1"),
            ablation_run("no-mean", "the mean is no candidate", flag="--no-mean-candidate"),
            ablation_run("best", "the best sequence is executed", flag="--execute best"),
        ),
        panels=(return_panel(""),),
        columns=(RETURN, PLAN_MS),
    ),
    Study(
        name="any",
        title="`python mpc_cem.py --env-id X` and nothing else",
        shows="One set of defaults on five tasks.",
        runs=(
            any_run("pendulum", "Pendulum-v1", 3, 20, "−1331 (random actions)", "≥ −250"),
            any_run("reacher", "Reacher-v5", 16, 30, "−41 (random actions)", "≥ −7"),
            any_run("pusher", "Pusher-v5", 21, 30, "−150 (random actions)", "≥ −45"),
            any_run("inverted-pendulum", "InvertedPendulum-v5", 6, 40, "5 (random actions)", "≥ 990"),
            any_run("hopper", "Hopper-v5", 16, 45, "28 (random actions)", "≥ 800"),
        ),
        panels=(
            return_panel("Pendulum-v1", "pendulum"),
            return_panel("Reacher-v5", "reacher"),
            return_panel("Pusher-v5", "pusher"),
            return_panel("InvertedPendulum-v5", "inverted-pendulum"),
            return_panel("Hopper-v5", "hopper"),
        ),
        columns=(RETURN, Column("std over episodes", "eval/episodic_return_std"), PLAN_MS),
    ),
    Study(
        name="hw6",
        title="PostureCheetah-v0 with episodes of 1,000 steps",
        shows="CEM against random shooting, and what becomes of CEM with one step of foresight or with 50 candidates.",
        runs=(
            Run(
                name="cem-h1",
                command=f"{course_cem(horizon=1)}{POSTURE} --max-episode-steps 1_000 --num-iterations 5",
                minutes=12,
                label="CEM, H = 1",
                reported="−22422 ± 10190",
                target="< −5000 (the collapse is the finding)",
            ),
            Run(
                name="cem-k50",
                command=f"{course_cem(candidates='50')}{POSTURE} --max-episode-steps 1_000 --num-iterations 5",
                minutes=25,
                label="CEM, K = 50",
                reported="1282 ± 59",
                target="≥ 1282",
            ),
            Run(
                name="cem",
                command=f"{course_cem()}{POSTURE} --max-episode-steps 1_000 --num-iterations 5",
                minutes=150,
                label="CEM",
                reported="2303 ± 43",
                target="≥ 2303",
            ),
            Run(
                name="rs",
                command=f"{RS}{POSTURE} --max-episode-steps 1_000 --horizon 15 --num-candidates 1_000"
                " --num-iterations 15",
                minutes=115,
                label="random shooting",
                reported="873 ± 50",
                target="≥ 873",
            ),
        ),
        panels=(
            return_panel("1,000 candidates, H = 15", "cem", "rs", reported=(Reported("CEM", 2303, "reported"),)),
            return_panel("CEM with less", "cem-h1", "cem-k50"),
        ),
        columns=(RETURN, PLAN_MS),
    ),
    Study(
        name="q4",
        title="Random shooting on Reacher7DoF-v0: ensemble, candidates, horizon",
        shows="One setting at a time: members of the ensemble, candidates, horizon.",
        runs=(
            q4_run("base", "E = 3, K = 1000, H = 10", 18),
            q4_run("e1", "E = 1", 10, ensemble=1),
            q4_run("e5", "E = 5", 28, ensemble=5),
            q4_run("k100", "K = 100", 8, candidates="100"),
            q4_run("k4000", "K = 4000", 60, candidates="4_000"),
            q4_run("h5", "H = 5", 11, horizon=5),
            q4_run("h15", "H = 15", 25, horizon=15),
            q4_run("h30", "H = 30", 45, horizon=30),
        ),
        panels=(
            return_panel("Ensemble", "e1", "base", "e5"),
            return_panel("Candidates", "k100", "base", "k4000"),
            return_panel("Horizon", "h5", "base", "h15", "h30"),
        ),
        columns=(RETURN, PLAN_MS),
    ),
    Study(
        name="p1",
        title="Random shooting on PostureCheetah-v0 from 12,000 random steps",
        shows="A student's variant of q3: more random data first, and 36 iterations.",
        runs=(
            Run(
                name="rs",
                command=f"{RS}{POSTURE} --horizon 15 --num-candidates 1_000 --initial-steps 12_000 --num-iterations 36",
                minutes=205,
                label="random shooting, 12,000 random steps",
            ),
        ),
        panels=(return_panel(""),),
        columns=(RETURN, PLAN_MS),
        seeds=1,
    ),
    Study(
        name="best-v5",
        title="HalfCheetah-v5, 50,000 steps",
        shows="`python mpc_cem.py --env-id HalfCheetah-v5` against what others reported on their own cheetahs, and what"
        " a member for each environment and the value at the end of the plan are worth: without it, twice the horizon.",
        runs=(
            Run(
                name="default",
                command="python mpc_cem.py --env-id HalfCheetah-v5",
                minutes=70,
                label="mpc_cem.py as it is",
                reported="PETS 4204 ± 789, POPLIN-P 12228 ± 5653",
                target="≥ 1500, then ≥ 4204",
            ),
            Run(
                name="all-members",
                command="python mpc_cem.py --env-id HalfCheetah-v5 --no-thompson",
                minutes=70,
                label="collected with all members' mean",
            ),
            Run(
                name="no-value",
                command="python mpc_cem.py --env-id HalfCheetah-v5 --no-terminal-value --gamma 1 --horizon 20",
                minutes=130,
                label="without a value, horizon 20",
            ),
        ),
        panels=(return_panel("", reported=(Reported("PETS at 50k", 4204, "published, its own cheetah"),)),),
        columns=(RETURN, PLAN_MS),
    ),
    Study(
        name="model-v5",
        title="HalfCheetah-v5 at 20,000 steps: the default without one of its parts",
        shows="What mattered in the model and in the data that it learns from, one change at a time.",
        runs=tuple(
            Run(
                name=name,
                command=f"python mpc_cem.py --env-id HalfCheetah-v5 --num-iterations 16 {flag}".strip(),
                minutes=25,
                label=label,
            )
            for name, label, flag in (
                ("all", "all of them", ""),
                ("angle", "the pitch as it is, for V, too", "--no-wrap-angles"),
                ("whole", "whole episodes", "--reset-every None"),
                ("small", "two layers instead of four", "--num-layers 2"),
                ("short", "500 gradient steps a fit instead of 1,500, V's, too", "--train-steps 500"),
                ("exact", "no noise on the inputs", "--input-noise 0"),
                ("one", "a single member, five times the candidates", "--ensemble-size 1 --num-candidates 500"),
            )
        ),
        panels=(return_panel(""),),
        columns=(RETURN, PLAN_MS),
    ),
    Study(
        name="q6",
        title="SAC, Dyna and MBPO on PostureCheetah-v0, the course's variant",
        shows="What imagined steps add to real ones. The course gives SAC 1,000 updates an iteration and the others"
        " 5,000; SAC with 5,000 tells the updates from the rollouts.",
        runs=(
            Run(
                name="sac-1000",
                command=f"{Q6} --rollout-length 0 --utd-ratio 0.2",
                minutes=4,
                label="SAC, 1,000 updates an iteration",
            ),
            Run(
                name="sac-5000",
                command=f"{Q6} --rollout-length 0 --utd-ratio 1",
                minutes=12,
                label="SAC, 5,000 updates",
            ),
            Run(
                name="dyna",
                command=f"{Q6} --rollout-length 1 --utd-ratio 1",
                minutes=14,
                label="rollouts of 1, 5,000 updates",
            ),
            Run(
                name="mbpo",
                command=f"{Q6} --rollout-length 10 --utd-ratio 1",
                minutes=14,
                label="rollouts of 10, 5,000 updates",
            ),
        ),
        panels=(return_panel(""),),
        columns=(RETURN, Column("best", "eval/episodic_return", "max"), Column("critic bias", "eval/critic_bias")),
    ),
    Study(
        name="sac-mbpo",
        title="SAC, MBPO and A2C on HalfCheetah-v5",
        shows="What a model saves in environment steps and what it costs in time; and what on-policy data cost.",
        runs=(
            Run(
                name="sac",
                command=f"{SAC} --env-id HalfCheetah-v5 --total-timesteps 1_000_000",
                minutes=80,
                label="SAC",
                reported="CleanRL 9635 ± 1424 (v2), SB3 zoo 9536, Tianshou 12139",
                target="≥ 9635",
            ),
            Run(
                name="mbpo",
                command="python mbpo_sac.py --env-id HalfCheetah-v5 --target-entropy -3"
                f" --checkpoint-every 5_000 {FAST}",
                minutes=120,
                label="MBPO, 10 updates a step",
                reported="≈ 10,000 near 150–200k steps with 40 updates a step",
                target="≥ 9635 at ≤ 150k steps",
            ),
            Run(
                name="a2c",
                command="python a2c.py --env-id HalfCheetah-v5",
                minutes=2.5,
                label="A2C",
                exp_name="a2c-halfcheetah",
            ),
        ),
        panels=(
            return_panel("By environment steps", reported=(Reported("SAC at 1M", 9635, "CleanRL"),)),
            Panel(
                tag="eval/episodic_return",
                x_tag="time/minutes",
                x_label="minutes",
                y_label="evaluation return",
                title="By time, one core",
                log_x=True,
            ),
        ),
        columns=(
            RETURN,
            Column("best", "eval/episodic_return", "max"),
            Column("critic bias", "eval/critic_bias"),
            Column("steps/s", "charts/SPS"),
        ),
    ),
    Study(
        name="mbpo-hopper",
        title="MBPO on Hopper-v5",
        shows="Rollouts that grow from 1 to 11 steps, 20 updates a step, fits of at most 1,000 batches.",
        runs=(
            Run(
                name="mbpo",
                command="python mbpo_sac.py --env-id Hopper-v5 --total-timesteps 125_000 --utd-ratio 20"
                " --rollout-schedule 20 150 1 15 --target-entropy -1"
                f" --max-train-steps 1_000 --checkpoint-every 5_000 {FAST}",
                minutes=300,
                label="MBPO",
                reported="≈ 3000–3300",
                target="≥ 3300",
            ),
        ),
        panels=(return_panel("", reported=(Reported("MBPO", 3300, "published"),)),),
        columns=(RETURN, Column("best", "eval/episodic_return", "max"), Column("critic bias", "eval/critic_bias")),
    ),
    Study(
        name="sac-004",
        title="SAC on three robots, 200,000 steps",
        shows="What a student project compared, by environment; the settings are ours.",
        runs=tuple(
            Run(
                name=env_id.split("-")[0].lower(),
                command=f"{SAC} --env-id {env_id} --total-timesteps 200_000",
                minutes=minutes,
                label=env_id,
                reported="200k steps in 23 minutes (stable-baselines3)",
            )
            for env_id, minutes in (("HalfCheetah-v5", 16), ("Ant-v5", 22), ("Humanoid-v5", 35))
        ),
        panels=(return_panel(""),),
        columns=(RETURN, Column("steps/s", "charts/SPS")),
        seeds=1,
    ),
    Study(
        name="pets",
        title="PETS on HalfCheetah-v5, 50,000 steps",
        shows="A probabilistic ensemble with sampled uncertainty.",
        runs=(
            Run(
                name="default",
                command="python pets.py --env-id HalfCheetah-v5 --eval-every 10_000",
                minutes=210,
                label="pets.py as it is",
                reported="PETS 4204 ± 789",
                target="≥ 4204",
            ),
            Run(
                name="short",
                command="python pets.py --env-id HalfCheetah-v5 --horizon 20 --num-candidates 200 --num-elites 20"
                " --num-envs 1",
                minutes=300,
                label="20 steps ahead, 200 candidates",
                reported="PETS 4204 ± 789",
                target="≥ 4204",
            ),
            Run(
                name="paper",
                command="python pets.py --env-id HalfCheetah-v5 --propagation tsinf --num-candidates 500"
                " --num-elites 50 --num-particles 20 --cem-iterations 5 --num-iterations 2"
                " --initial-steps 1_000 --reset-every None --num-envs 1 --eval-episodes 1 --interim-episodes 1",
                minutes=180,
                label="the authors' planner, 2,000 steps",
            ),
        ),
        panels=(return_panel("", reported=(Reported("PETS at 50k", 4204, "published, its own cheetah"),)),),
        columns=(RETURN, PLAN_MS),
    ),
    Study(
        name="bc",
        title="Behaviour cloning of HalfCheetah-v5 from 100 episodes",
        shows="Five losses, one expert.",
        runs=tuple(
            Run(
                name=f"{name}-100",
                command=f"{BC} --variant {name} --num-episodes 100",
                minutes=4,
                label=name,
                reported={"mse": "9500", "gaussian": "7250", "gmm": "6500"}.get(name, "never finished"),
                target="≥ 0.95 of the expert's",
            )
            for name in BC_NAMES
        ),
        panels=(
            Panel(tag="eval/expert_fraction", y_label="return, as a share of the expert's", x_label="gradient steps"),
            Panel(tag="losses/action_error", y_label="action error", x_label="gradient steps", log_y=True),
        ),
        columns=(
            RETURN,
            Column("best", "eval/best_return"),
            Column("share of the expert's", "eval/expert_fraction"),
            Column("action error", "losses/action_error"),
            Column("ms to act in 100 episodes at once", "time/act_ms"),
        ),
    ),
    Study(
        name="bc-episodes",
        title="Cloning from few episodes, with and without DAgger",
        shows="How much an expert must show, and what asking it once more is worth.",
        runs=(
            *(
                Run(
                    name=f"{name}-{count}",
                    command=f"{BC} --variant {name} --num-episodes {count}",
                    minutes=4,
                    label=f"{name}, {count} episode{'s' * (count > 1)}",
                    exp_name=f"bc-{name}-100" if count == 100 else "",
                    target={100: "≥ 0.95", 20: "≥ 0.46, the best ≥ 0.9"}.get(count, ""),
                )
                for name in BC_NAMES
                for count in (1, 5, 20, 100)
            ),
            *(
                Run(
                    name=f"{name}-{count}-dagger",
                    command=f"{BC} --variant {name} --num-episodes {count} {DAGGER}",
                    minutes=9,
                    label=f"{name}, {count} episode{'s' * (count > 1)}, DAgger",
                    target="≥ 0.95" if count == 5 else "",
                )
                for name in BC_NAMES
                for count in ((1, 5, 20) if name == "mse" else (5,))
            ),
        ),
        panels=(
            Panel(
                tag="",
                y_label="return, as a share of the expert's",
                x_label="episodes of the expert",
                log_x=True,
                title="cloning alone",
                series=tuple(
                    Series(name, tuple((count, f"{name}-{count}", "eval/expert_fraction") for count in (1, 5, 20, 100)))
                    for name in BC_NAMES
                ),
            ),
            Panel(
                tag="",
                y_label="return, as a share of the expert's",
                x_label="episodes of the expert",
                log_x=True,
                title="with DAgger",
                series=tuple(
                    Series(
                        name,
                        tuple(
                            (count, f"{name}-{count}-dagger", "eval/expert_fraction")
                            for count in ((1, 5, 20) if name == "mse" else (5,))
                        ),
                    )
                    for name in BC_NAMES
                ),
            ),
        ),
        columns=(
            RETURN,
            Column("share of the expert's", "eval/expert_fraction"),
            Column("transitions", "charts/transitions"),
        ),
    ),
    Study(
        name="bc-grid",
        title="Batch size and step size in cloning from 20 episodes",
        shows="What the two numbers that everyone tunes first are worth.",
        runs=tuple(
            Run(
                name=f"{name}-{batch}-{rate}",
                command=f"{BC} --variant {name} --train-steps 10_000 --batch-size {batch} --learning-rate {rate}",
                minutes=6,
                label=f"{name}, batch {batch}, step size {rate}",
            )
            for name in ("mse", "gaussian")
            for batch in BC_BATCHES
            for rate in BC_RATES
        ),
        panels=tuple(
            Panel(
                tag="",
                y_label="step size",
                x_label="batch size",
                title=f"{name}: share of the expert's return",
                heat=True,
                series=tuple(
                    Series(
                        rate, tuple((batch, f"{name}-{batch}-{rate}", "eval/expert_fraction") for batch in BC_BATCHES)
                    )
                    for rate in BC_RATES
                ),
            )
            for name in ("mse", "gaussian")
        ),
        columns=(RETURN, Column("share of the expert's", "eval/expert_fraction")),
        seeds=1,
    ),
    imitation("imitation", "HalfCheetah-v5", 500_000, minutes=80, algos=("gail", "airl")),
    imitation("imitation-hopper", "Hopper-v5", 300_000, minutes=40, algos=("gail", "airl", "control")),
    Study(
        name="a2c",
        title="A2C on HalfCheetah-v5, 1M steps",
        shows="What a plain policy gradient reaches in two minutes.",
        runs=(
            Run(
                name="halfcheetah",
                command="python a2c.py --env-id HalfCheetah-v5",
                minutes=2.5,
                label="A2C",
                reported="1830 ± 1068 (Tianshou), 3041 ± 157 (SB3 zoo)",
                target="≥ 3041",
            ),
        ),
        panels=(return_panel("", reported=(Reported("A2C", 3041, "SB3 zoo"),)),),
        columns=(RETURN, Column("best", "eval/episodic_return", "max"), Column("steps/s", "charts/SPS")),
        seeds=5,
    ),
    Study(
        name="a2c-more",
        title="A2C elsewhere and for longer",
        shows="Ant and Humanoid at 1M steps, HalfCheetah at 5M.",
        runs=(
            Run(
                name="ant",
                command="python a2c.py --env-id Ant-v5",
                minutes=4,
                label="Ant-v5, 1M steps",
                reported="3485 (published)",
            ),
            Run(
                name="humanoid",
                command="python a2c.py --env-id Humanoid-v5",
                minutes=6,
                label="Humanoid-v5, 1M steps",
                reported="1726 (published)",
            ),
            Run(
                name="halfcheetah-5m",
                command="python a2c.py --env-id HalfCheetah-v5 --total-timesteps 5_000_000 --eval-every 250_000",
                minutes=12,
                label="HalfCheetah-v5, 5M steps",
                reported="5M steps in 12 minutes; 2377 at 3M (published)",
            ),
        ),
        panels=(
            return_panel("1M steps", "ant", "humanoid"),
            return_panel("5M steps", "halfcheetah-5m"),
        ),
        columns=(RETURN, Column("best", "eval/episodic_return", "max"), Column("steps/s", "charts/SPS")),
    ),
    Study(
        name="a2c-parts",
        title="A2C on HalfCheetah-v5 without one of its parts, 1M steps",
        shows="What each of the things that make A2C work is worth.",
        runs=(
            Run(
                name="all",
                command="python a2c.py --env-id HalfCheetah-v5",
                minutes=2.5,
                label="all of it",
                exp_name="a2c-halfcheetah",
            ),
            *(
                Run(name=name, command=f"python a2c.py --env-id HalfCheetah-v5 {flags}", minutes=2.5, label=label)
                for name, flags, label in A2C_PARTS
            ),
        ),
        panels=(return_panel(""),),
        columns=(RETURN, Column("best", "eval/episodic_return", "max")),
    ),
    Study(
        name="tabular",
        title="Certainty equivalence in random problems of 20 states",
        shows="The simulation lemma, four concentration bounds, and what trusting the model costs.",
        runs=(
            Run(
                name="default",
                command="python tabular_mbrl.py",
                minutes=0.2,
                label="20 states, 4 actions, 1,600 samples a pair",
                extra_flags="",
            ),
        ),
        panels=(
            Panel(
                tag="",
                title="Error of the model and its bounds",
                x_label="samples of each pair",
                y_label="‖(P − P̂) V‖∞",
                log_x=True,
                log_y=True,
                runs=("default",),
                tags=(
                    ("error/optimal_value", "V*"),
                    ("error/policy_value", "V̂^π"),
                    ("error/model_optimal_value", "V̂*"),
                    ("error/counterexample", "V̂^π of the counterexample"),
                    ("bound/hoeffding", "Hoeffding's bound"),
                    ("bound/l1_value", "the bound through rows"),
                    ("bound/counterexample", "Hoeffding's, counterexample"),
                ),
            ),
            Panel(
                tag="",
                title="Draws inside the bound",
                x_label="samples of each pair",
                y_label="share of the draws",
                log_x=True,
                runs=("default",),
                tags=(
                    ("coverage/l1", "(1) rows"),
                    ("coverage/policy_value", "(2) V̂^π, random problems"),
                    ("coverage/counterexample", "(2) V̂^π, counterexample"),
                    ("coverage/optimal_value", "(3) V*"),
                    ("coverage/model_optimal_value", "(4) V̂*"),
                ),
            ),
            Panel(
                tag="",
                title="Planning in the wrong model",
                x_label="samples of each pair",
                y_label="value lost",
                log_x=True,
                log_y=True,
                runs=("default",),
                tags=(("value/loss", "‖V* − V^π̂*‖∞"), ("value/bound", "bound (T)")),
            ),
        ),
        columns=(
            Column("violation of the lemma", "check/simulation_lemma_error", "max"),
            Column("(1) holds in", "coverage/l1"),
            Column("(2) in random problems", "coverage/policy_value"),
            Column("(2) in the counterexample", "coverage/counterexample"),
            Column("(3)", "coverage/optimal_value"),
            Column("(4)", "coverage/model_optimal_value"),
            Column("value lost", "value/loss"),
        ),
    ),
)

POSTURE_LONG = "PostureCheetah-v0, 1,000-step episodes"
HEADLINES = (
    Headline("HalfCheetah-v5, CEM on a learned model", "best-v5", "default"),
    Headline("HalfCheetah-v5, PETS, 20 steps ahead", "pets", "short"),
    Headline(f"{POSTURE_LONG}, random shooting", "hw6", "rs"),
    Headline(f"{POSTURE_LONG}, the course's CEM", "hw6", "cem"),
    Headline(f"{POSTURE_LONG}, our CEM", "best-posture", "1000"),
    Headline("HalfCheetah-v5, MBPO", "sac-mbpo", "mbpo"),
    Headline("HalfCheetah-v5, SAC", "sac-mbpo", "sac"),
    Headline("Hopper-v5, MBPO", "mbpo-hopper", "mbpo"),
    Headline("HalfCheetah-v5, A2C", "a2c", "halfcheetah"),
    Headline("HalfCheetah-v5, cloning 100 episodes, mse", "bc", "mse-100", acts=False),
    Headline("HalfCheetah-v5, cloning 100 episodes, diffusion", "bc", "diffusion-100", acts=False),
    Headline("HalfCheetah-v5, GAIL from 10 episodes", "imitation", "gail"),
    Headline("HalfCheetah-v5, AIRL from 10 episodes", "imitation", "airl"),
)


def fail(message: str) -> NoReturn:
    """End with one clear line and exit code 2: the input was wrong and no work was started."""
    print(message, file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """argparse that answers a wrong command line with one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        fail(f"{self.prog}: {message}")


def find_study(name: str) -> Study:
    """The study of that name; an unknown one ends the program and names those there are."""
    for study in STUDIES:
        if study.name == name:
            return study
    fail(f"unknown study {name!r}; the studies are: {', '.join(study.name for study in STUDIES)}")


def experiment(study: Study, run: Run) -> str:
    """The --exp-name of a run."""
    return run.exp_name or f"{study.name}-{run.name}"


def full_command(study: Study, run: Run, seed: int) -> str:
    """The command of one seed, ready to paste."""
    return f"{run.command} --exp-name {experiment(study, run)} --seed {seed} {run.extra_flags}".strip()


# ---------------------------------------------------------------------------------------------------------------------
# Run folders
# ---------------------------------------------------------------------------------------------------------------------


def run_folders(exp_name: str, log_dir: Path) -> dict[int, list[Path]]:
    """All run folders of an experiment by seed, oldest first."""
    found: dict[int, list[Path]] = {}
    for folder in log_dir.glob(f"*__{exp_name}__*__*"):
        _, name, seed, _ = folder.name.rsplit("__", 3)
        if name == exp_name and seed.isdigit():
            found.setdefault(int(seed), []).append(folder)
    for folders in found.values():
        folders.sort(key=lambda folder: folder.name.rsplit("__", 1)[1])  # the unix time ends the name
    return found


def newest_with(file: str, folders: list[Path]) -> Path | None:
    """The newest folder that holds the file."""
    return next((folder for folder in reversed(folders) if (folder / file).exists()), None)


def finished_runs(exp_name: str, log_dir: Path) -> dict[int, Path]:
    """The newest finished run folder of each seed, seeds in ascending order."""
    newest = {seed: newest_with("result.json", folders) for seed, folders in run_folders(exp_name, log_dir).items()}
    return {seed: folder for seed, folder in sorted(newest.items()) if folder is not None}


def read_note(folder: Path) -> dict[str, str | int]:
    """The folder's study.json; empty for a run that was started by hand."""
    path = folder / "study.json"
    return json.loads(path.read_text()) if path.exists() else {}


def current_commit() -> str:
    """The short hash of HEAD, with "-dirty" when a tracked Python file differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy of the files without the repository
        return "unknown"


# ---------------------------------------------------------------------------------------------------------------------
# The launcher
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One run and seed on its way through the launcher."""

    study: Study
    run: Run
    seed: int
    log_dir: Path
    process: subprocess.Popen[bytes] | None = None
    folder: Path | None = None
    older: list[Path] = field(default_factory=list)
    """Folders of earlier, broken attempts: not the one that this process writes."""
    commit: str = ""

    @property
    def exp_name(self) -> str:
        return experiment(self.study, self.run)

    @property
    def title(self) -> str:
        return f"{self.exp_name} seed {self.seed}"

    @property
    def log_file(self) -> Path:
        return self.log_dir / f"{self.exp_name}__{self.seed}.log"

    @property
    def command(self) -> str:
        return full_command(self.study, self.run, self.seed)

    def folders(self) -> list[Path]:
        return run_folders(self.exp_name, self.log_dir).get(self.seed, [])

    def start(self) -> bool:
        """Start the script, or resume it where an earlier attempt left a checkpoint. False: it runs already."""
        import fcntl  # here, so that `list` and `show` also work where there is none

        self.older, self.commit = self.folders(), current_commit()
        self.folder = newest_with("checkpoint.pt", self.older)
        arguments = shlex.split(self.command)
        if self.folder:
            arguments = [*arguments[:2], "--resume", str(self.folder)]  # its settings are in its args.json
        elif self.log_dir != ROOT / "runs":  # the scripts' own default
            arguments += ["--log-dir", str(self.log_dir)]
        printed = shlex.join(arguments)
        if arguments[0] == "python":
            arguments[0] = sys.executable
        with self.log_file.open("ab") as log:
            try:
                # The child inherits this lock with its output, so it holds as long as the child lives, even when the
                # launcher is killed: two launchers never write into one run folder.
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            log.write(f"$ {printed}\n".encode())
            log.flush()
            # A session of its own: Ctrl-C in the terminal reaches the launcher only, which passes it on exactly once.
            self.process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if self.folder:
            self.write_note()
        return True

    def watch_folder(self) -> None:
        """Write study.json as soon as the new run folder is there: not at the end, for a run may be killed before."""
        if self.folder is None:
            new = [folder for folder in self.folders() if folder not in self.older]
            if new:
                self.folder = new[-1]
                self.write_note()

    def write_note(self) -> None:
        """Leave {study, run, seed, command, commit} in the run folder; a resumed run names every commit it saw."""
        assert self.folder is not None
        commits = str(read_note(self.folder).get("commit", self.commit)).split("+")
        if commits[-1] != self.commit:
            commits.append(self.commit)
        note = {"study": self.study.name, "run": self.run.name, "seed": self.seed}
        note |= {"command": self.command, "commit": "+".join(commits)}
        (self.folder / "study.json").write_text(json.dumps(note, indent=2) + "\n")

    def last_line(self) -> str:
        """The last line that the script wrote, which for a Python error is the error."""
        lines = [line.strip() for line in self.log_file.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300]


def report(message: str) -> None:
    """One progress line, visible at once also when the output goes into a file."""
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def jobs_to_run(studies: list[Study], seeds: int | None, log_dir: Path) -> list[Job]:
    """What is not finished yet: seed 1 of everything first, so that there is something to look at early."""
    jobs: dict[tuple[str, int], Job] = {}  # a run shared by two studies is one job
    for seed in range(1, max(seeds or study.seeds for study in studies) + 1):
        for study in studies:
            if seed > (seeds or study.seeds):
                continue
            for run in study.runs:
                job = Job(study, run, seed, log_dir)
                done = newest_with("result.json", job.folders())
                if done is None:
                    jobs.setdefault((job.exp_name, seed), job)
                    continue
                report(f"skipped  {job.title}: finished ({done.name})")
                if read_note(done).get("command", job.command) != job.command:
                    report(f"         but by another command than the catalogue's: remove {done} to run it again")
    return list(jobs.values())


def run_jobs(jobs: list[Job], workers: int) -> int:
    """Run the jobs, `workers` at a time. Returns the exit code: 1 when a run failed, 128 + n after signal n."""
    waiting, active, failures = list(jobs), list[Job](), 0
    received: list[int] = []  # signals; the handler only notes them, so that nothing below is cut in half
    passed_on = 0
    catch = (signal.SIGINT, signal.SIGTERM)
    handlers = {signum: signal.signal(signum, lambda number, _: received.append(number)) for signum in catch}
    try:
        while active or (waiting and not received):
            while waiting and not received and len(active) < workers:
                job = waiting.pop(0)
                if job.start():
                    active.append(job)
                    how = f"resumed  {job.title} from {job.folder.name}" if job.folder else f"started  {job.title}"
                    report(f"{how} (output in {job.log_file}; {len(waiting)} waiting)")
                else:
                    report(f"skipped  {job.title}: another launcher is running it")
            time.sleep(0.1)
            for signum in received[passed_on:]:  # the scripts write a checkpoint and leave; that is waited for
                passed_on += 1
                report(f"passing signal {signum} on to {len(active)} processes, waiting for their checkpoints")
                for job in active:
                    assert job.process is not None
                    job.process.send_signal(signum)
            for job in list(active):
                assert job.process is not None
                code = job.process.poll()  # before looking for the folder: a finished script has written everything
                job.watch_folder()
                if code is None:
                    continue
                active.remove(job)
                if job.folder and (job.folder / "result.json").exists():
                    minutes = json.loads((job.folder / "result.json").read_text())["minutes"]
                    report(f"finished {job.title} in {minutes:.1f} minutes")
                elif received:
                    report(f"stopped  {job.title}: the same command goes on from its last checkpoint, if it has one")
                else:
                    failures += 1
                    why = f"exit code {code}" if code else "exit code 0, but it wrote no result.json"
                    report(f"failed   {job.title}: {why}: {job.last_line()} (all of it in {job.log_file})")
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    if failures:
        report(f"{failures} of {len(jobs)} runs failed")
    return 128 + received[0] if received else int(failures > 0)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def list_studies(log_dir: Path) -> None:
    """Print the catalogue with what it costs (one core) and how many runs × seeds are finished and started."""
    print(f"{'name':<14} {'runs':>4} {'seeds':>5} {'minutes':>7} {'finished':>8} {'started':>7}  title")
    for study in STUDIES:
        minutes = study.seeds * sum(run.minutes for run in study.runs)
        finished = started = 0
        for run in study.runs:
            done = finished_runs(experiment(study, run), log_dir)
            finished += len(done)
            started += len(run_folders(experiment(study, run), log_dir).keys() - done.keys())
        share = f"{finished}/{len(study.runs) * study.seeds}"
        numbers = f"{len(study.runs):>4} {study.seeds:>5} {minutes:>7g} {share:>8} {started:>7}"
        print(f"{study.name:<14} {numbers}  {study.title}")


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Read the command line; return the exit code."""
    parser = Parser(prog="studies.py", description="The studies of this repository and a launcher for them.")
    commands = parser.add_subparsers(dest="action", required=True, parser_class=Parser)
    lists = commands.add_parser("list", help="what there is, what it costs, how much of it is finished")
    shows = commands.add_parser("show", help="the commands of studies, to paste")
    runs = commands.add_parser("run", help="run what is not finished")
    for sub in (shows, runs):
        sub.add_argument("names", nargs="+", metavar="NAME")
        sub.add_argument("--seeds", type=positive, help="seeds 1 to this (default: the study's own number)")
    for sub in (lists, runs):
        sub.add_argument("--log-dir", type=Path, default=ROOT / "runs", help="where the run folders are")
    runs.add_argument("--workers", type=positive, default=2, help="processes at a time, one thread each")
    args = parser.parse_args(argv)

    if args.action == "list":
        list_studies(args.log_dir.resolve())
        return 0
    studies = [find_study(name) for name in args.names]
    if args.action == "show":
        for study in studies:
            print(f"# {study.name}: {study.shows}")
            for run in study.runs:
                for seed in range(1, (args.seeds or study.seeds) + 1):
                    print(full_command(study, run, seed))
        return 0
    log_dir = args.log_dir.resolve()
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--log-dir {args.log_dir}: {error.strerror}")
    return run_jobs(jobs_to_run(studies, args.seeds, log_dir), args.workers)


if __name__ == "__main__":
    sys.exit(main())
