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
#     "matplotlib==3.11.2",
# ]
# ///
"""Learn the dynamics of an environment with an ensemble of neural networks.

Every model-based agent in this folder stands on this file: a network f(s, a) that predicts how the state changes,

    s' = s + Unnormalise(f(Normalise(s, a)))                                                                  (1)

trained on transitions (s, a, s') by regression on the normalised change y = Normalise(s' - s), either deterministic,

    loss_e = mean over batch and dimensions of (f_e(x) - y)²,       x = Normalise(s, a) + input_noise N(0, I)  (2)

or, with `--probabilistic`, as a Gaussian whose mean μ and log-variance λ are both predicted (PETS, equation 1),

    loss_e = mean of (μ_e(x) - y)² exp(-λ_e(x)) + λ_e(x),           λ softly clamped to [λ_min, λ_max]         (3)

plus 0.01 / E Σ (λ_max - λ_min) over the dimensions, which keeps the learned bounds tight (each member has its own). A
dimension that has never moved has neither, only the squared error of its mean. Where the environment has no formulas
for reward and termination they are learned too: the reward as one more dimension of y, the termination as a logit
(cross-entropy).

An ensemble of E such networks starts from different weights and sees different batches. Where data is plentiful the
members agree; where it is not they disagree, and their spread tells a planner what the model does not know.

Pseudocode:

    collect transitions (s, a, r, s') with random actions                  (or load them: --data)
    hold out some whole episodes; fit the normalisers on the others only
    for step = 1 .. train_steps:
        for each member e (one batched product, no Python loop):
            draw its own batch (x, y) from the training episodes;  x <- x + input_noise * N(0, 1)
            one Adam step on loss_e
    on the held-out episodes report:
        one step:   normalised MSE, R² of every dimension, disagreement between members
        open loop:  ŝ_0 = s_0, ŝ_{t+1} = model(ŝ_t, a_t) for 1, 5, 15, 50 steps, beside "nothing changes" (ŝ_t = s_0)

Usage:

    python mbrl_dynamics.py                                        # HalfCheetah-v5
    python mbrl_dynamics.py --env-id Pendulum-v1 --save-data pendulum.pt
    python mbrl_dynamics.py --env-id Pendulum-v1 --data pendulum.pt --probabilistic
    python mbrl_dynamics.py --resume runs/HalfCheetah-v5__mbrl_dynamics__1__1700000000 --train-steps 10_000

The trained ensemble loads on its own; four lines load it and predict for one state, by each of the E members:

    import torch, mbrl_dynamics
    model = mbrl_dynamics.load_model("runs/HalfCheetah-v5__mbrl_dynamics__1__1700000000/model.pt")
    obs, action = torch.zeros(model.obs_dim), torch.ones(model.action_dim)
    next_obs, reward, terminated = model.predict(*(x.expand(model.ensemble_size, 1, -1) for x in (obs, action)))

What to expect: on HalfCheetah-v5 the defaults (20,000 random steps, 5,000 gradient steps, a minute on two idle cores)
reach a held-out MSE of 0.017 and an R² of 0.986 (seed 1); predicted open loop, the error is 6 % of the variance after 5
steps and 13 % after 15, where "nothing changes" is off by 160 %.

Every logged tag (TensorBoard and metrics.csv; the step is the number of gradient steps):

    charts/episodic_return      mean return of the collected episodes, at step 0
    charts/episodic_length      mean length of the collected episodes, at step 0
    charts/SPS                  gradient steps per second, the first ten left out as warm-up
    time/env_s                  seconds spent on collecting data
    time/train_s                seconds spent on gradient steps
    model/train_loss            loss of equation 2 or 3 (and the cross-entropy, if learned), mean over the members
    model/holdout_mse           one-step MSE in normalised units on held-out episodes, mean over the members
    model/disagreement          std over the members of the same prediction, mean over held-out data and dimensions
    model/r2                    R² of the ensemble's mean one-step prediction, mean over dimensions that change
    model/r2_{dim}              the same for one dimension of Δs; to predict its mean scores 0, perfect is 1
    model/reward_mse            error of the learned reward in units of its variance (learned reward only)
    model/termination_accuracy  share of held-out steps of which it is predicted rightly (learned reward only)
    model/open_loop_mse_{h}     error after h steps of open-loop prediction, in units of each dimension's variance
    model/open_loop_baseline_{h}  the same error for the prediction that nothing changes
    pictures/loss_curve         training loss and held-out error against gradient steps
    pictures/predictions        true trajectory and every member's open-loop prediction for the first dimensions

Where this deviates from the papers, and why:

1. Normalised targets (PDDM, MBMF do; PETS does not): each dimension of Δs weighs the same, whatever its unit.
2. Batches are drawn with replacement, not by epochs: E shuffles of a growing buffer cost more than they buy.
3. The log-variance bounds are learned and regularised as in PETS, but each member has its own, with a share of the
   penalty (E members together have all of it), and weight decay is one number for all layers. Predictions (`predict`,
   open loop) use the mean of the Gaussian; drawing from it is a planner's business.
4. The six locomotion tasks of Gymnasium's MuJoCo suite keep the absolute position x in the observation (the reward of a
   planner is Δx/dt, which nobody can read from the standard observation). The model predicts its change too but never
   sees it as an input: physics does not depend on where the robot stands.

Papers: Nagabandi et al. 2018, MBMF, arXiv 1708.02596 (normalised Δs, input noise); Chua et al. 2018, PETS, arXiv
1805.12114 (probabilistic ensembles); Nagabandi et al. 2019, PDDM, arXiv 1909.11652 (ensembles with MPC).
"""

import copy
import csv
import importlib.util
import itertools
import json
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Activation = Literal["tanh", "relu", "silu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": F.relu, "silu": F.silu}
SCRIPT = Path(__file__).stem
HORIZONS = (1, 5, 15, 50)  # steps of open-loop prediction that are reported


@dataclass
class Args:
    exp_name: str = "mbrl_dynamics"
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
    log_dir: str = "runs"
    """folder that holds the run folders"""
    checkpoint_every: int = 5_000
    """steps between checkpoints: of the environment, or of the gradient in a fit that can be resumed"""
    resume: str | None = None
    """run folder to continue, with its own settings; those that shaped it so far cannot change"""
    env_id: str = "HalfCheetah-v5"
    """Gymnasium environment with Box observations and actions; module:EnvId imports the module first"""

    # Data
    num_envs: int = 8
    """environments stepped side by side"""
    initial_steps: int = 20_000
    """environment steps of the random policy, rounded up to a multiple of num_envs"""
    data: str | None = None
    """file of transitions (of --save-data) to use instead of what would be collected first"""
    save_data: str | None = None
    """file to write the collected transitions to"""
    holdout_ratio: float = 0.1
    """share of the transitions held out, in whole episodes, to measure the model on"""

    # Model
    ensemble_size: int = 5
    """members of the ensemble"""
    num_layers: int = 2
    """hidden layers of each network"""
    hidden_size: int = 256
    """units of each hidden layer"""
    activation: Activation = "silu"
    """nonlinearity of the hidden layers"""
    probabilistic: bool = False
    """predict mean and variance (Gaussian negative log-likelihood) instead of the mean alone (squared error)"""
    wrap_angles: bool = True
    """the network sees sine and cosine of angles that turn without limit (MuJoCo), not the angles"""
    reward: Literal["auto", "known", "learned"] = "auto"
    """known: by formula (the environment's batch_reward, batch_terminated); learned: predicted; auto: known if it is"""

    # Training
    train_steps: int = 5_000
    """gradient steps per fit"""
    eval_every: int = 100
    """steps between evaluations"""
    batch_size: int = 512
    """samples per gradient step (of an ensemble: per member)"""
    learning_rate: float = 1e-3
    """step size of Adam"""
    weight_decay: float = 0.0
    """L2 penalty on the weights, through Adam"""
    input_noise: float = 0.01
    """standard deviation of the Gaussian noise on the normalised inputs while training"""
    train_dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the matrix products in training; weights, optimiser and losses stay in float32"""


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


def check_args(args: Args) -> None:
    one = "num_threads checkpoint_every num_envs ensemble_size num_layers hidden_size train_steps eval_every batch_size"
    zero = {"seed": 0, "weight_decay": 0, "input_noise": 0}
    check_fields(args, dict.fromkeys(one.split(), 1) | zero | {"initial_steps": 2})
    require(0 < args.holdout_ratio < 1, f"--holdout-ratio must lie between 0 and 1, got {args.holdout_ratio}")
    check_data_paths(None if args.resume else args.data, args.save_data)
    require_package("matplotlib", "drawing the pictures")


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


def has_known_reward(env: gym.Env[Any, Any]) -> bool:
    """Does the environment itself say what reward and termination follow from (obs, action, next_obs)?"""
    return all(callable(getattr(env.unwrapped, name, None)) for name in ("batch_reward", "batch_terminated"))


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


class GaussianEnsemble(DynamicsModel):
    """Members that predict a Gaussian with diagonal covariance, trained by its likelihood."""

    outputs_per_target = 2  # mean and log-variance

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.max_logvar = nn.Parameter(torch.full((self.ensemble_size, 1, self.num_targets), 0.5))
        self.min_logvar = nn.Parameter(torch.full((self.ensemble_size, 1, self.num_targets), -10.0))

    def logvar(self, output: Tensor) -> Tensor:
        """Softly clamped (PETS, appendix A.1): outside the data a free variance would explode or collapse."""
        logvar = output[..., self.num_targets : 2 * self.num_targets]
        logvar = self.max_logvar - F.softplus(self.max_logvar - logvar)
        return self.min_logvar + F.softplus(logvar - self.min_logvar)

    def regression_loss(self, output: Tensor, target: Tensor) -> Tensor:  # (E, B, out), (E, B, targets) -> (E,)
        logvar = self.logvar(output)
        error = (output[..., : self.num_targets] - target).square()
        nll = error * torch.exp(-logvar) + logvar
        # Learned bounds must stay tight, but with more weight than this they close, and the variance is a constant.
        bounds = 0.01 / self.ensemble_size * (self.max_logvar - self.min_logvar)
        moves = self.target_normaliser.std > 0  # what has never moved says nothing of its variance, nor of the bounds
        return torch.where(moves, nll, error).mean(dim=(1, 2)) + torch.where(moves, bounds, 0).sum(dim=(1, 2))


def make_model(config: dict[str, Any]) -> DynamicsModel:
    shape = {name: value for name, value in config.items() if name != "probabilistic"}
    return GaussianEnsemble(**shape) if config["probabilistic"] else Ensemble(**shape)


def load_model(path: str | Path) -> DynamicsModel:
    """The trained ensemble of a run: `load_model("runs/.../model.pt")`."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model = make_model(saved["config"])
    model.load_state_dict(saved["model"])
    return model.requires_grad_(False)


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


# ----------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def one_step_metrics(model: DynamicsModel, x: Tensor, y: Tensor) -> dict[str, float]:
    """How well the ensemble predicts the next state of held-out transitions x (N, in), y (N, out)."""
    output, truth = model.mlp(x.expand(model.ensemble_size, -1, -1)), y[:, : model.num_targets]
    mean = output[..., : model.num_targets]  # (E, N, D), and one column more if the reward is learned
    square = (mean - truth).square()
    metrics = {"model/holdout_mse": square[..., : model.obs_dim].mean().item()}
    metrics["model/disagreement"] = mean[..., : model.obs_dim].std(dim=0, correction=0).mean().item()
    if model.learn_reward:
        metrics["model/reward_mse"] = square[..., -1].mean().item()
        metrics["model/termination_accuracy"] = ((output[..., -1] > 0) == (y[:, -1] > 0.5)).float().mean().item()
    # R² = 1 - residual / total sum of squares; a dimension that never changes has none to explain and is left out.
    residual = (mean.mean(dim=0) - truth).square().sum(dim=0)[: model.obs_dim]
    total = (truth - truth.mean(dim=0)).square().sum(dim=0)[: model.obs_dim]
    changing = (total > 1e-6 * len(truth)).nonzero()[:, 0].tolist()
    r2 = {dim: 1 - (residual[dim] / total[dim]).item() for dim in changing}
    if r2:
        metrics["model/r2"] = float(np.mean(list(r2.values())))
    return metrics | {f"model/r2_{dim}": value for dim, value in r2.items()}


@torch.no_grad()
def open_loop(model: DynamicsModel, obs: Tensor, action: Tensor) -> Tensor:
    """Predict from obs (B, D) through the actions (B, H, A), every member on its own: (E, B, H, D)."""
    states, state = [], obs.expand(model.ensemble_size, -1, -1)
    for step in range(action.shape[1]):
        state = model.predict(state, action[:, step].expand(model.ensemble_size, -1, -1))[0]
        states.append(state)
    return torch.stack(states, dim=2)


def windows(buffer: ReplayBuffer, rows: Tensor, horizon: int, most: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Up to `most` stretches of `horizon` steps within single episodes: obs (B, D), action and next_obs (B, H, ·)."""
    episode = buffer.episode[rows]  # rows are in order of episode and time
    last = episode[horizon - 1 :]
    starts = (episode[: len(last)] == last).nonzero()[:, 0]
    starts = starts[torch.linspace(0, len(starts) - 1, min(most, len(starts))).long()]
    index = rows[starts[:, None] + torch.arange(horizon, device=rows.device)]  # (B, H)
    return buffer.obs[index[:, 0]], buffer.action[index], buffer.next_obs[index]


def open_loop_metrics(model: DynamicsModel, buffer: ReplayBuffer, rows: Tensor, scale: Tensor) -> dict[str, float]:
    """Squared error after h steps in units of the observations' variance, against "nothing changes"."""
    metrics = {}
    for horizon in HORIZONS:
        obs, action, truth = windows(buffer, rows, horizon)
        if len(obs):  # episodes may all be shorter
            error = (open_loop(model, obs, action)[:, :, -1] - truth[:, -1]) / scale  # (E, B, D)
            metrics[f"model/open_loop_mse_{horizon}"] = error.square().mean().item()
            metrics[f"model/open_loop_baseline_{horizon}"] = ((obs - truth[:, -1]) / scale).square().mean().item()
    return metrics


def summary(metrics: dict[str, float]) -> str:
    text = f"one step   held-out MSE {metrics['model/holdout_mse']:.4f}"
    if "model/r2" in metrics:
        worst = min((tag for tag in metrics if tag.startswith("model/r2_")), key=lambda tag: metrics[tag])
        text += f", R² {metrics['model/r2']:.4f} (worst: {worst} {metrics[worst]:.4f})"
    for horizon in HORIZONS:
        if f"model/open_loop_mse_{horizon}" in metrics:
            error, baseline = (metrics[f"model/open_loop_{name}_{horizon}"] for name in ("mse", "baseline"))
            text += f"\nopen loop  {horizon:2d} steps: {error:.3g} of the variance (nothing changes: {baseline:.3g})"
    return text


def draw_loss_curve(history: dict[str, list[tuple[int, float]]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="gradient step", ylabel="error in normalised units")
    for tag, label in (
        ("model/train_loss", "training loss, all outputs"),
        ("model/holdout_mse", "held-out MSE of the state"),
    ):
        axes.plot(*zip(*history[tag], strict=True), label=label)
    if min(value for _, value in history["model/train_loss"]) > 0:  # a likelihood may be negative
        axes.set_yscale("log")
    axes.set_title(f"Dynamics model: held-out MSE {history['model/holdout_mse'][-1][1]:.4f}")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_predictions(model: DynamicsModel, buffer: ReplayBuffer, rows: Tensor, scale: Tensor) -> Any:
    """The first held-out stretch: what happened (black) and what each member thought would happen."""
    from matplotlib.figure import Figure

    lengths = [horizon for horizon in HORIZONS if len(windows(buffer, rows, horizon, 1)[0])]
    obs, action, truth = windows(buffer, rows, lengths[-1], 1)
    predicted = torch.cat([obs.expand(model.ensemble_size, 1, -1), open_loop(model, obs, action)[:, 0]], dim=1).cpu()
    true = torch.cat([obs, truth[0]]).cpu()  # (H + 1, D)
    error = ((predicted - true) / scale.cpu())[:, 1:].square().mean().item()
    shown = min(6, model.obs_dim)
    figure = Figure(figsize=(10, 2.2 * -(-shown // 2) + 0.6), layout="constrained")
    for dim, axes in enumerate(figure.subplots(-(-shown // 2), 2, sharex=True, squeeze=False).flat[:shown]):
        members = predicted[..., dim]  # (E, H + 1)
        axes.fill_between(range(len(true)), members.amin(0), members.amax(0), color="C0", alpha=0.2)
        axes.plot(members.T, color="C0", linewidth=0.8, label=["members", *[None] * (len(members) - 1)])
        axes.plot(true[:, dim], color="black", linewidth=1.6, label="true")
        spread = (true[:, dim].max() - true[:, dim].min()).clamp(min=0.5 * float(scale[dim]))
        axes.set_ylim(true[:, dim].min() - spread, true[:, dim].max() + spread)  # a diverging member leaves the picture
        axes.set_ylabel(f"dimension {dim}")
    figure.supxlabel("steps predicted open loop")
    figure.suptitle(f"Open-loop prediction over {len(true) - 1} steps: mean squared error {error:.3g} (in variances)")
    figure.axes[0].legend(loc="upper right", fontsize="small")
    return figure


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


def save_picture(log: Logger, tag: str, figure: Any, step: int) -> None:
    figure.savefig(log.run_dir / f"{tag.split('/')[-1]}.png", dpi=100)
    log.writer.add_figure(tag, figure, step)


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
MAY_CHANGE |= {"train_steps", "save_data"}


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


def load_checkpoint(args: Args) -> dict[str, Any]:
    """The checkpoint of the run to resume, after checking that it is one and that the settings still fit it."""
    assert args.resume is not None
    saved_args = asdict(load_args(args.resume))
    for name, value in asdict(args).items():
        was = saved_args[name]
        message = f"--{name.replace('_', '-')} was {was} in {args.resume} and cannot change to {value}"
        require(name in MAY_CHANGE or value == was, message)
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


def collect(args: Args, envs: VectorEnv, buffer: ReplayBuffer, checkpointer: Checkpointer) -> None:
    """Fill the buffer with random actions."""
    progress = checkpointer.progress
    bar = tqdm(total=buffer.capacity, initial=buffer.size, desc="collect", unit="step", disable=args.data is not None)
    while buffer.size < buffer.capacity:
        begin = time.perf_counter()
        obs, episode, action = envs.obs, envs.episode, envs.random_action()
        next_obs, reward, terminated = envs.step(action)
        buffer.add(obs=obs, action=action, next_obs=next_obs, reward=reward, terminated=terminated, episode=episode)
        progress["episodes"] += envs.finished
        progress["env_s"] += time.perf_counter() - begin
        bar.update(args.num_envs)
        checkpointer.step(due=buffer.size % args.checkpoint_every < args.num_envs)
    bar.close()


def fit(args: Args, model: DynamicsModel, optimizer: torch.optim.Optimizer, train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor], log: Logger, checkpointer: Checkpointer) -> None:  # fmt: skip
    """Gradient steps up to `train_steps`, with the held-out error along the way."""
    progress, dtype = checkpointer.progress, getattr(torch, args.train_dtype)
    pending: list[Tensor] = []
    durations: list[float] = []
    bar = tqdm(total=args.train_steps, initial=progress["step"], desc="train", unit="step")
    while progress["step"] < args.train_steps:
        begin = time.perf_counter()
        progress["step"] = step = progress["step"] + 1
        pending.append(train_step(model, optimizer, *train, args.batch_size, args.input_noise, dtype))
        evaluate, save = step % args.eval_every == 0 or step == args.train_steps, step % args.checkpoint_every == 0
        if evaluate or save or checkpointer.signal or len(pending) == 50:  # not at every step: reading makes a GPU wait
            losses = torch.stack(pending).cpu()  # (steps, E)
            check_finite({"model/train_loss": losses}, model, step, checkpointer.run_dir)
            for at, loss in enumerate(losses.mean(dim=1).tolist(), step - len(pending) + 1):
                log.scalars({"model/train_loss": loss}, at)
            pending.clear()
        durations.append(time.perf_counter() - begin)
        progress["train_s"] += durations[-1]
        bar.update()
        if evaluate:
            metrics = one_step_metrics(model, *test)
            metrics["charts/SPS"] = 1 / float(np.mean(durations[10:] or durations))  # the first ten warm up
            log.scalars(metrics, step)
            bar.set_postfix(loss=f"{loss:.4f}", holdout=f"{metrics['model/holdout_mse']:.4f}")
        if not pending:  # a signal that came since then waits for the next step: nothing is saved unread
            checkpointer.step(due=save)
    bar.close()


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
    envs = VectorEnv(args.env_id, args.num_envs, args.seed)
    obs_dim, action_dim = envs.obs.shape[1], gym.spaces.flatdim(envs.action_space)
    known = has_known_reward(envs.envs[0])
    require(known or args.reward != "known", f"--reward known: {args.env_id} has no batch_reward and batch_terminated")
    data = load_data(args.data, args.env_id, obs_dim, action_dim) if args.data and not checkpoint else None
    capacity = len(data["obs"]) if data else -(-args.initial_steps // args.num_envs) * args.num_envs
    buffer = ReplayBuffer(checkpoint["buffer"]["capacity"] if checkpoint else capacity, obs_dim, action_dim, device)
    if data:
        buffer.add(**data)
    config = {"obs_dim": obs_dim, "action_dim": action_dim, "skip": hidden_positions(envs.envs[0])}
    config |= {"ensemble_size": args.ensemble_size, "num_layers": args.num_layers, "hidden_size": args.hidden_size}
    config |= {"activation": args.activation, "probabilistic": args.probabilistic}
    config |= {"learn_reward": args.reward == "learned" or not known}
    config |= {"angles": free_angles(envs.envs[0], envs.obs[0]) if args.wrap_angles else []}
    model = make_model(config).to(device)
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay)

    run_dir = Path(args.resume) if args.resume else new_run_dir(args)
    progress: dict[str, Any] = {"step": 0, "episodes": [], "seconds": 0.0, "env_s": 0.0, "train_s": 0.0}
    parts = {"model": model, "optimizer": optimizer, "buffer": buffer, "envs": envs}
    with Checkpointer(run_dir, progress, parts) as checkpointer:
        if checkpoint:
            checkpointer.restore(checkpoint)
            done = progress["step"]
            require(done <= args.train_steps, f"--train-steps {args.train_steps}: {run_dir} has already trained {done}")
        log = Logger(run_dir, args, progress["step"] if checkpoint else None)
        print(f"{run_dir}: reward and termination {'learned' if config['learn_reward'] else 'known'}, device {device}")
        collect(args, envs, buffer, checkpointer)
        check_data(buffer.columns(), args.env_id)
        if args.save_data:
            save_file(Path(args.save_data), {"env_id": args.env_id, **buffer.columns()})

        # Train on whole episodes, measure on others.
        train_rows, test_rows = split_episodes(buffer.episode, args.holdout_ratio, args.seed)
        print(f"{len(train_rows)} transitions to train on, {len(test_rows)} in held-out episodes")
        train = model.regression_data(buffer, train_rows, fit=progress["step"] == 0)
        test = model.regression_data(buffer, test_rows)
        if progress["episodes"]:
            mean_return, mean_length = np.mean(progress["episodes"], axis=0).tolist()
            log.scalars({"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}, 0)
        fit(args, model, optimizer, train, test, log, checkpointer)

        # Say what the model is worth.
        scale = Normaliser(obs_dim).to(device)
        scale.fit(buffer.obs[train_rows])
        metrics = one_step_metrics(model, *test) | open_loop_metrics(model, buffer, test_rows, scale.std)
        metrics |= {"time/env_s": progress["env_s"], "time/train_s": progress["train_s"]}
        log.scalars(metrics, progress["step"])
        save_picture(log, "pictures/loss_curve", draw_loss_curve(log.history), progress["step"])
        predictions = draw_predictions(model, buffer, test_rows, scale.std)
        save_picture(log, "pictures/predictions", predictions, progress["step"])
        save_file(run_dir / "model.pt", {"config": config, "model": model.state_dict()})
        checkpointer.save()
    metrics["minutes"] = progress["seconds"] / 60
    log.close(metrics)
    print(summary(metrics))
    return metrics


if __name__ == "__main__":
    main(parse_args())
