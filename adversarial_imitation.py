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
"""Adversarial imitation: a discriminator learns to tell the expert's steps from the policy's, SAC learns to fool it.

Behaviour cloning copies actions, and drifts where the expert never was. Here the policy acts in the environment, and is
paid for steps that could be the expert's: it finds its way back by itself. The true reward is not used, only logged.

SAC learns two values Q_1, Q_2 and a stochastic policy π that is paid for entropy at the price α (see mbpo_sac.py):

    y = r + γ (1 - terminated) (min_i Q'_i(s', a') - α log π(a'|s')),   a' ~ π(.|s')                                (1)
    critic:       Σ_i (Q_i(s, a) - y)²                  actor:  α log π(a|s) - min_i Q_i(s, a),   a ~ π(.|s)        (2)
    temperature:  -α (log π(a|s) + target_entropy)      target networks:  Q' <- Q' + τ (Q - Q')                     (3)

Here r is what the discriminator says of a step:

    D = sigmoid(logit), trained by   -log D on the expert's steps   - log(1 - D) on the policy's                    (4)
    GAIL:   logit = h(s, a)                     r = -log(1 - D) = softplus(logit)                                   (5)
    AIRL:   logit = f(s, a, s') - β log π(a|s)      r = f                                                           (6)
            f = g(s, a) + γ (1 - terminated) Φ(s') - Φ(s)                                                           (7)

In AIRL the policy's own density is part of the discriminator, so that at the optimum f / β is the expert's log density
(its advantage), and g, if it did not see the action, a reward that could be used elsewhere. SAC is rewarded with f and
not with f - β log π: its entropy term is the -β log π, and exp(f / β) is then what it plays. β is SAC's temperature α
times the spread by which the rewards are divided, so that SAC makes the mean logit as large as it can. In the paper β
is 1. Here the penalty keeps f from being much steeper than 1, so it cannot fall by much beside the expert's action, and
with β = 1 the entropy would outweigh it: noise would pay. (With f / β - log π and β = 0.1, which has the same optimum,
D was sure of nearly every step on HalfCheetah-v5: f is not steep, but f / β is.) In D log π is kept within ±max(5,
dimensions): the expert's actions may have hardly any density under another policy.

What happens after an episode has ended? If nothing is paid there, rewards that are positive (equation 5) teach it to
stay alive, whatever the expert does, and rewards that may be negative teach it to end quickly. So an episode that has
ended goes on in an absorbing state `end`, for expert and policy alike, and D judges that state, too. D's network sees
as many steps of the one as of the other, and no `end`. With p the share of the time limit that is spent in `end`,

    logit(end) = log(p_expert / p_policy);   all other logits:  + log((1 - p_expert) / (1 - p_policy))              (8)
    a step that ends the episode is paid  r + γ / (1 - γ) r(end), as if `end` went on for ever                      (9)

set that right (AIRL: f(end) = logit(end), and the other one is added to f). Both logarithms are kept within ±5. A share
of the policy's below 1e-3 counts as that, one of the expert's below 1e-5: where neither ever ends, ending must not pay.
AIRL's rewards, that of `end`, too, are shifted by their running mean: where all goes on for ever, that changes no
policy, and the values that the critics learn stay nearer to 0. With --no-absorbing nothing comes after the end, and
nothing is shifted. `--algo control` pays 1 for each step and learns nothing of the expert (whose return is only the
yardstick): where episodes can end, what it earns is what staying alive is worth, and no merit of imitation.

Pseudocode:

    demonstrations <- episodes of the expert
    for each environment step:
        a ~ π(.|s);  s <- environment step with a;  buffer <- buffer + transition   (initial_steps at random)
        every discriminator_every steps: one gradient step on equation 4 for a batch of each, plus
            10 max(0, |∇| - 1)², ∇ that of h or f, at random points between the two      (the gradient penalty)
        batch <- buffer, its rewards by equations 8, 5 or 6, and 9, over their running spread;  one step of SAC

Usage:

    python adversarial_imitation.py --algo gail                # imitates experts/HalfCheetah-v5.pt, if it is there
    python adversarial_imitation.py --algo airl --num-episodes 4
    python adversarial_imitation.py --env-id Hopper-v5 --algo control
    python adversarial_imitation.py --env-id HalfCheetah-v5 --minari-id mujoco/halfcheetah/expert-v0
    python adversarial_imitation.py --resume RUN_DIR                  # go on exactly where it stopped
    python adversarial_imitation.py --resume RUN_DIR --eval-only      # the evaluation of that run again
    python adversarial_imitation.py --resume RUN_DIR --eval-only --save-policy imitator.pt    # its actor, as a file

On HalfCheetah-v5 GAIL earned 10,160 after 500,000 steps, 0.91 of its expert's return, in 81 minutes on one core of two;
AIRL 10,222, 0.91 (--train-dtype bfloat16 --compile; one seed each).

Experts and data are those of bc_variants.py: a file of `mbpo_sac.py --save-policy` or of CleanRL's SAC, a Minari
dataset, or a file of --save-data or a dict of `observations`, `actions`, `mean_reward` and, if you like, `episode`
(whole numbers, an episode's rows in order; AIRL needs to know what follows what) and `terminated` (true in a row that
ended its episode); all of a file is used, first random steps, too. A dict without `terminated` is taken for an expert
whose episodes never end. An episode that the expert plays here counts as ended if it is shorter than the time limit (so
does one that the environment cuts short by itself before that).

Every logged tag (TensorBoard and metrics.csv; the step is the number of environment steps):

    charts/episodic_return      return (the environment's) of the training episodes that ended at this step
    charts/episodic_length      their length
    charts/SPS                  environment steps per second since the last log, everything included, first one left out
    eval/episodic_return        mean return (the environment's) of the evaluation episodes, acting by the policy's mean
    eval/episodic_return_std    their standard deviation (ddof=1)
    eval/episodic_length        their mean length
    eval/expert_fraction        the mean return over the expert's own; 0 where that is not positive, and says nothing
    losses/discriminator_loss   equation 4, mean over the gradient steps since the last log, as are the following
    losses/gradient_penalty     max(0, |∇ h| - 1)², or of f
    losses/expert_logit         of the expert's steps
    losses/policy_logit         of the policy's
    losses/reward_spread        running std of equation 5 or 6, by which rewards are divided (at least by 0.1)
    losses/reward_mean          running mean of equation 6, which is taken off; 0 for equation 5 and with --no-absorbing
    losses/absorbing_reward     r(end) of equation 9 before both; softplus(-4.6) or -4.6 where no episode ever ends
    losses/qf_loss              equation 2: SAC's critics
    losses/actor_loss           equation 2: SAC's actor
    losses/alpha                temperature
    losses/entropy              -log π(a|s), of actions scaled to [-1, 1]
    losses/qf_values            min_i Q_i, mean over the batch
    time/minutes                minutes since the beginning, over all sessions of a resumed run
    time/share_env              share of the time since the last log in acting and in the environment
    time/share_discriminator    in gradient steps of the discriminator
    time/share_updates          in gradient steps of actor and critic
    time/share_other            in evaluation, logging and checkpoints

(`--algo control` has nothing to log of the discriminator.)

Deviations: SAC instead of TRPO (some ten times fewer steps, as in DAC), and with it steps of recent, older policies for
D to judge, with the present one's log π in equation 6; equation 8 in place of a network's output; the penalty is on
slopes above 1 only (Gulrajani's pulls every slope to 1, up as well as down); rewards are scaled, and AIRL's shifted;
the expert that plays here plays its best guess, and so has no density; SAC's actor, critics and temperature step
together, by the weights before.

Papers: Ho and Ermon 2016, GAIL, arXiv 1606.03476 (equations 4, 5: its 15 to 18, its D is our 1 - D); Fu et al. 2018,
AIRL, arXiv 1710.11248 (equations 6, 7: its section 6); Kostrikov et al. 2019, DAC, arXiv 1809.02925 (off-policy,
absorbing states, the bias); Gulrajani et al. 2017, arXiv 1704.00028 (the penalty); Haarnoja et al. 2018, SAC, arXiv
1812.05905.
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
import shutil
import signal
import sys
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": F.relu}
SCRIPT = Path(__file__).stem
Transitions = tuple[Tensor, Tensor, Tensor, Tensor]  # obs (B, D), action (B, A), next_obs (B, D), terminated (B,)
LOG_EVERY = 1_000  # steps between logs of losses and speed


@dataclass
class Args:
    exp_name: str = "adversarial_imitation"
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
    checkpoint_every: int = 50_000
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

    # Expert
    expert: str | None = None
    """file of the expert's actor; None: experts/ENV_ID.pt, unless there is other data"""
    minari_id: str | None = None
    """Minari dataset to clone instead of a rolled-out expert (pip install "minari[hdf5,hf]")"""
    data: str | None = None
    """file of transitions (of --save-data) to use instead of what would be collected first"""
    num_episodes: int = 10
    """episodes of the expert, or of the Minari dataset (of --data: all)"""

    # Data
    total_timesteps: int = 1_000_000
    """environment steps"""
    num_envs: int = 1
    """environments stepped side by side"""
    initial_steps: int = 5_000
    """environment steps of the random policy, rounded up to a multiple of num_envs"""
    buffer_size: int = 1_000_000
    """most recent real transitions that are kept"""
    eval_every: int = 20_000
    """steps between evaluations"""
    eval_episodes: int = 10
    """episodes of the last evaluation, side by side"""
    interim_episodes: int = 3
    """episodes of the evaluations before the last"""

    # Discriminator
    algo: Literal["gail", "airl", "control"] = "gail"
    """what the policy is paid: equation 5, equation 6 or 1 for each step"""
    absorbing: bool = True
    """an ended episode goes on in an absorbing state: equations 8 and 9"""
    discriminator_every: int = 2
    """environment steps between gradient steps of the discriminator"""
    discriminator_learning_rate: float = 3e-4
    """step size of Adam for the discriminator"""
    discriminator_units: int = 128
    """units of each of the two hidden layers of the discriminator; AIRL's Φ has one such layer"""
    newest: int = 10_000
    """the policy's last steps, which the discriminator is trained on: older ones are another policy's"""
    gradient_penalty: float = 10.0
    """weight of the gradient penalty"""

    # Actor and critic
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """step of the target networks towards the critics"""
    batch_size: int = 256
    """samples per gradient step (of an ensemble: per member)"""
    learning_rate: float = 3e-4
    """step size of Adam"""
    units: int = 256
    """units of each of the two hidden layers of actor and critics"""
    alpha: float | None = None
    """fixed temperature; None adapts it so that the entropy meets target_entropy"""
    target_entropy: float | Literal["auto"] = "auto"
    """entropy that the temperature aims at, of actions scaled to [-1, 1]; auto: minus the number of dimensions"""
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


# Differs: the arguments do
def check_args(args: Args) -> None:
    one = "num_threads checkpoint_every max_episode_steps num_episodes total_timesteps num_envs eval_every"
    one += " eval_episodes interim_episodes units discriminator_every discriminator_units newest"
    zero = "seed alpha gradient_penalty"
    more = {"initial_steps": 2, "buffer_size": 2, "batch_size": 2}
    check_fields(args, dict.fromkeys(one.split(), 1) | dict.fromkeys(zero.split(), 0) | more)
    require(0 <= args.gamma < 1, f"--gamma must lie in [0, 1): the values are endless sums; got {args.gamma}")
    require(0 < args.tau <= 1, f"--tau must lie in (0, 1], got {args.tau}")
    rate = args.discriminator_learning_rate
    require(0 < rate < math.inf, f"--discriminator-learning-rate must be positive, got {rate}")
    target = args.target_entropy
    fine = target == "auto" or (not isinstance(target, str) and math.isfinite(target))
    require(fine, f"--target-entropy must be auto or a number, got {target}")
    few = f"--initial-steps {args.initial_steps} of --total-timesteps {args.total_timesteps}: nothing would be learned"
    require(args.initial_steps < args.total_timesteps, few)
    seldom = f"--discriminator-every {args.discriminator_every}: the discriminator would not learn in this run"
    times = args.total_timesteps // args.discriminator_every - args.initial_steps // args.discriminator_every
    require(args.algo == "control" or times > 0, seldom)
    require(args.resume is not None or not args.eval_only, "--eval-only needs --resume RUN_DIR: the run to evaluate")
    sources = [name for name in ("expert", "data", "minari_id") if getattr(args, name) is not None]
    two = " and ".join(f"--{name.replace('_', '-')}" for name in sources)
    require(len(sources) < 2, f"{two} are two sources: give one of them")
    fixed = "--target-entropy is for an --alpha that adapts itself, this one is fixed"
    require(target == "auto" or args.alpha is None, fixed)
    if args.data is not None and args.resume is None:
        require(Path(args.data).is_file(), f"--data {args.data}: there is no such file")
    if args.resume is None and args.data is None and args.minari_id is None:
        how = f"python mbpo_sac.py --env-id {args.env_id} --rollout-length 0 --utd-ratio 1 --total-timesteps 1_000_000"
        how += f" --save-policy {expert_path(args)}"
        folder = Path(expert_path(args)).parent
        how = how if folder.is_dir() else f"mkdir -p {folder} && {how}"
        make_env(args.env_id).close()  # a misspelt id has no expert, either
        require(Path(expert_path(args)).is_file(), f"--expert {expert_path(args)}: no such file; make it with: {how}")
    if args.minari_id is not None and args.resume is None:
        fine = re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", args.minari_id) is not None
        require(fine, f"--minari-id {args.minari_id}: an id looks like mujoco/halfcheetah/expert-v0")
        require_package("minari", "--minari-id")
    if args.save_policy is not None:
        path = Path(args.save_policy).resolve()
        writable = not path.is_dir() and os.access(path.parent, os.W_OK)
        require(writable, f"--save-policy {args.save_policy}: cannot write such a file")
    if args.capture_video:
        check_video(args.env_id)


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


# Differs: nothing is held out, and what follows what matters
class Demonstrations:
    """What to imitate: observations, the expert's actions there, and which episode each comes from."""

    def __init__(
        self, obs: Tensor, action: Tensor, episode: Tensor, expert_return: float, terminated: Tensor | None = None
    ):
        """`terminated`: True where the episode's last step terminated it. None: rows of who knows which episodes."""
        order = torch.sort(episode, stable=True).indices  # by episode, and by time within it
        self.obs, self.action, self.episode = obs[order].float(), action[order].float(), episode[order]
        self.expert_return, self.terminated = expert_return, terminated
        if terminated is not None:
            self.last = self.episode != torch.cat([self.episode[1:], self.episode[-1:] + 1])
            self.terminated = self.last & terminated[order].bool()

    def transitions(self) -> Transitions:
        """obs, action, next_obs, terminated. What followed an episode's last step is not kept: that step is left
        out, unless it terminated the episode."""
        if self.terminated is None:  # GAIL does not ask what came next
            return self.obs, self.action, self.obs, torch.zeros_like(self.obs[:, 0])
        rows = (~self.last | self.terminated).nonzero()[:, 0]
        following = torch.where(self.terminated[rows], rows, rows + 1)  # after an end nothing is looked at
        return self.obs[rows], self.action[rows], self.obs[following], self.terminated[rows].float()

    def absorbed(self, limit: int) -> float:
        """Share of the absorbing state if each episode goes on up to this limit, in it after its end."""
        if self.terminated is None:
            return 0.0
        _, index, counts = self.episode.unique(return_inverse=True, return_counts=True)
        steps = (limit - counts[index[self.terminated]]).clamp(min=0).sum().item()
        return steps / (limit * len(counts))

    def state_dict(self) -> dict[str, Any]:
        tensors = {"obs": self.obs, "action": self.action, "episode": self.episode, "terminated": self.terminated}
        return {**tensors, "expert_return": self.expert_return}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass  # it was made from the checkpoint


def check_data(columns: dict[str, Tensor], source: str) -> None:
    for name, column in columns.items():
        bad = (~torch.isfinite(column)).nonzero()
        if len(bad):
            where = f"row {bad[0, 0]}" + (f", dimension {bad[0, 1]}" if bad.shape[1] > 1 else "")
            fail(f"{source}: {name} has {len(bad)} non-finite values, the first in {where}")


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


# Differs: how an episode ended matters
def from_file(path: str, env_id: str, obs_dim: int, skip: int, action_dim: int) -> Demonstrations:
    """A file of --save-data (which keeps the positions that the environment hides), or observations and actions."""
    try:
        data = load_data_file(path)
        ours = "obs" in data
        obs, action = (
            torch.as_tensor(data[name]) for name in (("obs", "action") if ours else ("observations", "actions"))
        )
        source = data["env_id"] if ours else data.get("env_id", env_id)
        told = ours or "episode" in data
        episode = torch.as_tensor(data["episode"]) if told else torch.zeros(len(obs), dtype=torch.int64)
        reward = torch.as_tensor(data["reward"]) if ours else torch.tensor([float(data["mean_reward"])])
        terminated = torch.as_tensor(data["terminated"] if ours else data.get("terminated", np.zeros(len(obs))))
    except Exception as error:  # torch.load raises whatever the bytes happen to trigger
        fail(f"--data {path} holds neither --save-data's columns nor observations, actions and mean_reward: {error}")
    require(source == env_id, f"--data {path} is from {source}, not from {env_id}")
    require(obs.ndim == 2 and len(obs) > 1, f"--data {path}: observations must be (N, {obs_dim}), N > 1")
    obs = obs[:, skip:] if ours else obs
    fits = obs.shape[1] == obs_dim and action.shape == (len(obs), action_dim)
    shapes = f"{tuple(obs.shape)} and {tuple(action.shape)}"
    require(fits, f"--data {path}: observations and actions are {shapes}, not (N, {obs_dim}) and (N, {action_dim})")
    whole = episode.shape == (len(obs),) and (reward.shape == (len(obs),) or not ours)
    require(whole, f"--data {path}: episodes and rewards are not one number for each of {len(obs)} observations")
    require(not episode.is_floating_point(), f"--data {path}: episodes must be numbered by integers")
    named = {"observations": obs, "actions": action, "rewards" if ours else "mean_reward": reward}
    named |= {"terminated": terminated}
    check_data(named, f"--data {path}")
    require(terminated.shape == episode.shape, f"--data {path}: terminated is not (N,)")
    require(told or "terminated" not in data, f"--data {path}: terminated needs episode, too: which rows are one's?")
    number = episode.unique(return_inverse=True)[1]
    row = torch.arange(len(obs))
    last = torch.zeros_like(row).scatter_reduce(0, number, row, "amax")[number]  # of the episode, for each row
    inside = f"--data {path}: an episode goes on after a row that is terminated: number them anew after each end"
    require(bool(((row == last) | (terminated == 0)).all()), inside)
    expert_return = whole_return(reward, terminated, episode) if ours else reward.item()
    return Demonstrations(obs, action, episode, expert_return, terminated if told else None)


# Differs: how an episode ended matters
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
        ends = [bool(each.terminations[-1]) for each in found]
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
    return Demonstrations(
        torch.cat(obs), torch.cat(action), episode, float(np.mean(returns)), torch.tensor(ends)[episode]
    )


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


class TwinCritic(StackedMLP):
    """Q_1 and Q_2 in one batched product a layer."""

    def __init__(self, obs_dim: int, action_dim: int, units: int):
        super().__init__(2, [obs_dim + action_dim, units, units, 1], "relu")

    def value(self, obs: Tensor, action: Tensor, frozen: bool = False) -> Tensor:  # (B, D), (B, A) -> (2, B)
        """Where frozen, gradients go through the networks to the action, and not to their weights."""
        weights, biases = ([p.detach() if frozen else p for p in group] for group in (self.weights, self.biases))
        x = torch.cat([obs, action], dim=-1).expand(2, -1, -1)
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            x = F.relu(torch.baddbmm(bias, x, weight))
        with torch.autocast(x.device.type, enabled=False):  # values near 1,000 would be rounded to ±2 in bfloat16
            # A matrix product with one column is slow, so multiply and sum: (2, B, units) * (2, 1, units).
            return (x.float() * weights[-1].mT).sum(dim=-1) + biases[-1][..., 0]


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


class Step(NamedTuple):
    """Steps as the discriminator sees them: standardised observations, actions scaled to [-1, 1]."""

    x: Tensor  # (B, D)
    u: Tensor  # (B, A)
    next_x: Tensor  # (B, D)
    terminated: Tensor  # (B, 1)


class Discriminator(nn.Module):
    """h of equation 5, or g and Φ of equation 7."""

    spread: Tensor
    centre: Tensor

    def __init__(self, obs_dim: int, low: Tensor, high: Tensor, args: Args):
        super().__init__()
        units = args.discriminator_units
        self.airl = args.algo == "airl"
        self.bound = max(5.0, len(low))  # of log π
        self.gamma, self.low, self.high = args.gamma, low, high
        self.normaliser = Normaliser(obs_dim)
        self.head = nn.Sequential(
            nn.Linear(obs_dim + len(low), units), nn.Tanh(), nn.Linear(units, units), nn.Tanh(), nn.Linear(units, 1)
        )
        if self.airl:
            self.potential = nn.Sequential(nn.Linear(obs_dim, units), nn.Tanh(), nn.Linear(units, 1))
        self.register_buffer("spread", torch.ones(()))
        self.register_buffer("centre", torch.zeros(()))
        self.gradients = self.find_gradients
        if args.compile:
            torch._dynamo.config.trace_autograd_ops = True  # the way back is a part of the program
            self.gradients = compiled(self.find_gradients, low.device)

    def steps(self, obs: Tensor, action: Tensor, next_obs: Tensor, terminated: Tensor) -> Step:
        u = 2 * (action - self.low) / (self.high - self.low) - 1
        return Step(self.normaliser(obs), u, self.normaliser(next_obs), terminated[:, None])

    def score(self, step: Step) -> Tensor:
        """h, or f of equation 7: what depends on the step alone (B,)."""
        found: Tensor = self.head(torch.cat([step.x, step.u], dim=-1))
        if self.airl:
            after = (1 - step.terminated) * self.potential(step.next_x)
            found = found + self.gamma * after - self.potential(step.x)
        return found[:, 0]

    def logit(self, step: Step, log_prob: Tensor, alpha: Tensor) -> Tensor:
        if not self.airl:
            return self.score(step)
        return self.score(step) - alpha * self.scale() * log_prob.clamp(-self.bound, self.bound)

    def scale(self) -> Tensor:
        """What rewards are divided by, and SAC's temperature multiplied with."""
        return self.spread.clamp(min=0.1)

    def reward(self, score: Tensor) -> Tensor:
        return score if self.airl else F.softplus(score)

    def absorbing_reward(self, logit: float | None) -> Tensor:
        """Equation 8's state has one action, and so log π = 0 and f is the logit. None: nothing is paid there."""
        if logit is None:
            return torch.zeros_like(self.spread)
        return self.reward(self.spread.new_tensor(logit))

    def find_gradients(
        self, actor: Actor, alpha: Tensor, expert: Transitions, policy: Transitions, weight: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, penalty, the expert's logit, the policy's) and the gradients of equation 4 and the penalty."""
        steps, logits = [self.steps(*each) for each in (expert, policy)], []
        for step, (obs, action, _, _) in zip(steps, (expert, policy), strict=True):
            with torch.no_grad():
                density = log_prob(actor, obs, action) if self.airl else torch.zeros(())
            logits.append(self.logit(step, density, alpha))
        loss = F.softplus(-logits[0]).mean() + F.softplus(logits[1]).mean()  # -log D and -log(1 - D)

        mix = torch.rand(len(expert[0]), 1, device=self.spread.device)
        between = Step(*(mix * one + (1 - mix) * two for one, two in zip(*steps, strict=True)))
        inputs = [part.requires_grad_() for part in (between.x, between.u, between.next_x)[: 3 if self.airl else 2]]
        slopes = torch.autograd.grad(self.score(between).sum(), inputs, create_graph=True)
        penalty = F.relu(torch.cat(slopes, dim=-1).norm(dim=-1) - 1).square().mean()
        means = (loss, penalty, logits[0].mean(), logits[1].mean())
        gradients = torch.autograd.grad(loss + weight * penalty, [*self.parameters()])
        return torch.stack([mean.detach() for mean in means]), gradients


# ------------------------------------------------------------------------------------------------------ algorithm


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The whole function as one program; on a GPU as CUDA graphs, with fresh random numbers at each replay."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        warnings.warn("--compile needs a C++ compiler, going on without", stacklevel=2)
        return function
    if device.type == "cuda":
        return torch.compile(function, mode="reduce-overhead")
    # PyTorch's own random numbers, the same as without --compile: a compiled loop would draw them one at a time.
    return torch.compile(function, options={"fallback_random": True})


class Agent(nn.Module):
    """Soft actor-critic: equations 1 to 3 as one function of a batch."""

    def __init__(self, obs_dim: int, low: Tensor, high: Tensor, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, low, high, args.units)
        self.critic = TwinCritic(obs_dim, len(low), args.units)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha) if args.alpha else 0.0))
        self.target_entropy = -float(len(low)) if args.target_entropy == "auto" else args.target_entropy
        self.gamma, self.tau, self.fixed_alpha = args.gamma, args.tau, args.alpha
        self.dtype = getattr(torch, args.train_dtype)
        self.to(low.device)
        self.learned = [*self.critic.parameters(), *self.actor.parameters()]
        self.learned += [self.log_alpha] if args.alpha is None else []
        self.optimizer = torch.optim.Adam(self.learned, args.learning_rate, fused=True, capturable=low.is_cuda)
        self.gradients = self.find_gradients
        if args.compile:
            torch._dynamo.config.trace_autograd_ops = True  # the way back is a part of the program
            self.gradients = compiled(self.find_gradients, low.device)

    def temperature(self) -> Tensor:
        if self.fixed_alpha is not None:
            return torch.full_like(self.log_alpha, self.fixed_alpha)
        return self.log_alpha.exp().detach()

    def find_gradients(
        self, obs: Tensor, action: Tensor, next_obs: Tensor, reward: Tensor, terminated: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(qf_loss, actor_loss, alpha, entropy, qf_values) and the gradients of equation 2 and the temperature's.

        The losses share no weights that learn: the gradient of their sum is each one's own.
        """
        alpha = self.temperature()
        with torch.autocast(obs.device.type, self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                next_action, next_log_prob = self.actor.sample(next_obs)
                next_value = self.target.value(next_obs, next_action).amin(dim=0) - alpha * next_log_prob
                y = reward + self.gamma * (1 - terminated) * next_value  # (1); a time limit is no end
            values = self.critic.value(obs, action)  # (2, B)
            critic_loss = (values - y).square().mean(dim=1).sum()
            new_action, log_prob = self.actor.sample(obs)
            value = self.critic.value(obs, new_action, frozen=True).amin(dim=0)
            entropy = -log_prob.detach().mean()
            actor_loss = (alpha * log_prob - value).mean()
            alpha_loss = self.log_alpha.exp() * (entropy - self.target_entropy)
            loss = critic_loss + actor_loss + (alpha_loss if self.fixed_alpha is None else 0)
        means = (critic_loss, actor_loss, alpha, entropy, values.amin(dim=0).mean())
        return torch.stack([mean.detach() for mean in means]), torch.autograd.grad(loss, self.learned)

    def update(self, *batch: Tensor) -> Tensor:
        """One gradient step of everything at once; returns (qf_loss, actor_loss, alpha, entropy, qf_values)."""
        means, gradients = self.gradients(*batch)
        for weight, gradient in zip(self.learned, gradients, strict=True):
            weight.grad = gradient
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_([*self.target.parameters()], [*self.critic.parameters()], self.tau)  # (3)
        return means


def log_prob(actor: Actor, obs: Tensor, action: Tensor) -> Tensor:
    """log π(a|s) of given actions (B, A). Experts saturate, and atanh(1) is infinite: actions are pulled in a bit."""
    mean, log_std = actor(obs)
    u = ((action - actor.action_bias) / actor.action_scale).clamp(-1 + 1e-4, 1 - 1e-4)
    x = torch.atanh(u)
    gaussian = -0.5 * ((x - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    return (gaussian - (1 - u.square()).log()).sum(dim=-1)


def train_discriminator(
    discriminator: Discriminator, optimizer: torch.optim.Optimizer, agent: Agent, expert: Transitions,
    policy: Transitions, weight: float,
) -> Tensor:  # fmt: skip
    """One gradient step on equation 4 and the penalty; returns (loss, penalty, the expert's logit, the policy's)."""
    means, gradients = discriminator.gradients(agent.actor, agent.temperature(), expert, policy, weight)
    for parameter, gradient in zip(discriminator.parameters(), gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    return means


class Absorption:
    """How often the policy is in the absorbing state, over the episodes that D sees, and at least 20; equation 8.

    An episode that did not end by itself counts as one of the full length: it was only cut short.
    """

    def __init__(self, expert_share: float, limit: int, newest: int):
        self.expert_share, self.limit, self.newest = expert_share, limit, newest
        self.lengths: deque[int] = deque()

    def add(self, lengths: Iterable[int]) -> None:
        self.lengths.extend(lengths)
        while len(self.lengths) > 20 and sum(self.lengths) - self.lengths[0] >= self.newest:
            self.lengths.popleft()

    def policy_share(self) -> float:
        if not self.lengths:
            return self.expert_share  # nothing is known yet
        return sum(self.limit - length for length in self.lengths) / (self.limit * len(self.lengths))

    def logits(self) -> tuple[float, float]:
        """Of the absorbing state, and to be added to those of all others. Within ±5, as far as a network might go."""
        expert, policy = self.expert_share, self.policy_share()
        # An expert that never ends has no share at all: where the policy has none, either, ending must not pay.
        ratios = max(expert, 1e-5) / max(policy, 1e-3), max(1 - expert, 1e-3) / max(1 - policy, 1e-3)
        there, elsewhere = (min(max(math.log(ratio), -5.0), 5.0) for ratio in ratios)
        return there, elsewhere

    def state_dict(self) -> dict[str, Any]:
        return {"lengths": list(self.lengths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lengths.extend(state["lengths"])


@torch.no_grad()
def learned_reward(discriminator: Discriminator, batch: Transitions, there: float | None, elsewhere: float) -> Tensor:
    """Equations 5 or 6 and 9 over their running spread (B,), with what equation 8 says of `end` and of other states."""
    step = discriminator.steps(*batch)
    reward = discriminator.reward(discriminator.score(step) + elsewhere)
    discriminator.spread.lerp_(reward.std(), 0.001)
    if discriminator.airl and there is not None:
        discriminator.centre.lerp_(reward.mean(), 0.001)
    end = discriminator.absorbing_reward(there) - discriminator.centre
    after = step.terminated[:, 0] * (discriminator.gamma / (1 - discriminator.gamma) * end)
    return (reward - discriminator.centre + after) / discriminator.scale()


# Differs: there is no model, and the environment's reward is a secret
def sample_batch(args: Args, buffer: ReplayBuffer, skip: int, newest: int | None = None) -> Transitions:
    """From the newest transitions only, or from all."""
    among = min(newest or buffer.size, buffer.size)
    rows = torch.randint(among, (args.batch_size,), device=buffer.obs.device)
    rows = (buffer.position - 1 - rows) % buffer.capacity  # position is where the next one will go
    obs, next_obs = buffer.obs[rows][:, skip:], buffer.next_obs[rows][:, skip:]
    return obs, buffer.action[rows], next_obs, buffer.terminated[rows]


def tell_apart(
    args: Args, discriminator: Discriminator, optimizer: torch.optim.Optimizer, agent: Agent,
    expert_steps: list[Tensor], buffer: ReplayBuffer,
) -> Tensor:  # fmt: skip
    """Train the discriminator on as many of the expert's transitions as of the policy's newest."""
    chosen = torch.randint(len(expert_steps[0]), (args.batch_size,), device=buffer.obs.device)
    obs, action, next_obs, terminated = (column[chosen] for column in expert_steps)
    skip = buffer.obs.shape[1] - obs.shape[1]
    batches = (obs, action, next_obs, terminated), sample_batch(args, buffer, skip, args.newest)
    return train_discriminator(discriminator, optimizer, agent, *batches, args.gradient_penalty)


class Means:
    """Running means of the losses, kept on the device: reading a number makes a GPU wait."""

    names: tuple[str, ...] = (
        "losses/qf_loss", "losses/actor_loss", "losses/alpha", "losses/entropy", "losses/qf_values",
    )  # fmt: skip

    def __init__(self, device: torch.device):
        self.sums, self.count = torch.zeros(len(self.names), device=device), 0

    def add(self, values: Tensor) -> None:
        self.sums += values
        self.count += 1

    def read(self) -> dict[str, float]:
        return dict(zip(self.names, (self.sums / self.count).tolist(), strict=True)) if self.count else {}

    def reset(self) -> None:
        self.sums, self.count = torch.zeros_like(self.sums), 0

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.count = state["sums"].to(self.sums), state["count"]


class DiscriminatorMeans(Means):
    names = (
        "losses/discriminator_loss", "losses/gradient_penalty", "losses/expert_logit", "losses/policy_logit",
        "losses/reward_spread", "losses/reward_mean", "losses/absorbing_reward",
    )  # fmt: skip


def weight_size(networks: nn.Module) -> dict[str, float]:
    """Not finite if a weight or a running mean is not: those of the last step have entered no loss yet."""
    tensors = [tensor for tensor in networks.state_dict().values() if tensor.is_floating_point()]
    return {"weights": torch.stack([tensor.double().norm() for tensor in tensors]).sum().item()}


# Differs: losses and weights are all there is to diverge
def check_losses(means: dict[str, float], networks: nn.Module, step: int, run_dir: Path) -> None:
    """A policy that has diverged is of no use, and must not overwrite its last good checkpoint."""
    bad = [name for name, mean in (means | weight_size(networks)).items() if not math.isfinite(mean)]
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


# Differs: the policy acts, and is compared with its expert
@torch.no_grad()
def evaluate(
    args: Args, actor: Actor, expert_return: float, episodes: int, device: torch.device, video: Path | None
) -> tuple[dict[str, float], list[float]]:
    """Whole episodes, acting by the mean, on the same seeds each time, none of them trained on."""
    seed = 1_000_000 + 1_000 * args.seed  # for --seed below 100 and 1,000 episodes, nobody else begins there
    obs, _, _, returns, _ = run_episodes(actor.mode, args.env_id, episodes, seed, device, args.max_episode_steps, video)
    mean = returns.mean().item()
    metrics = {"eval/episodic_return": mean, "eval/episodic_length": len(obs) / episodes}
    metrics["eval/episodic_return_std"] = returns.std(ddof=1).item() if episodes > 1 else 0.0
    metrics["eval/expert_fraction"] = mean / expert_return if expert_return > 0 else 0.0
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
MAY_CHANGE |= {"total_timesteps", "save_policy", "eval_only", "eval_episodes", "capture_video", "eval_every"}
MAY_CHANGE |= {"interim_episodes", "compile"}


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


# Differs: how an episode ended matters
def demonstrate(
    args: Args, expert: Actor | None, sizes: tuple[int, int, int], limit: int, device: torch.device
) -> Demonstrations:
    """The expert's episodes, from wherever they are to come."""
    obs_dim, skip, action_dim = sizes
    if args.data is not None:
        return from_file(args.data, args.env_id, obs_dim, skip, action_dim)
    if args.minari_id is not None:
        return from_minari(args.minari_id, args.num_episodes, args.env_id, obs_dim, action_dim)
    assert expert is not None
    seed = 2_000_000 + 1_000 * args.seed  # for --seed below 100 and 1,000 episodes, nobody else begins there
    rows = run_episodes(expert.mode, args.env_id, args.num_episodes, seed, device, args.max_episode_steps)
    early = rows[2].bincount()[rows[2]] < limit  # whole episodes: what ended before the limit has terminated
    return Demonstrations(*rows[:3], rows[3].mean().item(), early)


def save_policy(path: Path, args: Args, agent: Agent, metrics: dict[str, float]) -> None:
    """The actor in the standard observation space, with the bounds of its actions among its weights."""
    contents = {"env_id": args.env_id, "actor": agent.actor.state_dict(), "seed": args.seed, "metrics": metrics}
    save_file(path, contents | {"max_episode_steps": args.max_episode_steps})


def passes(every: int, step: int, taken: int) -> bool:
    """Has a multiple of `every` been reached by the last `taken` steps?"""
    return step // every > (step - taken) // every


@torch.no_grad()
def interact(actor: Actor, envs: VectorEnv, skip: int, device: torch.device, random: bool) -> dict[str, np.ndarray]:
    """One step in every environment; the transitions."""
    obs, episode = envs.obs, envs.episode
    seen = torch.from_numpy(obs[:, skip:]).to(device)
    action = envs.random_action() if random else actor.sample(seen)[0].cpu().numpy()
    next_obs, reward, terminated = envs.step(action)
    rows = {"obs": obs, "action": action, "next_obs": next_obs, "reward": reward, "terminated": terminated}
    return rows | {"episode": episode}


def expert_data(
    args: Args, checkpoint: dict[str, Any] | None, dims: tuple[int, int, int], low: Tensor, high: Tensor, limit: int
) -> tuple[Demonstrations, list[Tensor], float]:
    """The demonstrations, their transitions, and the share of the time limit that their episodes do not live to see."""
    if checkpoint:
        names = ("obs", "action", "episode", "expert_return", "terminated")
        data = Demonstrations(*(checkpoint["data"][name] for name in names))
    else:
        recorded = args.data is not None or args.minari_id is not None
        expert = None if recorded else load_expert(expert_path(args), args.env_id, dims[0], low, high)
        data = demonstrate(args, expert, dims, limit, low.device)
    check_demonstrations(data, args.env_id, low, high)
    unknown = f"--data {args.data} does not tell episodes apart, and AIRL needs to know which steps follow each other"
    require(data.terminated is not None or args.algo != "airl", unknown)
    transitions = [column.to(low.device) for column in data.transitions()]
    require(len(transitions[0]) > 1, "the demonstrations are too short: nothing is known to follow anything")
    return data, transitions, data.absorbed(limit)


def go_on(args: Args, checkpointer: Checkpointer, checkpoint: dict[str, Any]) -> None:
    """Continue from a checkpoint that is not beyond what was asked for."""
    checkpointer.restore(checkpoint)
    step = checkpointer.progress["step"]
    few = f"--total-timesteps {args.total_timesteps}: {checkpointer.run_dir} has had {step}"
    before = load_args(str(checkpointer.run_dir))
    unfinished = step < args.total_timesteps
    require(unfinished or args.total_timesteps == before.total_timesteps, few)
    idle = f"--eval-episodes {args.eval_episodes}: {checkpointer.run_dir} has finished; evaluate it with --eval-only"
    require(unfinished or args.eval_only or args.eval_episodes == before.eval_episodes, idle)


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
    obs_dim, action_dim = envs.obs.shape[1] - skip, gym.spaces.flatdim(envs.action_space)
    low, high = action_bounds(envs, args.env_id, device)
    check_ranges(low, high, args.env_id)
    limit: int = envs.envs[0].spec.max_episode_steps  # type: ignore[union-attr, assignment]
    data, expert_steps, absorbed = expert_data(args, checkpoint, (obs_dim, skip, action_dim), low, high, limit)

    agent = Agent(obs_dim, low, high, args)
    discriminator = Discriminator(obs_dim, low, high, args).to(device)
    judge_optimizer = torch.optim.Adam(discriminator.parameters(), args.discriminator_learning_rate, fused=True)
    absorption = Absorption(absorbed, limit, args.newest)
    buffer = ReplayBuffer(
        min(args.buffer_size, args.total_timesteps + args.num_envs), envs.obs.shape[1], action_dim, device
    )

    run_dir = Path(args.resume) if args.resume else new_run_dir(args)
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "metrics": {}}
    means, judged = Means(device), DiscriminatorMeans(device)
    parts = {"agent": agent, "agent_optimizer": agent.optimizer}
    parts |= {"discriminator": discriminator, "judge_optimizer": judge_optimizer}
    parts |= {"absorption": absorption, "data": data}
    parts |= {"means": means, "judged": judged, "buffer": buffer, "envs": envs}
    checkpointer = Checkpointer(run_dir, progress, parts)
    if checkpoint:
        go_on(args, checkpointer, checkpoint)
        checkpoint = None  # it has a copy of the buffer
    if args.eval_only:
        video = run_dir / "videos" / "eval_only.mp4" if args.capture_video else None
        again, returns = evaluate(args, agent.actor, data.expert_return, args.eval_episodes, device, video)
        share = f"; {again['eval/expert_fraction']:.2f} of the expert's" if data.expert_return > 0 else ""
        print(f"{run_dir}: {describe(again, returns)}{share}")
        if args.save_policy:
            save_policy(Path(args.save_policy), args, agent, again)
        return again
    with checkpointer:
        log = Logger(run_dir, args, progress["step"] if args.resume else None)
        print(f"{run_dir}: the expert earns {data.expert_return:.1f}, {len(expert_steps[0])} transitions", flush=True)
        bar = tqdm(total=args.total_timesteps, initial=progress["step"], unit="step")
        watch = Stopwatch(progress["step"])
        while progress["step"] < args.total_timesteps:
            rows = interact(agent.actor, envs, skip, device, random=progress["step"] < args.initial_steps)
            buffer.add(**rows)
            progress["step"] = step = progress["step"] + args.num_envs
            if step - args.num_envs < args.initial_steps <= step:  # on both: by the expert alone, others are off scale
                discriminator.normaliser.fit(torch.cat([expert_steps[0], buffer.obs[: buffer.size, skip:]]))
            due = partial(passes, step=step, taken=args.num_envs)
            if envs.finished:
                over = rows["terminated"][envs.episode != rows["episode"]]
                lengths = [length for _, length in envs.finished]
                absorption.add(length if end else limit for length, end in zip(lengths, over, strict=True))
                mean_return, mean_length = np.mean(envs.finished, axis=0).tolist()
                log.scalars({"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}, step)
                bar.set_postfix({"return": f"{mean_return:.0f}"})
            watch.lap("time/share_env")

            for number in range(max(step - args.num_envs, args.initial_steps) + 1, step + 1):
                there, elsewhere = absorption.logits() if args.absorbing else (None, 0.0)
                if args.algo != "control" and number % args.discriminator_every == 0:
                    found = tell_apart(args, discriminator, judge_optimizer, agent, expert_steps, buffer)
                    paid = discriminator.spread, discriminator.centre, discriminator.absorbing_reward(there)
                    judged.add(torch.cat([found, torch.stack(paid)]))
                    watch.lap("time/share_discriminator")
                batch = obs, action, next_obs, terminated = sample_batch(args, buffer, skip)
                reward = torch.ones_like(terminated)
                if args.algo != "control":
                    reward = learned_reward(discriminator, batch, there, elsewhere)
                means.add(agent.update(obs, action, next_obs, reward, terminated))
                watch.lap("time/share_updates")
            bar.update(args.num_envs)

            finished, save = step >= args.total_timesteps, due(args.checkpoint_every)
            if due(LOG_EVERY) or finished or save or checkpointer.signal:  # what has not been checked is not saved
                check_losses(means.read() | judged.read(), nn.ModuleList([agent, discriminator]), step, run_dir)
            if due(LOG_EVERY) or finished:
                log.scalars(means.read() | judged.read() | watch.read(step), step)
                means.reset()
                judged.reset()
            if due(args.eval_every) or finished:
                video = run_dir / "videos" / f"{step}.mp4" if args.capture_video else None
                episodes = args.eval_episodes if finished else args.interim_episodes
                progress["metrics"], returns = evaluate(args, agent.actor, data.expert_return, episodes, device, video)
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
