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
r"""Advantage actor-critic (A2C): the policy gradient with a learned baseline, in many environments at once.

The policy π draws an action, the critic V says what to expect, and the policy is pushed towards actions that turned out
better than expected, by as much as their advantage A says:

    ∇ E[return] ≈ E[ Σ_t ∇ log π(a_t|s_t) A_t ]                                                                     (1)
    δ_t = r_t + γ (1 - terminated_t) V(s_t+1) - V(s_t),   A_t = δ_t + γ λ (1 - done_t) A_t+1                        (2)
    critic: (V(s_t) - target_t)²,   target_t = A_t + V(s_t) with the V before the update                            (3)

Equation 2 is generalised advantage estimation (GAE): λ = 0 trusts the critic, λ = 1 what was really earned up to the
end of the episode or batch, which is noisier. Equation 1 is exact for whole episodes that terminate, with γ = λ = 1;
otherwise there is less noise, and some bias. Done is terminated or truncated: at a time limit the sum over δ stops, but
V of the state that was reached still counts. The end of a batch is such an end, too. `--gae-lambda None` is λ = 1: then
A is the return minus V, and two flags weaken it. `--no-use-baseline` leaves V out (the return then ends with the batch,
which should hold whole episodes), and with `--no-reward-to-go` an action answers not only for what comes after it, but
for all that was earned from the first step of the batch or episode on.

Pseudocode:

    for each update:
        batch_size / num_envs times:  u ~ N(μ(x), σ²),  step every environment with the action that u stands for
        the spread of returns <- the batch;  A, targets <- equation 2 with the critic as it is;  standardise A
        one gradient step (Adam) on -log π(u|x) A - entropy_weight · entropy;  baseline_steps of them on equation 3
        the means and spreads of observations <- the batch

where x is the standardised observation, rewards are divided by the spread of the discounted return so far (both are cut
off at ±10), and u in [-1, 1] stands for the range of the actions (outside it is clipped, but only on its way to the
environment). The means and spreads of observations are part of the policy: without them a saved policy is worth
nothing. The spread of the returns is saved with it for those who train on.

Expect 3,100 ± 550 on HalfCheetah-v5 after a million steps (mean ± standard deviation of five seeds), in 1.6 minutes on
one core of a server from 2023, and 1,000 on InvertedPendulum-v5 with `--total-timesteps 100_000`, after 40,000 of them.

Usage:

    python a2c.py --env-id HalfCheetah-v5
    python a2c.py --env-id Ant-v5 --total-timesteps 1_000_000 --save-policy ant.pt      # `load_policy` reads it
    python a2c.py --env-id Pendulum-v1 --gae-lambda None --no-use-baseline --no-normalize-advantages \
        --batch-size 3_200 --no-anneal --total-timesteps 320_000     # REINFORCE: so noisy that it learns nothing here
    python a2c.py --resume RUN_DIR                             # go on exactly where it stopped
    python a2c.py --resume RUN_DIR --eval-only                 # the evaluation of that run again

Every logged tag (TensorBoard and metrics.csv; the step is the number of environment steps):

    charts/episodic_return      return of the training episodes that ended in the last batch, mean
    charts/episodic_length      their length
    charts/SPS                  environment steps per second since the last log, everything included, first one left out
    eval/episodic_return        mean return of the evaluation episodes, acting by the policy's mean
    eval/episodic_return_std    their standard deviation (ddof=1)
    eval/episodic_length        their mean length
    losses/policy_loss          equation 1's loss minus the entropy's bonus, of the last batch, as are the following
    losses/value_loss           equation 3 before its gradient steps, in units of the scaled rewards (with a baseline)
    losses/entropy              of the policy, in nats
    losses/explained_variance   1 - var(target - V) / var(target); 1: V agrees with its targets, which are partly
                                made of V, the less the nearer λ is to 1 (with a baseline)
    time/minutes                minutes since the beginning, over all sessions of a resumed run
    time/share_env              share of the time since the last log in acting and in the environments
    time/share_updates          in advantages and gradient steps
    time/share_other            in evaluation, logging and checkpoints

Deviations: GAE instead of n-step returns, standardised advantages and observations, rewards divided by the spread of
the returns, Adam instead of a shared RMSprop, larger batches (total_timesteps is rounded up to whole ones), several
steps of the critic, no entropy bonus; the means and spreads of observations change between batches, not within them, so
that a batch is trained on as it was seen.

Papers: Mnih et al. 2016, A3C, arXiv 1602.01783 (A2C is its synchronous form); Schulman et al. 2016, GAE, arXiv
1506.02438 (equation 2: its 11 to 16); Sutton et al. 1999 (equation 1); Andrychowicz et al. 2021, what matters in
on-policy RL, arXiv 2006.05990 (the small last layer, the normalisations).
"""

import copy
import csv
import importlib.util
import itertools
import json
import math
import os
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Activation = Literal["tanh", "relu", "silu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": F.relu, "silu": F.silu}
SCRIPT = Path(__file__).stem
LOG_EVERY = 10_000  # steps between logs of losses and speed


@dataclass
class Args:
    exp_name: str = "a2c"
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
    checkpoint_every: int = 100_000
    """steps between checkpoints: of the environment, or of the gradient in a fit that can be resumed"""
    resume: str | None = None
    """run folder to continue, with its own settings; those that shaped it so far cannot change"""
    eval_only: bool = False
    """only evaluate the run given by --resume; of a finished one: its last evaluation again, on the same seeds"""
    save_policy: str | None = None
    """file to write the trained policy to at the end"""
    env_id: str = "HalfCheetah-v5"
    """Gymnasium environment with Box observations and actions; module:EnvId imports the module first"""
    max_episode_steps: int | None = None
    """time limit of an episode; None leaves the environment's own"""

    # Data
    total_timesteps: int = 1_000_000
    """environment steps"""
    num_envs: int = 8
    """environments stepped side by side"""
    batch_size: int = 1_024
    """samples per gradient step (of an ensemble: per member)"""
    normalize_obs: bool = True
    """standardise the observations by their mean and spread so far"""
    scale_rewards: bool = True
    """divide the rewards by the spread of the discounted return so far"""
    eval_every: int = 50_000
    """steps between evaluations"""
    eval_episodes: int = 10
    """episodes of the last evaluation, side by side"""
    interim_episodes: int = 3
    """episodes of the evaluations before the last"""

    # Networks
    num_layers: int = 2
    """hidden layers of each network"""
    hidden_size: int = 64
    """units of each hidden layer"""
    activation: Activation = "tanh"
    """nonlinearity of the hidden layers"""
    initial_std: float = 0.6
    """the policy's spread before it is trained, in half-ranges of the actions"""

    # Algorithm
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float | None = 0.95
    """λ of equation 2; None: 1, with which the next two may be switched off"""
    reward_to_go: bool = True
    """an action answers for what was earned from it on, not from the first step of the batch or episode on"""
    use_baseline: bool = True
    """learn V and subtract it"""
    baseline_steps: int = 20
    """gradient steps of the critic for each batch"""
    normalize_advantages: bool = True
    """standardise the advantages of each batch"""
    entropy_weight: float = 0.0
    """bonus for the policy's entropy"""
    learning_rate: float = 3e-3
    """step size of Adam"""
    anneal: bool = True
    """let the step size fall to zero, linearly, over total_timesteps"""
    max_grad_norm: float = 0.5
    """gradients longer than this are shortened to it"""


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
    one = "num_threads checkpoint_every max_episode_steps total_timesteps num_envs batch_size eval_every eval_episodes"
    one += " interim_episodes num_layers hidden_size baseline_steps"
    zero = "seed entropy_weight"
    check_fields(args, dict.fromkeys(one.split(), 1) | dict.fromkeys(zero.split(), 0))
    require(0 <= args.gamma <= 1, f"--gamma must lie in [0, 1], got {args.gamma}")
    lam = args.gae_lambda
    require(lam is None or 0 <= lam <= 1, f"--gae-lambda must lie in [0, 1] or be None, got {lam}")
    whole = lam is None or lam == 1
    require(whole or args.use_baseline, "--no-use-baseline goes with --gae-lambda 1: less puts V for later rewards")
    require(whole or args.reward_to_go, "--no-reward-to-go goes with --gae-lambda 1: less counts from t on")
    for flag, value in (("--initial-std", args.initial_std), ("--max-grad-norm", args.max_grad_norm)):
        require(0 < value < math.inf, f"{flag} must be positive, got {value}")
    uneven = f"--batch-size {args.batch_size} must be a multiple of --num-envs {args.num_envs}, and larger than 1"
    require(args.batch_size % args.num_envs == 0 and args.batch_size > 1, uneven)
    few = f"--batch-size {args.batch_size} is more than --total-timesteps {args.total_timesteps}"
    require(args.batch_size <= args.total_timesteps, few)
    require(args.resume is not None or not args.eval_only, "--eval-only needs --resume RUN_DIR: the run to evaluate")
    if args.save_policy is not None:
        path = Path(args.save_policy).resolve()
        writable = not path.is_dir() and os.access(path.parent, os.W_OK)
        require(writable, f"--save-policy {args.save_policy}: cannot write such a file")
    if args.capture_video:
        check_video(args.env_id)


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


# ----------------------------------------------------------------------------------------------------------- data


class RunningNormaliser(nn.Module):
    """x -> (x - mean) / spread of all x so far (N, D), within ±10. Both are buffers: a saved policy has them, too."""

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Chan et al. 1983: the mean and variance of two sets together, from theirs."""
        x = x.double()
        var, mean = torch.var_mean(x, dim=0, correction=0)
        total, change = self.count + len(x), mean - self.mean
        both = self.var * self.count + var * len(x) + change.square() * self.count * len(x) / total
        self.mean += change * len(x) / total
        self.var.copy_(both / total)
        self.count.copy_(total)

    def spread(self) -> Tensor:
        return (self.var + 1e-8).sqrt().float()

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean.float()) / self.spread()).clamp(-10, 10)


# ------------------------------------------------------------------------------------------------------- networks


class ActivationLayer(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.function = ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def orthogonal_mlp(sizes: list[int], activation: str, last_gain: float) -> nn.Sequential:
    layers = list[nn.Module]()
    for number, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes), 2):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.orthogonal_(linear.weight, last_gain if number == len(sizes) else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear, ActivationLayer(activation)]
    return nn.Sequential(*layers[:-1])


class GaussianPolicy(nn.Module):
    """A Gaussian whose mean depends on the standardised observation; its unit is half the range of an action."""

    low: Tensor
    high: Tensor

    def __init__(self, obs_dim: int, low: Tensor, high: Tensor, args: Args):
        super().__init__()
        hidden = [args.hidden_size] * args.num_layers
        self.normaliser = RunningNormaliser(obs_dim) if args.normalize_obs else nn.Identity()
        self.mean = orthogonal_mlp([obs_dim, *hidden, len(low)], args.activation, last_gain=0.01)
        self.log_std = nn.Parameter(torch.full((len(low),), math.log(args.initial_std)))
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def action(self, u: Tensor) -> Tensor:
        """What u in [-1, 1] stands for, between low and high."""
        return self.low + (u.clamp(-1, 1) + 1) / 2 * (self.high - self.low)

    def mode(self, obs: Tensor) -> Tensor:
        return self.action(self.mean(self.normaliser(obs.float())))

    def sample(self, x: Tensor) -> Tensor:  # (B, D) -> (B, A)
        mean: Tensor = self.mean(x)
        return mean + self.log_std.exp() * torch.randn_like(mean)

    def log_prob(self, x: Tensor, u: Tensor) -> Tensor:  # (..., D), (..., A) -> (...)
        z = (u - self.mean(x)) * (-self.log_std).exp()
        return (-0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(dim=-1)

    def entropy(self) -> Tensor:
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()


class ActorCritic(nn.Module):
    """Policy, critic, and the spread of the returns; the policy acts without the other two."""

    running_return: Tensor

    def __init__(self, obs_dim: int, low: Tensor, high: Tensor, args: Args):
        super().__init__()
        hidden = [args.hidden_size] * args.num_layers
        self.policy = GaussianPolicy(obs_dim, low, high, args)
        self.critic = orthogonal_mlp([obs_dim, *hidden, 1], args.activation, last_gain=1.0)
        self.returns = RunningNormaliser(1)
        self.register_buffer("running_return", torch.zeros(args.num_envs))

    def value(self, x: Tensor) -> Tensor:  # (..., D) -> (...)
        found: Tensor = self.critic(x)[..., 0]
        return found


# ------------------------------------------------------------------------------------------------------ algorithm


@dataclass
class Batch:
    """T steps of N environments."""

    obs: Tensor  # (T, N, D)
    u: Tensor  # (T, N, A)
    next_obs: Tensor  # (T, N, D)
    reward: Tensor  # (T, N), as are the following
    terminated: Tensor
    done: Tensor


@torch.no_grad()
def rollout(
    policy: GaussianPolicy, envs: VectorEnv, skip: int, steps: int, device: torch.device
) -> tuple[Batch, list[tuple[float, int]]]:
    """The batch, and return and length of the episodes that ended in it."""
    rows: list[tuple[Tensor, ...]] = []
    finished = []
    for _ in range(steps):
        obs, episode = torch.from_numpy(envs.obs[:, skip:]).to(device), envs.episode
        u = policy.sample(policy.normaliser(obs))
        next_obs, reward, terminated = envs.step(policy.action(u).cpu().numpy())
        seen = (next_obs[:, skip:], reward.astype(np.float32), terminated, envs.episode != episode)
        rows.append((obs, u, *(torch.from_numpy(each).to(device) for each in seen)))
        finished += envs.finished
    return Batch(*(torch.stack(column) for column in zip(*rows, strict=True))), finished


def scale_rewards(agent: ActorCritic, batch: Batch, gamma: float) -> Tensor:
    """Rewards over the spread of the discounted return, which runs on from batch to batch: (T, N)."""
    seen = []
    for reward, done in zip(batch.reward, batch.done, strict=True):
        agent.running_return.mul_(gamma).add_(reward)
        seen.append(agent.running_return.clone())
        agent.running_return.mul_(~done)
    agent.returns.update(torch.cat(seen)[:, None])
    return (batch.reward / agent.returns.spread()).clamp(-10, 10)


def advantages(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor, gamma: float,
    gae_lambda: float | None, reward_to_go: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Equation 2 and the critic's targets, all of them (T, N). The end of the batch is a time limit.

    Without a baseline the values are zeros.
    """
    goes_on = gamma * (~terminated) * next_value
    # With λ = 1 equation 2 is the discounted return minus V; where the batch ends before the episode, V stands for it.
    lam = 1.0 if gae_lambda is None else gae_lambda
    delta, ahead = reward + goes_on - value, torch.zeros_like(reward[0])
    advantage = torch.empty_like(reward)
    for t in reversed(range(len(reward))):
        ahead = delta[t] + gamma * lam * (~done[t]) * ahead
        advantage[t] = ahead
    target = advantage + value
    if not reward_to_go:  # every step gets the return of its episode's first step in the batch
        whole = target.clone()
        for t in range(1, len(reward)):
            whole[t] = torch.where(done[t - 1], target[t], whole[t - 1])
        advantage = whole - value
    return advantage, target


def update(
    agent: ActorCritic, optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer], batch: Batch, args: Args
) -> dict[str, Tensor]:
    """The spread of the returns learns of the batch; one gradient step of the policy and some of the critic; then the
    normaliser of observations learns of it."""
    policy, (policy_optimizer, critic_optimizer) = agent.policy, optimizers
    with torch.no_grad():
        x, next_x = policy.normaliser(batch.obs), policy.normaliser(batch.next_obs)
        reward = scale_rewards(agent, batch, args.gamma) if args.scale_rewards else batch.reward
        zeros = torch.zeros_like(reward)
        value, next_value = (agent.value(x), agent.value(next_x)) if args.use_baseline else (zeros, zeros)
        ends = batch.terminated, batch.done
        advantage, target = advantages(reward, value, next_value, *ends, args.gamma, args.gae_lambda, args.reward_to_go)
        if args.normalize_advantages:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)

    entropy = policy.entropy()
    policy_loss = -(policy.log_prob(x, batch.u) * advantage).mean() - args.entropy_weight * entropy
    policy_optimizer.zero_grad()
    policy_loss.backward()
    nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
    policy_optimizer.step()

    for _ in range(args.baseline_steps if args.use_baseline else 0):
        value_loss = (agent.value(x) - target).square().mean()
        critic_optimizer.zero_grad()
        value_loss.backward()
        nn.utils.clip_grad_norm_(agent.critic.parameters(), args.max_grad_norm)
        critic_optimizer.step()
    if isinstance(policy.normaliser, RunningNormaliser):
        policy.normaliser.update(batch.obs.flatten(0, 1))
    losses = {"losses/policy_loss": policy_loss.detach(), "losses/entropy": entropy.detach()}
    if args.use_baseline:
        losses["losses/value_loss"] = (value - target).square().mean()
        losses["losses/explained_variance"] = 1 - (target - value).var() / target.var().clamp(min=1e-8)
    return losses


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


# ----------------------------------------------------------------------------------------------------- evaluation


def write_video(frames: list[Any], path: Path, fps: int) -> None:
    from moviepy.video.io.ImageSequenceClip import ImageSequenceClip

    path.parent.mkdir(parents=True, exist_ok=True)
    ImageSequenceClip(frames, fps=fps).write_videofile(str(path), logger=None)


def describe(metrics: dict[str, float], returns: list[float]) -> str:
    mean, std = metrics["eval/episodic_return"], metrics["eval/episodic_return_std"]
    each = ", ".join(f"{value:.0f}" for value in returns[:20]) + ", .." * (len(returns) > 20)
    return f"return {mean:.1f} ± {std:.1f} ({each})" if len(returns) > 1 else f"return {mean:.1f}"


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


# Differs: the policy acts, and that is all
@torch.no_grad()
def evaluate(
    args: Args, policy: GaussianPolicy, episodes: int, device: torch.device, video: Path | None
) -> tuple[dict[str, float], list[float]]:
    """Whole episodes, acting by the mean, on the same seeds each time, none of them trained on."""
    seed = args.seed + 1_000_000
    obs, _, _, returns, _ = run_episodes(
        policy.mode, args.env_id, episodes, seed, device, args.max_episode_steps, video
    )
    metrics = {"eval/episodic_return": returns.mean().item(), "eval/episodic_length": len(obs) / episodes}
    metrics["eval/episodic_return_std"] = returns.std(ddof=1).item() if episodes > 1 else 0.0
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


class Stopwatch:
    """Where the time goes: `lap(tag)` books what has passed since the last lap."""

    def __init__(self, step: int):
        self.seconds: dict[str, float] = defaultdict(float)
        self.last, self.step, self.warm = time.perf_counter(), step, False

    def lap(self, tag: str) -> None:
        now = time.perf_counter()
        self.seconds[tag] += now - self.last
        self.last = now

    def read(self, step: int) -> dict[str, float]:
        """Shares of the time and speed since the last reading."""
        total = sum(self.seconds.values())
        found = {tag: seconds / total for tag, seconds in self.seconds.items()}
        if self.warm:
            found["charts/SPS"] = (step - self.step) / total
        self.seconds, self.step, self.warm = defaultdict(float), step, True
        return found


MAY_CHANGE = {"resume", "num_threads", "cuda", "track", "wandb_project_name", "wandb_entity", "checkpoint_every"}
MAY_CHANGE |= {"save_policy", "eval_only", "eval_episodes", "capture_video"}


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


# Differs: a policy needs its means and spreads, and is made anew from its sizes
def save_policy(path: Path, args: Args, agent: ActorCritic, metrics: dict[str, float]) -> None:
    sizes = {"num_layers": args.num_layers, "hidden_size": args.hidden_size, "activation": args.activation}
    sizes["normalize_obs"] = args.normalize_obs
    contents = {"env_id": args.env_id, "policy": agent.policy.state_dict(), "sizes": sizes, "seed": args.seed}
    contents["returns"] = agent.returns.state_dict()
    save_file(path, contents | {"metrics": metrics, "max_episode_steps": args.max_episode_steps})


# Differs: its policy
def load_policy(path: str) -> GaussianPolicy:
    """What --save-policy wrote: `load_policy("ant.pt").mode(torch.as_tensor(obs)[None])[0].numpy()` acts."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    weights = saved["policy"]
    policy = GaussianPolicy(weights["mean.0.weight"].shape[1], weights["low"], weights["high"], Args(**saved["sizes"]))
    policy.load_state_dict(weights)
    return policy.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------- main


def passes(every: int, step: int, taken: int) -> bool:
    """Has a multiple of `every` been reached by the last `taken` steps?"""
    return step // every > (step - taken) // every


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
    check_time_limit(envs.envs[0], args.env_id)
    skip = hidden_positions(envs.envs[0])
    obs_dim = envs.obs.shape[1] - skip
    low, high = action_bounds(envs, args.env_id, device)
    agent = ActorCritic(obs_dim, low, high, args).to(device)
    policy_optimizer = torch.optim.Adam(agent.policy.parameters(), args.learning_rate, eps=1e-5, fused=True)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), args.learning_rate, eps=1e-5, fused=True)

    run_dir = Path(args.resume) if args.resume else new_run_dir(args)
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "metrics": {}}
    parts = {"agent": agent, "policy_optimizer": policy_optimizer, "critic_optimizer": critic_optimizer, "envs": envs}
    checkpointer = Checkpointer(run_dir, progress, parts)
    if checkpoint:
        checkpointer.restore(checkpoint)
        as_before = args.eval_only or args.eval_episodes == load_args(str(run_dir)).eval_episodes
        idle = f"--eval-episodes {args.eval_episodes}: {run_dir} has finished; evaluate it with --eval-only"
        require(as_before or progress["step"] < args.total_timesteps, idle)
    if args.eval_only:
        video = run_dir / "videos" / "eval_only.mp4" if args.capture_video else None
        again, returns = evaluate(args, agent.policy, args.eval_episodes, device, video)
        print(f"{run_dir}: {describe(again, returns)}")
        if args.save_policy:
            save_policy(Path(args.save_policy), args, agent, again)
        return again
    with checkpointer:
        log = Logger(run_dir, args, progress["step"] if checkpoint else None)
        print(f"{run_dir}: device {device}", flush=True)
        bar = tqdm(total=args.total_timesteps, initial=progress["step"], unit="step")
        watch = Stopwatch(progress["step"])
        while progress["step"] < args.total_timesteps:
            if args.anneal:
                left = 1 - progress["step"] / args.total_timesteps
                for optimizer in (policy_optimizer, critic_optimizer):
                    optimizer.param_groups[0]["lr"] = args.learning_rate * left
            batch, ended = rollout(agent.policy, envs, skip, args.batch_size // args.num_envs, device)
            watch.lap("time/share_env")
            losses = update(agent, (policy_optimizer, critic_optimizer), batch, args)
            watch.lap("time/share_updates")

            progress["step"] = step = progress["step"] + args.batch_size
            bar.update(args.batch_size)
            if ended:
                mean_return, mean_length = np.mean(ended, axis=0).tolist()
                log.scalars({"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}, step)
                bar.set_postfix({"return": f"{mean_return:.0f}"})
            finished, save = step >= args.total_timesteps, passes(args.checkpoint_every, step, args.batch_size)
            log_now, eval_now = (
                passes(every, step, args.batch_size) or finished for every in (LOG_EVERY, args.eval_every)
            )
            if log_now or eval_now or save or checkpointer.signal:
                means = {name: loss.item() for name, loss in losses.items()}
                check_losses(means | weight_size(agent), step, run_dir)  # what has not been checked is not saved
            if log_now:
                log.scalars(means | watch.read(step), step)
            if eval_now:
                video = run_dir / "videos" / f"{step}.mp4" if args.capture_video else None
                episodes = args.eval_episodes if finished else args.interim_episodes
                progress["metrics"], returns = evaluate(args, agent.policy, episodes, device, video)
                minutes = (progress["seconds"] + time.perf_counter() - checkpointer.started) / 60
                log.scalars(progress["metrics"] | {"time/minutes": minutes}, step)
                tqdm.write(f"{step} steps: {describe(progress['metrics'], returns)}")
            checkpointer.step(due=save or finished)
            watch.lap("time/share_other")
        bar.close()
        if args.save_policy:
            save_policy(Path(args.save_policy), args, agent, progress["metrics"])
    metrics: dict[str, float] = progress["metrics"] | {"minutes": progress["seconds"] / 60}
    log.close(metrics)
    return metrics


if __name__ == "__main__":
    main(parse_args())
