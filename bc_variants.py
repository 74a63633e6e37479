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
"""Behaviour cloning: five policies that differ in one loss function, each with DAgger.

An expert's observations and actions are given; learn π(a|s) from them as in supervised learning. What a policy can
express decides what it makes of an expert who does now this, now that in the same place: the mean of two good actions
may be a bad one. With x the standardised observation and u the action scaled to [-1, 1]:

    mse             u = f(x) = tanh(..)                          Σ (f(x) - u)²                                      (1)
    gaussian        u = tanh(z),  z ~ N(μ(x), σ(x)²)             -log N(atanh u) + Σ log(1 - u²)                    (2)
    gmm             u ~ Σ_k w_k(x) N(μ_k(x), σ_k(x)²)            -log Σ_k w_k N_k(u)                                (3)
    diffusion       u_T ~ N(0, I), then T steps of denoising     Σ (û(x, √ᾱ_t u + √(1-ᾱ_t) ε, t) - u)²              (4)
    autoregressive  u_i ~ one of B bins, given x and b_1..b_i-1  -Σ_i Σ_b share_b(u_i) log p(b | x, b_1 .. b_i-1)   (5)

share_b(u_i) is 1 at the centre of bin b and falls to 0 at those of its neighbours; b_i is a bin drawn by these shares.
f, μ_k and û end in a tanh: experts often act at the bounds, which a tanh reaches without going beyond them. While
training, x is a little blurred (--input-noise); what acts and is measured is a running mean of the weights
(--ema-decay).

mse averages over modes, a gaussian as well, and the other three can keep them apart. Acting takes the best guess: f, or
tanh(μ), or μ_k of the likeliest component, or what some noise is denoised to without adding more (the first noise is
still drawn), or the mean of the likeliest bin and its neighbours. With `--sample` it takes a sample; those of gaussian
and gmm may spread wider than the expert, for their σ stays above 0.3 (before the tanh) and 0.1, and those of
autoregressive are centres of bins.

All of them drift: small errors lead to states in which the expert never was, and there the errors are larger. DAgger
(Ross et al. 2011) asks the expert what it would have done where the policy went:

    data <- episodes of the expert
    for round = 0 .. dagger_rounds:
        train on everything so far, from the last round's weights                      (train_steps gradient steps)
        unless it was the last: roll out; at each step the expert acts with probability dagger_beta^(round + 1)
        data <- data + the states of that, each with the expert's action

Usage:

    python bc_variants.py --variant mse                        # clones experts/HalfCheetah-v5.pt, if it is there
    python bc_variants.py --variant diffusion --num-episodes 5 --dagger-rounds 5
    python bc_variants.py --env-id Hopper-v5 --expert hopper.pt            # written by mbpo_sac.py --save-policy
    python bc_variants.py --env-id HalfCheetah-v5 --minari-id mujoco/halfcheetah/expert-v0
    python bc_variants.py --env-id HalfCheetah-v5 --data demonstrations.pt
    python bc_variants.py --resume RUN_DIR                     # go on exactly where it stopped
    python bc_variants.py --resume RUN_DIR --eval-only         # the evaluation of that run again

An expert is a file written by `mbpo_sac.py --save-policy`, or by CleanRL's SAC (a state dict of its actor, or a tuple
that begins with one; it does not say of which environment: see whether "the expert earns" what it should). `--data` is
one of two kinds of file, all of which is used, whatever --num-episodes is:

    one written by --save-data of the other scripts: all of its actions count as the expert's
    torch.save of a dict of tensors or arrays: `observations` (N, D), `actions` (N, A); if you like `episode` (N,),
        whole numbers (without it all rows are one episode, in order of time, of which the last part is held out) and
        `mean_reward`, the expert's return (without it --expert plays ten episodes)

Without an expert to ask there is no DAgger.

Every logged tag (TensorBoard and metrics.csv; the step is the number of gradient steps over all rounds):

    eval/episodic_return        mean return of the evaluation episodes
    eval/episodic_return_std    their standard deviation (ddof=1)
    eval/episodic_length        their mean length
    eval/expert_fraction        the mean return over the expert's own; 0 where that is not positive, and says nothing
    eval/best_return            the highest mean return so far; a maximum of noisy numbers, and so too high
    losses/train_loss           equation 1 to 5 on 10,000 training transitions at most; no two variants' losses compare
    losses/holdout_loss         the same on held-out transitions (with --stop-after the last point of a fit, like its
                                returns, is of the best weights, to which it goes back)
    losses/action_error         mean of |what the policy does - the expert's action| there, in half-ranges
    charts/SPS                  gradient steps per second, the first ten left out
    charts/transitions          transitions in the data
    time/act_ms                 milliseconds in which the policy acts for all evaluation episodes once, median

Deviations: the policy of DAgger's last round is kept, not the best of all rounds; the expert always acts by its best
guess; observations are standardised by the first round's training data in all rounds of DAgger; Adam goes on from one
round to the next (with --stop-after a round begins with the averaged weights of the lowest held-out loss, and a new
Adam); --weight-decay decays biases, too. An expert's recorded episodes have lengths of their own: with another
--max-episode-steps eval/expert_fraction means nothing. Of diffusion policy there is the denoiser alone: it predicts one
action, not a sequence; and a bin of equation 5 shares its weight with a neighbour, where Metz et al. have one bin.

Papers: Pomerleau 1989 (cloning); Bishop 1994 (mixture density networks); Ho et al. 2020, DDPM, arXiv 2006.11239
(equation 4, here predicting the clean action instead of the noise); Nichol and Dhariwal 2021, arXiv 2102.09672 (the
cosine schedule); Song et al. 2021, DDIM, arXiv 2010.02502 (denoising without added noise); Chi et al. 2023, diffusion
policy, arXiv 2303.04137; Metz et al. 2017, arXiv 1705.05035 (equation 5); Ross, Gordon and Bagnell 2011, DAgger, arXiv
1011.0686.
"""

import copy
import csv
import importlib.util
import itertools
import json
import math
import os
import pickle
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
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
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Activation = Literal["tanh", "relu", "silu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": F.relu, "silu": F.silu}
SCRIPT = Path(__file__).stem


@dataclass
class Args:
    exp_name: str = "bc_variants"
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """seed of every random generator"""
    torch_deterministic: bool = True
    """use PyTorch's deterministic algorithms where there are any"""
    cuda: bool = True
    """use a GPU if there is one"""
    num_threads: int | None = None
    """CPU threads of PyTorch; None leaves its default (one per core)"""
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

    # Expert
    expert: str | None = None
    """file of the expert's actor; None: experts/ENV_ID.pt, unless there is other data"""
    minari_id: str | None = None
    """Minari dataset to clone instead of a rolled-out expert (pip install "minari[hdf5,hf]")"""
    data: str | None = None
    """file of transitions (of --save-data) to use instead of what would be collected first"""
    num_episodes: int = 20
    """episodes of the expert, or of the Minari dataset (of --data: all)"""
    dagger_rounds: int = 0
    """rounds of DAgger after the first training"""
    dagger_episodes: int = 5
    """episodes rolled out in each round of DAgger"""
    dagger_beta: float = 0.5
    """in round i of DAgger (from 1) the expert acts with probability dagger_beta^i at each step"""

    # Policy
    variant: Literal["mse", "gaussian", "gmm", "diffusion", "autoregressive"] = "mse"
    """what the policy can express: equations 1 to 5"""
    num_layers: int = 2
    """hidden layers of each network"""
    hidden_size: int = 256
    """units of each hidden layer"""
    activation: Activation = "relu"
    """nonlinearity of the hidden layers"""
    num_components: int = 5
    """Gaussians in the mixture of gmm"""
    denoising_steps: int = 10
    """steps T of diffusion"""
    num_bins: int = 20
    """bins B of each action dimension of autoregressive; modes closer than two bins are one"""
    sample: bool = False
    """act by samples in evaluation and DAgger instead of the best guess; mse has none to offer"""

    # Training
    train_steps: int = 40_000
    """gradient steps per fit"""
    batch_size: int = 256
    """samples per gradient step (of an ensemble: per member)"""
    learning_rate: float = 1e-3
    """step size of Adam"""
    weight_decay: float = 0.0
    """L2 penalty on the weights, through Adam"""
    input_noise: float = 0.003
    """standard deviation of the Gaussian noise on the normalised inputs while training"""
    holdout_ratio: float = 0.1
    """share of the transitions held out, in whole episodes, to measure the model on"""
    stop_after: int | None = None
    """end a fit after so many evaluations without a lower held-out loss, and go back to the lowest; None: never"""
    ema_decay: float = 0.999
    """decay of the averaged weights, which act and are measured (at first i / (i + 10)); 0: no averaging"""
    eval_every: int = 10_000
    """steps between evaluations"""
    eval_episodes: int = 20
    """episodes of the last evaluation, side by side"""
    interim_episodes: int = 5
    """episodes of the evaluations before the last"""


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


# Differs: the arguments do
def check_args(args: Args) -> None:
    one = "num_threads checkpoint_every max_episode_steps num_episodes dagger_episodes num_layers hidden_size"
    one += " num_components train_steps batch_size stop_after eval_every eval_episodes interim_episodes"
    zero = dict.fromkeys(("seed", "dagger_rounds", "weight_decay", "input_noise"), 0)
    check_fields(args, dict.fromkeys(one.split(), 1) | zero | {"denoising_steps": 2, "num_bins": 4})
    require(0 < args.holdout_ratio < 1, f"--holdout-ratio must lie in (0, 1), got {args.holdout_ratio}")
    require(0 <= args.dagger_beta <= 1, f"--dagger-beta must lie in [0, 1], got {args.dagger_beta}")
    require(0 <= args.ema_decay < 1, f"--ema-decay must lie in [0, 1), got {args.ema_decay}")
    require(args.resume is not None or not args.eval_only, "--eval-only needs --resume RUN_DIR: the run to evaluate")
    require(args.data is None or args.minari_id is None, "--data and --minari-id are two sources: give one of them")
    if args.data is not None and args.resume is None:
        require(Path(args.data).is_file(), f"--data {args.data}: there is no such file")
    no_expert = "--dagger-rounds needs an expert to ask: give --expert FILE (recorded data cannot answer)"
    recorded = args.data is not None or args.minari_id is not None
    require(not (args.dagger_rounds and recorded and args.expert is None), no_expert)
    require(not (args.sample and args.variant == "mse"), "--sample: mse is a point, there is nothing to sample")
    if args.resume is None and (args.expert is not None or not recorded):
        make_env(args.env_id).close()  # a misspelt id has no expert, either
        check_expert(args)
    if args.minari_id is not None and args.resume is None:
        fine = re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", args.minari_id) is not None
        require(fine, f"--minari-id {args.minari_id}: an id looks like mujoco/halfcheetah/expert-v0")
        require_package("minari", "--minari-id")
    if args.capture_video:
        check_video(args.env_id)


def check_expert(args: Args) -> None:
    path = Path(expert_path(args))
    how = f"python mbpo_sac.py --env-id {args.env_id} --rollout-length 0 --utd-ratio 1 --total-timesteps 1_000_000"
    how += f" --save-policy {path}"
    how = how if path.parent.is_dir() else f"mkdir -p {path.parent} && {how}"
    ways = f"; give --expert FILE, or --data or --minari-id, or make it with: {how}"
    require(path.is_file(), f"no expert in {path}" + (ways if args.expert is None else ""))


def expert_path(args: Args) -> str:
    """Beside this file, so that it is found from anywhere."""
    default = Path(__file__).parent / "experts" / f"{args.env_id}.pt".replace(":", "-").replace("/", "-")
    return args.expert or str(default)


# ---------------------------------------------------------------------------------------------------- environment

# Leading observation dimensions (x, or x and y) that these tasks hide by default; no network here sees them either.
POSITIONS = {"HalfCheetah-v5": 1, "Hopper-v5": 1, "Walker2d-v5": 1, "Swimmer-v5": 2, "Ant-v5": 2, "Humanoid-v5": 2}


def hidden_positions(env: gym.Env[Any, Any]) -> int:
    return POSITIONS.get(env.spec.id, 0) if env.spec else 0


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


def check_ranges(low: Tensor, high: Tensor, env_id: str) -> None:
    """Actions are scaled to [-1, 1], which is not possible where lowest and highest are the same."""
    require(bool((high > low).all()), f"--env-id {env_id}: an action has no range, it cannot be scaled")


# ----------------------------------------------------------------------------------------------------------- data


class Demonstrations:
    """What to imitate: observations, the expert's actions there, and which episode each comes from."""

    def __init__(self, obs: Tensor, action: Tensor, episode: Tensor, expert_return: float):
        self.obs, self.action, self.episode, self.expert_return = obs.float(), action.float(), episode, expert_return
        self.parts = [len(obs)]  # transitions of the expert, and of each round of DAgger

    def split(self, holdout_ratio: float, seed: int) -> tuple[Tensor, Tensor]:
        """Training and held-out rows. Each part is split on its own: what was held out once is so in all rounds."""
        ends = itertools.accumulate(self.parts)
        splits = [
            [rows + end - size for rows in split_episodes(self.episode[end - size : end], holdout_ratio, seed)]
            for size, end in zip(self.parts, ends, strict=True)
        ]
        train, test = zip(*splits, strict=True)
        return torch.cat(train), torch.cat(test)

    def add(self, obs: Tensor, action: Tensor, episode: Tensor) -> None:
        self.obs, self.action = torch.cat([self.obs, obs]), torch.cat([self.action, action])
        self.episode = torch.cat([self.episode, episode + int(self.episode.max()) + 1])
        self.parts.append(len(obs))

    def state_dict(self) -> dict[str, Any]:
        tensors = {"obs": self.obs, "action": self.action, "episode": self.episode}
        return {**tensors, "expert_return": self.expert_return, "parts": self.parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.obs, self.action, self.episode = (state[name].to(self.obs.device) for name in ("obs", "action", "episode"))
        self.expert_return, self.parts = state["expert_return"], list(state["parts"])


def check_data(columns: dict[str, Tensor], source: str) -> None:
    for name, column in columns.items():
        bad = (~torch.isfinite(column)).nonzero()
        if len(bad):
            where = f"row {bad[0, 0]}" + (f", dimension {bad[0, 1]}" if bad.shape[1] > 1 else "")
            fail(f"{source}: {name} has {len(bad)} non-finite values, the first in {where}")


def split_episodes(episode: Tensor, holdout_ratio: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers of the training and the held-out transitions, each in order of episode and time.

    Whole episodes are held out: neighbouring transitions are nearly equal, so that single held-out rows would test
    memory, not generalisation. Where these come to less than half of what was asked for, the last part of the longest
    one is held out instead.
    """
    order = torch.sort(episode, stable=True).indices
    episodes, counts = episode.unique(return_counts=True)
    shuffled = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(seed)).tolist()
    lengths, wanted = counts.tolist(), max(int(holdout_ratio * len(episode)), 1)
    chosen, held = [], 0
    for index in shuffled:
        if held + lengths[index] <= wanted:  # else the next one may be shorter
            chosen.append(index)
            held += lengths[index]
    held_out = torch.isin(episode[order], episodes[chosen])
    if held < wanted / 2:
        longest = max(shuffled, key=lambda index: lengths[index])
        held_out = episode[order] == episodes[longest]
        held_out &= held_out.cumsum(0) > lengths[longest] - wanted
    return order[~held_out], order[held_out]


def load_data_file(path: str) -> Any:
    """What torch.save wrote of tensors, numpy's arrays and numbers; anything else could run code, and is refused."""
    rebuild = np._core.multiarray  # type: ignore[attr-defined]
    names = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
    kinds = [type(np.dtype(name)) for name in names]
    with torch.serialization.safe_globals([np.ndarray, np.dtype, rebuild._reconstruct, rebuild.scalar, *kinds]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError(
                "it may hold tensors, numpy's arrays of numbers, and numbers, all saved by torch"
            ) from None


def whole_return(reward: Tensor, terminated: Tensor, episode: Tensor) -> float:
    """Mean return of the episodes that ended, or lasted as long as any: the others were cut short while collecting."""
    number, counts = episode.unique(return_inverse=True, return_counts=True)[1:]
    returns, ended = (torch.zeros(len(counts)).index_add(0, number, column.float()) for column in (reward, terminated))
    return returns[(ended > 0) | (counts == counts.max())].mean().item()


def from_file(path: str, env_id: str, obs_dim: int, skip: int, action_dim: int) -> Demonstrations:
    """A file of --save-data (which keeps the positions that the environment hides), or observations and actions."""
    try:
        data = load_data_file(path)
        ours = "obs" in data
        obs, action = (
            torch.as_tensor(data[name]) for name in (("obs", "action") if ours else ("observations", "actions"))
        )
        source = data["env_id"] if ours else data.get("env_id", env_id)
        episode = torch.as_tensor(data.get("episode", np.zeros(len(obs), np.int64)))
        ended = torch.as_tensor(data["terminated"]) if ours else torch.zeros(len(obs))
        reward = torch.as_tensor(data["reward"]) if ours else torch.tensor([float(data.get("mean_reward", "nan"))])
    except Exception as error:  # torch.load raises whatever the bytes happen to trigger
        fail(f"--data {path} holds neither --save-data's columns nor observations and actions: {error}")
    require(source == env_id, f"--data {path} is from {source}, not from {env_id}")
    require(obs.ndim == 2 and len(obs) > 1, f"--data {path}: observations must be (N, {obs_dim}), N > 1")
    obs = obs[:, skip:] if ours else obs
    fits = obs.shape[1] == obs_dim and action.shape == (len(obs), action_dim)
    shapes = f"{tuple(obs.shape)} and {tuple(action.shape)}"
    require(fits, f"--data {path}: observations and actions are {shapes}, not (N, {obs_dim}) and (N, {action_dim})")
    each = episode.shape == ended.shape == (len(obs),) and (reward.shape == (len(obs),) or not ours)
    require(each, f"--data {path}: episodes and rewards are not one number for each of {len(obs)} observations")
    require(not episode.is_floating_point(), f"--data {path}: episodes must be numbered by integers")
    named = {"observations": obs, "actions": action} | ({"rewards": reward} if ours else {})
    check_data(named, f"--data {path}")
    expert_return = whole_return(reward, ended, episode) if ours else reward.item()
    return Demonstrations(obs, action, episode, expert_return)


def from_minari(name: str, episodes: int, env_id: str, obs_dim: int, action_dim: int) -> Demonstrations:
    """The first episodes of a Minari dataset, downloaded unless it is there; a dataset knows what its expert earned."""
    import minari

    try:
        dataset = minari.load_dataset(name, download=name not in minari.list_local_datasets())
        source = dataset.env_spec.id if dataset.env_spec else env_id
        found = list(itertools.islice(dataset.iterate_episodes(), episodes))
        obs = [
            torch.as_tensor(np.asarray(each.observations)[:-1]) for each in found
        ]  # T + 1 rows: the last is no start
        action = [torch.as_tensor(np.asarray(each.actions)) for each in found]
        returns = [float(np.sum(each.rewards)) for each in found]
    except Exception as error:  # the network, the file, or the dataset's own code
        fail(f"--minari-id {name}: {error}")
    same = source.rpartition(":")[2] == env_id.rpartition(":")[2]  # Gymnasium's specs leave the module out
    require(same, f"--minari-id {name} is from {source}, not from {env_id}")
    require(bool(found), f"--minari-id {name}: it has no episodes")
    shapes = f"{tuple(obs[0].shape)} and {tuple(action[0].shape)}"
    fits = obs[0].shape[1:] == (obs_dim,) and action[0].shape[1:] == (action_dim,)
    require(
        fits, f"--minari-id {name}: observations and actions are {shapes}, not (T, {obs_dim}) and (T, {action_dim})"
    )
    check_data({"observations": torch.cat(obs), "actions": torch.cat(action)}, f"--minari-id {name}")
    episode = torch.cat([torch.full((len(part),), number) for number, part in enumerate(action)])
    return Demonstrations(torch.cat(obs), torch.cat(action), episode, float(np.mean(returns)))


def check_demonstrations(data: Demonstrations, env_id: str, low: Tensor, high: Tensor) -> None:
    """There are some, they are finite, and the environment can take such actions."""
    require(len(data.obs) > 1, "one transition is not enough to learn from")
    check_data({"observations": data.obs, "actions": data.action}, "the demonstrations")
    low, high = low.to(data.action), high.to(data.action)
    beyond = torch.maximum(low - data.action, data.action - high)
    fits, most = bool((beyond <= 1e-3 * (high - low)).all()), beyond.max().item()
    require(fits, f"the demonstrated actions exceed the bounds of {env_id} by up to {most:.3g}: are they scaled?")


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


class Actor(nn.Module):
    """A Gaussian squashed by tanh into the bounds of the actions. The names are CleanRL's: its weights load."""

    action_scale: Tensor
    action_bias: Tensor

    def __init__(self, obs_dim: int, low: Tensor, high: Tensor, units: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(obs_dim, units), nn.Linear(units, units)
        self.fc_mean, self.fc_logstd = nn.Linear(units, len(low)), nn.Linear(units, len(low))
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:  # (B, D) -> mean and log std before the tanh (B, A)
        x = F.relu(self.fc2(F.relu(self.fc1(obs))))
        log_std = torch.tanh(self.fc_logstd(x).float())
        return self.fc_mean(x).float(), -5 + 0.5 * (2 + 5) * (log_std + 1)  # log std within [-5, 2]

    def mode(self, obs: Tensor) -> Tensor:
        return torch.tanh(self(obs)[0]) * self.action_scale + self.action_bias

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Reparametrised actions (B, A) and the log-probability (B,) that they have when they are scaled to [-1, 1]."""
        mean, log_std = self(obs)
        noise = torch.randn_like(mean)
        x = mean + log_std.exp() * noise
        gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # The density shrinks by the slope of tanh(x): log(1 - tanh(x)²), written so that nothing overflows.
        slope = 2 * (math.log(2) - x - F.softplus(-2 * x))
        return torch.tanh(x) * self.action_scale + self.action_bias, (gaussian - slope).sum(dim=-1)


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


class ActivationLayer(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.function = ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def make_mlp(num_inputs: int, num_outputs: int, args: Args) -> nn.Sequential:
    sizes, layers = [num_inputs, *[args.hidden_size] * args.num_layers], list[nn.Module]()
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), ActivationLayer(args.activation)]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_outputs))


class Policy(nn.Module):
    """What the five share: the observation is standardised, actions are scaled to [-1, 1]. Both lie in buffers.

    A variant says how wrong it is about actions u (B, A) in x (B, D), and what it does in x.
    """

    low: Tensor
    high: Tensor

    def __init__(self, obs_dim: int, low: Tensor, high: Tensor, args: Args):
        super().__init__()
        self.normaliser, self.action_dim = Normaliser(obs_dim), len(low)
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def error(self, x: Tensor, u: Tensor) -> Tensor:  # (B, D), (B, A) -> (B,)
        raise NotImplementedError

    def decide(self, x: Tensor, sample: bool) -> Tensor:  # (B, D) -> (B, A)
        raise NotImplementedError

    def scale(self, action: Tensor) -> Tensor:
        return (2 * (action - self.low) / (self.high - self.low) - 1).clamp(-1, 1)

    def loss(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.error(self.normaliser(obs), self.scale(action)).mean()

    def act(self, obs: Tensor, sample: bool = False) -> Tensor:  # (B, D) -> (B, A), in the units of the environment
        u = self.decide(self.normaliser(obs), sample).clamp(-1, 1)
        return self.low + (u + 1) / 2 * (self.high - self.low)


class MSE(Policy):
    """Equation 1: a point. There is nothing to sample."""

    def __init__(self, obs_dim: int, low: Tensor, high: Tensor, args: Args):
        super().__init__(obs_dim, low, high, args)
        self.net = make_mlp(obs_dim, len(low), args)

    def error(self, x: Tensor, u: Tensor) -> Tensor:
        return (torch.tanh(self.net(x)) - u).square().sum(dim=-1)

    def decide(self, x: Tensor, sample: bool) -> Tensor:
        return torch.tanh(self.net(x))


class Gaussian(Policy):
    """Equation 2: SAC's squashed Gaussian. atanh(1) is infinite, so u is kept a hundredth away from the bounds.

    And σ stays above 0.3. Nearer to the bounds, or with a smaller σ, the few saturated actions, far out before the
    tanh, would be nearly all of the likelihood. The best guess of a saturated action is ±0.99, then.
    """

    LOG_STD = (math.log(0.3), math.log(3.0))

    def __init__(self, obs_dim: int, low: Tensor, high: Tensor, args: Args):
        super().__init__(obs_dim, low, high, args)
        self.net = make_mlp(obs_dim, 2 * len(low), args)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(x).chunk(2, dim=-1)
        least, most = self.LOG_STD
        return mean, least + (most - least) * torch.sigmoid(log_std)

    def error(self, x: Tensor, u: Tensor) -> Tensor:
        mean, log_std = self.moments(x)
        z = torch.atanh(u.clamp(-1 + 1e-2, 1 - 1e-2))
        gaussian = 0.5 * ((z - mean) * (-log_std).exp()).square() + log_std + 0.5 * math.log(2 * math.pi)
        slope = 2 * (math.log(2) - z - F.softplus(-2 * z))  # log(1 - tanh(z)²)
        return (gaussian + slope).sum(dim=-1)

    def decide(self, x: Tensor, sample: bool) -> Tensor:
        mean, log_std = self.moments(x)
        return torch.tanh(mean + log_std.exp() * torch.randn_like(mean) if sample else mean)


class GMM(Policy):
    """Equation 3. Where the expert repeats itself to the digit a spread without a least one would shrink to nothing,
    and the likelihood would be about those places alone."""

    LEAST_STD = 0.1

    def __init__(self, obs_dim: int, low: Tensor, high: Tensor, args: Args):
        super().__init__(obs_dim, low, high, args)
        self.components = args.num_components
        self.net = make_mlp(obs_dim, self.components * (1 + 2 * len(low)), args)

    def mixture(self, x: Tensor) -> MixtureSameFamily:
        logits, rest = self.net(x).split([self.components, 2 * self.components * self.action_dim], dim=-1)
        mean, spread = rest.view(-1, self.components, 2 * self.action_dim).chunk(2, dim=-1)  # (B, K, A)
        std = self.LEAST_STD + F.softplus(spread)
        choice = Categorical(logits=logits, validate_args=False)  # check_losses sees what is not finite
        component = Independent(Normal(torch.tanh(mean), std, validate_args=False), 1)
        return MixtureSameFamily(choice, component, validate_args=False)

    def error(self, x: Tensor, u: Tensor) -> Tensor:
        return -self.mixture(x).log_prob(u)

    def decide(self, x: Tensor, sample: bool) -> Tensor:
        mixture = self.mixture(x)
        if sample:
            return mixture.sample()
        best = mixture.mixture_distribution.logits.argmax(dim=-1)  # (B,)
        means: Tensor = mixture.component_distribution.mean
        return means[torch.arange(len(best), device=best.device), best]


class Diffusion(Policy):
    """Equation 4: noise becomes an action in T steps. The network predicts the clean action."""

    alpha_bar: Tensor

    def __init__(self, obs_dim: int, low: Tensor, high: Tensor, args: Args):
        super().__init__(obs_dim, low, high, args)
        self.steps = args.denoising_steps
        self.net = make_mlp(obs_dim + len(low) + self.steps, len(low), args)
        # The cosine schedule. A linear one, made for a thousand steps, would leave most of the action in u_T.
        times = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
        signal = torch.cos((times + 0.008) / 1.008 * math.pi / 2).square()
        betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
        self.register_buffer("alpha_bar", torch.cat([torch.ones(1), (1 - betas).cumprod(0).float()]))  # ᾱ_0 .. ᾱ_T

    def clean(self, x: Tensor, noisy: Tensor, t: Tensor) -> Tensor:  # t (B,) in 1 .. T
        return torch.tanh(self.net(torch.cat([x, noisy, F.one_hot(t - 1, self.steps).to(x)], dim=-1)))

    def error(self, x: Tensor, u: Tensor) -> Tensor:
        t = torch.randint(1, self.steps + 1, (len(x),), device=x.device)
        kept = self.alpha_bar[t][:, None]
        noisy = kept.sqrt() * u + (1 - kept).sqrt() * torch.randn_like(u)
        return (self.clean(x, noisy, t) - u).square().sum(dim=-1)

    def decide(self, x: Tensor, sample: bool) -> Tensor:
        u = torch.randn(len(x), self.action_dim, device=x.device)
        for step in range(self.steps, 0, -1):
            guess = self.clean(x, u, torch.full((len(x),), step, device=x.device))
            now, before = self.alpha_bar[step], self.alpha_bar[step - 1]
            alpha = now / before
            if sample:  # the posterior of u_{t-1} given u_t and the clean action (DDPM, equations 6, 7)
                u = (before.sqrt() * (1 - alpha) * guess + alpha.sqrt() * (1 - before) * u) / (1 - now)
                u = u + ((1 - before) / (1 - now) * (1 - alpha)).sqrt() * torch.randn_like(u)  # (at t = 1 nothing)
            else:  # the same noise, but less of it (DDIM); the posterior's mean would average over modes
                noise = (u - now.sqrt() * guess) / (1 - now).sqrt()
                u = before.sqrt() * guess + (1 - before).sqrt() * noise
        return u


class Autoregressive(Policy):
    """Equation 5: one network per dimension, all of them in one batched product, each seeing the dimensions before it.

    The B bins are centred at -1, .. , 1, ends included: an expert that goes to the limit is followed there. An action
    between two centres belongs to both in such shares that their mean is the action itself, and so a few bins will do.
    The best action is the mean of the likeliest bin and its neighbours. Of the dimensions before its own a network sees
    only a drawn bin, as in a sample: their exact values would tell more of x than a blurred x does, and a network that
    has learned to read x off them reads its own mistakes when it acts.
    """

    mask: Tensor
    centres: Tensor

    def __init__(self, obs_dim: int, low: Tensor, high: Tensor, args: Args):
        super().__init__(obs_dim, low, high, args)
        A, bins = len(low), args.num_bins
        self.nets = StackedMLP(A, [obs_dim + A, *[args.hidden_size] * args.num_layers, bins], args.activation)
        self.register_buffer("mask", torch.tril(torch.ones(A, A), diagonal=-1)[:, None])  # (A, 1, A): the ones before
        self.register_buffer("centres", torch.linspace(-1, 1, bins))

    def shares(self, u: Tensor) -> Tensor:  # (..) -> (.., bins)
        distance = (u[..., None] - self.centres).abs() * (len(self.centres) - 1) / 2  # in bins
        return (1 - distance).clamp(min=0)

    def bins(self, u: Tensor, draw: Tensor | float) -> Tensor:
        """Centre of one of the two bins beside each u: a uniform `draw` picks them by their shares, 0.5 the nearer."""
        half = (len(self.centres) - 1) / 2
        return (((u + 1) * half + draw).floor() / half - 1).clamp(-1, 1)

    def log_probs(self, x: Tensor, b: Tensor) -> Tensor:  # (B, D), centres (B, A) -> (A, B, bins)
        return self.nets(torch.cat([x.expand(self.action_dim, -1, -1), b * self.mask], dim=-1)).log_softmax(dim=-1)

    def probs(self, i: int, x: Tensor, b: Tensor) -> Tensor:
        """Of dimension i alone: (B, bins)."""
        h = torch.cat([x, b * self.mask[i]], dim=-1)
        for layer, (weight, bias) in enumerate(zip(self.nets.weights, self.nets.biases, strict=True)):
            h = torch.addmm(bias[i], self.nets.activation(h) if layer else h, weight[i])
        return h.softmax(dim=-1)

    def error(self, x: Tensor, u: Tensor) -> Tensor:
        b = self.bins(u, torch.rand_like(u))
        return -(self.shares(u).transpose(0, 1) * self.log_probs(x, b)).sum(dim=(0, 2))

    def decide(self, x: Tensor, sample: bool) -> Tensor:
        u = torch.zeros(len(x), self.action_dim, device=x.device)
        number = torch.arange(len(self.centres), device=x.device)
        for i in range(self.action_dim):
            p = self.probs(i, x, self.bins(u, 0.5))  # (B, bins)
            if sample:
                u[:, i] = self.centres[p.multinomial(1)[:, 0]]
            else:
                p = p * ((number - p.argmax(dim=-1, keepdim=True)).abs() <= 1)
                u[:, i] = p @ self.centres / p.sum(dim=-1)
        return u


VARIANTS: dict[str, type[Policy]] = {"mse": MSE, "gaussian": Gaussian, "gmm": GMM, "diffusion": Diffusion}
VARIANTS |= {"autoregressive": Autoregressive}


def load_expert(path: str, env_id: str, obs_dim: int, low: Tensor, high: Tensor) -> Actor:
    """The actor of `mbpo_sac.py --save-policy` or of CleanRL."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved = saved[0] if isinstance(saved, (tuple, list)) else saved
        source, weights = saved.get("env_id", env_id), saved.get("actor", saved)
        (units, seen), moves = weights["fc1.weight"].shape, len(weights["fc_mean.weight"])
    except Exception as error:  # torch.load raises whatever the bytes happen to trigger
        fail(f"--expert {path} is no actor of mbpo_sac.py --save-policy or of CleanRL's SAC ({error!r})")
    require(source == env_id, f"--expert {path} was made for {source}, not for {env_id}")
    fits = seen == obs_dim and moves == len(low)
    require(fits, f"--expert {path} sees {seen} dimensions and moves {moves}: not those of {env_id}")
    actor = Actor(obs_dim, low.cpu(), high.cpu(), units)
    try:
        actor.load_state_dict({name: weight.view_as(actor.state_dict()[name]) for name, weight in weights.items()})
    except (AttributeError, KeyError, RuntimeError) as error:
        fail(f"--expert {path} is no actor of mbpo_sac.py --save-policy or of CleanRL's SAC ({error})")
    check_data(actor.state_dict(), f"--expert {path}")
    least, most = actor.action_bias - actor.action_scale, actor.action_bias + actor.action_scale
    beyond = torch.maximum(low.cpu() - least, most - high.cpu())
    fits = bool((beyond <= 1e-3 * (high - low).cpu()).all())
    words = f"exceeds the bounds of {env_id}'s actions by up to {beyond.max().item():.3g}: another scale?"
    require(fits, f"--expert {path} {words}")
    return actor.to(low.device).requires_grad_(False)


# ------------------------------------------------------------------------------------------------------ algorithm


@torch.no_grad()
def run_episodes(
    act: Callable[[Tensor], Tensor], env_id: str, episodes: int, seed: int, device: torch.device,
    max_episode_steps: int | None, video: Path | None = None,
) -> tuple[Tensor, Tensor, Tensor, np.ndarray, float]:  # fmt: skip
    """Whole episodes side by side: obs (N, D), action (N, A), episode (N,), returns (episodes,), seconds of acting."""
    kwargs = {"max_episode_steps": max_episode_steps} | ({"render_mode": "rgb_array"} if video else {})
    envs = VectorEnv(env_id, episodes, seed, **kwargs)
    skip, alive, frames = hidden_positions(envs.envs[0]), np.ones(episodes, bool), []
    seen, done, numbers, returns, seconds = [], [], [], np.zeros(episodes), []
    while alive.any():
        begin = time.perf_counter()
        obs = torch.from_numpy(envs.obs[:, skip:]).to(device)
        action = act(obs)
        moves = action.cpu().numpy()
        seconds.append(time.perf_counter() - begin)
        if video and alive[0]:
            frames.append(envs.envs[0].render())
        rows, before = torch.from_numpy(alive.nonzero()[0]), envs.episode
        seen.append(obs[rows])
        done.append(action[rows])
        numbers.append(rows)
        _, reward, _ = envs.step(moves)
        returns += np.where(alive, reward, 0)  # after its first episode an environment is only kept company
        alive = alive & (envs.episode == before)
    for env in envs.envs:
        env.close()
    if video:
        write_video(frames, video, envs.envs[0].metadata.get("render_fps", 30))
    return torch.cat(seen), torch.cat(done), torch.cat(numbers).to(device), returns, float(np.median(seconds))


def train_batch(
    policy: Policy, optimizer: torch.optim.Optimizer, obs: Tensor, action: Tensor, size: int, input_noise: float
) -> Tensor:
    """One gradient step on a batch from obs (N, D) and action (N, A), seen a little blurred."""
    index = torch.randint(len(obs), (size,), device=obs.device)
    noise = input_noise * policy.normaliser.std * torch.randn(size, obs.shape[1], device=obs.device)
    loss = policy.loss(obs[index] + noise, action[index])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def dagger(args: Args, policy: Policy, expert: Actor, data: Demonstrations, number: int, device: torch.device) -> float:
    """Round `number` (from 1): where the two of them go, and what the expert would do there. Returns their return."""
    beta = args.dagger_beta**number

    def mixture(obs: Tensor) -> Tensor:
        asks_expert = torch.rand(len(obs), 1, device=obs.device) < beta
        return torch.where(asks_expert, expert.mode(obs), policy.act(obs, args.sample))

    seed = 3_000_000 + 100_000 * number + 1_000 * args.seed  # nobody else begins there, as in `evaluate`
    obs, _, episode, returns, _ = run_episodes(
        mixture, args.env_id, args.dagger_episodes, seed, device, args.max_episode_steps
    )
    data.add(obs, expert.mode(obs), episode)
    return float(returns.mean())


# ----------------------------------------------------------------------------------------------------- evaluation


def write_video(frames: list[Any], path: Path, fps: int) -> None:
    from moviepy.video.io.ImageSequenceClip import ImageSequenceClip

    path.parent.mkdir(parents=True, exist_ok=True)
    ImageSequenceClip(frames, fps=fps).write_videofile(str(path), logger=None)


def describe(metrics: dict[str, float], returns: list[float]) -> str:
    mean, std = metrics["eval/episodic_return"], metrics["eval/episodic_return_std"]
    each = ", ".join(f"{value:.0f}" for value in returns[:20]) + ", .." * (len(returns) > 20)
    return f"return {mean:.1f} ± {std:.1f} ({each})" if len(returns) > 1 else f"return {mean:.1f}"


# Differs: an imitator is measured by its expert
@torch.no_grad()
def evaluate(
    args: Args, policy: Policy, expert_return: float, episodes: int, device: torch.device, video: Path | None
) -> tuple[dict[str, float], list[float]]:
    """Whole episodes on the same seeds each time, none of them trained on."""
    seed = 1_000_000 + 1_000 * args.seed  # for --seed below 100 and 1,000 episodes, nobody else begins there
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        act = lambda obs: policy.act(obs, args.sample)  # noqa: E731
        obs, _, _, returns, seconds = run_episodes(
            act, args.env_id, episodes, seed, device, args.max_episode_steps, video
        )
    mean = returns.mean().item()
    metrics = {"eval/episodic_return": mean, "eval/episodic_length": len(obs) / episodes}
    metrics["eval/episodic_return_std"] = returns.std(ddof=1).item() if episodes > 1 else 0.0
    metrics["eval/expert_fraction"] = mean / expert_return if expert_return > 0 else 0.0
    metrics["time/act_ms"] = 1e3 * seconds
    return metrics, returns.tolist()


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


MAY_CHANGE = {"resume", "num_threads", "cuda", "track", "wandb_project_name", "wandb_entity", "checkpoint_every"}
MAY_CHANGE |= {"dagger_rounds", "expert", "eval_only", "eval_episodes", "capture_video"}


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


# Differs: an evaluation may act otherwise
def load_checkpoint(args: Args) -> dict[str, Any]:
    """The checkpoint of the run to resume, after checking that it is one and that the settings still fit it."""
    assert args.resume is not None
    saved_args = asdict(load_args(args.resume))
    may_change = MAY_CHANGE | ({"sample"} if args.eval_only else set())
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


def parse_args(command_line: list[str] | None = None) -> Args:
    """With --resume, the earlier run's settings are the defaults; an evaluation need not write again what it wrote."""
    args = tyro.cli(Args, args=command_line, description=__doc__)
    if args.resume is None:
        return args
    saved = load_args(args.resume)
    if getattr(args, "eval_only", False):
        for name in {"save_data", "save_policy", "capture_video"} & {field.name for field in fields(Args)}:
            setattr(saved, name, getattr(Args, name))
    return tyro.cli(Args, args=command_line, default=saved, description=__doc__)


# ----------------------------------------------------------------------------------------------------------- main


def demonstrate(args: Args, expert: Actor | None, sizes: tuple[int, int, int], device: torch.device) -> Demonstrations:
    """The expert's episodes, from wherever they are to come."""
    obs_dim, skip, action_dim = sizes
    seed = 2_000_000 + 1_000 * args.seed  # as in `evaluate`, for seeds below 100
    if args.data is not None:
        data = from_file(args.data, args.env_id, obs_dim, skip, action_dim)
        if not math.isfinite(data.expert_return):
            require(expert is not None, f"--data {args.data} has no finite mean_reward: add it, or give --expert FILE")
            assert expert is not None
            rows = run_episodes(expert.mode, args.env_id, 10, seed, device, args.max_episode_steps)
            data.expert_return = rows[3].mean().item()
        return data
    if args.minari_id is not None:
        return from_minari(args.minari_id, args.num_episodes, args.env_id, obs_dim, action_dim)
    assert expert is not None
    rows = run_episodes(expert.mode, args.env_id, args.num_episodes, seed, device, args.max_episode_steps)
    return Demonstrations(*rows[:3], rows[3].mean().item())


def weight_size(networks: nn.Module) -> dict[str, float]:
    """Not finite if a weight or a running mean is not: those of the last step have entered no loss yet."""
    tensors = [tensor for tensor in networks.state_dict().values() if tensor.is_floating_point()]
    return {"weights": torch.stack([tensor.double().norm() for tensor in tensors]).sum().item()}


# Differs: losses and weights are all there is to diverge
def check_losses(means: dict[str, float], step: int, run_dir: Path) -> None:
    """A policy that has diverged is of no use, and must not overwrite its last good checkpoint."""
    bad = [name for name, mean in means.items() if not math.isfinite(mean)]
    if bad:
        checkpoint = run_dir / "checkpoint.pt"
        last = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"
        sys.exit(f"non-finite {bad[0]} at or before step {step}; {last}; try a smaller --learning-rate")


@torch.no_grad()
def measure(policy: Policy, data: Demonstrations, train: Tensor, test: Tensor, sample: bool) -> dict[str, float]:
    """Losses, with the same random numbers each time, and how far off the actions are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        train, test = (rows[torch.randperm(len(rows), device=rows.device)[:10_000]] for rows in (train, test))
        losses = [policy.loss(data.obs[rows], data.action[rows]).item() for rows in (train, test)]
        done = policy.act(data.obs[test], sample)
    off = (policy.scale(done) - policy.scale(data.action[test])).abs().mean().item()
    return {"losses/train_loss": losses[0], "losses/holdout_loss": losses[1], "losses/action_error": off}


def load_clone(run_dir: str) -> Policy:
    """What a run has learned: `clone = load_clone("runs/...")` and, for each observation,
    `clone.act(torch.as_tensor(obs)[None].float())[0].numpy()`."""
    weights = torch.load(Path(run_dir) / "checkpoint.pt", map_location="cpu", weights_only=True)["average"]
    args, obs_dim = load_args(run_dir), len(weights["normaliser.mean"])
    policy = VARIANTS[args.variant](obs_dim, weights["low"], weights["high"], args)
    policy.load_state_dict(weights)
    return policy.requires_grad_(False)


def train_round(
    args: Args, policy: Policy, average: Policy, best: Policy, optimizer: torch.optim.Optimizer, data: Demonstrations,
    final: bool, log: Logger, checkpointer: Checkpointer,
) -> None:  # fmt: skip
    """`train_steps` gradient steps on everything so far; `average` is evaluated, `best` has the lowest holdout loss."""
    progress, run_dir, device = checkpointer.progress, checkpointer.run_dir, data.obs.device
    train, test = data.split(args.holdout_ratio, args.seed)
    obs, action = data.obs[train], data.action[train]
    if progress["step"] == 0:
        policy.normaliser.fit(obs)
        average.load_state_dict(policy.state_dict())
    bar = tqdm(total=args.train_steps, initial=progress["fit_step"], desc=f"round {progress['round']}", unit="step")
    durations: list[float] = []
    while progress["fit_step"] < args.train_steps:
        begin = time.perf_counter()
        progress["step"] += 1
        progress["fit_step"] = step = progress["fit_step"] + 1
        loss = train_batch(policy, optimizer, obs, action, args.batch_size, args.input_noise)
        warm = progress["step"] / (progress["step"] + 10)  # at first there is little to remember
        with torch.no_grad():
            torch._foreach_lerp_([*average.parameters()], [*policy.parameters()], 1 - min(args.ema_decay, warm))
        durations.append(time.perf_counter() - begin)
        bar.update()
        due = step % args.eval_every == 0 or step == args.train_steps
        save = progress["step"] % args.checkpoint_every == 0
        if due or save or checkpointer.signal:  # what has not been checked is not saved
            check_losses({"losses/train_loss": loss.item()} | weight_size(policy), progress["step"], run_dir)
        if due:
            metrics = measure(average, data, train, test, args.sample)
            check_losses(metrics, progress["step"], run_dir)
            better = metrics["losses/holdout_loss"] < progress["lowest"]
            progress["lowest"] = min(progress["lowest"], metrics["losses/holdout_loss"])
            progress["stale"] = 0 if better else progress["stale"] + 1
            if better and args.stop_after:
                best.load_state_dict(average.state_dict())
            if args.stop_after and (progress["stale"] >= args.stop_after or step == args.train_steps):
                policy.load_state_dict(best.state_dict())
                average.load_state_dict(best.state_dict())
                optimizer.state.clear()  # what it remembers is of other weights
                progress["fit_step"] = step = args.train_steps
                metrics = measure(average, data, train, test, args.sample)
            last = final and step == args.train_steps
            video = run_dir / "videos" / f"{progress['step']}.mp4" if args.capture_video else None
            episodes = args.eval_episodes if last else args.interim_episodes
            found, returns = evaluate(args, average, data.expert_return, episodes, device, video)
            progress["best_return"] = max(progress["best_return"], found["eval/episodic_return"])
            progress["metrics"] = metrics | found | {"eval/best_return": progress["best_return"]}
            speed = {"charts/SPS": 1 / float(np.mean(durations[10:] or durations))}
            log.scalars(progress["metrics"] | speed | {"charts/transitions": float(len(data.obs))}, progress["step"])
            tqdm.write(f"{progress['step']} steps: {describe(found, returns)}")
        checkpointer.step(due=save)
    bar.close()


def prepare_torch(args: Args) -> torch.device:
    """Seed, determinism and threads; returns the device to compute on."""
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.set_num_threads(args.num_threads or torch.get_num_threads())
    torch.set_flush_denormal(True)  # Adam's averages for units that rest fade below 1e-38, where a CPU is slow
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


# Differs: rounds instead of environment steps
def go_on(args: Args, checkpointer: Checkpointer, checkpoint: dict[str, Any]) -> None:
    """Continue from a checkpoint that is not beyond what was asked for."""
    checkpointer.restore(checkpoint)
    run_dir, done, fitted = checkpointer.run_dir, checkpointer.progress["round"], checkpointer.progress["fit_step"]
    before, unfinished = load_args(str(run_dir)), done < args.dagger_rounds or fitted < args.train_steps
    few = f"--dagger-rounds {args.dagger_rounds}: {run_dir} has had {done}; it goes on with more of them only"
    fewer = args.dagger_rounds < before.dagger_rounds
    require(done <= args.dagger_rounds and (unfinished or args.eval_only or not fewer), few)
    idle = f"--eval-episodes {args.eval_episodes}: {run_dir} has finished; evaluate it with --eval-only"
    require(unfinished or args.eval_only or args.eval_episodes == before.eval_episodes, idle)


def main(args: Args) -> dict[str, float]:
    check_args(args)
    checkpoint = load_checkpoint(args) if args.resume else None
    device = prepare_torch(args)
    envs = VectorEnv(args.env_id, 1, args.seed, max_episode_steps=args.max_episode_steps)
    check_time_limit(envs.envs[0], args.env_id)
    skip = hidden_positions(envs.envs[0])
    obs_dim, action_dim = envs.obs.shape[1] - skip, gym.spaces.flatdim(envs.action_space)
    low, high = action_bounds(envs, args.env_id, device)
    check_ranges(low, high, args.env_id)
    recorded = args.data is not None or args.minari_id is not None
    needed = not checkpoint or checkpoint["progress"]["round"] < args.dagger_rounds  # the data lie in the checkpoint
    needed = needed and (args.expert is not None or not recorded) and not args.eval_only
    if needed:
        check_expert(args)
    expert = load_expert(expert_path(args), args.env_id, obs_dim, low, high) if needed else None
    if checkpoint:
        data = Demonstrations(*(checkpoint["data"][name] for name in ("obs", "action", "episode", "expert_return")))
    else:
        data = demonstrate(args, expert, (obs_dim, skip, action_dim), device)
    data.obs, data.action, data.episode = data.obs.to(device), data.action.to(device), data.episode.to(device)
    check_demonstrations(data, args.env_id, low, high)

    policy = VARIANTS[args.variant](obs_dim, low, high, args).to(device)
    optimizer = torch.optim.Adam(policy.parameters(), args.learning_rate, weight_decay=args.weight_decay, fused=True)
    average, best = (copy.deepcopy(policy).requires_grad_(False) for _ in range(2))

    run_dir = Path(args.resume) if args.resume else new_run_dir(args)
    progress: dict[str, Any] = {"step": 0, "fit_step": 0, "round": 0, "stale": 0, "lowest": math.inf, "seconds": 0.0}
    progress |= {"metrics": {}, "best_return": -math.inf}
    parts = {"policy": policy, "average": average, "best": best, "optimizer": optimizer, "data": data}
    checkpointer = Checkpointer(run_dir, progress, parts)
    if checkpoint:
        go_on(args, checkpointer, checkpoint)
    if args.eval_only:
        video = run_dir / "videos" / "eval_only.mp4" if args.capture_video else None
        again, returns = evaluate(args, average, data.expert_return, args.eval_episodes, device, video)
        print(f"{run_dir}: {describe(again, returns)}; the expert earns {data.expert_return:.1f}")
        return again
    with checkpointer:
        log = Logger(run_dir, args, progress["step"] if checkpoint else None)
        size = f"{len(data.obs)} transitions of {len(data.episode.unique())} episodes"
        print(f"{run_dir}: the expert earns {data.expert_return:.1f}, {size}", flush=True)
        while True:
            final = progress["round"] >= args.dagger_rounds
            train_round(args, policy, average, best, optimizer, data, final, log, checkpointer)
            if final:
                break
            # Ask the expert about where the policy goes.
            assert expert is not None
            progress["round"] += 1
            mixed = dagger(args, average, expert, data, progress["round"], device)
            tqdm.write(f"round {progress['round']}: {args.dagger_episodes} episodes, return {mixed:.1f}")
            progress.update(fit_step=0, stale=0, lowest=math.inf)
        checkpointer.save()
    result: dict[str, float] = progress["metrics"] | {"minutes": progress["seconds"] / 60}
    log.close(result)
    return result


if __name__ == "__main__":
    main(parse_args())
