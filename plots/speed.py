"""Speed of the scripts against named baselines: one row of plots/speed.csv for each way of doing the same work.

    python plots/speed.py                    all rows, on an otherwise idle machine (a minute)
    python plots/speed.py --threads 1        with one thread

The ways of a row are timed in turn, A B C A B C …, in one process, after a warm-up, and the medians are compared: the
ratio holds when the machine's speed drifts, the absolute figure does not. Before a ratio counts the baseline must show
that it is no straw man: it must reach at least 75 % of what the reference machine's figure becomes on this one, scaled
by the speed of a plain float32 matrix product. bfloat16 is shown with the model's error beside it, because being fast
and wrong is easy.
"""

import argparse
import csv
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the scripts are measured from outside, as a user's own code would call them

from figures import refresh_readme  # noqa: E402  (beside this file)

import mbrl_dynamics  # noqa: E402

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


def row(work: str, way: str, speed: float, unit: str, ratio: float, flops: float) -> dict[str, str]:
    return {
        "work": work,
        "way": way,
        "speed": f"{speed:.3g} {unit}",
        "ratio": f"{ratio:.2f}",
        "GFLOP/s": f"{flops / 1e9:.0f}",
    }


def check_baseline(baseline: dict[str, str], speed: float, expected: float) -> None:
    """A ratio to a slow baseline is worth nothing."""
    baseline["target ratio"] = f"≥ {0.75 * expected:.0f} {baseline['speed'].split()[1]} to count"
    if speed < 0.75 * expected:
        sys.exit(f"the baseline reaches {baseline['speed']}, expected {expected:.3g} here: its ratios do not count")


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the scripts against named baselines.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--no-save", action="store_true", help="print only, leave plots/speed.csv alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    gflops = {dtype: matrix_gflops(dtype) for dtype in (torch.float32, torch.bfloat16)}
    machine = f"{cpu_name()}, {args.threads} threads, PyTorch {torch.__version__}; matrix products reach "
    machine += f"{gflops[torch.float32]:.0f} GFLOP/s in float32, {gflops[torch.bfloat16]:.0f} in bfloat16"
    print(machine)
    rows = training_row(gflops[torch.float32] / REFERENCE_GFLOPS)
    for each in rows:
        print(" | ".join(each.values()))
    if not args.no_save:
        path = ROOT / "plots" / "speed.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*rows[0]], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        path.with_suffix(".txt").write_text(machine + "\n")
        refresh_readme("speed")


if __name__ == "__main__":
    main()
