"""a2c.py: advantages against a slow reference, normalisers, one update, saved policies, runs."""

import csv
import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal

import a2c

TINY = dict(env_id="Pendulum-v1", max_episode_steps=15, total_timesteps=96, num_envs=2, batch_size=8, eval_every=30)
TINY |= dict(eval_episodes=2, interim_episodes=1, num_layers=1, hidden_size=8, num_threads=1, cuda=False)
LOW, HIGH = torch.tensor([-1.0, 0.5]), torch.tensor([0.0, 2.0])


def tiny(tmp_path: Path, **changes: object) -> a2c.Args:
    return a2c.Args(**({"log_dir": str(tmp_path / "runs")} | TINY | changes))


def run(args) -> tuple[dict[str, float], Path]:
    result = a2c.main(args)
    return result, Path(args.resume) if args.resume else sorted(Path(args.log_dir).iterdir())[-1]


def logged(run_dir: Path) -> list[tuple[str, ...]]:
    rows = [tuple(row) for row in csv.reader((run_dir / "metrics.csv").open())]
    return sorted(row for row in rows if not row[1].startswith(("time/", "charts/SPS")))


def assert_same(one: Path, two: Path) -> None:
    a, b = (torch.load(path / "checkpoint.pt", weights_only=True)["agent"] for path in (one, two))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert logged(one) == logged(two)


# --------------------------------------------------------------------------------------------------------- advantages


def steps(T: int = 30, N: int = 4) -> dict[str, torch.Tensor]:
    """Some end by termination, some by a time limit; without ends values go on: V(s_t+1) is the next row's V."""
    reward, value, last = torch.randn(T, N), torch.randn(T, N), torch.randn(1, N)
    done = torch.rand(T, N) < 0.15
    terminated = done & (torch.rand(T, N) < 0.5)
    assert terminated.any() and (done & ~terminated).any()
    next_value = torch.where(done, torch.randn(T, N), torch.cat([value[1:], last]))
    return {"reward": reward, "value": value, "next_value": next_value, "terminated": terminated, "done": done}


def slow(rows: dict[str, torch.Tensor], t: int, n: int, gamma: float, count: int) -> float:
    """The return over `count` steps from t, less where the episode or the batch ends, then the value of where it is."""
    total, discount = 0.0, 1.0
    for i in range(t, min(t + count, len(rows["reward"]))):
        total += discount * rows["reward"][i, n].item()
        discount *= gamma
        if rows["terminated"][i, n]:
            return total
        if rows["done"][i, n]:
            break
    return total + discount * rows["next_value"][i, n].item()


def test_gae_is_the_weighted_mean_of_all_step_counts():
    rows, gamma, lam = steps(), 0.9, 0.8
    advantage, target = a2c.advantages(**rows, gamma=gamma, gae_lambda=lam, reward_to_go=True)
    T, N = advantage.shape
    for n in range(N):
        for t in range(T):
            # (1 - λ) Σ λ^(k-1) (k-step return), Schulman et al. 2016, equation 16; beyond the end all are the same.
            weights = [(1 - lam) * lam ** (k - 1) for k in range(1, T)] + [lam ** (T - 1)]
            mean = sum(weight * slow(rows, t, n, gamma, k) for k, weight in enumerate(weights, 1))
            assert target[t, n].item() == pytest.approx(mean, abs=1e-4)
    torch.testing.assert_close(advantage, target - rows["value"])


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("to_go", [True, False])
def test_returns_without_lambda(baseline, to_go):
    rows, gamma = steps(), 0.9
    if not baseline:
        rows |= {"value": torch.zeros(30, 4), "next_value": torch.zeros(30, 4)}
    advantage, target = a2c.advantages(**rows, gamma=gamma, gae_lambda=None, reward_to_go=to_go)
    for n in range(4):
        for t in range(30):
            begin = t
            while not to_go and begin > 0 and not rows["done"][begin - 1, n]:
                begin -= 1
            whole = slow(rows, begin, n, gamma, 30)
            assert target[t, n].item() == pytest.approx(slow(rows, t, n, gamma, 30), abs=1e-4), "V is of what follows"
            assert advantage[t, n].item() == pytest.approx(whole - rows["value"][t, n].item(), abs=1e-4)


def test_a_time_limit_is_bootstrapped_and_an_end_is_not():
    one, no = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool)
    at = lambda terminated: a2c.advantages(one, 0 * one, 7 * one, terminated, ~no, 0.5, 0.95, True)[0].item()  # noqa: E731
    assert at(no) == pytest.approx(1 + 0.5 * 7) and at(~no) == pytest.approx(1)


# -------------------------------------------------------------------------------------------------------- normalisers


def test_means_and_spreads_are_those_of_all_rows():
    x = torch.randn(1_000, 3) * torch.tensor([1.0, 100.0, 1e-3]) + torch.tensor([0.0, 1e4, 5.0])
    normaliser = a2c.RunningNormaliser(3)
    for part in x.split([1, 9, 490, 500]):
        normaliser.update(part)
    torch.testing.assert_close(normaliser.mean, x.double().mean(0))
    torch.testing.assert_close(normaliser.var, x.double().var(0, correction=0), rtol=1e-6, atol=0)
    assert normaliser(100 * x).abs().max() == 10


def agent(**changes) -> a2c.ActorCritic:
    torch.manual_seed(0)
    return a2c.ActorCritic(3, LOW, HIGH, a2c.Args(**({"hidden_size": 16, "num_envs": 4} | changes)))


def batch(T: int = 12, N: int = 4) -> a2c.Batch:
    done = torch.rand(T, N) < 0.2
    terminated = done & (torch.rand(T, N) < 0.5)
    obs, u, next_obs = torch.randn(T, N, 3), torch.randn(T, N, 2), torch.randn(T, N, 3)
    return a2c.Batch(obs, u, next_obs, 5 + torch.randn(T, N), terminated, done)


def test_rewards_are_divided_by_the_spread_of_the_discounted_return():
    mine, gamma, seen = agent(), 0.9, []
    running = [0.0] * 4
    for rows in (batch(), batch()):  # it runs on from batch to batch
        scaled = a2c.scale_rewards(mine, rows, gamma)
        for reward, done in zip(rows.reward, rows.done, strict=True):
            running = [gamma * running[n] + reward[n].item() for n in range(4)]
            seen += running
            running = [0.0 if done[n] else running[n] for n in range(4)]
        torch.testing.assert_close(scaled, rows.reward / np.std(seen).astype(np.float32), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- policy


def test_the_density_is_torchs_and_actions_stay_in_bounds():
    policy = agent().policy
    x, u = torch.randn(20, 3), 3 * torch.randn(20, 2)
    torch.testing.assert_close(policy.log_std, torch.full((2,), 0.6).log())
    gaussian = Independent(Normal(policy.mean(x), policy.log_std.exp()), 1)
    torch.testing.assert_close(policy.log_prob(x, u), gaussian.log_prob(u))
    torch.testing.assert_close(policy.entropy(), gaussian.entropy()[0])
    action = policy.action(u)
    assert (action >= LOW).all() and (action <= HIGH).all() and (action == LOW).any() and (action == HIGH).any()
    torch.testing.assert_close(policy.action(torch.zeros(1, 2))[0], (LOW + HIGH) / 2)
    sample = policy.sample(x[:1].expand(50_000, -1))
    torch.testing.assert_close(sample.std(0), policy.log_std.exp(), rtol=0.02, atol=0)
    torch.testing.assert_close(sample.mean(0), policy.mean(x[0]), rtol=0, atol=0.02)


def sgd(mine: a2c.ActorCritic, rate: float = 0.1) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    return torch.optim.SGD(mine.policy.parameters(), rate), torch.optim.SGD(mine.critic.parameters(), rate)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
def test_an_update_is_equations_1_to_3(entropy_weight):
    args = a2c.Args(entropy_weight=entropy_weight, baseline_steps=2, num_envs=4, max_grad_norm=1e9)
    mine, rows = agent(), batch()
    before = torch.randn(50, 3) * 2 + 1
    mine.policy.normaliser.update(before)
    x, next_x = mine.policy.normaliser(rows.obs), mine.policy.normaliser(rows.next_obs)
    other = agent()
    other.load_state_dict(mine.state_dict())
    reward = a2c.scale_rewards(other, rows, args.gamma)
    with torch.no_grad():
        value = other.value(x)
        found = a2c.advantages(
            reward, value, other.value(next_x), rows.terminated, rows.done, args.gamma, args.gae_lambda, True
        )
    gaussian = Independent(Normal(other.policy.mean(x), other.policy.log_std.exp()), 1)
    weight = (found[0] - found[0].mean()) / found[0].std()
    loss = -(gaussian.log_prob(rows.u) * weight).mean() - entropy_weight * gaussian.entropy().mean()
    gradients = torch.autograd.grad(loss, list(other.policy.parameters()))
    with torch.no_grad():
        for weight, gradient in zip(other.policy.parameters(), gradients, strict=True):
            weight -= 0.1 * gradient
    for _ in range(2):
        error = (other.value(x) - found[1]).square().mean()
        for weight, gradient in zip(
            other.critic.parameters(), torch.autograd.grad(error, list(other.critic.parameters())), strict=True
        ):
            weight.data -= 0.1 * gradient
    losses = a2c.update(mine, sgd(mine), rows, args)
    for (name, weight), expected in zip(mine.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6, msg=name)
    assert losses["losses/policy_loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    assert losses["losses/value_loss"].item() == pytest.approx((value - found[1]).square().mean().item(), rel=1e-4)
    explained = 1 - (found[1] - value).var() / found[1].var()
    assert losses["losses/explained_variance"].item() == pytest.approx(explained.item(), abs=1e-5)
    # It learned of the batch, after the update, and of its observations only: the next ones come in the next batch.
    assert mine.policy.normaliser.count == 50 + 48
    everything = torch.cat([before, rows.obs.reshape(-1, 3)])
    torch.testing.assert_close(mine.policy.normaliser.mean, everything.double().mean(0))


def test_switches_leave_alone_what_they_switch_off():
    off = dict(use_baseline=False, gae_lambda=None, normalize_obs=False, scale_rewards=False, num_envs=4)
    mine = agent(normalize_obs=False)
    assert torch.equal(mine.policy.normaliser(torch.full((1, 3), 50.0)), torch.full((1, 3), 50.0))
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    a2c.update(mine, sgd(mine), batch(), a2c.Args(**off))
    changed = {name for name, value in mine.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"policy.{name}" for name, _ in mine.policy.named_parameters()}


def test_long_gradients_are_shortened():
    mine, rows = agent(), batch()
    before = [weight.clone() for weight in mine.policy.parameters()]
    a2c.update(mine, sgd(mine, 1.0), rows, a2c.Args(num_envs=4, max_grad_norm=1e-3))
    moved = torch.cat([(new - old).flatten() for new, old in zip(mine.policy.parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(1e-3, rel=1e-2)


def test_a_batch_is_what_happened():
    envs = a2c.VectorEnv("Hopper-v5", 2, 3, max_episode_steps=20)
    policy = a2c.GaussianPolicy(11, -torch.ones(3), torch.ones(3), a2c.Args())
    rows, finished = a2c.rollout(policy, envs, 1, 60, torch.device("cpu"))
    assert rows.obs.shape == rows.next_obs.shape == (60, 2, 11) and rows.u.shape == (60, 2, 3)
    assert (rows.done & ~rows.terminated).any() and rows.terminated.any() and not (rows.terminated & ~rows.done).any()
    follows = (rows.next_obs[:-1] == rows.obs[1:]).all(dim=-1)
    assert torch.equal(follows, ~rows.done[:-1])  # next_obs is the true one, even where the episode ended
    assert len(finished) == rows.done.sum() and all(1 <= length <= 20 for _, length in finished)


# --------------------------------------------------------------------------------------------------------------- runs


def test_a_pendulum_is_balanced(tmp_path):
    """Seen with seed 1: 1,000 from 20,000 steps on. A random policy falls after 5."""
    changes = dict(env_id="InvertedPendulum-v5", max_episode_steps=1_000, total_timesteps=24_000, num_envs=8)
    changes |= dict(batch_size=64, hidden_size=64, num_layers=2, eval_every=24_000, learning_rate=7e-4)
    changes |= dict(baseline_steps=4)
    result, _ = run(tiny(tmp_path, **changes))
    assert result["eval/episodic_return"] > 900


def test_a_run_leaves_its_metrics_and_its_policy_says_the_same(tmp_path, capsys):
    policy = tmp_path / "policy.pt"
    result, run_dir = run(
        tiny(tmp_path, total_timesteps=20_096, batch_size=64, save_policy=str(policy), eval_every=20_000)
    )
    tags = {row[1] for row in csv.reader((run_dir / "metrics.csv").open())} - {"tag"}
    prefixes = ("charts/", "eval/", "losses/", "time/")
    assert tags == {line.split()[0] for line in a2c.__doc__.splitlines() if line.strip().startswith(prefixes)}
    assert json.loads((run_dir / "result.json").read_text()) == result
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    again = a2c.main(a2c.parse_args(["--resume", str(run_dir), "--eval-only"]))
    assert again == {name: value for name, value in result.items() if name != "minutes"}
    with pytest.raises(SystemExit) as exit:  # it would evaluate nothing, and its args.json would say otherwise
        a2c.main(a2c.parse_args(["--resume", str(run_dir), "--eval-episodes", "3"]))
    assert exit.value.code == 2 and "has finished; evaluate it with --eval-only" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before
    # From its file alone, in the environment as Gymnasium makes it.
    loaded, returns = a2c.load_policy(str(policy)), []
    assert loaded.normaliser.count == 20_096
    kept = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    for name, value in torch.load(policy, weights_only=True)["returns"].items():
        assert torch.equal(value, kept[f"returns.{name}"]) and value.isfinite().all()
    for episode in range(2):
        env = gym.make("Pendulum-v1", max_episode_steps=15)
        obs, over, total = env.reset(seed=1_000_001 + episode)[0], False, 0.0
        while not over:
            obs, reward, terminated, truncated, _ = env.step(
                loaded.mode(torch.as_tensor(obs, dtype=torch.float64)[None])[0].numpy()
            )
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    assert np.mean(returns) == pytest.approx(result["eval/episodic_return"], rel=1e-5)
    loaded.normaliser = a2c.RunningNormaliser(3)  # without it the policy is another
    assert not torch.equal(loaded.mode(torch.ones(1, 3)), a2c.load_policy(str(policy)).mode(torch.ones(1, 3)))


def test_a_policy_without_normaliser_is_saved_and_loaded(tmp_path):
    path = tmp_path / "policy.pt"
    result, _ = run(tiny(tmp_path, normalize_obs=False, save_policy=str(path)))
    loaded = a2c.load_policy(str(path))
    returns = a2c.run_episodes(loaded.mode, "Pendulum-v1", 2, 1_000_001, torch.device("cpu"), 15)[3]
    assert returns.mean() == pytest.approx(result["eval/episodic_return"])


@pytest.mark.parametrize(
    "changes, call",
    [
        ({}, 9),
        ({"env_id": "HalfCheetah-v5", "num_envs": 4, "entropy_weight": 0.01}, 9),
        ({"env_id": "Hopper-v5", "use_baseline": False, "gae_lambda": None, "reward_to_go": False}, 7),
    ],
)
def test_killed_and_resumed_equals_never_stopped(tmp_path, monkeypatch, changes, call):
    _, whole = run(tiny(tmp_path / "whole", **changes))
    args = tiny(tmp_path / "killed", checkpoint_every=20, **changes)
    original, calls = a2c.rollout, iter(range(10**6))

    def killed(*args):
        if next(calls) == call:
            raise MemoryError
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(a2c, "rollout", killed)
        with pytest.raises(MemoryError):
            a2c.main(args)
    run_dir = next(Path(args.log_dir).iterdir())
    a2c.main(a2c.parse_args(["--resume", str(run_dir)]))
    assert_same(whole, run_dir)


def test_stopped_by_a_signal_and_resumed_equals_never_stopped(tmp_path, monkeypatch):
    _, whole = run(tiny(tmp_path / "whole"))
    args = tiny(tmp_path / "stopped")
    original, calls = a2c.rollout, iter(range(10**6))
    with monkeypatch.context() as patch:
        stop = lambda *a: (next(calls) == 5 and signal.raise_signal(signal.SIGTERM)) or original(*a)  # noqa: E731
        patch.setattr(a2c, "rollout", stop)
        with pytest.raises(SystemExit) as exit:
            a2c.main(args)
    assert exit.value.code == 128 + signal.SIGTERM and next(calls) == 6
    run_dir = next(Path(args.log_dir).iterdir())
    a2c.main(a2c.parse_args(["--resume", str(run_dir)]))
    assert_same(whole, run_dir)


def test_a_diverged_policy_does_not_overwrite_its_checkpoint(tmp_path, monkeypatch):
    args = tiny(tmp_path, checkpoint_every=20)
    original, calls = a2c.update, iter(range(10**6))

    def diverging(*rest):
        losses = original(*rest)
        return losses | {"losses/value_loss": torch.tensor(math.nan)} if next(calls) == 4 else losses

    monkeypatch.setattr(a2c, "update", diverging)
    with pytest.raises(SystemExit) as exit:
        a2c.main(args)
    run_dir = next(Path(args.log_dir).iterdir())
    assert "non-finite losses/value_loss" in exit.value.code and str(run_dir / "checkpoint.pt") in exit.value.code
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["progress"]["step"] == 24


def test_weights_that_diverged_in_the_last_step_are_not_saved(tmp_path):
    """The losses of a batch are those before its gradient steps."""
    args = tiny(tmp_path, total_timesteps=8, batch_size=8, learning_rate=1e38, anneal=False, checkpoint_every=8)
    with pytest.raises(SystemExit) as exit:
        a2c.main(args)
    assert "non-finite weights" in exit.value.code
    assert not list(Path(args.log_dir).glob("*/checkpoint.pt"))


def test_an_observation_that_was_infinite_once_is_not_saved_in_the_running_mean(tmp_path, monkeypatch):
    """Cut off at 10 spreads it leaves the losses of its batch finite."""
    args, step, calls = tiny(tmp_path, checkpoint_every=8, batch_size=8), a2c.VectorEnv.step, iter(range(10**6))

    def infinite(self, action):
        found = step(self, action)
        if next(calls) == 10:
            self.obs[0, 0] = math.inf
        return found

    monkeypatch.setattr(a2c.VectorEnv, "step", infinite)
    with pytest.raises(SystemExit, match="non-finite weights"):
        a2c.main(args)
    saved = torch.load(next(Path(args.log_dir).glob("*/checkpoint.pt")), weights_only=True)
    assert all(tensor.isfinite().all() for tensor in saved["agent"].values())


def test_without_a_baseline_nothing_is_said_of_the_critic(tmp_path):
    _, run_dir = run(tiny(tmp_path, use_baseline=False, gae_lambda=None))
    tags = {row[1] for row in logged(run_dir)}
    assert "losses/policy_loss" in tags and not tags & {"losses/value_loss", "losses/explained_variance"}


def test_the_step_size_falls_to_nothing(tmp_path):
    for anneal, rate in ((True, 3e-3 * 8 / 96), (False, 3e-3)):
        _, run_dir = run(tiny(tmp_path / str(anneal), anneal=anneal))
        for name in ("policy_optimizer", "critic_optimizer"):
            saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)[name]
            assert saved["param_groups"][0]["lr"] == pytest.approx(rate)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch_size": 9}, "--batch-size 9 must be a multiple of --num-envs 2"),
        ({"batch_size": 200}, "--batch-size 200 is more than --total-timesteps 96"),
        ({"use_baseline": False}, "--no-use-baseline goes with --gae-lambda 1"),
        ({"reward_to_go": False}, "--no-reward-to-go goes with --gae-lambda 1"),
        ({"gae_lambda": 1.5}, "--gae-lambda"),
        ({"gamma": 1.5}, "--gamma"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm"),
        ({"initial_std": math.nan}, "--initial-std"),
        ({"eval_only": True}, "--eval-only needs --resume"),
        ({"env_id": "CartPole-v1"}, "the action space must be a Box"),
        ({"save_policy": "/no/such/folder/policy.pt"}, "--save-policy"),
    ],
)
def test_bad_arguments(tmp_path, capfd, changes, words):
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        a2c.main(tiny(tmp_path, **changes))
    lines = capfd.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_ends_an_evaluation_alone_at_once(tmp_path, monkeypatch):
    """It saves nothing, and so there is nothing to wait for."""
    _, run_dir = run(tiny(tmp_path))
    monkeypatch.setattr(a2c, "run_episodes", lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        a2c.main(replace(a2c.load_args(str(run_dir)), resume=str(run_dir), eval_only=True))
