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
r"""SAC, Dyna and MBPO: one actor and critic, trained on real steps, or on short rollouts of a learned model as well.

`--rollout-length 0` is soft actor-critic (SAC), k > 0 is model-based policy optimisation (MBPO), of which Dyna is an
older relative (below). SAC learns two values Q_1, Q_2 and a stochastic policy π, paid for entropy at the price α:

    y = r + γ (1 - terminated) (min_i Q'_i(s', a') - α log π(a'|s')),   a' ~ π(.|s')                                (1)
    critic:       Σ_i (Q_i(s, a) - y)²                  actor:  α log π(a|s) - min_i Q_i(s, a),   a ~ π(.|s)        (2)
    temperature:  -α (log π(a|s) + target_entropy)      target networks:  Q' <- Q' + τ (Q - Q')                     (3)

Real steps are dear, so MBPO invents more: an ensemble of Gaussian models learns p(s', r | s, a) from the real steps,
and the policy acts in it for k steps from states that really occurred. Short, because a model's errors compound; from
real states, because there it is right. The critic can then take many gradient steps for each real one.

Pseudocode:

    buffer <- initial_steps transitions of the random policy
    for each environment step:
        a ~ π(.|s);  s <- environment step with a;  buffer <- buffer + transition
        every model_every steps, if rollout_length > 0:
            fit the ensemble on the buffer until each member's held-out error stops falling;  keep the best as elites
            start = states of the buffer;  for rollout_length steps:
                a ~ π(.|s),  s', r ~ a random elite(s, a);  model buffer <- model buffer + transition
                s <- s' where that is no end
        utd_ratio times:
            batch <- real_ratio of it from the buffer, the rest from the model buffer;  equations 1 to 3

Usage:

    python mbpo_sac.py --env-id HalfCheetah-v5 --target-entropy -3  # MBPO, with the authors' target entropy
    python mbpo_sac.py --env-id HalfCheetah-v5 --rollout-length 0 --utd-ratio 1 --total-timesteps 1_000_000    # SAC
    python mbpo_sac.py --env-id Hopper-v5 --utd-ratio 20 --total-timesteps 125_000 --rollout-schedule 20 150 1 15 \
        --target-entropy -1 --max-train-steps 1_000     # MBPO, with the authors' schedule, updates a step and entropy
    python mbpo_sac.py --env-id Pendulum-v1 --rollout-length 0 --utd-ratio 1 --initial-steps 1_000 \
        --total-timesteps 6_000 --eval-every 1_000                                      # SAC in a minute
    python mbpo_sac.py --resume RUN_DIR                     # go on exactly where it stopped
    python mbpo_sac.py --resume RUN_DIR --eval-only         # the evaluation of that run again
    python mbpo_sac.py --resume RUN_DIR --eval-only --save-policy expert.pt     # ... and its actor, for bc_variants.py
    from mbpo_sac import load_policy; actor = load_policy("expert.pt")          # ... in your own code, once
    action = actor.mode(torch.as_tensor(obs).float()).numpy()       # for each observation

The course's Dyna (CS285 homework 4: deterministic members that are averaged, known reward, one buffer for real and
imagined steps, a fixed number of updates after each 5,000 steps) is, but for the noise on the model's inputs,

    python mbpo_sac.py --env-id envs:PostureCheetah-v0 --total-timesteps 50_000 --rollout-length 10 --real-ratio None \
        --average-members --no-probabilistic --ensemble-size 3 --elite-members 3 --num-layers 2 --hidden-size 250 \
        --activation tanh --model-every 5_000 --update-every 5_000 --utd-ratio 1 --rollouts-per-step 1 \
        --batch-size 1_500 --alpha 0.1 --model-batch-size 512 --max-train-steps 1_500 --patience None \
        --input-noise 0.01 --weight-decay 0 --no-wrap-angles

Expect of SAC on HalfCheetah-v5 5,000 after 100,000 steps, 9,500 after 600,000 and 11,100 after a million (seed 1; 1.7
hours on one core of a server from 2023 that also did other things, with --train-dtype bfloat16 --compile), and of MBPO
as above 5,900 after 25,000, 9,200 after 100,000 and 10,200 after 150,000 (seed 1; 2.6 hours, likewise; before the
penalty on the bounds of the variance was divided by the number of members).

The reward r and the end of an episode are functions of (obs, action, next_obs): the environment's own `batch_reward`
and `batch_terminated` if it has them, else the formulas of Gymnasium's MuJoCo v5 tasks, which this file knows, else two
more outputs of the ensemble (--reward learned: these always; the paper learns the reward and knows the end). The policy
sees the standard observation; the positions that the locomotion tasks hide are kept for the model's reward alone.

Every logged tag (TensorBoard and metrics.csv; the step is the number of environment steps):

    charts/episodic_return      return of the training episodes that ended at this step, mean over environments
    charts/episodic_length      their length
    charts/SPS                  environment steps per second since the last log, everything included, first one left out
    eval/episodic_return        mean return of the evaluation episodes, acting by the policy's mean
    eval/episodic_return_std    their standard deviation (ddof=1)
    eval/episodic_length        their mean length
    eval/critic_value           mean of min Q over the evaluation's states and actions
    eval/critic_bias            the same minus the discounted return that followed (past the time limit: the critic's
                                own value). The critic counts entropy and sampled actions, the evaluation does not:
                                watch how the bias changes, not its sign
    losses/qf_loss              equation 2, mean over the gradient steps since the last log, as are the following
    losses/actor_loss           equation 2
    losses/alpha                temperature
    losses/entropy              -log π(a|s), of actions scaled to [-1, 1]
    losses/qf_values            min_i Q_i, mean over the batch
    model/train_loss            loss of the last gradient step of the fit, mean over members
    model/holdout_mse           one-step error (normalised) on held-out transitions, mean over the elites
    model/train_steps           gradient steps of the last fit
    model/rollout_mse           error of the elites' mean after rollout_length steps of the evaluation's actions, over
                                the variance of the observations; 1: no better than knowing nothing
    model/rollout_length        steps of each rollout
    time/minutes                minutes since the beginning, over all sessions of a resumed run
    time/share_env              share of the time since the last log in acting and in the environment
    time/share_model            in fitting the model
    time/share_rollouts         in rollouts
    time/share_updates          in gradient steps of actor and critic
    time/share_other            in evaluation, logging and checkpoints

Deviations: actor, critics and temperature step together, by the weights before (the paper's pseudocode: one after the
other); 5 members and 3 elites by default (the paper: 7 and 5), 10 gradient steps for each real one (40 on HalfCheetah);
rollouts begin at each fit (as in the authors' code), not at each step (as in the paper); targets are normalised; every
member trains on all rows, and not on a bootstrap of them; reward and termination come from formulas where there are any
(the paper learns the reward, and knows when an episode ends: here --reward learned learns both); each rollout step
gives every elite an equal share of the rows instead of drawing one per row; a fit takes at most max_train_steps
gradient steps, and that alone ends it from some 24,000 rows on (six epochs are more); with bfloat16 rollouts use a copy
of the elites' weights that is rounded, too. A row that is held out is never trained on, where the paper draws others at
each fit: on rows that an earlier fit has trained on the old weights do too well for any new ones to be better. At most
5,000 of them are tested by, drawn anew at each fit, and learned ends do not count. The course's Dyna holds no rows out,
so that a fit ends with its last weights, and has no noise on its inputs; its code has three layers of 128 units for SAC
and, in the file of settings, α = 0.05 (0.1 where nothing is set); it makes a rollout before each update, here those for
50 updates are made at once.

Papers: Haarnoja et al. 2018, SAC, arXiv 1812.05905 (equations 1 to 3: its 5 to 18); Janner et al. 2019, MBPO, arXiv
1906.08253 (algorithm 2, appendix C); Sutton 1991, Dyna; Chua et al. 2018, PETS, arXiv 1805.12114 (the ensemble).
"""

import copy
import csv
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
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
LOG_EVERY = 1_000  # steps between logs of losses and speed
BLOCK = 50  # updates between rollouts, where real and model transitions share one buffer


@dataclass
class Args:
    exp_name: str = "mbpo_sac"
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

    # Data
    total_timesteps: int = 150_000
    """environment steps"""
    num_envs: int = 1
    """environments stepped side by side"""
    initial_steps: int = 5_000
    """environment steps of the random policy, rounded up to a multiple of num_envs"""
    buffer_size: int = 1_000_000
    """most recent real transitions that are kept"""
    eval_every: int = 5_000
    """steps between evaluations"""
    eval_episodes: int = 10
    """episodes of the last evaluation, side by side"""
    interim_episodes: int = 3
    """episodes of the evaluations before the last"""

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
    utd_ratio: float = 10.0
    """gradient steps of actor and critic for each environment step"""
    update_every: int = 1
    """environment steps between rounds of gradient steps; the first round follows the random steps at once"""
    train_dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the matrix products in training; weights, optimiser and losses stay in float32"""

    # Model
    rollout_length: int = 1
    """steps of each model rollout (rollout_schedule overrules it); 0: no model, which is SAC (with utd_ratio 1)"""
    rollout_schedule: tuple[int, int, int, int] | None = None
    """FROM TO MIN MAX: rollout_length grows from MIN at epoch FROM (of 1,000 steps, random ones apart) to MAX at TO"""
    rollouts_per_step: float = 400.0
    """model rollouts begun for each environment step (a whole number, at least one, each time that some are begun)"""
    real_ratio: float | None = 0.05
    """share of real transitions in a batch; None: real and model transitions share one buffer"""
    retain_epochs: int = 1
    """room for the model transitions of so many epochs (of 1,000 steps), if no rollout ends early"""
    model_every: int = 250
    """environment steps between fits of the model, with rollouts after each (with one buffer: between the updates)"""
    ensemble_size: int = 5
    """members of the ensemble"""
    elite_members: int = 3
    """members that make rollouts: those with the smallest held-out error"""
    average_members: bool = False
    """a rollout follows the mean of the elites' predictions instead of a sample of a random elite at each step"""
    probabilistic: bool = True
    """predict mean and variance (Gaussian negative log-likelihood) instead of the mean alone (squared error)"""
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
    model_batch_size: int = 256
    """samples in the batch of each gradient step of each member"""
    model_learning_rate: float = 1e-3
    """step size of Adam for the model"""
    weight_decay: float = 5e-5
    """L2 penalty on the weights, through Adam"""
    input_noise: float = 0.0
    """standard deviation of the Gaussian noise on the normalised inputs while training"""
    model_holdout: float = 0.1
    """share of the transitions that no fit of the model trains on, to stop early by"""
    patience: int | None = 5
    """stop a fit after more than so many epochs in which no member's held-out error fell by 1 %; None: never"""
    max_train_steps: int = 500
    """most gradient steps per fit of the model"""


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
    one = "num_threads checkpoint_every max_episode_steps total_timesteps num_envs buffer_size eval_every eval_episodes"
    one += " interim_episodes batch_size units update_every model_every ensemble_size elite_members num_layers"
    one += " hidden_size model_batch_size max_train_steps retain_epochs patience"
    zero = "seed rollout_length weight_decay input_noise rollouts_per_step utd_ratio alpha"
    check_fields(
        args, dict.fromkeys(one.split(), 1) | dict.fromkeys(zero.split(), 0) | {"initial_steps": 2, "buffer_size": 2}
    )
    require(0 <= args.gamma < 1, f"--gamma must lie in [0, 1): the values are endless sums; got {args.gamma}")
    require(0 < args.tau <= 1, f"--tau must lie in (0, 1], got {args.tau}")
    require(
        0 < args.model_learning_rate < math.inf, f"--model-learning-rate must be positive: {args.model_learning_rate}"
    )
    require(0 < args.model_holdout < 1, f"--model-holdout must lie in (0, 1), got {args.model_holdout}")
    ratio = args.real_ratio
    require(ratio is None or 0 <= ratio <= 1, f"--real-ratio must lie in [0, 1] or be None, got {ratio}")
    idle = args.rollout_length > 0 and ratio is not None and real_rows(args) == args.batch_size
    alone = f"--real-ratio {ratio} of --batch-size {args.batch_size} makes no use of a model:"
    require(not idle, f"{alone} --rollout-length 0 is how to go without one")
    target = args.target_entropy
    fine = target == "auto" or (not isinstance(target, str) and math.isfinite(target))
    require(fine, f"--target-entropy must be auto or a number, got {target}")
    fixed = target != "auto" and args.alpha is not None
    require(not fixed, "--target-entropy is for an --alpha that adapts itself, this one is fixed")
    require(args.utd_ratio > 0, "--utd-ratio 0: nothing would be learned")
    many = f"--elite-members {args.elite_members} of --ensemble-size {args.ensemble_size}: elites are some of them"
    require(args.elite_members <= args.ensemble_size, many)
    if args.rollout_schedule:
        first, last, low, high = args.rollout_schedule
        fine = 0 <= first < last and 1 <= low <= high
        require(fine, f"--rollout-schedule {args.rollout_schedule}: give FROM < TO and 1 <= MIN <= MAX")
        require(args.rollout_length > 0, "--rollout-schedule with --rollout-length 0: without a model nothing grows")
    if args.rollout_length:
        require(args.rollouts_per_step > 0, "--rollouts-per-step 0: --rollout-length 0 is how to go without a model")
    require(args.resume is not None or not args.eval_only, "--eval-only needs --resume RUN_DIR: the run to evaluate")
    few = f"--initial-steps {args.initial_steps} of --total-timesteps {args.total_timesteps}: nothing would be learned"
    require(args.initial_steps < args.total_timesteps, few)
    if args.save_policy is not None:
        path = Path(args.save_policy).resolve()
        writable = not path.is_dir() and os.access(path.parent, os.W_OK)
        require(writable, f"--save-policy {args.save_policy}: cannot write such a file")
    if args.capture_video:
        check_video(args.env_id)


# ---------------------------------------------------------------------------------------------------- environment

# Leading observation dimensions (x, or x and y) that these tasks hide by default; here they are for the reward alone.
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


class ResizableBuffer(ReplayBuffer):
    """For imagined transitions, of which longer rollouts make more."""

    def resize(self, capacity: int) -> None:
        """The newest transitions stay."""
        if capacity != self.capacity:
            oldest = self.position if self.size == self.capacity else 0
            rows = {name: column.roll(-oldest, dims=0)[-capacity:] for name, column in self.columns().items()}
            self.__init__(capacity, self.obs.shape[1], self.action.shape[1], self.obs.device)  # type: ignore[misc]
            self.add(**rows)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.resize(state["capacity"])
        super().load_state_dict(state)


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


def member_errors(model: DynamicsModel, x: Tensor, y: Tensor) -> Tensor:
    """Squared error of each member's mean on x (N, in), y (N, out): (E,)."""
    with torch.no_grad():
        output = model.mlp(x.expand(model.ensemble_size, -1, -1))[..., : model.num_targets]
        return (output - y[:, : model.num_targets]).square().mean(dim=(1, 2))


def hold_out(buffer: ReplayBuffer, args: Args) -> tuple[Tensor, Tensor]:
    """Rows of the buffer to train on, and at most 5,000 to test by. A place that is held out is so at every fit."""
    out = torch.rand(buffer.capacity, generator=torch.Generator().manual_seed(args.seed)) < args.model_holdout
    out[0], out[1] = True, False  # neither is ever empty
    test = out[: buffer.size].nonzero()[:, 0]
    test = test[torch.randperm(len(test))[:5_000]]
    train = (~out[: buffer.size]).nonzero()[:, 0]
    return train.to(buffer.obs.device), test.to(buffer.obs.device)


def fit_members(
    model: DynamicsModel, optimizer: torch.optim.Optimizer, buffer: ReplayBuffer, args: Args
) -> tuple[list[int], dict[str, float]]:
    """Train until no member's held-out error falls any more; every member ends as it was at its best.

    Returns the elites' indices, best first, and metrics. Goes on from the weights of the last fit.
    """
    train_rows, test_rows = hold_out(buffer, args)
    x, y = model.regression_data(buffer, train_rows, fit=True)
    test = model.regression_data(buffer, test_rows)
    epoch = math.ceil(len(x) / args.model_batch_size)
    best, best_error = {name: p.detach().clone() for name, p in model.named_parameters()}, member_errors(model, *test)
    steps, stale, mark, dtype = 0, 0, best_error, getattr(torch, args.train_dtype)
    while steps < args.max_train_steps and (args.patience is None or stale <= args.patience):
        for _ in range(min(epoch, args.max_train_steps - steps)):
            loss = train_step(model, optimizer, x, y, args.model_batch_size, args.input_noise, dtype)
            steps += 1
        error = member_errors(model, *test)
        fell = error < 0.99 * mark  # by 1 % since it last did: small gains add up
        mark, stale = torch.where(fell, error, mark), 0 if fell.any() else stale + 1
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        for name, parameter in model.named_parameters():  # all of them begin with the member (E, ...)
            best[name][better] = parameter.detach()[better]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(best[name])
    elites = best_error.argsort()[: args.elite_members]
    metrics = {"model/train_loss": loss.mean().item(), "model/holdout_mse": best_error[elites].mean().item()}
    return elites.tolist(), metrics | {"model/train_steps": float(steps)}


def only_members(model: DynamicsModel, members: list[int], dtype: str = "float32") -> DynamicsModel:
    """A copy of the model that has these members only, with the layers' weights in another precision."""
    few = copy.deepcopy(model).requires_grad_(False)
    few.ensemble_size = len(members)
    for parameter in few.parameters():
        parameter.data = parameter.data[members]
    few.mlp.to(getattr(torch, dtype))
    return few


CACHED_STATES = 4_096  # a CPU rolls out so many at a time: their activations stay in its cache


@torch.no_grad()
def model_step(
    elites: DynamicsModel, formulas: tuple[RewardFn, TerminatedFn] | None, obs: Tensor, action: Tensor, average: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """obs (N, D), action (N, A) -> next_obs (N, D), reward (N,), terminated (N,).

    A random elite takes each row, and no elite computes a row that it does not take: the rows are shuffled and dealt
    out in equal parts (E, N / E), for one batched product, and put back in order.
    """
    E, N = elites.ensemble_size, len(obs)
    if average:
        next_obs, reward, over = elites.predict(obs.expand(E, -1, -1), action.expand(E, -1, -1))
        next_obs = next_obs.mean(dim=0)
        reward, over = (None if part is None else part.mean(dim=0) for part in (reward, over))
    else:
        pad = -N % E  # some rows go in twice, so that the parts are equal; which ones count is random, too
        dealt = torch.randperm(N, device=obs.device).repeat(1 + -(-E // N))[: N + pad]
        first = int(torch.randint(pad + 1, ()))
        counts, row = slice(first, first + N), dealt[first : first + N]  # any N of them in a row are all rows
        x = elites.inputs(obs, action)[dealt]
        x = elites.input_normaliser(x).view(E, (N + pad) // E, -1).to(elites.mlp.weights[0].dtype)
        group = x.shape[1] if x.is_cuda else max(1, CACHED_STATES // E)
        output = torch.cat([elites.mlp(part).float() for part in x.split(group, dim=1)], dim=1)
        target = output[..., : elites.num_targets]
        if isinstance(elites, GaussianEnsemble):
            target = target + (0.5 * elites.logvar(output)).exp() * torch.randn_like(target)
        change = torch.empty(N, elites.num_targets, device=obs.device)
        change[row] = elites.target_normaliser.inverse(target).flatten(0, 1)[counts]
        next_obs, reward, over = obs + change[:, : elites.obs_dim], None, None
        if elites.learn_reward:
            over = torch.empty(N, device=obs.device)
            over[row] = output[..., -1].sigmoid().flatten()[counts]
            reward = change[:, -1]
    if formulas:
        reward, over = formulas[0](obs, action, next_obs), formulas[1](next_obs)
    assert reward is not None and over is not None
    # A known end is a bool, a learned one a probability, and drawn like the next state; the mean's comes if likely.
    return next_obs, reward, over.float() > (0.5 if formulas or average else torch.rand_like(reward))


@torch.no_grad()
def imagine(
    elites: DynamicsModel, formulas: tuple[RewardFn, TerminatedFn] | None, actor: Actor, obs: Tensor, length: int,
    average: bool, into: ReplayBuffer,
) -> None:  # fmt: skip
    """Act in the model from obs (N, D); what ends is stored as ended and goes no further."""
    for _ in range(length):
        action, _ = actor.sample(obs[:, elites.skip :])
        next_obs, reward, over = model_step(elites, formulas, obs, action, average)
        sound = next_obs.isfinite().all(dim=1) & reward.isfinite()  # a model that blew up has nothing to teach
        rows = {"obs": obs, "action": action, "next_obs": next_obs, "reward": reward, "terminated": over}
        into.add(**{name: column[sound] for name, column in rows.items()})
        obs = next_obs[sound & ~over]
        if not len(obs):
            break


def scheduled_length(args: Args, step: int) -> int:
    """Steps of a rollout begun at this environment step."""
    if args.rollout_schedule is None:
        return args.rollout_length
    first, last, low, high = args.rollout_schedule
    epoch = (step - args.initial_steps) / 1_000
    share = min(max((epoch - first) / (last - first), 0.0), 1.0)
    return int(low + share * (high - low))


def real_rows(args: Args) -> int:
    """How many rows of a batch are real where there are imagined ones, too: at least one, unless none are asked for."""
    ratio = args.real_ratio or 0.0
    return max(round(ratio * args.batch_size), int(ratio > 0))


def sample_batch(
    args: Args, buffer: ReplayBuffer, imagined: ReplayBuffer, skip: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """obs, action, next_obs, reward, terminated: so many real and so many imagined, without the hidden positions."""
    real = real_rows(args) if imagined.size else args.batch_size
    parts = []
    for source, count in ((buffer, real), (imagined, args.batch_size - real)):
        if count:
            rows = torch.randint(source.size, (count,), device=source.obs.device)
            columns = (source.obs, source.action, source.next_obs, source.reward, source.terminated)
            parts.append([column[rows] for column in columns])
    obs, action, next_obs, reward, terminated = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return obs[:, skip:], action, next_obs[:, skip:], reward, terminated


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


def weight_size(networks: nn.Module) -> dict[str, float]:
    """Not finite if a weight or a running mean is not: those of the last step have entered no loss yet."""
    tensors = [tensor for tensor in networks.state_dict().values() if tensor.is_floating_point()]
    return {"weights": torch.stack([tensor.double().norm() for tensor in tensors]).sum().item()}


def check_losses(means: dict[str, float], buffer: ReplayBuffer, args: Args, step: int, run_dir: Path) -> None:
    """An agent that has diverged is of no use, and must not overwrite its last good checkpoint."""
    bad = [f"non-finite {name}" for name, mean in means.items() if not math.isfinite(mean)]
    # No value can exceed in size the largest reward and the entropy of each action, at most log 2, got forever; ten
    # times that leaves room for a temperature that adapts itself.
    entropy = (args.alpha or 0.0) * buffer.action.shape[1]
    highest = 10 * (buffer.reward[: buffer.size].abs().max().item() + entropy + 10) / (1 - args.gamma)
    if abs(means.get("losses/qf_values", 0.0)) > highest:
        bad.append(f"losses/qf_values beyond ±{highest:.0f}, which no policy can earn or lose,")
    if bad:
        checkpoint = run_dir / "checkpoint.pt"
        last = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"
        way = "--model-learning-rate" if "model/" in bad[0] else "--learning-rate or --utd-ratio"
        sys.exit(f"{bad[0]} at or before step {step}; {last}; or start anew with a smaller {way}")


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
def rollout_error(elites: DynamicsModel, obs: Tensor, action: Tensor, whole: Tensor, length: int) -> dict[str, float]:
    """Error of the elites' mean after `length` steps of the actions taken; obs (T, B, D), action (T, B, A)."""
    starts = torch.arange(len(obs) - length, device=obs.device)
    state = obs[starts].flatten(0, 1).expand(elites.ensemble_size, -1, -1)  # (E, N, D)
    for t in range(length):
        state, _, _ = elites.predict(state, action[starts + t].flatten(0, 1).expand(elites.ensemble_size, -1, -1))
    lasted = whole[starts + length].flatten()  # episodes that were still going on then
    if not lasted.any():
        return {}
    error = (state.mean(dim=0) - obs[starts + length].flatten(0, 1))[lasted][:, elites.skip :]
    variance = obs[whole][:, elites.skip :].var(dim=0)
    moving = variance > 1e-8
    return {"model/rollout_mse": (error.square().mean(dim=0)[moving] / variance[moving]).mean().item()}


# Differs: the policy acts, and its critic is compared with what was earned
@torch.no_grad()
def evaluate(
    args: Args, agent: Agent, elites: DynamicsModel | None, length: int, episodes: int, device: torch.device,
    video: Path | None,
) -> tuple[dict[str, float], list[float]]:  # fmt: skip
    """Whole episodes, side by side, acting by the mean; the same seeds each time, none of them trained on."""
    kwargs = {"max_episode_steps": args.max_episode_steps} | ({"render_mode": "rgb_array"} if video else {})
    envs = VectorEnv(args.env_id, episodes, args.seed + 1_000_000, **kwargs)
    skip = hidden_positions(envs.envs[0])
    frames, observed, actions, rewards, ended, alive = [], [], [], [], [], [np.ones(episodes, bool)]
    last_obs = np.empty_like(envs.obs)
    while alive[-1].any():
        obs, episode = torch.from_numpy(envs.obs).to(device), envs.episode
        action = agent.actor.mode(obs[:, skip:])
        if video and alive[-1][0]:
            frames.append(envs.envs[0].render())
        next_obs, reward, over = envs.step(action.cpu().numpy())
        observed.append(obs)
        actions.append(action)
        rewards.append(np.where(alive[-1], reward, 0))  # after its first episode it is only kept company
        ended.append(over & alive[-1])
        last_obs[alive[-1]] = next_obs[alive[-1]]
        alive.append(alive[-1] & (envs.episode == episode))
    for env in envs.envs:
        env.close()
    if video:
        write_video(frames, video, envs.envs[0].metadata.get("render_fps", 30))
    returns, lengths = np.sum(rewards, axis=0), np.sum(alive[:-1], axis=0)
    metrics = {"eval/episodic_return": returns.mean().item(), "eval/episodic_length": lengths.mean().item()}
    metrics["eval/episodic_return_std"] = returns.std(ddof=1).item() if episodes > 1 else 0.0

    def value(obs: Tensor, action: Tensor) -> np.ndarray:
        return agent.critic.value(obs[..., skip:], action).amin(dim=0).cpu().numpy()

    # What was earned from each state on, discounted; where the time limit cut it short, the critic's value goes on.
    final = torch.from_numpy(last_obs).to(device)
    earned = value(final, agent.actor.mode(final[:, skip:])) * ~np.any(ended, axis=0)
    gains = []
    for reward, on in zip(reversed(rewards), reversed(alive[:-1]), strict=True):
        earned = np.where(on, reward + args.gamma * earned, earned)
        gains.append(earned)
    whole, promised = np.array(alive[:-1]), np.stack([value(*each) for each in zip(observed, actions, strict=True)])
    metrics["eval/critic_value"] = promised[whole].mean().item()
    metrics["eval/critic_bias"] = (promised - np.array(gains[::-1]))[whole].mean().item()
    if elites and length < len(observed):
        steps = (torch.stack(observed), torch.stack(actions), torch.from_numpy(whole).to(device))
        metrics |= rollout_error(elites, *steps, length)
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
MAY_CHANGE |= {"total_timesteps", "save_policy", "eval_only", "eval_episodes", "capture_video", "compile"}
MAY_CHANGE |= {"eval_every", "interim_episodes"}


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


def save_policy(path: Path, args: Args, agent: Agent, metrics: dict[str, float]) -> None:
    """The actor in the standard observation space, with the bounds of its actions among its weights."""
    contents = {"env_id": args.env_id, "actor": agent.actor.state_dict(), "seed": args.seed, "metrics": metrics}
    save_file(path, contents | {"max_episode_steps": args.max_episode_steps})


def load_policy(path: str) -> Actor:
    """What --save-policy wrote."""
    weights = torch.load(path, map_location="cpu", weights_only=True)["actor"]
    scale, bias = weights["action_scale"], weights["action_bias"]
    actor = Actor(weights["fc1.weight"].shape[1], bias - scale, bias + scale, len(weights["fc1.weight"]))
    actor.load_state_dict(weights)
    return actor.requires_grad_(False)


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


def branch(
    args: Args, step: int, num_steps: float, elites: DynamicsModel, formulas: tuple[RewardFn, TerminatedFn] | None,
    actor: Actor, buffer: ReplayBuffer, imagined: ResizableBuffer,
) -> None:  # fmt: skip
    """Rollouts from states of the buffer, as many as fall due in `num_steps` environment steps."""
    length, count = scheduled_length(args, step), max(1, round(args.rollouts_per_step * num_steps))
    if args.real_ratio is not None:
        imagined.resize(count * length * math.ceil(1_000 * args.retain_epochs / num_steps))
    start = buffer.obs[torch.randint(buffer.size, (count,), device=buffer.obs.device)]
    imagine(elites, formulas, actor, start, length, args.average_members, imagined)


def learn_to_act(
    args: Args, step: int, owed: int, agent: Agent, elites: DynamicsModel | None,
    formulas: tuple[RewardFn, TerminatedFn] | None, buffer: ReplayBuffer, imagined: ResizableBuffer, skip: int,
    means: Means, watch: Stopwatch,
) -> None:  # fmt: skip
    """`owed` gradient steps; with one buffer rollouts are made between them, with the policy as it is by then."""
    for update in range(owed):
        if args.real_ratio is None and elites is not None and update % BLOCK == 0:
            every = min(BLOCK, owed - update) / args.utd_ratio  # in how many steps so many updates fall due
            watch.lap("time/share_updates")
            branch(args, step, every, elites, formulas, agent.actor, buffer, imagined)
            watch.lap("time/share_rollouts")
        means.add(agent.update(*sample_batch(args, buffer, imagined, skip)))


def model_config(args: Args, envs: VectorEnv, action_dim: int, known: bool) -> dict[str, Any]:
    """`known`: there are formulas for reward and termination; without rollouts nobody asks for them."""
    env, obs = envs.envs[0], envs.obs
    config: dict[str, Any] = {"obs_dim": obs.shape[1], "action_dim": action_dim, "skip": hidden_positions(env)}
    config |= {"ensemble_size": args.ensemble_size, "num_layers": args.num_layers, "hidden_size": args.hidden_size}
    learn_reward = not known and args.rollout_length > 0
    config |= {"activation": args.activation, "learn_reward": learn_reward, "probabilistic": args.probabilistic}
    return config | {"angles": free_angles(env, obs[0]) if args.wrap_angles else []}


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
    obs_dim, skip = envs.obs.shape[1], hidden_positions(envs.envs[0])
    low, high = action_bounds(envs, args.env_id, device)
    check_ranges(low, high, args.env_id)
    formulas = chosen_formulas(args, envs.envs[0]) if args.rollout_length else None

    agent = Agent(obs_dim - skip, low, high, args)
    buffer = ReplayBuffer(min(args.buffer_size, args.total_timesteps + args.num_envs), obs_dim, len(low), device)
    model = make_model(model_config(args, envs, len(low), known=formulas is not None)).to(device)
    model_optimizer = make_optimizer(model, args.model_learning_rate, args.weight_decay)
    imagined = ResizableBuffer(args.buffer_size if args.real_ratio is None else 1, obs_dim, len(low), device)

    run_dir = Path(args.resume) if args.resume else new_run_dir(args)
    progress: dict[str, Any] = {"step": 0, "updates": 0, "elites": None, "seconds": 0.0, "metrics": {}}
    means = Means(device)
    parts = {"agent": agent, "optimizer": agent.optimizer, "model": model, "model_optimizer": model_optimizer}
    parts |= {"means": means, "buffer": buffer, "imagined": imagined, "envs": envs}
    checkpointer = Checkpointer(run_dir, progress, parts)
    if checkpoint:
        go_on(args, checkpointer, checkpoint)
        checkpoint = None  # a second copy of both buffers
    elites = only_members(model, progress["elites"], args.train_dtype) if progress["elites"] else None
    if args.eval_only:
        video = run_dir / "videos" / "eval_only.mp4" if args.capture_video else None
        length = scheduled_length(args, progress["step"])
        again, returns = evaluate(args, agent, elites, length, args.eval_episodes, device, video)
        print(f"{run_dir}: {describe(again, returns)}")
        if args.save_policy:
            save_policy(Path(args.save_policy), args, agent, again)
        return again
    with checkpointer:
        log = Logger(run_dir, args, progress["step"] if args.resume else None)
        model_is = f"reward and termination {'known' if formulas else 'learned'}" if args.rollout_length else "no model"
        print(f"{run_dir}: {model_is}, device {device}", flush=True)
        bar = tqdm(total=args.total_timesteps, initial=progress["step"], unit="step")
        watch = Stopwatch(progress["step"])
        while progress["step"] < args.total_timesteps:
            rows = interact(agent.actor, envs, skip, device, random=progress["step"] < args.initial_steps)
            buffer.add(**rows)
            progress["step"] = step = progress["step"] + args.num_envs
            due = partial(passes, step=step, taken=args.num_envs)
            if envs.finished:
                mean_return, mean_length = np.mean(envs.finished, axis=0).tolist()
                log.scalars({"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}, step)
                bar.set_postfix({"return": f"{mean_return:.0f}"})
            watch.lap("time/share_env")
            started = step >= args.initial_steps

            # Learn the model, act in it.
            if args.rollout_length and args.real_ratio is None:
                imagined.add(**rows)  # one buffer for both
            if args.rollout_length and started and (due(args.model_every) or elites is None):
                if elites is None:
                    compare_with_paid(formulas, buffer)
                progress["elites"], fitted = fit_members(model, model_optimizer, buffer, args)
                check_losses(fitted, buffer, args, step, run_dir)
                elites = only_members(model, progress["elites"], args.train_dtype)
                watch.lap("time/share_model")
                if args.real_ratio is not None:
                    every = max(args.model_every, args.num_envs)
                    branch(args, step, every, elites, formulas, agent.actor, buffer, imagined)
                log.scalars(fitted | {"model/rollout_length": float(scheduled_length(args, step))}, step)
                watch.lap("time/share_rollouts")

            # Learn to act.
            if started and (due(args.update_every) or not progress["updates"]):
                owed = int(args.utd_ratio * (step - args.initial_steps + args.update_every)) - progress["updates"]
                learn_to_act(args, step, owed, agent, elites, formulas, buffer, imagined, skip, means, watch)
                progress["updates"] += owed
                watch.lap("time/share_updates")
            bar.update(args.num_envs)

            finished, save = step >= args.total_timesteps, due(args.checkpoint_every)
            if due(LOG_EVERY) or finished:
                check_losses(means.read(), buffer, args, step, run_dir)
                log.scalars(means.read() | watch.read(step), step)
                means.reset()
            if due(args.eval_every) or finished:
                video = run_dir / "videos" / f"{step}.mp4" if args.capture_video else None
                episodes = args.eval_episodes if finished else args.interim_episodes
                length = scheduled_length(args, step)
                progress["metrics"], returns = evaluate(args, agent, elites, length, episodes, device, video)
                minutes = (progress["seconds"] + time.perf_counter() - checkpointer.started) / 60
                log.scalars(progress["metrics"] | {"time/minutes": minutes}, step)
                tqdm.write(f"{step} steps: {describe(progress['metrics'], returns)}")
            if save or finished or checkpointer.signal:  # what has not been checked is not saved
                check_losses(means.read() | weight_size(agent), buffer, args, step, run_dir)
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
