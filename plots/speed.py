"""Speed of the scripts against named baselines: one row of plots/speed.csv for each way of doing the same work.

    pip install stable-baselines3            the baseline of the SAC rows
    python plots/speed.py                    all rows, on an otherwise idle machine (some minutes)
    python plots/speed.py --no-compile       without the rows of torch.compile: a minute, nothing is saved
    python plots/speed.py --threads 1        with one thread

The ways of a row are timed in turn, A B C A B C …, in one process, after a warm-up, and the medians are compared: the
ratio holds when the machine's speed drifts, the absolute figure does not. Before a ratio counts the baseline must show
that it is no straw man: it must reach at least 75 % of the reference machine's figure, which is scaled down by the
speed of a plain float32 matrix product on a machine where that is slower. bfloat16 is shown with the model's error
beside it, because being fast and wrong is easy.
"""

import argparse
import csv
import importlib.util
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the scripts are measured from outside, as a user's own code would call them

from figures import refresh_readme  # noqa: E402  (beside this file)

import mbpo_sac  # noqa: E402
import mbrl_dynamics  # noqa: E402
import mpc_cem  # noqa: E402
import mpc_random_shooting  # noqa: E402
import pets  # noqa: E402

REFERENCE_GFLOPS = 230.0  # float32 matrix products of the reference machine (2-core Zen 5), where its figures are from


def medians(ways: dict[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, float]:
    """Median seconds a call of each way, timed in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first round warms up
        for name, call in ways.items():
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            if number:
                times[name].append((time.perf_counter() - begin) / calls)
    return {name: float(np.median(values)) for name, values in times.items()}


def matrix_gflops(dtype: torch.dtype) -> float:
    """What this machine's matrix products reach, at the size of a training batch of three members."""
    a, b = torch.randn(1536, 256, dtype=dtype), torch.randn(256, 256, dtype=dtype)
    return 2 * 1536 * 256 * 256 / medians({"product": lambda: a @ b}, rounds=15, calls=30)["product"] / 1e9


def cpu_name() -> str:
    """The processor as the system names it, with the generation that a vague name leaves out."""
    info = Path("/proc/cpuinfo")
    fields = [line.partition(":") for line in info.read_text().splitlines()] if info.exists() else []
    found = {key.strip(): value.strip() for key, _, value in reversed(fields)}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    return f"{found['model name']} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


# ---------------------------------------------------------------------------------------------------------------------
# Dynamics training: 3 members × batch 512, 2×250 tanh, PostureCheetah-v0 (21 observations, 6 actions)
# ---------------------------------------------------------------------------------------------------------------------


def posture_data(count: int = 20_000) -> mbrl_dynamics.ReplayBuffer:
    """Random transitions, the same at every call."""
    envs = mbrl_dynamics.VectorEnv("envs:PostureCheetah-v0", 8, seed=1)
    buffer = mbrl_dynamics.ReplayBuffer(count, 21, 6, torch.device("cpu"))
    while buffer.size < count:
        obs, episode, action = envs.obs, envs.episode, envs.random_action()
        next_obs, reward, terminated = envs.step(action)
        buffer.add(obs=obs, action=action, next_obs=next_obs, reward=reward, terminated=terminated, episode=episode)
    return buffer


def course_training(buffer: mbrl_dynamics.ReplayBuffer) -> Callable[[], object]:
    """One gradient step in the course's style: numpy replay buffer, one network and one Adam per member, in a loop."""
    obs, action, next_obs = (column.numpy() for column in (buffer.obs, buffer.action, buffer.next_obs))
    x, y = np.concatenate([obs, action], axis=1), next_obs - obs
    x_mean, x_std, y_mean, y_std = (torch.from_numpy(part) for part in (x.mean(0), x.std(0), y.mean(0), y.std(0)))
    members, optimizers = [], []
    for _ in range(3):
        layers = [torch.nn.Linear(27, 250), torch.nn.Tanh(), torch.nn.Linear(250, 250), torch.nn.Tanh()]
        members.append(torch.nn.Sequential(*layers, torch.nn.Linear(250, 21)))
        optimizers.append(torch.optim.Adam(members[-1].parameters(), lr=1e-3))

    def step() -> list[float]:
        losses = []
        for member, optimizer in zip(members, optimizers, strict=True):
            rows = np.random.randint(0, len(obs), 512)
            batch_obs, batch_action, batch_next = (torch.from_numpy(part[rows]) for part in (obs, action, next_obs))
            inputs = (torch.cat([batch_obs, batch_action], dim=1) - x_mean) / (x_std + 1e-6)
            target = (batch_next - batch_obs - y_mean) / (y_std + 1e-6)
            loss = torch.nn.functional.mse_loss(member(inputs), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return step


def our_training(
    buffer: mbrl_dynamics.ReplayBuffer, dtype: torch.dtype
) -> tuple[Callable[[], object], Callable[[], float]]:
    """One gradient step of mbrl_dynamics.py, input noise included; and its one-step error on held-out episodes."""
    torch.manual_seed(1)
    model = mbrl_dynamics.Ensemble(21, 6, 3, 2, 250, "tanh", learn_reward=False, skip=0)
    train_rows, test_rows = mbrl_dynamics.split_episodes(buffer.episode, 0.1, seed=1)
    x, y = model.regression_data(buffer, train_rows, fit=True)
    test = model.regression_data(buffer, test_rows)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    return (
        lambda: mbrl_dynamics.train_step(model, optimizer, x, y, 512, 0.01, dtype),
        lambda: mbrl_dynamics.one_step_metrics(model, *test)["model/holdout_mse"],
    )


def training_row(scale: float) -> list[dict[str, str]]:
    """Gradient steps per second; a gradient step is forward and two backward products of every layer but the first."""
    buffer = posture_data()
    ways: dict[str, Callable[[], object]] = {"course: loop over members, numpy": course_training(buffer)}
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = f"mbrl_dynamics.py {str(dtype).removeprefix('torch.')}"
        ways[name], errors[name] = our_training(buffer, dtype)
    rounds, calls = 41, 25  # after warm-up: 1,000 gradient steps more, so that the errors are those of a trained model
    seconds = medians(ways, rounds, calls)
    flops = 2 * 3 * 512 * (27 * 250 * 2 + 250 * 250 * 3 + 250 * 21 * 3)
    rows = []
    for name, targets in zip(ways, ("160 × matrix speed", "1.8", "3"), strict=True):
        ratio = next(iter(seconds.values())) / seconds[name]
        error = f"{errors[name]():.4f}" if name in errors else ""
        rows.append(
            row("dynamics training, 3 members × 512", name, 1 / seconds[name], "steps/s", ratio, flops / seconds[name])
        )
        rows[-1] |= {"target ratio": targets, "held-out MSE": error}
    expected = 160 * scale
    check_baseline(rows[0], 1 / next(iter(seconds.values())), expected)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Planning: K 1000, H 15, 3 members of 2×250 tanh, PostureCheetah-v0; CEM sweeps the candidates four times
# ---------------------------------------------------------------------------------------------------------------------

LOW, HIGH = -torch.ones(6), torch.ones(6)


def posture_reward(next_obs: np.ndarray) -> np.ndarray:
    """PostureCheetah's, in numpy, as a course solution would have it."""
    faults = (next_obs[:, 6] > 0.2).astype(float) + (next_obs[:, 7] > 0) + (next_obs[:, 8] > 0)
    return next_obs[:, 9] - 10 * faults


def course_returns(model: mpc_cem.Ensemble) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns of candidates (K, H, A) in the course's style: a loop over members, numpy between the steps."""
    members = []
    for member in range(model.ensemble_size):
        layers: list[torch.nn.Module] = []
        for weight, bias in zip(model.mlp.weights, model.mlp.biases, strict=True):
            layer = torch.nn.Linear(*weight.shape[1:])
            layer.weight.data, layer.bias.data = weight[member].T.contiguous(), bias[member, 0].clone()
            layers += [layer, torch.nn.Tanh()]
        members.append(torch.nn.Sequential(*layers[:-1]))
    x_mean, x_std = model.input_normaliser.mean, model.input_normaliser.std
    y_mean, y_std = model.target_normaliser.mean, model.target_normaliser.std

    @torch.no_grad()
    def returns(obs: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        total = np.zeros((len(members), len(candidates)), np.float32)
        states = [np.tile(obs, (len(candidates), 1)) for _ in members]
        for t in range(candidates.shape[1]):
            for number, member in enumerate(members):
                state, action = torch.from_numpy(states[number]), torch.from_numpy(candidates[:, t])
                inputs = (torch.cat([state, action], dim=1) - x_mean) / x_std
                states[number] = (state + member(inputs) * y_std + y_mean).numpy()
                total[number] += posture_reward(states[number])
        return total.mean(axis=0)

    return returns


def course_shooting(returns: Callable[[np.ndarray, np.ndarray], np.ndarray], obs: np.ndarray) -> np.ndarray:
    candidates = (LOW + (HIGH - LOW) * torch.rand(1000, 15, 6)).numpy()
    return candidates[returns(obs, candidates).argmax(), 0]


def course_cem(returns: Callable[[np.ndarray, np.ndarray], np.ndarray], obs: np.ndarray) -> np.ndarray:
    mean, std = np.zeros((15, 6)), np.ones((15, 6))
    for iteration in range(4):
        if iteration == 0:
            draws = (LOW + (HIGH - LOW) * torch.rand(1000, 15, 6)).numpy()
        else:
            noise = torch.randn(1000, 6, 15).transpose(-1, -2).numpy()
            draws = mean + std * noise
        elites = draws[np.argsort(returns(obs, np.clip(draws, -1, 1).astype(np.float32)))[-5:]]
        mean, std = np.clip(elites.mean(axis=0), -1, 1), elites.std(axis=0, ddof=1)
    return mean[0]


def planning_rows(scale: float, compile: bool) -> list[dict[str, str]]:
    """Plans per second. Every float32 way must choose the same action on the same random numbers."""
    torch.manual_seed(0)
    model = mpc_cem.Ensemble(21, 6, 3, 2, 250, "tanh", learn_reward=False, skip=0).requires_grad_(False)
    buffer = posture_data(2_000)
    model.regression_data(buffer, torch.arange(buffer.size), fit=True)
    env: Any = mbrl_dynamics.make_env("envs:PostureCheetah-v0").unwrapped
    formulas, obs = (env.batch_reward, env.batch_terminated), buffer.obs[:1]
    returns = course_returns(model)
    course = {"horizon": 15, "num_candidates": 1000, "planner_dtype": "float32"}
    cem = course | {"start": "uniform", "num_elites": 5, "cem_alpha": 1.0, "noise_beta": 0.0, "keep_elites": 0.0}
    cem |= {"shift_plan": False, "candidate_decay": 1.0, "mean_candidate": False, "cem_iterations": 4}
    works = (
        ("random-shooting plan", mpc_random_shooting, course, lambda: course_shooting(returns, obs[0].numpy()), 67, 1),
        ("CEM plan, 4 iterations", mpc_cem, cem, lambda: course_cem(returns, obs[0].numpy()), 256, 4),
    )
    rows = []
    for work, script, settings, baseline, reference_ms, sweeps in works:
        ways: dict[str, Callable[[], Any]] = {"course: loop over members, numpy": baseline}
        for dtype in ("float32", "bfloat16"):
            fast = script.planning_copy(model, dtype)
            imagine = partial(script.imagined_returns, fast, formulas, 1.0)
            for compiled in (False, True) if compile else (False,):
                args = script.Args(**settings, compile=compiled)
                planner = script.Planner(args, imagine, LOW, HIGH, 1)
                name = f"{script.__name__}.py {dtype}{', --compile' if compiled else ''}"
                ways[name] = partial(planner, obs)
        torch.manual_seed(1)
        chosen = torch.from_numpy(np.asarray(baseline(), np.float32))
        torch.manual_seed(1)
        same = (ways[f"{script.__name__}.py float32"]()[0][0] - chosen).abs().max().item()
        if same > 1e-4:
            sys.exit(f"{work}: the float32 plan differs from the baseline's by {same}")
        seconds = medians(ways, rounds=9, calls=3)
        flops = sweeps * 15 * 2 * 3 * 1000 * (27 * 250 + 250 * 250 + 250 * 21)
        for name in ways:
            ratio = next(iter(seconds.values())) / seconds[name]
            rows.append(row(f"{work}, K 1000, H 15", name, 1 / seconds[name], "plans/s", ratio, flops / seconds[name]))
            target = "6" if "compile" in name else "4" if "bfloat16" in name else "1.5"
            rows[-1] |= {"target ratio": target, "held-out MSE": ""}
            if "float32, --compile" in name:
                rows[-1]["target ratio"] = ""
        check_baseline(rows[-len(ways)], 1 / next(iter(seconds.values())), 1000 / reference_ms * scale)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# SAC: one environment step of HalfCheetah-v5 and one update, 256-256, batch 256
# ---------------------------------------------------------------------------------------------------------------------

SAC_STEPS = 50  # of each timed call


def our_sac(dtype: Any, compile: bool = False) -> Callable[[], object]:
    torch.manual_seed(1)
    args = mbpo_sac.Args(rollout_length=0, utd_ratio=1.0, train_dtype=dtype, compile=compile)
    envs = mbpo_sac.VectorEnv(args.env_id, 1, seed=1)
    skip, device = mbpo_sac.hidden_positions(envs.envs[0]), torch.device("cpu")
    buffer = mbpo_sac.ReplayBuffer(100_000, envs.obs.shape[1], 6, device)
    agent = mbpo_sac.Agent(envs.obs.shape[1] - skip, LOW, HIGH, args)

    def steps() -> None:
        for _ in range(SAC_STEPS):
            buffer.add(**mbpo_sac.interact(agent.actor, envs, skip, device, random=buffer.size < 1_000))
            if buffer.size > 1_000:
                agent.update(*mbpo_sac.sample_batch(args, buffer, None, skip))

    while buffer.size <= 1_000:
        steps()
    return steps


def sac_rows(scale: float, compile: bool) -> list[dict[str, str]]:
    """Environment steps per second, each with one update."""
    from stable_baselines3 import SAC

    baseline = SAC("MlpPolicy", "HalfCheetah-v5", learning_starts=1_000, device="cpu", seed=1)
    baseline.learn(1_000)
    ways: dict[str, Callable[[], object]] = {
        "stable-baselines3": lambda: baseline.learn(SAC_STEPS, reset_num_timesteps=False),
        "mbpo_sac.py float32": our_sac("float32"),
        "mbpo_sac.py bfloat16": our_sac("bfloat16"),
    }
    if compile:
        ways |= {f"mbpo_sac.py {dtype}, --compile": our_sac(dtype, compile=True) for dtype in ("float32", "bfloat16")}
    seconds = {name: each / SAC_STEPS for name, each in medians(ways, rounds=15, calls=1).items()}
    actor, critics = 17 * 256 + 256 * 256 + 256 * 12, 2 * (23 * 256 + 256 * 256 + 256)
    flops = 2 * 256 * (4 * actor + 6 * critics)  # forward, and backward where a gradient is needed
    rows = []
    for name in ways:
        target = "2.2" if "bfloat16" in name else "1.6"
        ratio = next(iter(seconds.values())) / seconds[name]
        work = "SAC, an environment step and an update"
        rows.append(row(work, name, 1 / seconds[name], "steps/s", ratio, flops / seconds[name]))
        rows[-1] |= {"target ratio": target, "held-out MSE": ""}
    check_baseline(rows[0], 1 / next(iter(seconds.values())), 122 * scale)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# MBPO's model: 5 Gaussian members of 4×200, HalfCheetah-v5 (17 observations, 6 actions)
# ---------------------------------------------------------------------------------------------------------------------


class PlainEnsemble(torch.nn.Module):
    """As mbrl-lib writes it: one matrix product a layer for all members, bias added, learned log-variance bounds."""

    def __init__(self, sizes: list[int], members: int):
        super().__init__()
        pairs = list(itertools.pairwise(sizes))
        self.weights = torch.nn.ParameterList(torch.randn(members, a, b) / (2 * a**0.5) for a, b in pairs)
        self.biases = torch.nn.ParameterList(torch.zeros(members, 1, b) for _, b in pairs)
        self.max_logvar = torch.nn.Parameter(0.5 * torch.ones(1, sizes[-1] // 2))
        self.min_logvar = torch.nn.Parameter(-10 * torch.ones(1, sizes[-1] // 2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x.matmul(weight) + bias
            if number < len(self.weights) - 1:
                x = torch.nn.functional.silu(x)
        mean, logvar = x.chunk(2, dim=-1)
        logvar = self.max_logvar - torch.nn.functional.softplus(self.max_logvar - logvar)
        return mean, self.min_logvar + torch.nn.functional.softplus(logvar - self.min_logvar)


@torch.no_grad()
def copy_members(plain: PlainEnsemble, ours: Any) -> None:
    """The same members in both ways, checked by their means; the plain ones share their bounds of the variance."""
    for mine, theirs in zip(
        (*plain.weights, *plain.biases, plain.max_logvar, plain.min_logvar),
        (*ours.mlp.weights, *ours.mlp.biases, ours.max_logvar[0], ours.min_logvar[0]),
        strict=True,
    ):
        mine.copy_(theirs)
    x = torch.randn(5, 8, ours.mlp.weights[0].shape[1])
    torch.testing.assert_close(plain(x)[0], ours.mlp(x)[..., : ours.num_targets], rtol=1e-4, atol=1e-4)


def model_rows(scale: float) -> list[dict[str, str]]:
    """Training batches per second, and seconds for one model step of 100,000 states with a random member each."""
    torch.manual_seed(1)
    data = mbrl_dynamics.VectorEnv("HalfCheetah-v5", 8, seed=1)
    obs_dim = data.obs.shape[1]
    buffer = mbpo_sac.ReplayBuffer(20_000, obs_dim, 6, torch.device("cpu"))
    while buffer.size < buffer.capacity:
        rows = mbpo_sac.interact(mbpo_sac.Actor(obs_dim, LOW, HIGH, 8), data, 0, buffer.obs.device, random=True)
        buffer.add(**rows)
    count, shape = obs_dim - 1 + 6, [200] * 4
    plain = PlainEnsemble([count, *shape, 2 * obs_dim], 5)
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3, weight_decay=5e-5)
    config: dict[str, Any] = {"obs_dim": obs_dim, "action_dim": 6, "ensemble_size": 5, "num_layers": 4}
    config |= {"hidden_size": 200, "activation": "silu", "learn_reward": False, "skip": 1}
    models = {name: mbpo_sac.GaussianEnsemble(**config) for name in ("float32", "bfloat16")}
    train_rows, test_rows = torch.arange(18_000), torch.arange(18_000, 20_000)
    x, y = models["float32"].regression_data(buffer, train_rows, fit=True)
    models["bfloat16"].load_state_dict(models["float32"].state_dict())
    x_numpy, y_numpy = x.numpy(), y.numpy()

    def plain_step() -> None:
        index = np.random.randint(0, len(x_numpy), (5, 256))
        inputs, target = torch.from_numpy(x_numpy[index]), torch.from_numpy(y_numpy[index])
        mean, logvar = plain(inputs)
        nll = (mean - target).square() * (-logvar).exp() + logvar
        loss = nll.mean(dim=(1, 2)).sum() + 0.01 * (plain.max_logvar.sum() - plain.min_logvar.sum())
        plain_optimizer.zero_grad()
        loss.backward()
        plain_optimizer.step()
        loss.item()

    ways: dict[str, Callable[[], object]] = {"plain, as in mbrl-lib": plain_step}
    for name, model in models.items():
        optimizer = mbpo_sac.make_optimizer(model, 1e-3, 5e-5)
        dtype = getattr(torch, name)
        ways[f"mbpo_sac.py {name}"] = partial(mbpo_sac.train_step, model, optimizer, x, y, 256, 0.0, dtype)
    seconds = medians(ways, rounds=31, calls=10)
    macs = count * 200 + 3 * 200 * 200 + 200 * 2 * obs_dim
    flops = 2 * 5 * 256 * (3 * macs - count * 200)
    found = []
    for name, target in zip(ways, ("", "2", "3"), strict=True):
        ratio = next(iter(seconds.values())) / seconds[name]
        work = "model training, 5 members × 256"
        found.append(row(work, name, 1 / seconds[name], "batches/s", ratio, flops / seconds[name]))
        error = ""
        if name.split()[-1] in models:
            model = models[name.split()[-1]]
            test = model.regression_data(buffer, test_rows)
            error = f"{mbpo_sac.member_errors(model, *test).mean().item():.4f}"
        found[-1] |= {"target ratio": target, "held-out MSE": error}
    check_baseline(found[0], 1 / next(iter(seconds.values())), 74 * scale)

    trained = models["float32"]
    copy_members(plain, trained)
    rows_100k = torch.randint(20_000, (100_000,))
    obs, action = buffer.obs[rows_100k], buffer.action[rows_100k]
    obs_numpy, action_numpy = obs.numpy(), action.numpy()
    mean_in, std_in = trained.input_normaliser.mean, trained.input_normaliser.std
    mean_out, std_out = trained.target_normaliser.mean, trained.target_normaliser.std

    @torch.no_grad()
    def plain_model_step() -> np.ndarray:
        state, act = torch.from_numpy(obs_numpy), torch.from_numpy(action_numpy)
        inputs = (torch.cat([state[:, 1:], act], dim=1) - mean_in) / std_in
        order = torch.randperm(len(inputs))
        mean, logvar = plain(inputs[order].view(5, -1, inputs.shape[1]))
        sample = torch.normal(mean, (0.5 * logvar).exp()).view(len(inputs), -1)
        delta = torch.empty_like(sample)
        delta[order] = sample
        return (state + delta * std_out + mean_out).numpy()

    never = (lambda obs, action, next_obs: next_obs[:, 0], lambda next_obs: next_obs[:, 0] > torch.inf)
    steps: dict[str, Callable[[], object]] = {"plain, as in mbrl-lib": plain_model_step}
    elites = {name: mbpo_sac.only_members(trained, [0, 1, 2, 3, 4], name) for name in models}
    for name in models:
        steps[f"mbpo_sac.py {name}"] = partial(mbpo_sac.model_step, elites[name], never, obs, action, False)
    seconds = medians(steps, rounds=9, calls=1)
    flops = 2 * 100_000 * macs
    for name, target in zip(steps, ("", "2", "5"), strict=True):
        ratio = next(iter(seconds.values())) / seconds[name]
        found.append(
            row("model step, 100,000 states", name, 1 / seconds[name], "steps/s", ratio, flops / seconds[name])
        )
        error = ""
        if name.split()[-1] in elites:
            held, change = buffer.obs[test_rows], buffer.next_obs[test_rows]
            guess = mbpo_sac.model_step(elites[name.split()[-1]], never, held, buffer.action[test_rows], True)[0]
            error = f"{((guess - change) / std_out).square().mean().item():.4f}"
        found[-1] |= {"target ratio": target, "held-out MSE": error}
    check_baseline(found[3], 1 / next(iter(seconds.values())), scale / 0.365)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# PETS: a plan of 5 iterations, 350 candidates, 20 particles (TS1), 30 steps ahead; the members of MBPO's model
# ---------------------------------------------------------------------------------------------------------------------

PETS_SIZE: dict[str, Any] = {"num_candidates": 350, "num_elites": 35, "num_particles": 20, "horizon": 30}
PETS_SIZE |= {"cem_iterations": 5, "propagation": "ts1", "ensemble_size": 5}


def forward_reward(obs: torch.Tensor, action: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
    return (next_obs[..., 0] - obs[..., 0]) / 0.05 - 0.1 * action.square().sum(dim=-1)


def never_over(next_obs: torch.Tensor) -> torch.Tensor:
    return next_obs[..., 0] > torch.inf


@torch.no_grad()
def plain_pets(plain: PlainEnsemble, ours: Any, args: Any, start: np.ndarray) -> np.ndarray:
    """The first action of a plan as mbrl-lib makes it: particles shuffled over the members at each step, in float32."""
    K, P, H = args.num_candidates, args.num_particles, args.horizon
    into, out = ours.input_normaliser, ours.target_normaliser
    mean, var = torch.zeros(H, 6), torch.full((H, 6), args.start_std**2)
    for _ in range(args.cem_iterations):
        std = torch.minimum(var.sqrt(), torch.minimum(mean + 1, 1 - mean) / 2)
        noise = torch.randn(K, H, 6)
        while (beyond := noise.abs() > 2).any():
            noise = torch.where(beyond, torch.randn(K, H, 6), noise)
        candidates = mean + std * noise
        obs, over = torch.from_numpy(start).repeat(K * P, 1), torch.zeros(K * P, dtype=torch.bool)
        total = torch.zeros(K * P)
        for t in range(H):
            action = candidates[:, t].repeat_interleave(P, dim=0)
            inputs = (torch.cat([obs[:, 1:], action], dim=1) - into.mean) / into.std
            order = torch.randperm(K * P)
            center, logvar = plain(inputs[order].view(5, -1, inputs.shape[1]))
            sample = torch.normal(center, logvar.exp().sqrt()).view(K * P, -1)
            change = torch.empty_like(sample)
            change[order] = sample
            next_obs = obs + change * out.std + out.mean
            reward = forward_reward(obs, action, next_obs)
            reward[over] = 0
            total, over, obs = total + reward, over | never_over(next_obs), next_obs
        elites = candidates[total.view(K, P).mean(dim=1).topk(args.num_elites).indices]
        mean = args.cem_alpha * elites.mean(dim=0) + (1 - args.cem_alpha) * mean
        var = args.cem_alpha * elites.var(dim=0) + (1 - args.cem_alpha) * var
    return mean[0].numpy()


def pets_rows(scale: float) -> list[dict[str, str]]:
    """Plans per second. Each way draws its own particles: actions cannot be compared, but the members are the same."""
    torch.manual_seed(1)
    args = pets.Args(**PETS_SIZE)
    model = pets.GaussianEnsemble(18, 6, 5, 4, 200, "silu", learn_reward=False, skip=1).requires_grad_(False)
    plain = PlainEnsemble([23, *[200] * 4, 36], 5)
    copy_members(plain, model)
    obs = 0.1 * torch.randn(1, 18)
    ways: dict[str, Callable[[], object]] = {
        "plain, as in mbrl-lib": partial(plain_pets, plain, model, args, obs[0].numpy())
    }
    for dtype in ("float32", "bfloat16"):
        fast: Any = pets.planning_copy(model, dtype)
        imagine = partial(pets.imagined_returns, fast, (forward_reward, never_over), args)
        ways[f"pets.py {dtype}"] = partial(pets.Planner(args, imagine, LOW, HIGH, 1), obs)
    seconds = medians(ways, rounds=5, calls=1)
    flops = 5 * 30 * 2 * 350 * 20 * (23 * 200 + 3 * 200 * 200 + 200 * 36)
    rows = []
    for name, target in zip(ways, ("", "2", "5"), strict=True):
        ratio = next(iter(seconds.values())) / seconds[name]
        rows.append(
            row("PETS plan, K 350, 20 particles", name, 1 / seconds[name], "plans/s", ratio, flops / seconds[name])
        )
        rows[-1] |= {"target ratio": target, "held-out MSE": ""}
    check_baseline(rows[0], 1 / next(iter(seconds.values())), scale / 3.288)
    return rows


# ---------------------------------------------------------------------------------------------------------------------


def row(work: str, way: str, speed: float, unit: str, ratio: float, flops: float) -> dict[str, str]:
    return {
        "work": work,
        "way": way,
        "speed": f"{speed:.3g} {unit}",
        "ratio": f"{ratio:.2f}",
        "GFLOP/s": f"{flops / 1e9:.0f}",
    }


TOO_SLOW = ", and it is not"


def check_baseline(baseline: dict[str, str], speed: float, expected: float) -> None:
    """A ratio to a slow baseline is worth nothing."""
    baseline["target ratio"] = f"≥ {0.75 * expected:.3g} {baseline['speed'].split()[1]} to count"
    if speed < 0.75 * expected:
        baseline["target ratio"] += TOO_SLOW


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the scripts against named baselines.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile's rows out, and save nothing")
    args = parser.parse_args()
    if importlib.util.find_spec("stable_baselines3") is None:
        sys.exit("the SAC rows need stable-baselines3 as their baseline: pip install stable-baselines3")
    torch.set_num_threads(args.threads)
    gflops = {dtype: matrix_gflops(dtype) for dtype in (torch.float32, torch.bfloat16)}
    machine = f"{cpu_name()}, {args.threads} threads, PyTorch {torch.__version__}; matrix products reach "
    machine += f"{gflops[torch.float32]:.0f} GFLOP/s in float32, {gflops[torch.bfloat16]:.0f} in bfloat16"
    print(machine)
    scale = min(1.0, gflops[torch.float32] / REFERENCE_GFLOPS)  # what is not products is no faster here
    rows = training_row(scale) + planning_rows(scale, not args.no_compile) + pets_rows(scale)
    rows += sac_rows(scale, not args.no_compile) + model_rows(scale)
    for each in rows:
        print(" | ".join(each.values()))
    slow = [each["work"] for each in rows if each["target ratio"].endswith(TOO_SLOW)]
    if slow:
        sys.exit(f"nothing is saved, for the baseline is too slow to count: {'; '.join(slow)}. Is the machine idle?")
    if not args.no_compile:
        path = ROOT / "plots" / "speed.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*rows[0]], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        path.with_suffix(".txt").write_text(machine + "\n")
        refresh_readme("speed")


if __name__ == "__main__":
    main()
