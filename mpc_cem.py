# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[classic-control,mujoco]==1.4.0",
#     "mujoco==4.0.0",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "moviepy==2.2.1",
# ]
# ///
r"""Model predictive control by the cross-entropy method (CEM) on a learned ensemble, with its modern refinements.

Random shooting (mpc_random_shooting.py) draws action sequences blindly. CEM draws them from a Gaussian that it moves,
iteration by iteration, towards the best ones found so far. For each environment, with a mean μ and a standard deviation
σ for every action of the horizon (H, A):

    a_k = clip(z_k),  z_k = μ + σ ε_k,  ε_k ~ N(0, I),   k = 1 .. K                                             (1)
    G_k = mean over members e of Σ_t<H γ^t r(ŝ_t, a_k,t, ŝ_{t+1}) + γ^H V̄(ŝ_H),
          where ŝ_0 = s,  ŝ_{t+1} = model_e(ŝ_t, a_k,t)                                                         (2)
    elites = the J of the z_k with the largest G_k
    μ <- clip(α mean(elites) + (1 - α) μ),    σ² <- α var(elites) + (1 - α) σ²                                  (3)

M times over; then the first action of μ (or of the best sequence) is executed, and all is planned anew one step later.
K, J, M, H, E and α are --num-candidates, --num-elites, --cem-iterations, --horizon, --ensemble-size and --cem-alpha.
The elites count as drawn and not as clipped, and var divides by J - 1: good actions often lie on the bounds, where
clipped ones are all alike, and σ would be gone before anything has been found (study hw6 with 50 candidates: 1,162, and
713 with clipped elites and a division by J; seed 1 each).

V is the discounted return of acting as in the episodes seen so far. It is learned from all transitions (s, r, s') of
the buffer; V̄ is the same network with a running mean of its weights:

    minimise Σ (V(s) - y)²,   y = r + γ V̄(s'),  or r alone where s' was terminal (not timed out, not cut short)  (4)

V begins anew with each model: one that learned on through a whole run ended lower (one seed, see below).
With --num-values there are several V, each learned by itself, and equation 2 believes the one that promises least.

Pseudocode:

    buffer <- initial_steps transitions of the random policy           (or --data)
    for iteration = 0 .. num_iterations - 1:
        fit the ensemble on the whole buffer (train_steps more gradient steps: squared error of the normalised s' - s)
        fit a new V by equation 4 (as many gradient steps; --terminal-value)
        evaluate, first, last and every eval_every steps: whole episodes, side by side, on seeds of their own
        for steps_per_iteration steps, except after the last iteration:      (cut short now and then: reset_every)
            μ, kept elites <- last step's, shifted by one (in a new episode: the middle of the bounds)
            σ <- start_std;  e <- the episode's own member (--thompson)
            for i = 1 .. cem_iterations:  equations 1, 2, 3, for all environments, members and candidates at once
            s <- environment step with the first action; buffer <- buffer + transition

Episodes are cut short now and then while collecting (--reset-every), because a planner can only be as good as the model
is where it stands. Five whole episodes of random actions show five times how an episode of HalfCheetah-v5 begins; the
plans of a model that has seen no more mostly begin with a somersault, and the rest of the episode is spent on the back.

A horizon is short. HalfCheetah-v5 starts fastest by a somersault, with the true dynamics as with a model, and that it
then lies on its back is beyond the horizon. V knows: it has seen what became of those that did. It is the value of what
was done, not of the best that could be, and so it keeps to where episodes have gone well; the planner does better than
V expects, its data make the next V, and so on (--no-terminal-value goes without, and wants a longer --horizon).

A planner that always does what all members together think best sees nothing else, and its model learns of nothing else.
So while collecting (--thompson) each environment plans with one member alone, with another one in its next episode:
where they disagree, different things are tried. A candidate is rolled out once then and not E times, so that E times as
many can be tried in the same time.

Not every task goes at HalfCheetah's pace, 50 ms a step, which --help shows the defaults of. Where a step takes less
than 20 ms (Hopper, Walker2d, Humanoid) the defaults are --horizon 20, --noise-beta 1, --gamma 0.992 and --reset-every
625: plans of more steps, noise that is slow enough to move a body, and a V and episodes of about as many seconds; and
--num-values 5, for the plans of a body that can fall end where no V has been, and one V alone promises too much there.
Where an episode has at most 200 steps (Reacher, Pusher: to get somewhere, not to run) they are --horizon 20,
--noise-beta 2 and --reset-every None: a hand that moves smoothly, to somewhere that is farther than a few steps; and
beginnings abound.

The refinements, each a flag, each with its reason (bounded sampling is of PETS, the rest of iCEM, section 3, which
executes the best):

    --shift-plan        start from the last step's plan, one step on: the world has moved by one step only
    --keep-elites       let some of the last elites (shifted too) compete again: a good plan is not lost to bad luck
    --noise-beta        draw noise whose power falls as f^-β over the horizon: where steps are short (10 ms), white
                        noise averages out and the body only trembles; where they are long (50 ms), slow noise gains
                        nothing: on HalfCheetah-v5's true dynamics 120 steps earn 641 ± 137 with β 0 and 529 ± 223 with
                        β 1 (three seeds, one episode each, commit 44e8d92: --true-dynamics --num-iterations 1
                        --initial-steps 10 --train-steps 1 --num-candidates 250 --horizon 20 --gamma 1
                        --no-terminal-value --eval-episodes 1 --max-episode-steps 120 --noise-beta β)
    --candidate-decay   K shrinks by this factor each iteration (never below 2 J): a narrow Gaussian needs fewer
    --mean-candidate    in the last iteration μ itself competes: a sample around a good mean is mostly worse than it
    --bounded-sampling  cap σ at half the distance to the bounds and cut the Gaussian off at 2σ (PETS): no pile of
                        samples on the bounds
    --execute           mean smooths over what the model got wrong; best takes the winning sequence as it is

Where steps are short (the cheetah below, 10,000 steps, seed 1) its command earns 1,533. Without the shifted plan it is
998, without the mean as a candidate 1,134, with the best sequence executed 1,250, with white noise 1,300, with no
elites kept 1,342, and with 250 candidates in each iteration 1,531; another seed may turn the smaller differences round.

The course's CEM (CS285 homework 4: uniform first iteration, five elites, α = 1, nothing remembered) is, but for the
elites of equation 3,

    python mpc_cem.py --start uniform --num-elites 5 --cem-alpha 1 --noise-beta 0 --keep-elites 0 --no-shift-plan \
        --candidate-decay 1 --no-mean-candidate --num-candidates 1_000 --horizon 15 --ensemble-size 3 \
        --num-layers 2 --hidden-size 250 --activation tanh --train-steps 1_500 --batch-size 512 \
        --steps-per-iteration 5_000 --num-iterations 5 --reset-every None --no-wrap-angles --num-envs 1 \
        --no-terminal-value --gamma 1 --no-thompson

On a cheetah with steps of 10 ms, looking further ahead by slower noise, a smaller model and no V earn 735 after 5,000
steps and 1,751 after 25,000 (seed 1, commit 3e089bc, before elites counted as drawn; how much the horizon, the model
and V are worth has not been measured):

    python mpc_cem.py --env-id envs:PostureCheetah-v0 --horizon 20 --num-candidates 250 --noise-beta 1 --gamma 1 \
        --ensemble-size 3 --num-layers 2 --hidden-size 250 --no-terminal-value --no-thompson --reset-every None

Usage:

    python mpc_cem.py --env-id HalfCheetah-v5
    python mpc_cem.py --env-id Pendulum-v1 --capture-video
    python mpc_cem.py --resume RUN_DIR                 # go on exactly where it stopped
    python mpc_cem.py --resume RUN_DIR --eval-only     # the evaluation of that run again
    python mpc_cem.py --resume RUN_DIR --eval-only --true-dynamics    # is it the planner or the model?
    python mpc_cem.py --resume RUN_DIR --eval-only --num-candidates 300    # what would more candidates have earned?

What to expect of the first command: a return of 4,500 after 10,000 environment steps and 7,000 after 50,000 (seed 3; a
V that learned on through the run earned 6,666, and an evaluation with --num-candidates 400 earns 8,296, two episodes),
in 85 minutes on one core of a CPU that multiplies in bfloat16; of the second, with `--num-iterations 3`: -162 after
7,000 steps and 8 minutes (seed 1).

The reward r and the end of an episode are functions of (obs, action, next_obs): the environment's own `batch_reward`
and `batch_terminated` if it has them, else the formulas of Gymnasium's MuJoCo v5 tasks, which this file knows, else two
more outputs of the ensemble. After a step that ends the episode a candidate earns nothing, and no V; an end that is
learned counts by its probability.

Every logged tag (TensorBoard and metrics.csv; the step is the number of transitions in the buffer):

    charts/episodic_return      return of the episodes (cut by --reset-every) that ended here, mean over environments
    charts/episodic_length      their length
    charts/SPS                  environment steps per second while collecting, planning included, first ten left out
    eval/episodic_return        mean return of the evaluation episodes
    eval/episodic_return_std    their standard deviation (ddof=1)
    eval/episodic_length        their mean length
    eval/predicted_return       what the last elites (with --execute best: the best of them) promised (equation 2), mean
                                over the steps after which the episode lasted for a whole horizon, or fell
    eval/realised_return        what the environment paid over the same horizons, and the value of where that led; below
                                the promise: plans make use of the model's errors, or end where V is wrong
    eval/elite_std              std of the final elites, as drawn, in half-ranges; near 0: the search has converged
    model/train_loss            loss of the last gradient step of the fit, mean over members
    model/value_loss            the same of (1 - γ) V (in units of the reward's variance; with --terminal-value)
    model/holdout_mse           one-step error (normalised) of the old model on the data collected since its fit
    model/disagreement          std over the members of the same predictions
    time/plan_ms                milliseconds of one planning call (all environments), median over the collection
    time/train_s                seconds of the fit
    time/env_s                  seconds of the collection, planning included

Papers: Chua et al. 2018, PETS, arXiv 1805.12114 (CEM on an ensemble, bounded sampling); Pinneri et al. 2020, iCEM,
arXiv 2008.06389 (the refinements); Lowrey et al. 2019, POLO, arXiv 1811.01848 (a value at the end of the plan). PETS
and iCEM write their momentum as the weight of the old mean; here α is the weight of the new one.
"""

import copy
import csv
import importlib.util
import itertools
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn, get_args

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.linalg import vector_norm
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Activation = Literal["tanh", "relu", "silu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": F.relu, "silu": F.silu}
SCRIPT = Path(__file__).stem
RewardFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # obs (..., D), action (..., A), next_obs (..., D) -> (...)
TerminatedFn = Callable[[Tensor], Tensor]  # next_obs (..., D) -> (...), bool
Imagine = Callable[[Tensor, Tensor], Tensor]  # obs (B, D), candidates (B, K, H, A) -> predicted returns (B, K)


@dataclass
class Args:
    """Planning in a learned model by CEM. Some defaults depend on the task: --horizon 20, --noise-beta 1, --gamma
    0.992, --num-values 5 and --reset-every 625 where a step takes less than 20 ms; --horizon 20, --noise-beta 2 and
    --reset-every None where an episode has at most 200 steps."""

    exp_name: str = "mpc_cem"
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """seed of every random generator"""
    torch_deterministic: bool = True
    """use PyTorch's deterministic algorithms where there are any"""
    cuda: bool = True
    """use a GPU if there is one"""
    num_threads: int | None = None
    """CPU threads of PyTorch; None leaves its default (one per core)"""
    compile: bool = False
    """torch.compile for the hot path: CUDA graphs on a GPU; a CPU needs a C++ compiler, and up to minutes at first"""
    track: bool = False
    """mirror TensorBoard to Weights & Biases (pip install wandb)"""
    wandb_project_name: str = "mbrl"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases team or user"""
    capture_video: bool = False
    """write a video of one evaluation episode of each evaluation into the run folder"""
    log_dir: str = "runs"
    """folder that holds the run folders"""
    checkpoint_every: int = 5_000
    """steps between checkpoints: of the environment, or of the gradient in a fit that can be resumed"""
    resume: str | None = None
    """run folder to continue, with its own settings; those that shaped it so far cannot change"""
    eval_only: bool = False
    """only evaluate the run given by --resume; of a finished one: its last evaluation again, on the same seeds"""
    env_id: str = "HalfCheetah-v5"
    """Gymnasium environment with Box observations and actions; module:EnvId imports the module first"""
    max_episode_steps: int | None = None
    """time limit of an episode; None leaves the environment's own"""

    # Data
    num_envs: int = 5
    """environments stepped side by side"""
    initial_steps: int = 5_000
    """environment steps of the random policy, rounded up to a multiple of num_envs"""
    reset_every: int | None = 100
    """steps, on average, after which an episode is cut short while collecting, to see many beginnings; None: never"""
    steps_per_iteration: int = 1_000
    """environment steps of the planner between two fits of the model"""
    num_iterations: int = 46
    """how often the model is fitted; data is collected in between"""
    eval_every: int = 5_000
    """steps between evaluations"""
    eval_episodes: int = 10
    """episodes of the last evaluation, side by side"""
    interim_episodes: int = 2
    """episodes of the evaluations before the last"""
    data: str | None = None
    """file of transitions (of --save-data) to use instead of what would be collected first"""
    save_data: str | None = None
    """file to write the collected transitions to"""

    # Model
    ensemble_size: int = 5
    """members of the ensemble"""
    num_layers: int = 4
    """hidden layers of each network"""
    hidden_size: int = 200
    """units of each hidden layer"""
    activation: Activation = "silu"
    """nonlinearity of the hidden layers"""
    wrap_angles: bool = True
    """the network sees sine and cosine of angles that turn without limit (MuJoCo), not the angles"""
    reward: Literal["auto", "known", "learned"] = "auto"
    """known: by formula (the environment's batch_reward, batch_terminated); learned: predicted; auto: known if it is"""

    # Training
    train_steps: int = 1_500
    """gradient steps per fit"""
    batch_size: int = 256
    """samples per gradient step (of an ensemble: per member)"""
    learning_rate: float = 1e-3
    """step size of Adam"""
    weight_decay: float = 0.0
    """L2 penalty on the weights, through Adam"""
    input_noise: float = 0.01
    """standard deviation of the Gaussian noise on the normalised inputs while training"""
    train_dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the matrix products in training; weights, optimiser and losses stay in float32"""

    # Planning
    horizon: int = 10
    """steps planned ahead"""
    num_candidates: int = 100
    """action sequences tried at each step (by CEM: in each of its iterations, unless they shrink)"""
    cem_iterations: int = 4
    """iterations of CEM at each step"""
    num_elites: int = 10
    """sequences that the Gaussian is refitted to"""
    cem_alpha: float = 0.9
    """weight of the new elites in mean and variance: new = alpha * elites + (1 - alpha) * old"""
    start: Literal["gaussian", "uniform"] = "gaussian"
    """first iteration: Gaussian around the shifted plan (or the middle of the range), or uniform over the range"""
    start_std: float = 0.5
    """standard deviation of the Gaussian start, in half-ranges of the actions"""
    shift_plan: bool = True
    """start from the plan of the last step, shifted by one"""
    keep_elites: float = 0.3
    """share of the elites that competes again in the next iteration and, shifted, in the next step"""
    noise_beta: float = 0.0
    """power of the noise falls as frequency^-beta along the horizon; 0 is white noise"""
    candidate_decay: float = 1.25
    """num_candidates shrinks by this factor in each iteration, to no less than twice the elites"""
    mean_candidate: bool = True
    """the mean itself is a candidate in the last iteration"""
    bounded_sampling: bool = False
    """cap the standard deviation at half the distance to the bounds and the noise at two of them, as in PETS"""
    execute: Literal["mean", "best"] = "mean"
    """execute the first action of the final mean or of the best sequence"""
    thompson: bool = True
    """collect with one member for each environment, another in its next episode, and with more candidates (times
    ensemble_size); evaluations plan with all members"""
    true_dynamics: bool = False
    """plan with the simulator itself instead of the model: tells a bad planner from a bad model"""
    gamma: float = 0.95
    """discount factor"""
    terminal_value: bool = True
    """a plan also earns the learned value of the state in which it ends (two layers of hidden_size units)"""
    num_values: int = 1
    """values learned side by side; a plan earns the least of them"""
    planner_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of the model's products while planning; auto: bfloat16 where it is faster. All else: float32"""


def fail(message: str) -> NoReturn:
    """Bad input ends with one clear line and exit code 2, before any work starts."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def require(condition: bool, message: str) -> None:
    if not condition:
        fail(message)


def require_package(name: str, why: str) -> None:
    require(importlib.util.find_spec(name) is not None, f"{why} needs the package {name}: pip install {name}")


def check_fields(args: Args, at_least: dict[str, int]) -> None:
    """Numbers are finite and at least so large, choices are among those of the field's type."""
    for field in fields(args):
        value, choices, flag = getattr(args, field.name), get_args(field.type), f"--{field.name.replace('_', '-')}"
        if field.name in at_least and value is not None:
            low = at_least[field.name]
            require(low <= value < float("inf"), f"{flag} must be at least {low}, got {value}")  # and so NaN fails too
        if choices and all(isinstance(choice, str) for choice in choices):
            require(value in choices, f"{flag} must be one of {', '.join(choices)}, got {value}")
        require(value != "", f"{flag} is empty")
    size = len(os.fsencode(args.exp_name))
    require(size <= 100, f"--exp-name has {size} bytes, at most 100 are allowed")
    folder = Path(args.log_dir).resolve()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    require(writable, f"--log-dir {args.log_dir}: cannot write there")
    require(args.seed < 2**32, f"--seed must be below 2^32, got {args.seed}")
    cores = os.cpu_count() or 1
    require((args.num_threads or 1) <= cores, f"--num-threads must be at most {cores} here, got {args.num_threads}")
    require(0 < args.learning_rate < float("inf"), f"--learning-rate must be positive, got {args.learning_rate}")
    if args.track:
        require_package("wandb", "--track")


def check_data_paths(data: str | None, save_data: str | None) -> None:
    require(data is None or Path(data).is_file(), f"--data {data}: there is no such file")
    if save_data is not None:
        path = Path(save_data).resolve()
        writable = not path.is_dir() and os.access(path.parent, os.W_OK)
        require(writable, f"--save-data {save_data}: cannot write such a file")


# Differs: the arguments do
def check_args(args: Args) -> None:
    one = "num_threads checkpoint_every num_envs ensemble_size num_layers hidden_size train_steps batch_size horizon"
    one += " steps_per_iteration num_iterations eval_episodes interim_episodes num_candidates max_episode_steps"
    one += " cem_iterations eval_every reset_every num_values"
    other = {"seed": 0, "weight_decay": 0, "input_noise": 0, "noise_beta": 0, "initial_steps": 2, "num_elites": 2}
    check_fields(args, dict.fromkeys(one.split(), 1) | other | {"candidate_decay": 1})
    require(0 < args.cem_alpha <= 1, f"--cem-alpha must lie in (0, 1], got {args.cem_alpha}")
    require(0 <= args.keep_elites <= 1, f"--keep-elites must lie in [0, 1], got {args.keep_elites}")
    require(0 < args.start_std < float("inf"), f"--start-std must be positive, got {args.start_std}")
    few = (
        f"--num-elites {args.num_elites} of --num-candidates {args.num_candidates}: elites may be half of them at most"
    )
    require(2 * args.num_elites <= args.num_candidates, few)
    contrary = args.start == "uniform" and (args.shift_plan or args.keep_elites > 0)
    require(not contrary, "--start uniform forgets the last plan: give --no-shift-plan --keep-elites 0 with it")
    require(0 < args.gamma <= 1, f"--gamma must lie in (0, 1], got {args.gamma}")
    endless = f"--gamma {args.gamma}: above 0.999 no V is learned, give --no-terminal-value with it"
    require(args.gamma <= 0.999 or not args.terminal_value, endless)
    require(args.candidate_decay <= 100, f"--candidate-decay must be at most 100, got {args.candidate_decay}")
    require(args.noise_beta <= 10, f"--noise-beta must be at most 10, got {args.noise_beta}")
    short = f"--steps-per-iteration {args.steps_per_iteration} is less than one step of --num-envs {args.num_envs}"
    require(args.steps_per_iteration >= args.num_envs, short)
    require(args.resume is not None or not args.eval_only, "--eval-only needs --resume RUN_DIR: the run to evaluate")
    require(not (args.eval_only and args.save_data), "--save-data with --eval-only: give it with --resume alone")
    check_data_paths(None if args.resume else args.data, args.save_data)
    if args.capture_video:
        check_video(args.env_id)


# ---------------------------------------------------------------------------------------------------- environment

# Locomotion tasks whose reward is Δx/dt: leading observation dimensions (x, or x and y) that they hide by default.
POSITIONS = {"HalfCheetah-v5": 1, "Hopper-v5": 1, "Walker2d-v5": 1, "Swimmer-v5": 2, "Ant-v5": 2, "Humanoid-v5": 2}


def hidden_positions(env: gym.Env[Any, Any]) -> int:
    return POSITIONS.get(env.spec.id, 0) if env.spec else 0


def free_angles(env: gym.Env[Any, Any], obs: np.ndarray) -> list[int]:
    """Dimensions of the observation that are angles of MuJoCo joints without limits: they grow with each turn.

    `obs` is what the environment shows now. Where all joints are at 0 nobody can tell, and no angle is found."""
    task: Any = env.unwrapped
    model: Any = getattr(task, "model", None)
    positions = getattr(getattr(task, "data", None), "qpos", None)
    if not hasattr(model, "jnt_type") or positions is None or not np.any(positions) or len(obs) < len(positions):
        return []
    if not np.allclose(obs[: len(positions)], positions, atol=1e-6):
        return []  # the observation does not begin with the joints' positions
    hinge = 3  # mujoco.mjtJoint.mjJNT_HINGE
    free = (model.jnt_type == hinge) & ~model.jnt_limited.astype(bool)
    return [int(address) for address in model.jnt_qposadr[free]]


def make_env(env_id: str, **kwargs: Any) -> gym.Env[Any, Any]:
    """One environment with a flat Box observation (positions kept, see POSITIONS) and a flat Box action."""
    if importlib.util.find_spec("mujoco"):  # or it complains of Gymnasium's half-cheetah, once for each one
        import mujoco

        mujoco.set_mju_user_warning(lambda text: None if "deprecated" in text else print(text, file=sys.stderr))
    try:
        env = gym.make(env_id, **kwargs)
        if hidden_positions(env):
            env.close()
            env = gym.make(env_id, exclude_current_positions_from_observation=False, **kwargs)
    except Exception as error:  # an environment's own code raises what it likes
        fail(f"--env-id {env_id}: {error}")
    for name, space in (("observation", env.observation_space), ("action", env.action_space)):
        require(isinstance(space, gym.spaces.Box), f"--env-id {env_id}: the {name} space must be a Box, it is {space}")
    space, words = env.action_space, f"--env-id {env_id}: actions must be vectors of real numbers"
    require(len(space.shape or ()) == 1 and np.issubdtype(space.dtype, np.floating), f"{words}, not {space}")
    if len(env.observation_space.shape or ()) != 1:
        env = gym.wrappers.FlattenObservation(env)
    return env


def check_video(env_id: str) -> None:
    """Find out whether an episode can be drawn before it is played."""
    require_package("moviepy", "--capture-video")
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"} & {*os.environ}:
        os.environ["MUJOCO_GL"] = "egl"  # MuJoCo's default cannot draw without a display
    env = make_env(env_id, render_mode="rgb_array")
    try:
        env.reset()
        env.render()
    except Exception as error:  # a missing library, or an environment that has no pictures
        fail(f"--capture-video: {env_id} cannot be drawn: {error!r}")
    env.close()


def check_time_limit(env: gym.Env[Any, Any], env_id: str) -> None:
    limited = env.spec is not None and env.spec.max_episode_steps is not None
    require(limited, f"--env-id {env_id}: it has no time limit, evaluating might never end: give --max-episode-steps")


def check_horizon(args: Args, env: gym.Env[Any, Any]) -> None:
    limit = env.spec.max_episode_steps if env.spec else None
    too_far = f"--horizon {args.horizon} is longer than an episode of {args.env_id} ({limit} steps)"
    require(limit is None or args.horizon <= limit, too_far)


class Replayable(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that fits in a checkpoint: how its episode was seeded, and every action since.

    Restoring resets and replays, which is exact where all randomness is `np_random` and a reset forgets all else.
    """

    def __init__(self, env: gym.Env[Any, Any]):
        super().__init__(env)
        self.start: dict[str, Any] = {}
        self.actions: list[np.ndarray] = []
        self.episodic_return = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.start = {"rng": self.unwrapped.np_random.bit_generator.state} if seed is None else {"seed": seed}
        self.actions, self.episodic_return = [], 0.0
        return super().reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        space: Any = self.action_space
        action = np.array(action, space.dtype)  # what is stored is what was done
        action = np.minimum(np.maximum(action, space.low), space.high)  # rounding to float32 may leave the bounds
        self.actions.append(action.copy())  # an environment may change the one it is given
        obs, reward, terminated, truncated, info = super().step(action)
        self.episodic_return += float(reward)
        return obs, float(reward), terminated, truncated, info

    def state_dict(self) -> dict[str, Any]:
        actions = torch.from_numpy(np.stack(self.actions)) if self.actions else None
        return {**self.start, "actions": actions}

    def load_state_dict(self, state: dict[str, Any]) -> np.ndarray:
        """Returns the observation that the episode had reached."""
        if "rng" in state:
            self.unwrapped.np_random.bit_generator.state = state["rng"]
        obs, _ = self.reset(seed=state.get("seed"))
        for action in [] if state["actions"] is None else state["actions"].numpy():
            obs, *_ = self.step(action)
        return np.asarray(obs, np.float32)


class VectorEnv:
    """num_envs environments stepped together. A finished one is reset in the same step (Gymnasium's SAME_STEP), so
    `obs` is always what to act on, while `step` returns the true next observation, even of a finished episode."""

    def __init__(self, env_id: str, num_envs: int, seed: int, **kwargs: Any):
        self.envs = [Replayable(make_env(env_id, **kwargs)) for _ in range(num_envs)]
        self.action_space = copy.deepcopy(self.envs[0].action_space)  # a class may share one over all its instances
        self.action_space.seed(seed + 2_000_000)  # an environment's own seed would draw its own numbers once more
        self.obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(self.envs)]).astype(np.float32)
        self.episode = np.arange(num_envs)  # which episode each is in; environment i counts i, i + num_envs, ..
        self.finished: list[tuple[float, int]] = []  # return and length of the episodes that the last step ended

    def random_action(self) -> np.ndarray:
        return np.stack([self.action_space.sample() for _ in self.envs])

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        next_obs, reward, terminated = np.empty_like(self.obs), np.empty(len(self.envs)), np.zeros(len(self.envs), bool)
        self.obs, self.episode, self.finished = self.obs.copy(), self.episode.copy(), []
        for i, env in enumerate(self.envs):
            next_obs[i], reward[i], terminated[i], truncated, _ = env.step(action[i])
            self.obs[i] = next_obs[i]
            if terminated[i] or truncated:
                self.finished.append((env.episodic_return, len(env.actions)))
                self.obs[i] = env.reset()[0]
                self.episode[i] += len(self.envs)
        return next_obs, reward, terminated

    def state_dict(self) -> dict[str, Any]:
        rng = self.action_space.np_random.bit_generator.state
        envs = [env.state_dict() for env in self.envs]
        return {"envs": envs, "rng": rng, "episode": torch.from_numpy(self.episode), "obs": torch.from_numpy(self.obs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.obs = np.stack([env.load_state_dict(saved) for env, saved in zip(self.envs, state["envs"], strict=True)])
        self.action_space.np_random.bit_generator.state = state["rng"]
        self.episode = state["episode"].numpy()
        if not np.array_equal(self.obs, state["obs"].numpy(), equal_nan=True):
            print("warning: episodes were not replayed as they were: is all randomness np_random?", file=sys.stderr)


def action_bounds(envs: VectorEnv, env_id: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The smallest and the largest action, (A,) each."""
    space: Any = envs.action_space
    low, high = (torch.as_tensor(bound).float().to(device) for bound in (space.low, space.high))
    bounded = bool(torch.isfinite(high - low).all())
    require(bounded, f"--env-id {env_id}: actions must be bounded, {space} is not")
    return low, high


def locomotion_formulas(task: Any, skip: int) -> tuple[RewardFn, TerminatedFn]:
    """HalfCheetah, Swimmer, Hopper, Walker2d, Ant: forward speed, minus control, plus a bonus for staying upright."""
    z_range = getattr(task, "_healthy_z_range", (-np.inf, np.inf))
    angle_range = getattr(task, "_healthy_angle_range", (-np.inf, np.inf))
    state_range = getattr(task, "_healthy_state_range", (-np.inf, np.inf))  # Hopper only: of all that follows z
    contact_weight = getattr(task, "_contact_cost_weight", 0.0)  # Ant only; contact forces are its last observations
    can_fall = getattr(task, "_terminate_when_unhealthy", False)
    bonus = getattr(task, "_healthy_reward", 0.0)

    def unhealthy(next_obs: Tensor) -> Tensor:
        z, angle, rest = next_obs[..., skip], next_obs[..., skip + 1], next_obs[..., skip + 1 :]
        fallen = (z <= z_range[0]) | (z >= z_range[1]) | (angle <= angle_range[0]) | (angle >= angle_range[1])
        return fallen | ((rest <= state_range[0]) | (rest >= state_range[1])).any(-1)

    def terminated(next_obs: Tensor) -> Tensor:
        return unhealthy(next_obs) if can_fall else torch.zeros_like(next_obs[..., 0], dtype=torch.bool)

    def reward(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        total: Tensor = task._forward_reward_weight * (next_obs[..., 0] - obs[..., 0]) / task.dt
        total = total - task._ctrl_cost_weight * action.square().sum(-1)
        if bonus:
            total = total + bonus * (~unhealthy(next_obs))
        if contact_weight:
            forces = next_obs[..., 27 + skip :].clamp(*task._contact_force_range)
            total = total - contact_weight * forces.square().sum(-1)
        return total

    return reward, terminated


def has_known_reward(env: gym.Env[Any, Any]) -> bool:
    """Does the environment itself say what reward and termination follow from (obs, action, next_obs)?"""
    return all(callable(getattr(env.unwrapped, name, None)) for name in ("batch_reward", "batch_terminated"))


def check_own_formulas(env: gym.Env[Any, Any]) -> None:
    """Try the environment's own batch_reward and batch_terminated before they are planned with."""
    task: Any = env.unwrapped
    name = env.spec.id if env.spec else type(task).__name__
    has = [callable(getattr(task, part, None)) for part in ("batch_reward", "batch_terminated")]
    require(has[0] == has[1], f"{name} must have both of batch_reward and batch_terminated, or neither")
    if not any(has):
        return
    sizes = [gym.spaces.flatdim(space) for space in (env.observation_space, env.action_space)]
    obs, action = (torch.zeros(2, 3, size) for size in sizes)
    for part, arguments in (("batch_reward", (obs, action, obs)), ("batch_terminated", (obs,))):
        try:
            found = getattr(task, part)(*arguments)
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        except Exception as error:  # an environment's own code raises what it likes
            fail(f"{name}: {part} failed on zeros, (2, 3, D): {error}")
        require(shape == (2, 3), f"{name}: {part} of (2, 3, D) must be a tensor (2, 3), it is {shape}")
    require(found.dtype == torch.bool, f"{name}: batch_terminated must be of dtype bool, it is {found.dtype}")


def known_formulas(env: gym.Env[Any, Any]) -> tuple[RewardFn, TerminatedFn] | None:
    """Reward and termination from (obs, action, next_obs): the environment's own, else Gymnasium's MuJoCo tasks.

    Weights and ranges are read from the environment, so that one made with other settings is planned for correctly.
    """
    task: Any = env.unwrapped
    check_own_formulas(env)
    if has_known_reward(env):
        return task.batch_reward, task.batch_terminated
    name = env.spec.id if env.spec else ""

    def never(next_obs: Tensor) -> Tensor:
        return torch.zeros_like(next_obs[..., 0], dtype=torch.bool)

    def reacher(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        distance, effort = vector_norm(next_obs[..., 8:10], dim=-1), action.square().sum(-1)
        return -(task._reward_dist_weight * distance + task._reward_control_weight * effort)

    def pusher(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        tip, thing, goal = next_obs[..., 14:17], next_obs[..., 17:20], next_obs[..., 20:23]
        near, far, effort = vector_norm(thing - tip, dim=-1), vector_norm(thing - goal, dim=-1), action.square().sum(-1)
        cost = task._reward_near_weight * near + task._reward_dist_weight * far
        return -(cost + task._reward_control_weight * effort)

    def fallen(next_obs: Tensor) -> Tensor:
        return ~(next_obs[..., 1].abs() <= 0.2)  # nor is what is not a number upright

    if name in ("HalfCheetah-v5", "Swimmer-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5"):
        return locomotion_formulas(task, POSITIONS[name])
    if name in ("Reacher-v5", "Pusher-v5"):
        return {"Reacher-v5": reacher, "Pusher-v5": pusher}[name], never
    if name == "InvertedPendulum-v5":
        return (lambda obs, action, next_obs: (~fallen(next_obs)).to(obs)), fallen
    return None  # Humanoid-v5 among them: its reward needs the centre of mass, which is not in the observation


def chosen_formulas(args: Args, env: gym.Env[Any, Any]) -> tuple[RewardFn, TerminatedFn] | None:
    """Known reward and termination, or None where the model has to learn them."""
    formulas = known_formulas(env) if args.reward != "learned" else None
    require(formulas is not None or args.reward != "known", f"--reward known: no formula for {args.env_id} is known")
    return formulas


# ----------------------------------------------------------------------------------------------------------- data


COLUMNS = ("obs", "action", "next_obs", "reward", "terminated", "episode")


class ReplayBuffer:
    """Transitions in preallocated tensors on the training device; when it is full the oldest are overwritten."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.obs = torch.zeros(capacity, obs_dim, device=device)
        self.action = torch.zeros(capacity, action_dim, device=device)
        self.next_obs = torch.zeros(capacity, obs_dim, device=device)
        self.reward = torch.zeros(capacity, device=device)
        self.terminated = torch.zeros(capacity, device=device)  # not truncated: a time limit is no property of a state
        self.episode = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.capacity, self.position, self.size = capacity, 0, 0

    def add(self, **rows: np.ndarray | Tensor) -> None:
        count = len(rows["obs"])
        first = max(0, count - self.capacity)  # of more rows than there is room for the newest are kept
        index = (self.position + torch.arange(first, count)) % self.capacity
        for name, values in rows.items():
            column = getattr(self, name)
            column[index] = torch.as_tensor(values)[first:].to(column)
        self.position = (self.position + count) % self.capacity
        self.size = min(self.size + count, self.capacity)

    def columns(self) -> dict[str, Tensor]:
        return {name: getattr(self, name)[: self.size].clone() for name in COLUMNS}

    def state_dict(self) -> dict[str, Any]:
        return self.columns() | {"position": self.position, "capacity": self.capacity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = 0
        self.add(**{name: state[name] for name in COLUMNS})
        self.position = state["position"]


def check_data(columns: dict[str, Tensor], source: str) -> None:
    for name, column in columns.items():
        bad = (~torch.isfinite(column)).nonzero()
        if len(bad):
            where = f"row {bad[0, 0]}" + (f", dimension {bad[0, 1]}" if bad.shape[1] > 1 else "")
            fail(f"{source}: {name} has {len(bad)} non-finite values, the first in {where}")


def load_data(path: str, env_id: str, obs_dim: int, action_dim: int) -> dict[str, Tensor]:
    """The columns of a file written by `--save-data`, after checking that they are whole and fit this environment."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        columns: dict[str, Tensor] = {name: data[name] for name in COLUMNS}
        count, source = len(columns["obs"]), data["env_id"]
    except Exception as error:  # torch.load raises whatever the bytes happen to trigger
        fail(f"--data {path} is not a file written by --save-data ({type(error).__name__})")
    require(source == env_id, f"--data {path} is from {source}, not from {env_id}")
    require(count > 1, f"--data {path} has {count} transitions, too few to learn from")
    shapes = {"obs": (count, obs_dim), "action": (count, action_dim), "next_obs": (count, obs_dim)}
    for name, column in columns.items():
        shape = shapes.get(name, (count,))
        fits = isinstance(column, Tensor) and column.shape == shape
        require(fits, f"--data {path}: {name} is not a tensor of shape {shape}")
    check_data(columns, f"--data {path}")
    return columns


def first_data(
    args: Args, checkpoint: dict[str, Any] | None, envs: VectorEnv, device: torch.device
) -> tuple[ReplayBuffer, int]:
    """A buffer with room for the whole run, --data in it; and how many transitions there are before the first fit."""
    obs_dim, action_dim = envs.obs.shape[1], gym.spaces.flatdim(envs.action_space)
    data = load_data(args.data, args.env_id, obs_dim, action_dim) if args.data and not checkpoint else None
    first_steps: int = len(data["obs"]) if data else args.initial_steps
    first_steps = checkpoint["progress"]["first_steps"] if checkpoint else first_steps
    capacity = first_steps + args.num_iterations * (args.steps_per_iteration + args.num_envs)
    capacity = max(capacity, checkpoint["buffer"]["capacity"]) if checkpoint else capacity
    buffer = ReplayBuffer(capacity, obs_dim, action_dim, device)
    if data:
        buffer.add(**data)
        envs.episode += int(buffer.episode.max()) + 1
    return buffer, first_steps


def compare_with_paid(formulas: tuple[RewardFn, TerminatedFn] | None, buffer: ReplayBuffer) -> None:
    """Warn when what is planned for is not what the environment pays, or when it ends elsewhere."""
    if formulas:
        rows = slice(0, buffer.size)
        known = formulas[0](buffer.obs[rows], buffer.action[rows], buffer.next_obs[rows])
        error, spread = (known - buffer.reward[rows]).abs().mean().item(), buffer.reward[rows].std().item()
        if not error <= 0.1 * spread + 1e-4:
            words = f"{error:.3g} off what the environment paid, on average over {buffer.size} steps"
            print(f"warning: the reward by formula is {words} (spread {spread:.3g})", file=sys.stderr)
        wrong = (formulas[1](buffer.next_obs[rows]) != buffer.terminated[rows].bool()).sum().item()
        if wrong:
            print(f"warning: the end by formula is wrong in {wrong} of {buffer.size} steps", file=sys.stderr)


class Normaliser(nn.Module):
    """x -> (x - mean) / std. Both are buffers, so that a saved model never goes without them."""

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def fit(self, x: Tensor, constant: float = 1.0) -> None:
        """`constant`: the std that a dimension gets that does not vary; with 0, `inverse` returns its mean."""
        std, mean = torch.std_mean(x.double(), dim=0)  # (N, D); in double, or a large mean would drown a small std
        # What is left of a constant dimension is rounding, and dividing by it would blow that up: leave it alone.
        varies = std > 1e-6 * (1 + mean.abs())
        self.mean.copy_(mean)
        self.std.copy_(torch.where(varies, std, constant))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / torch.where(self.std > 0, self.std, 1.0)

    def inverse(self, y: Tensor) -> Tensor:
        return y * self.std + self.mean


# ------------------------------------------------------------------------------------------------------- networks


class StackedMLP(nn.Module):
    """E independent multilayer perceptrons as one: weights (E, in, out) and one batched product a layer."""

    def __init__(self, ensemble_size: int, sizes: list[int], activation: str):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(sizes):
            bound = fan_in**-0.5  # torch.nn.Linear's own initialisation
            self.weights.append(nn.Parameter(torch.empty(ensemble_size, fan_in, fan_out).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(ensemble_size, 1, fan_out).uniform_(-bound, bound)))
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:  # (E, B, in) -> (E, B, out)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if layer < len(self.weights) - 1:
                x = self.activation(x)
        return x


class DynamicsModel(nn.Module):
    """What deterministic and Gaussian ensembles share: s' = s + Δ, where Δ = mean + std · network(normalised s, a).

    The first `skip` observation dimensions (absolute positions) are predicted but not seen, and `angles`, which turn
    without limit, are seen as sine and cosine. With `learn_reward` the target has two more columns: the reward,
    normalised like Δs, and whether the step terminated, as a logit.
    """

    outputs_per_target = 1

    def __init__(
        self, obs_dim: int, action_dim: int, ensemble_size: int, num_layers: int, hidden_size: int, activation: str,
        learn_reward: bool, skip: int, angles: Sequence[int] = (),
    ):  # fmt: skip
        super().__init__()
        self.obs_dim, self.action_dim, self.ensemble_size = obs_dim, action_dim, ensemble_size
        self.learn_reward, self.skip, self.angles = learn_reward, skip, list(angles)
        self.seen = [dim for dim in range(skip, obs_dim) if dim not in self.angles]
        self.num_targets = obs_dim + learn_reward
        num_inputs = len(self.seen) + 2 * len(self.angles) + action_dim
        num_outputs = self.num_targets * self.outputs_per_target + learn_reward
        self.input_normaliser, self.target_normaliser = Normaliser(num_inputs), Normaliser(self.num_targets)
        self.mlp = StackedMLP(ensemble_size, [num_inputs, *[hidden_size] * num_layers, num_outputs], activation)

    def inputs(self, obs: Tensor, action: Tensor) -> Tensor:
        """What the network sees, not yet normalised: after a somersault an angle has changed, the body has not."""
        if not self.angles:
            return torch.cat([obs[..., self.skip :], action], dim=-1)
        angle = obs[..., self.angles]
        return torch.cat([obs[..., self.seen], angle.sin(), angle.cos(), action], dim=-1)

    def regression_data(self, buffer: ReplayBuffer, rows: Tensor, fit: bool = False) -> tuple[Tensor, Tensor]:
        """Inputs x (N, in) and targets y (N, out) of these rows, normalised once per fit rather than once per batch."""
        obs, action, next_obs = buffer.obs[rows], buffer.action[rows], buffer.next_obs[rows]
        x, y = self.inputs(obs, action), next_obs - obs
        if self.learn_reward:
            y = torch.cat([y, buffer.reward[rows, None]], dim=1)
        if fit:
            self.input_normaliser.fit(x)
            self.target_normaliser.fit(y, constant=0.0)  # what has never moved is predicted to stay: a goal, say
        x, y = self.input_normaliser(x), self.target_normaliser(y)
        return x, torch.cat([y, buffer.terminated[rows, None]], dim=1) if self.learn_reward else y

    def regression_loss(self, output: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def loss(self, x: Tensor, y: Tensor) -> Tensor:  # (E, B, in), (E, B, out) -> (E,)
        output = self.mlp(x).float()
        loss = self.regression_loss(output, y[..., : self.num_targets])
        if self.learn_reward:
            entropy = F.binary_cross_entropy_with_logits(output[..., -1], y[..., -1], reduction="none")
            loss = loss + entropy.mean(dim=1)
        return loss

    def predict(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(E, B, D), (E, B, A) -> mean next_obs (E, B, D); reward and termination probability (E, B) if learned."""
        x = self.input_normaliser(self.inputs(obs, action))
        output = self.mlp(x.to(self.mlp.weights[0].dtype)).float()  # a planner may keep the weights in bfloat16
        change = self.target_normaliser.inverse(output[..., : self.num_targets])
        next_obs = obs + change[..., : self.obs_dim]
        return (next_obs, change[..., -1], output[..., -1].sigmoid()) if self.learn_reward else (next_obs, None, None)


class Ensemble(DynamicsModel):
    """Deterministic members, trained by the squared error of the normalised Δ."""

    def regression_loss(self, output: Tensor, target: Tensor) -> Tensor:  # (E, B, out), (E, B, targets) -> (E,)
        return (output[..., : self.num_targets] - target).square().mean(dim=(1, 2))


class Value(nn.Module):
    """V(s) of equation 4, as V = (mean + std · network(normalised s)) / (1 - γ) with the reward's mean and std.

    Kept within what rewards as large or as small as any that was seen would sum to: where an episode was cut short, V
    learns from a state that it never learns about, and could talk itself up. There are num_values of them, which differ
    in how they began and in the batches that they saw.
    """

    lowest: Tensor
    highest: Tensor

    def __init__(self, model: DynamicsModel, num_values: int, hidden_size: int, activation: str, gamma: float):
        super().__init__()
        self.see, self.gamma = model.inputs, gamma
        num_inputs = model.mlp.weights[0].shape[1] - model.action_dim
        self.input_normaliser, self.reward_normaliser = Normaliser(num_inputs), Normaliser(1)
        self.register_buffer("lowest", torch.zeros(()))
        self.register_buffer("highest", torch.zeros(()))
        self.shape = (num_values, [num_inputs, hidden_size, hidden_size, 1], activation)
        self.mlp = StackedMLP(*self.shape)
        self.slow = copy.deepcopy(self.mlp)  # V̄: its weights are the running mean; targets and plans use this one

    @torch.no_grad()
    def begin_anew(self, buffer: ReplayBuffer) -> None:
        """Units and range of what the buffer holds, and a network that expects the mean reward for ever, or nearly."""
        obs, reward = buffer.obs[: buffer.size], buffer.reward[: buffer.size]
        self.input_normaliser.fit(self.see(obs, obs[:, :0]))
        self.reward_normaliser.fit(reward[:, None])
        self.lowest.copy_(reward.min().clamp(max=0) / (1 - self.gamma))  # an episode that has ended earns 0
        self.highest.copy_(reward.max().clamp(min=0) / (1 - self.gamma))
        fresh = StackedMLP(*self.shape).state_dict()
        self.mlp.load_state_dict(fresh)
        self.slow.load_state_dict(fresh)

    def data(self, buffer: ReplayBuffer) -> dict[str, Tensor]:
        """The whole buffer as the network sees it."""
        rows = buffer.columns()
        obs, next_obs = (self.see(rows[name], rows[name][:, :0]) for name in ("obs", "next_obs"))
        data = {"obs": self.input_normaliser(obs), "next_obs": self.input_normaliser(next_obs)}
        return data | {"reward": rows["reward"][:, None], "goes_on": 1 - rows["terminated"][:, None]}

    def loss(self, obs: Tensor, next_obs: Tensor, reward: Tensor, goes_on: Tensor) -> Tensor:  # (V, N, ..) each
        with torch.no_grad():
            target = reward + self.gamma * goes_on * self.inverse(self.slow(next_obs))
            target = self.reward_normaliser((1 - self.gamma) * target)
        return (self.mlp(obs) - target).square().mean()

    def inverse(self, output: Tensor) -> Tensor:
        return (self.reward_normaliser.inverse(output) / (1 - self.gamma)).clamp(self.lowest, self.highest)

    def forward(self, obs: Tensor) -> Tensor:  # (.., D) -> (..)
        x = self.input_normaliser(self.see(obs, obs[..., :0]))
        every = self.inverse(self.slow(x.reshape(1, -1, x.shape[-1]).expand(len(self.slow.weights[0]), -1, -1)))
        return every.amin(dim=0).reshape(obs.shape[:-1])


# ------------------------------------------------------------------------------------------------------ algorithm


def make_optimizer(model: DynamicsModel, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Adam; the weights of the layers decay, biases and log-variance bounds do not."""
    weights = [*model.mlp.weights]
    others = [parameter for name, parameter in model.named_parameters() if not name.startswith("mlp.weights")]
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": weight_decay}, {"params": others}]
    return torch.optim.Adam(groups, learning_rate, fused=True)


def train_step(
    model: DynamicsModel, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, batch_size: int, input_noise: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """One gradient step of every member on its own batch from x (N, in) and y (N, out); returns the losses (E,)."""
    index = torch.randint(len(x), (model.ensemble_size, batch_size), device=x.device)
    batch = x[index] + input_noise * torch.randn(*index.shape, x.shape[1], device=x.device)
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        loss = model.loss(batch, y[index])
    optimizer.zero_grad()
    loss.sum().backward()  # the members share no weights: the gradient of the sum is each one's own
    optimizer.step()
    return loss.detach()


def check_finite(losses: dict[str, Tensor], model: DynamicsModel, step: int, run_dir: Path) -> None:
    """A model that has diverged is of no use, and must not overwrite its last good checkpoint."""
    tensors = losses | dict(model.named_parameters())
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        checkpoint = run_dir / "checkpoint.pt"
        last = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"
        sys.exit(f"non-finite {bad[0]} at or before gradient step {step}; {last}; try a smaller --learning-rate")


def value_step(value: Value, optimizer: torch.optim.Optimizer, data: dict[str, Tensor], batch_size: int) -> Tensor:
    """One gradient step towards equation 4; the running mean follows. Returns the loss."""
    index = torch.randint(len(data["obs"]), (len(value.mlp.weights[0]), batch_size), device=data["obs"].device)
    loss = value.loss(**{name: column[index] for name, column in data.items()})
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for slow, weight in zip(value.slow.parameters(), value.mlp.parameters(), strict=True):
            slow.lerp_(weight, 0.1)
    return loss.detach()


CACHED_STATES = 4_096  # a CPU rolls out so many at a time: their activations stay in its cache


# Differs: the state at the end of the plan has a value, and an environment may have a member of its own
def imagined_returns(
    model: DynamicsModel, formulas: tuple[RewardFn, TerminatedFn] | None, gamma: float, obs: Tensor, candidates: Tensor,
    value: Value | None = None, own: bool = False,
) -> Tensor:  # fmt: skip
    """Equation 2: roll every candidate (B, K, H, A) out from obs (B, D) in every member; mean returns (B, K).

    With `own` the model has B members, and the candidates of an environment are rolled out in its own member alone.
    """
    B, K, H, A = candidates.shape
    E = model.ensemble_size
    starts, plans = obs[:, None].expand(B, K, -1), candidates
    if not own:
        starts, plans = starts.reshape(B * K, -1).expand(E, -1, -1), plans.reshape(B * K, H, A).expand(E, -1, -1, -1)
    group = plans.shape[1] if obs.is_cuda or torch.compiler.is_compiling() else max(1, CACHED_STATES // E)
    found = []
    for state, plan in zip(starts.split(group, dim=1), plans.split(group, dim=1), strict=True):
        returns, alive = torch.zeros(state.shape[:2], device=obs.device), torch.ones(state.shape[:2], device=obs.device)
        for t in range(H):
            action = plan[:, :, t]  # (E, N, A)
            next_state, reward, over = model.predict(state, action)
            if formulas:
                reward, over = formulas[0](state, action, next_state), formulas[1](next_state)
            assert reward is not None and over is not None
            reward = torch.where(alive > 0, alive * reward, 0)  # what blows up after the end is no matter
            returns = returns + gamma**t * reward
            alive = alive * (1 - over.float())  # a known end is a bool, a learned one a probability
            state = next_state
        if value:
            returns = returns + gamma**H * torch.where(alive > 0, alive * value(state), 0)
        found.append(returns)
    every = torch.cat(found, dim=1)  # (B, K) if each has its own, else (E, B * K)
    return every if own else every.mean(dim=0).view(B, K)


@torch.no_grad()
def take_members(mine: DynamicsModel, model: DynamicsModel, members: Tensor) -> None:
    """Network b of `mine` becomes member members[b] of the model."""
    for weight, source in zip(mine.mlp.parameters(), model.mlp.parameters(), strict=True):
        weight.copy_(source[members])


def own_member(episode: np.ndarray, ensemble_size: int) -> Tensor:
    """Each environment its own, another one in its next episode (those of i: i, i + num_envs, ..; later with data)."""
    first = np.arange(len(episode))
    return torch.from_numpy(((episode - first) // len(episode) + first) % ensemble_size)


def rank_last(returns: Tensor) -> Tensor:
    """A model can blow up far from its data; what it then promises (NaN, infinity) must not win."""
    return torch.where(returns.isfinite(), returns, -torch.inf)


def coloured_filter(horizon: int, beta: float, device: torch.device) -> Tensor:
    """F (H, H) such that white noise (.., H) @ F has period H, a power spectrum ~ frequency^-beta and unit variance."""
    frequency = torch.fft.rfftfreq(horizon, device=device).clamp(min=1 / horizon)  # the constant as the slowest wave
    circular = torch.fft.irfft(torch.fft.rfft(torch.eye(horizon, device=device)) * frequency ** (-beta / 2), n=horizon)
    return circular / circular[0].norm()


def truncated(noise: Tensor) -> Tensor:
    """A standard normal variable as one that is cut off at ±2, the order of its values kept: Φ'⁻¹(Φ(ε))."""
    tail = 0.0227501319  # Φ(-2)
    return torch.special.ndtri(tail + (1 - 2 * tail) * torch.special.ndtr(noise))


def shift(plans: Tensor) -> Tensor:
    """One step on: (.., H, A) without its first action, the last one repeated."""
    return torch.cat([plans[..., 1:, :], plans[..., -1:, :]], dim=-2)


def cem(
    imagine: Imagine, obs: Tensor, mean: Tensor, kept: Tensor, low: Tensor, high: Tensor, args: Args
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Equations 1 to 3 for B states at once. Starts from `mean` (B, H, A), with `kept` (B, n, H, A) competing.

    Returns the action to execute (B, A), the promised return (B,), the final mean (B, H, A), the elites, best first
    (B, J, H, A), and their standard deviation in half-ranges.
    """
    B, H, A = mean.shape
    half = (high - low) / 2
    # The σ² that equation 3 starts from; that of a uniform distribution is a third of the half-range squared.
    var = (half * (3**-0.5 if args.start == "uniform" else args.start_std)).square().expand(B, H, A)
    noise_filter = coloured_filter(H, args.noise_beta, obs.device)
    for iteration in range(args.cem_iterations):
        K = max(int(args.num_candidates / args.candidate_decay**iteration), 2 * args.num_elites)
        if iteration == 0 and args.start == "uniform":
            draws = low + (high - low) * torch.rand(B, K, H, A, device=obs.device)
        else:
            noise = (torch.randn(B, K, A, H, device=obs.device) @ noise_filter).transpose(-1, -2)  # (B, K, H, A)
            std = var.sqrt()
            if args.bounded_sampling:
                std, noise = torch.minimum(std, torch.minimum(mean - low, high - mean) / 2), truncated(noise)
            draws = mean[:, None] + std[:, None] * noise  # (B, K, H, A)
        last = args.mean_candidate and iteration == args.cem_iterations - 1
        draws = torch.cat([draws, kept, *([mean[:, None]] if last else [])], dim=1)
        top = rank_last(imagine(obs, draws.clamp(low, high))).topk(args.num_elites, dim=1)  # (B, J), best first
        elites = draws.gather(1, top.indices[..., None, None].expand(-1, -1, H, A))  # (B, J, H, A)
        new_var, new_mean = torch.var_mean(elites, dim=1)
        mean = (args.cem_alpha * new_mean + (1 - args.cem_alpha) * mean).clamp(low, high)
        var = args.cem_alpha * new_var + (1 - args.cem_alpha) * var
        kept = elites[:, : round(args.keep_elites * args.num_elites)]
    action, promise = (mean, top.values.mean(dim=1)) if args.execute == "mean" else (elites[:, 0], top.values[:, 0])
    action = action.clamp(low, high)
    return action[:, 0], promise, mean, elites, (new_var.sqrt() / half.clamp(min=1e-9)).mean()


# Differs: CEM remembers its plan and its elites from one step to the next
class Planner:
    """`cem` with its settings and its memory, for a fixed number of environments."""

    def __init__(self, args: Args, imagine: Imagine, low: Tensor, high: Tensor, num_envs: int):
        self.args, self.imagine, self.low, self.high = args, imagine, low, high
        self.search = compiled(cem, low.device) if args.compile else cem
        self.middle = ((low + high) / 2).expand(args.horizon, -1)  # (H, A): the plan of someone who knows nothing
        self.mean = self.middle.repeat(num_envs, 1, 1)  # (B, H, A)
        self.kept = self.middle.repeat(num_envs, round(args.keep_elites * args.num_elites), 1, 1)  # (B, n, H, A)
        self.spread, self.plans = torch.zeros((), device=low.device), 0

    def reset(self, ended: np.ndarray | Tensor) -> None:
        """Forget what was planned for the environments whose episode has ended, (B,)."""
        if ended.any():
            self.mean[torch.as_tensor(ended)] = self.middle
            self.kept[torch.as_tensor(ended)] = self.middle  # these compete until there are elites

    @torch.no_grad()
    def __call__(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Actions for obs (B, D), and the return that their plans promise: (B, A), (B,)."""
        assert len(obs) == len(self.mean), f"{len(obs)} observations for a planner of {len(self.mean)} environments"
        found = self.search(self.imagine, obs, self.mean, self.kept, self.low, self.high, self.args)
        action, promise, mean, elites, spread = (part.clone() for part in found)  # a CUDA graph overwrites its outputs
        if self.args.shift_plan:
            self.mean = shift(mean)
            if self.args.bounded_sampling:  # at a bound no spread is left: a copy would stay there for ever
                self.mean[:, -1] = self.middle[-1]
        self.kept = shift(elites[:, : self.kept.shape[1]])
        self.spread, self.plans = self.spread + spread, self.plans + 1
        return action, promise

    def diagnostics(self) -> dict[str, float]:
        return {"eval/elite_std": (self.spread / self.plans).item()}

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.kept = state["mean"].to(self.mean), state["kept"].to(self.kept)


def simulated_returns(
    envs: VectorEnv, formulas: tuple[RewardFn, TerminatedFn], gamma: float, obs: Tensor, candidates: Tensor,
    value: Value | None = None,
) -> Tensor:  # fmt: skip
    """Equation 2 with MuJoCo in place of the model: candidates (B, K, H, A) -> returns (B, K)."""
    from mujoco import MjData, mj_getState, mj_stateSize, mjtState, rollout

    returns = []
    for env, plans in zip(envs.envs, candidates, strict=True):
        task: Any = env.unwrapped
        K, H, _ = plans.shape
        state = np.empty(mj_stateSize(task.model, mjtState.mjSTATE_FULLPHYSICS))
        mj_getState(task.model, task.data, state, mjtState.mjSTATE_FULLPHYSICS)
        control = plans.repeat_interleave(task.frame_skip, dim=1).double().cpu().numpy()
        workers = [MjData(task.model) for _ in range(torch.get_num_threads())]
        states, _ = rollout.rollout(task.model, workers, np.tile(state, (K, 1)), control)  # (K, H * frame_skip, state)
        here = np.tile(state, (K, 1, 1))
        states = np.concatenate([here, states[:, task.frame_skip - 1 :: task.frame_skip]], axis=1)  # (K, H + 1, state)
        # The state is time, joint positions and velocities. What else is observed counts as zero: of the rewards here
        # only Ant's reads it, for the small cost of contact.
        seen = torch.zeros(K, H + 1, obs.shape[1])
        size = task.model.nq + task.model.nv
        seen[..., :size] = torch.from_numpy(states[..., 1 : 1 + size])
        if type(task).__name__.startswith(("Hopper", "Walker2d")):
            seen[..., task.model.nq : size].clamp_(-10, 10)  # as they are observed
        reward, over = formulas[0](seen[:, :-1], plans.cpu(), seen[:, 1:]), formulas[1](seen[:, 1:])  # (K, H)
        alive = torch.cat([torch.ones(K, 1), (~over).float().cumprod(dim=1)], dim=1)
        found = (gamma ** torch.arange(H) * alive[:, :-1] * reward).sum(dim=1)
        if value:
            found = found + gamma**H * alive[:, -1] * value(seen[:, -1].to(obs)).cpu()
        returns.append(found)
    return torch.stack(returns).to(obs)


def can_simulate(env: gym.Env[Any, Any], reward_fn: RewardFn) -> bool:
    """Does the observation begin with joint positions and velocities, as they are, is the reward a function of these,
    and are actions the motors' own signals? Ten random steps tell."""
    task: Any = env.unwrapped
    if not all(hasattr(task, name) for name in ("model", "data", "frame_skip", "_get_obs")):
        return False
    size = task.model.nq + task.model.nv
    obs, _ = env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(10):
        action = env.action_space.sample()
        next_obs, paid, *_ = env.step(action)
        state = np.concatenate([task.data.qpos, task.data.qvel])
        rows = [np.concatenate([each[:size], 0 * each[size:]]) for each in (obs, next_obs)]
        known = reward_fn(*(torch.as_tensor(each).float() for each in (rows[0], action, rows[1]))).item()
        same = np.allclose(next_obs[:size].clip(-10, 10), state.clip(-10, 10))  # some tasks clip velocities
        same &= np.shape(task.data.ctrl) == action.shape and np.allclose(task.data.ctrl, action, atol=1e-6)
        if not same or abs(known - float(paid)) > 0.1:  # contacts cost Ant a little
            return False
        obs = next_obs
    return True


def check_true_dynamics(args: Args, envs: VectorEnv, formulas: tuple[RewardFn, TerminatedFn] | None) -> None:
    task: Any = envs.envs[0].unwrapped
    words = "--true-dynamics needs a MuJoCo task with known reward whose observation is its joint state"
    require(args.reward != "learned", "--true-dynamics needs the known reward, not --reward learned")
    probe = make_env(args.env_id)
    able = formulas is not None and can_simulate(probe, formulas[0])
    probe.close()
    require(able, f"{words}; {args.env_id} is none")
    more = envs.obs.shape[1] > task.model.nq + task.model.nv and args.terminal_value
    require(not more, f"--true-dynamics of {args.env_id} needs --no-terminal-value: V has seen more than joints")


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The whole function as one program; on a GPU as CUDA graphs, with fresh random numbers at each replay."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        warnings.warn("--compile needs a C++ compiler, going on without", stacklevel=2)
        return function
    if device.type == "cuda":
        return torch.compile(function, mode="reduce-overhead")
    # PyTorch's own random numbers, the same as without --compile: a compiled loop would draw them one at a time.
    return torch.compile(function, options={"fallback_random": True})


def faster_dtype(device: torch.device) -> str:
    """Products in bfloat16 are up to four times faster where the hardware has them, and slower where it has not."""
    seconds = {}
    for name in ("float32", "bfloat16", "float32", "bfloat16"):  # the first round warms up
        a = torch.ones(3, 1000, 256, dtype=getattr(torch, name), device=device)
        b = torch.ones(3, 256, 256, dtype=getattr(torch, name), device=device)
        begin = time.perf_counter()
        for _ in range(10):
            (a @ b)[0, 0, 0].item()
        seconds[name] = time.perf_counter() - begin
    return min(seconds, key=lambda name: seconds[name])


@torch.no_grad()
def refresh(fast: DynamicsModel, model: DynamicsModel) -> None:
    """The model's weights, in the precision of the planner's copy.

    tanh(z) = 2σ(2z) - 1, and σ costs a CPU a third of tanh, which is a third of a plan: the copy of a tanh network has
    its weights scaled and shifted so that σ takes tanh's place: the same function, up to rounding.
    """
    fast.load_state_dict(model.state_dict())
    if model.mlp.activation is torch.tanh:
        fast.mlp.activation = torch.sigmoid
        for layer, (weight, bias) in enumerate(zip(model.mlp.weights, model.mlp.biases, strict=True)):
            if layer > 0:  # what comes in is 2σ - 1
                bias, weight = bias - weight.sum(dim=1, keepdim=True), 2 * weight
            if layer < len(model.mlp.weights) - 1:  # what goes out goes into σ(2z)
                bias, weight = 2 * bias, 2 * weight
            fast.mlp.weights[layer].copy_(weight)
            fast.mlp.biases[layer].copy_(bias)


def planning_copy(model: DynamicsModel, dtype: str) -> DynamicsModel:
    """The same model for the planner, with its weights in another precision."""
    fast = copy.deepcopy(model).requires_grad_(False)
    fast.mlp.to(getattr(torch, dtype))
    refresh(fast, model)
    return fast


# ----------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def novelty(model: DynamicsModel, buffer: ReplayBuffer, first: int) -> dict[str, float]:
    """How well the model predicts the transitions collected since it was fitted (from row `first` on)."""
    x, y = model.regression_data(buffer, torch.arange(first, buffer.size, device=buffer.obs.device))
    output = model.mlp(x.expand(model.ensemble_size, -1, -1))[..., : model.obs_dim]
    error = (output - y[:, : model.obs_dim]).square().mean().item()
    return {"model/holdout_mse": error, "model/disagreement": output.std(dim=0, correction=0).mean().item()}


# Differs: plans promise the value of the state in which they end, too
def promise_kept(
    promised: np.ndarray, rewards: np.ndarray, alive: np.ndarray, terminated: np.ndarray, values: np.ndarray, args: Args
) -> dict[str, float]:
    """What plans promised (T, B) against the reward of the next H steps and the value of the state that they led to
    (values (T, B) are those after each step), wherever the episode lasted that long."""
    horizon = min(args.horizon, len(rewards))
    discounts = args.gamma ** np.arange(horizon)
    later = np.zeros((horizon - 1, rewards.shape[1]))  # after the last step there is nothing
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([rewards, later]), horizon, axis=0)  # (T, B, H)
    realised = windows @ discounts  # (T, B)
    ends = np.where(np.logical_or.accumulate(terminated, axis=0), 0, values)
    realised += args.gamma**horizon * np.concatenate([ends, later])[horizon - 1 :]
    # A plan that the time limit cut short was not given the time to keep its promise; one that fell was.
    lived = np.concatenate([alive, later > 0])[horizon - 1 :]
    whole = alive & (lived | terminated.any(axis=0))
    if not whole.any():
        return {}
    return {
        "eval/predicted_return": promised[whole].mean().item(),
        "eval/realised_return": realised[whole].mean().item(),
    }


def write_video(frames: list[Any], path: Path, fps: int) -> None:
    from moviepy.video.io.ImageSequenceClip import ImageSequenceClip

    path.parent.mkdir(parents=True, exist_ok=True)
    ImageSequenceClip(frames, fps=fps).write_videofile(str(path), logger=None)


def describe(metrics: dict[str, float], returns: list[float]) -> str:
    mean, std = metrics["eval/episodic_return"], metrics["eval/episodic_return_std"]
    each = ", ".join(f"{value:.0f}" for value in returns[:20]) + ", .." * (len(returns) > 20)
    return f"return {mean:.1f} ± {std:.1f} ({each})" if len(returns) > 1 else f"return {mean:.1f}"


def describe_plans(metrics: dict[str, float]) -> str:
    if "eval/predicted_return" not in metrics:
        return ""  # no plan's horizon was lived
    return f"; plans promised {metrics['eval/predicted_return']:.2f}, got {metrics['eval/realised_return']:.2f}"


# Differs: the value of what was reached belongs to what was promised
def evaluate(
    args: Args,
    make_planner: Callable[[VectorEnv], Planner],
    episodes: int,
    device: torch.device,
    video: Path | None,
    leave: Callable[[], None],
    value: Value | None,
) -> tuple[dict[str, float], list[float]]:
    """Whole episodes, side by side in one planning call a step; the same seeds each time, none of them trained on."""
    seed = args.seed + 1_000_000
    kwargs = {"max_episode_steps": args.max_episode_steps} | ({"render_mode": "rgb_array"} if video else {})
    envs = VectorEnv(args.env_id, episodes, seed, **kwargs)
    planner = make_planner(envs)
    frames, promised, rewards, alive, terminated, values = [], [], [], [np.ones(episodes, bool)], [], []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while alive[-1].any():
            leave()
            action, promise = planner(torch.from_numpy(envs.obs).to(device))
            if video and alive[-1][0]:
                frames.append(envs.envs[0].render())
            episode = envs.episode
            next_obs, reward, over = envs.step(action.cpu().numpy())
            planner.reset(envs.episode != episode)
            promised.append(promise.cpu().numpy())
            rewards.append(np.where(alive[-1], reward, 0))  # after its first episode it is only kept company
            terminated.append(over & alive[-1])
            alive.append(alive[-1] & (envs.episode == episode))
            with torch.no_grad():
                values.append(value(torch.from_numpy(next_obs).to(device)).cpu().numpy() if value else 0 * reward)
    for env in envs.envs:
        env.close()
    if video:
        write_video(frames, video, envs.envs[0].metadata.get("render_fps", 30))
    returns, lengths = np.sum(rewards, axis=0), np.sum(alive[:-1], axis=0)
    metrics = {"eval/episodic_return": returns.mean().item(), "eval/episodic_length": lengths.mean().item()}
    metrics["eval/episodic_return_std"] = returns.std(ddof=1).item() if episodes > 1 else 0.0
    arrays = (np.array(promised), np.array(rewards), np.array(alive[:-1]), np.array(terminated), np.array(values))
    return metrics | planner.diagnostics() | promise_kept(*arrays, args), returns.tolist()


# ----------------------------------------------------------------------------------------- logging and checkpoints


def save_file(path: Path, contents: dict[str, Any]) -> None:
    """Atomic: a process killed halfway leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(contents, temporary)
    os.replace(temporary, path)


def save_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


class Logger:
    """The run folder: args.json, TensorBoard events and metrics.csv. What was logged after `step` (the checkpoint that
    a resumed run starts from) is dropped, so that the curves look as if nothing had happened."""

    def __init__(self, run_dir: Path, args: Args, step: int | None = None):
        self.run_dir, self.path = run_dir, run_dir / "metrics.csv"
        self.history: dict[str, list[tuple[int, float]]] = defaultdict(list)
        if args.track:
            import wandb

            wandb.init(
                project=args.wandb_project_name, entity=args.wandb_entity, config=asdict(args), name=run_dir.name,
                id=run_dir.name, resume="allow", sync_tensorboard=True,
            )  # fmt: skip
        if step is not None and self.path.exists():
            whole = self.path.read_text().rpartition("\n")[0]  # a killed process may have torn the last row
            for row in list(csv.reader(whole.splitlines()))[1:]:
                if int(row[0]) <= step:
                    self.history[row[1]].append((int(row[0]), float(row[2])))
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "result.json").unlink(missing_ok=True)  # it marks a finished run, which this is not any more
        save_text(run_dir / "args.json", json.dumps(asdict(args) | {"resume": None}, indent=2))
        kept = [(at, f"{tag},{value!r}") for tag, points in self.history.items() for at, value in points]
        rows = [f"{at},{rest}\n" for at, rest in sorted(kept, key=lambda row: row[0])]
        save_text(self.path, "step,tag,value\n" + "".join(rows))
        self.writer = SummaryWriter(str(run_dir), purge_step=None if step is None else step + 1)

    def scalars(self, values: dict[str, float], step: int) -> None:
        with self.path.open("a") as file:
            for tag, value in values.items():
                if not self.history[tag] or self.history[tag][-1][0] < step:  # else logged before it was resumed
                    self.history[tag].append((step, value))
                    self.writer.add_scalar(tag, value, step)
                    file.write(f"{step},{tag},{value!r}\n")

    def close(self, result: dict[str, float]) -> None:
        """result.json marks the run as finished."""
        self.writer.close()
        save_text(self.run_dir / "result.json", json.dumps(result, indent=2))
        print(f"{self.run_dir}: finished; its curves: tensorboard --logdir {self.run_dir.parent}")


class Checkpointer:
    """A run in one file: `parts` (whatever has a state_dict), `progress` (plain numbers and lists) and PyTorch's random
    generators. SIGINT and SIGTERM only raise a flag, so that the loop can save before it leaves."""

    def __init__(self, run_dir: Path, progress: dict[str, Any], parts: dict[str, Any]):
        self.run_dir, self.progress, self.parts = run_dir, progress, parts
        self.signal, self.started = 0, time.perf_counter()

    def __enter__(self) -> "Checkpointer":
        self.previous = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt  # asked twice: leave at once
        self.signal = number
        print("\nstopping when all up to here can be saved; asked again, at once", file=sys.stderr)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        try:
            for name, part in self.parts.items():
                part.load_state_dict(checkpoint[name])
            self.progress.update(checkpoint["progress"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            fail(f"{self.run_dir}: its checkpoint does not fit its settings ({error})")
        torch.set_rng_state(checkpoint["rng"])
        if torch.cuda.is_available() and len(checkpoint["cuda_rng"]):
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])

    def save(self) -> None:
        now = time.perf_counter()
        self.progress["seconds"] += now - self.started  # over all sessions of a resumed run
        self.started = now
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"script": SCRIPT, "progress": self.progress, "rng": torch.get_rng_state()}
        state |= {"cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0)}
        save_file(self.run_dir / "checkpoint.pt", state)

    def step(self, due: bool) -> None:
        """Call after every step, with everything of that step done."""
        if due or self.signal:
            self.save()
        self.leave()

    def leave(self) -> None:
        """Go if a signal asked for it; for stretches that a resumed run begins anew (an evaluation)."""
        if self.signal:
            again = " --eval-only" if (self.run_dir / "result.json").exists() else ""  # it had finished
            print(f"\nstopped; continue with: python {sys.argv[0]} --resume {self.run_dir}{again}", file=sys.stderr)
            sys.exit(128 + self.signal)


# What may be given anew when a run is resumed: nothing that has shaped the data or the weights so far.
MAY_CHANGE = {"resume", "num_threads", "cuda", "track", "wandb_project_name", "wandb_entity", "checkpoint_every"}
MAY_CHANGE |= {"num_iterations", "save_data", "eval_only", "eval_episodes", "capture_video", "compile", "eval_every"}
MAY_CHANGE |= {"interim_episodes"}
# Evaluating changes nothing, and may try another plan with the same model.
MAY_CHANGE_TO_EVALUATE = {"horizon", "num_candidates", "cem_iterations", "num_elites", "cem_alpha", "start"}
MAY_CHANGE_TO_EVALUATE |= {"start_std", "shift_plan", "keep_elites", "noise_beta", "candidate_decay", "mean_candidate"}
MAY_CHANGE_TO_EVALUATE |= {"bounded_sampling", "execute", "true_dynamics", "terminal_value", "planner_dtype"}
MAY_CHANGE_TO_EVALUATE |= {"max_episode_steps"}


def load_args(run_dir: str) -> Args:
    """The settings of an earlier run."""
    path = Path(run_dir) / "args.json"
    require(path.is_file(), f"--resume {run_dir}: this is no run folder (it has no args.json)")
    try:
        saved: dict[str, Any] = json.loads(path.read_text())
        saved |= {name: tuple(value) for name, value in saved.items() if isinstance(value, list)}
        args = Args(**saved)
    except (AttributeError, TypeError, ValueError):
        fail(f"--resume {run_dir}: its args.json is not from this script")
    missing = ", ".join(field.name for field in fields(Args) if field.name not in saved)
    words = "its args.json is from another script, or from an older version of this one"
    require(not missing, f"--resume {run_dir}: {words}, without {missing}")
    return args


# Differs: an evaluation may plan in another way
def load_checkpoint(args: Args) -> dict[str, Any]:
    """The checkpoint of the run to resume, after checking that it is one and that the settings still fit it."""
    assert args.resume is not None
    saved_args = asdict(load_args(args.resume))
    may_change = MAY_CHANGE | (MAY_CHANGE_TO_EVALUATE if args.eval_only else set())
    for name, value in asdict(args).items():
        was = saved_args[name]
        message = f"--{name.replace('_', '-')} was {was} in {args.resume} and cannot change to {value}"
        require(name in may_change or value == was, message)
    path = Path(args.resume) / "checkpoint.pt"
    require(path.is_file(), f"--resume {args.resume}: it has no checkpoint.pt, start it anew")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        script = checkpoint["script"]
    except Exception as error:  # torch.load raises whatever the bytes happen to trigger
        fail(f"{path} is not a checkpoint ({type(error).__name__}); start the run anew")
    require(script == SCRIPT, f"{path} was written by {script}.py")
    return checkpoint


def new_run_dir(args: Args) -> Path:
    name = f"{args.env_id}__{args.exp_name}__{args.seed}".replace(":", "-").replace("/", "-")
    now = int(time.time())
    while (run_dir := Path(args.log_dir) / f"{name}__{now}").exists():
        now += 1
    return run_dir


def suited(env_id: str, max_episode_steps: int | None) -> Args:
    """The defaults for a task: those of the class suit steps of 50 ms and episodes of 1,000 of them."""
    args, env = Args(env_id=env_id), make_env(env_id)
    dt = getattr(env.unwrapped, "dt", None)  # seconds of a step, in MuJoCo's tasks
    limit = max_episode_steps or (env.spec.max_episode_steps if env.spec else None)
    env.close()
    if isinstance(dt, float) and dt < 0.02:
        args = replace(args, horizon=20, noise_beta=1.0, gamma=0.992, num_values=5, reset_every=625)
    if limit is not None and 0 < limit <= 200:
        args = replace(args, horizon=min(20, limit), noise_beta=2.0, reset_every=None)
    return args


# Differs: the defaults depend on the task
def parse_args(command_line: list[str] | None = None) -> Args:
    """With --resume, the earlier run's settings are the defaults; an evaluation need not write again what it wrote."""
    args = tyro.cli(Args, args=command_line, description=__doc__)
    if args.resume is None:
        defaults = suited(args.env_id, args.max_episode_steps)
        return tyro.cli(Args, args=command_line, default=defaults, description=__doc__)
    saved = load_args(args.resume)
    if getattr(args, "eval_only", False):
        for name in {"save_data", "save_policy", "capture_video"} & {field.name for field in fields(Args)}:
            setattr(saved, name, getattr(Args, name))
    return tyro.cli(Args, args=command_line, default=saved, description=__doc__)


# ----------------------------------------------------------------------------------------------------------- main


# Differs: the value is fitted, too
def fit_model(
    args: Args, model: DynamicsModel, optimizer: torch.optim.Optimizer, value: Value | None,
    value_optimizer: torch.optim.Optimizer | None, buffer: ReplayBuffer, log: Logger, checkpointer: Checkpointer,
) -> None:  # fmt: skip
    """`train_steps` gradient steps of each on everything collected so far."""
    progress, rows = checkpointer.progress, torch.arange(buffer.size, device=buffer.obs.device)
    if progress["fit_step"] == 0:
        check_data(buffer.columns(), args.env_id)
        progress["fitted"] = buffer.size
    x, y = model.regression_data(buffer, rows, fit=progress["fit_step"] == 0)
    if value and value_optimizer and progress["fit_step"] == 0:
        value.begin_anew(buffer)
        value_optimizer.state.clear()
    data = value.data(buffer) if value else {}
    bar = tqdm(total=args.train_steps, initial=progress["fit_step"], desc="fit", unit="step", leave=False)
    begin, dtype = time.perf_counter(), getattr(torch, args.train_dtype)
    while progress["fit_step"] < args.train_steps:
        progress["fit_step"] = step = progress["fit_step"] + 1
        loss = train_step(model, optimizer, x, y, args.batch_size, args.input_noise, dtype)  # (E,)
        value_loss = loss[:0]  # none
        if value and value_optimizer:
            value_loss = value_step(value, value_optimizer, data, args.batch_size)[None]
        save, last = step % args.checkpoint_every == 0, step == args.train_steps
        read = save or last or checkpointer.signal > 0 or step % 50 == 0  # not at every step: it makes a GPU wait
        if read:
            found = {"model/train_loss": loss, "model/value_loss": value_loss}
            found |= {f"V's {name}": weight for name, weight in value.named_parameters()} if value else {}
            check_finite(found, model, step, checkpointer.run_dir)
        if last:
            losses = {"model/train_loss": loss.mean().item()}
            losses |= {"model/value_loss": value_loss.item()} if value else {}
            log.scalars(losses | {"time/train_s": time.perf_counter() - begin}, buffer.size)
        bar.update()
        if read:  # what has not been checked is not saved
            checkpointer.step(due=save)
    bar.close()


def cut_short(envs: VectorEnv, chance: float) -> None:
    """End an episode with this chance at each step: many beginnings are seen, and some long episodes, too."""
    for i, env in enumerate(envs.envs):
        if torch.rand(()).item() < chance and env.actions:
            envs.finished.append((env.episodic_return, len(env.actions)))
            envs.obs[i], _ = env.reset()
            envs.episode[i] += len(envs.envs)


# Differs: the planner acts, and everything is logged against environment steps
def collect(
    args: Args, envs: VectorEnv, buffer: ReplayBuffer, planner: Planner | None, target: int, log: Logger,
    checkpointer: Checkpointer, choose_members: Callable[[np.ndarray], None],
) -> None:  # fmt: skip
    """Act until the buffer holds `target` transitions, by random actions if there is no planner yet."""
    first, plan_times, step_times = buffer.size, [], []
    bar = tqdm(total=target, initial=first, desc="act" if planner else "random", unit="step", leave=False)
    while buffer.size < target:
        begin = time.perf_counter()
        obs, episode = envs.obs, envs.episode
        if planner is None:
            action = envs.random_action()
        else:
            choose_members(episode)
            action = planner(torch.from_numpy(obs).to(buffer.obs.device))[0].cpu().numpy()
            plan_times.append(time.perf_counter() - begin)
        next_obs, reward, terminated = envs.step(action)
        buffer.add(obs=obs, action=action, next_obs=next_obs, reward=reward, terminated=terminated, episode=episode)
        if args.reset_every:
            cut_short(envs, 1 / args.reset_every)
        if planner:
            planner.reset(envs.episode != episode)
        step_times.append(time.perf_counter() - begin)
        if envs.finished:
            mean_return, mean_length = np.mean(envs.finished, axis=0).tolist()
            log.scalars({"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}, buffer.size)
        if log.history["charts/episodic_return"]:
            bar.set_postfix({"return": f"{log.history['charts/episodic_return'][-1][1]:.0f}"}, refresh=False)
        bar.update(args.num_envs)
        checkpointer.step(due=buffer.size % args.checkpoint_every < args.num_envs)
    bar.close()
    if planner and step_times:
        speeds = {"time/plan_ms": 1e3 * float(np.median(plan_times)), "time/env_s": sum(step_times)}
        speeds["charts/SPS"] = args.num_envs / float(np.mean(step_times[10:] or step_times))
        log.scalars(speeds, buffer.size)


def restore(args: Args, checkpointer: Checkpointer, checkpoint: dict[str, Any]) -> None:
    """Go on from a checkpoint that is neither beyond what was asked for nor too early to evaluate."""
    checkpointer.restore(checkpoint)
    progress, run_dir = checkpointer.progress, checkpointer.run_dir
    done = progress["iteration"] + 1
    require(args.num_iterations >= done, f"--num-iterations {args.num_iterations}: {run_dir} has had {done}")
    early = f"--eval-only: {run_dir} was stopped before or in a fit of its model; resume it without"
    require(progress["fit_step"] >= args.train_steps or not args.eval_only, early)
    episodes = load_args(str(run_dir)).eval_episodes
    over = progress["evaluated"] == episodes and done == args.num_iterations
    as_before = args.eval_only or args.eval_episodes == episodes
    idle = f"--eval-episodes {args.eval_episodes}: {run_dir} has finished; evaluate it with --eval-only"
    require(as_before or not over, idle)


def prepare_torch(args: Args) -> torch.device:
    """Seed, determinism and threads; returns the device to compute on."""
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.set_num_threads(args.num_threads or torch.get_num_threads())
    torch.set_flush_denormal(True)  # Adam's averages for units that rest fade below 1e-38, where a CPU is slow
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def main(args: Args) -> dict[str, float]:
    check_args(args)
    checkpoint = load_checkpoint(args) if args.resume else None
    device = prepare_torch(args)
    envs = VectorEnv(args.env_id, args.num_envs, args.seed, max_episode_steps=args.max_episode_steps)
    obs_dim, action_dim = envs.obs.shape[1], gym.spaces.flatdim(envs.action_space)
    low, high = action_bounds(envs, args.env_id, device)
    check_time_limit(envs.envs[0], args.env_id)
    check_horizon(args, envs.envs[0])
    formulas = chosen_formulas(args, envs.envs[0])

    if args.true_dynamics:
        check_true_dynamics(args, envs, formulas)
    learned = checkpoint is None or "value" in checkpoint or not args.terminal_value
    require(learned, f"--terminal-value: {args.resume} has learned no value")
    buffer, first_steps = first_data(args, checkpoint, envs, device)
    angles = free_angles(envs.envs[0], envs.obs[0]) if args.wrap_angles else []
    make_model = partial(
        Ensemble, obs_dim, action_dim, num_layers=args.num_layers, hidden_size=args.hidden_size,
        activation=args.activation, learn_reward=formulas is None, skip=hidden_positions(envs.envs[0]), angles=angles,
    )  # fmt: skip
    model = make_model(ensemble_size=args.ensemble_size).to(device)
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay)
    value = None
    if args.terminal_value:
        value = Value(model, args.num_values, args.hidden_size, args.activation, args.gamma).to(device)
    value_optimizer = torch.optim.Adam(value.mlp.parameters(), args.learning_rate) if value else None

    run_dir = Path(args.resume) if args.resume else new_run_dir(args)
    progress: dict[str, Any] = {"iteration": 0, "fit_step": 0, "evaluated": 0, "seconds": 0.0, "metrics": {}}
    progress |= {"first_steps": first_steps, "fitted": 0, "dtype": args.planner_dtype}
    if args.planner_dtype == "auto":  # measured once: a resumed run goes on with what it began with
        progress["dtype"] = checkpoint["progress"]["dtype"] if checkpoint else faster_dtype(device)
    fast = planning_copy(model, progress["dtype"])
    own_members = args.thompson and not args.true_dynamics
    few = make_model(ensemble_size=args.num_envs).to(device)
    mine = planning_copy(few, progress["dtype"])  # a member for each environment that collects
    mine.input_normaliser, mine.target_normaliser = fast.input_normaliser, fast.target_normaliser

    def choose_members(episode: np.ndarray) -> None:
        if own_members:
            take_members(mine, fast, own_member(episode, args.ensemble_size).to(device))

    def make_planner(envs: VectorEnv, own: bool = False) -> Planner:
        imagine: Imagine = partial(imagined_returns, mine if own else fast, formulas, args.gamma, value=value, own=own)
        if args.true_dynamics and formulas:
            imagine = partial(simulated_returns, envs, formulas, args.gamma, value=value)
        candidates = args.num_candidates * (args.ensemble_size if own else 1)
        return Planner(replace(args, num_candidates=candidates), imagine, low, high, len(envs.envs))

    planner = make_planner(envs, own=own_members)
    parts = {"model": model, "optimizer": optimizer, "buffer": buffer, "envs": envs, "planner": planner}
    parts |= {"value": value, "value_optimizer": value_optimizer} if value else {}
    with Checkpointer(run_dir, progress, parts) as checkpointer:
        if checkpoint:
            restore(args, checkpointer, checkpoint)
        if args.eval_only:
            refresh(fast, model)
            video = run_dir / "videos" / "eval_only.mp4" if args.capture_video else None
            again, returns = evaluate(args, make_planner, args.eval_episodes, device, video, checkpointer.leave, value)
            print(f"{run_dir}: {describe(again, returns)}{describe_plans(again)}")
            return again
        log = Logger(run_dir, args, buffer.size if checkpoint else None)
        source = "known" if formulas else "learned"
        ahead = f"planning {args.horizon} steps ahead (gamma {args.gamma}, noise beta {args.noise_beta})"
        print(f"{run_dir}: reward and termination {source}, device {device}, {ahead} in {progress['dtype']}")
        collect(args, envs, buffer, None, progress["first_steps"], log, checkpointer, choose_members)
        compare_with_paid(formulas, buffer)
        if args.save_data and progress["iteration"] == 0:
            save_file(Path(args.save_data), {"env_id": args.env_id, **buffer.columns()})
        while True:
            iteration, last = progress["iteration"], progress["iteration"] >= args.num_iterations - 1
            fit_model(args, model, optimizer, value, value_optimizer, buffer, log, checkpointer)
            refresh(fast, model)
            collected = iteration * args.steps_per_iteration
            due = last or collected % args.eval_every < args.steps_per_iteration
            episodes = args.eval_episodes if last else args.interim_episodes
            if due and progress["evaluated"] != episodes:  # one in between is not the last one
                checkpointer.save()
                video = run_dir / "videos" / f"{buffer.size}.mp4" if args.capture_video else None
                progress["metrics"], returns = evaluate(
                    args, make_planner, episodes, device, video, checkpointer.leave, value
                )
                log.scalars(progress["metrics"], buffer.size)
                found = describe(progress["metrics"], returns) + describe_plans(progress["metrics"])
                print(f"iteration {iteration}, {buffer.size} steps: {found}", flush=True)
                progress["evaluated"] = episodes
                checkpointer.save()
            if last:
                break
            target = progress["first_steps"] + collected + args.steps_per_iteration
            collect(args, envs, buffer, planner, target, log, checkpointer, choose_members)
            log.scalars(novelty(model, buffer, progress["fitted"]), buffer.size)
            progress.update(iteration=iteration + 1, fit_step=0, evaluated=0)
        if args.save_data:
            save_file(Path(args.save_data), {"env_id": args.env_id, **buffer.columns()})
        checkpointer.save()
    metrics: dict[str, float] = progress["metrics"] | {"minutes": progress["seconds"] / 60}
    log.close(metrics)
    return metrics


if __name__ == "__main__":
    main(parse_args())
