"""mbpo_sac.py: the update against slow references, rollouts and fits against what they promise, runs."""

import contextlib
import csv
import json
import math
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import mbpo_sac as sac

TINY = dict(env_id="Pendulum-v1", max_episode_steps=15, total_timesteps=80, initial_steps=30, eval_every=25)
TINY |= dict(eval_episodes=2, interim_episodes=1, batch_size=16, units=8, utd_ratio=1.0, model_every=20)
TINY |= dict(ensemble_size=3, elite_members=2, num_layers=1, hidden_size=8, rollouts_per_step=2.0, max_train_steps=6)
TINY |= dict(model_batch_size=8, num_threads=1, cuda=False)


LOW, HIGH = torch.tensor([-1.0, 0.5]), torch.tensor([0.0, 2.0])


def tiny(tmp_path: Path, **changes: object) -> sac.Args:
    return sac.Args(**({"log_dir": str(tmp_path / "runs")} | TINY | changes))


def run(args) -> tuple[dict[str, float], Path]:
    result = sac.main(args)
    return result, Path(args.resume) if args.resume else sorted(Path(args.log_dir).iterdir())[-1]


def logged(run_dir: Path) -> list[tuple[str, ...]]:
    rows = [tuple(row) for row in csv.reader((run_dir / "metrics.csv").open())]
    return sorted(row for row in rows if not row[1].startswith(("time/", "charts/SPS")))


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    flat = {}
    for part in ("agent", "model", "buffer", "imagined"):
        flat |= {f"{part}.{k}": v for k, v in checkpoint[part].items() if isinstance(v, torch.Tensor)}
    return flat


def assert_same(one: Path, two: Path) -> None:
    a, b = state(one), state(two)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert logged(one) == logged(two)


# ----------------------------------------------------------------------------------------------------------- networks


def test_log_probability_is_torchs():
    torch.manual_seed(0)
    actor = sac.Actor(3, LOW, HIGH, 16).double()
    obs = torch.randn(500, 3, dtype=torch.float64) * 3
    action, log_prob = actor.sample(obs)
    mean, log_std = actor(obs)
    assert log_std.min() >= -5 and log_std.max() <= 2
    gaussian = Normal(mean, log_std.exp())
    reference = Independent(TransformedDistribution(gaussian, [TanhTransform(cache_size=1)]), 1)
    scaled = (action - actor.action_bias) / actor.action_scale
    inside = scaled.abs().amax(1) < 0.999  # torch inverts the tanh
    assert inside.sum() > 300
    torch.testing.assert_close(log_prob[inside], reference.log_prob(scaled)[inside].float(), rtol=1e-4, atol=1e-4)
    assert (action >= LOW).all() and (action <= HIGH).all() and log_prob.isfinite().all()
    torch.testing.assert_close(actor.mode(obs), torch.tanh(mean) * actor.action_scale + actor.action_bias)


def test_sampled_actions_have_the_density_that_is_claimed():
    """A histogram of one state's actions against exp(log_prob), which is that of actions scaled to [-1, 1]."""
    torch.manual_seed(0)
    actor = sac.Actor(2, torch.tensor([-2.0]), torch.tensor([4.0]), 8)
    with torch.no_grad():
        action, log_prob = actor.sample(torch.ones(400_000, 2))
    counts, edges = np.histogram(action[:, 0].numpy(), bins=30, range=(-2, 4), density=True)
    for k in range(30):
        within = (action[:, 0] >= edges[k]) & (action[:, 0] < edges[k + 1])
        if within.sum() > 5_000:
            assert 3 * counts[k] == pytest.approx((1 / (1 / log_prob[within].exp()).mean()).item(), rel=0.05)


def test_the_actor_loads_cleanrls_weights():
    names = {name for name, _ in sac.Actor(3, LOW, HIGH, 8).state_dict().items()}
    layers = {f"{layer}.{part}" for layer in ("fc1", "fc2", "fc_mean", "fc_logstd") for part in ("weight", "bias")}
    assert names == layers | {"action_scale", "action_bias"}


def separate(critic: sac.TwinCritic, number: int) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for weight, bias in zip(critic.weights, critic.biases, strict=True):
        layer = torch.nn.Linear(*weight.shape[1:])
        layer.weight.data, layer.bias.data = weight[number].detach().T.clone(), bias[number, 0].detach().clone()
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def test_twin_critics_equal_two_networks():
    torch.manual_seed(0)
    critic = sac.TwinCritic(3, 2, 16)
    obs, action = torch.randn(7, 3), torch.randn(7, 2)
    values = critic.value(obs, action)
    for number in range(2):
        alone = separate(critic, number)(torch.cat([obs, action], dim=1))[:, 0]
        torch.testing.assert_close(values[number], alone)
    assert not torch.allclose(values[0], values[1])


# ------------------------------------------------------------------------------------------------------------- update


def batch(count: int = 32) -> list[torch.Tensor]:
    action = torch.rand(count, 2) * (HIGH - LOW) + LOW
    return [torch.randn(count, 3), action, torch.randn(count, 3), torch.randn(count), (torch.rand(count) < 0.3).float()]


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_an_update_is_equations_1_to_3(alpha):
    """Two separate critics, torch's own optimisers and autograd, the same random numbers."""
    torch.manual_seed(0)
    agent = sac.Agent(3, LOW, HIGH, sac.Args(units=16, gamma=0.9, tau=0.1, alpha=alpha, learning_rate=1e-2))
    assert agent.target_entropy == -2, "of actions in [-1, 1], as log π"
    actor = sac.Actor(3, LOW, HIGH, 16)
    actor.load_state_dict(agent.actor.state_dict())
    critics, targets = ([separate(agent.critic, number) for number in range(2)] for _ in range(2))
    log_alpha = torch.tensor(math.log(alpha) if alpha else 0.0, requires_grad=True)
    adam = [torch.optim.Adam(net.parameters(), 1e-2) for net in (actor, *critics)] + [
        torch.optim.Adam([log_alpha], 1e-2)
    ]

    for step in range(3):
        obs, action, next_obs, reward, terminated = batch()
        torch.manual_seed(step)
        means = agent.update(obs, action, next_obs, reward, terminated)
        torch.manual_seed(step)
        price = log_alpha.exp().item()
        with torch.no_grad():
            next_action, next_log_prob = actor.sample(next_obs)
            pair = torch.cat([next_obs, next_action], dim=1)
            value = torch.minimum(targets[0](pair), targets[1](pair))[:, 0] - price * next_log_prob
            y = torch.where(terminated > 0, reward, reward + 0.9 * value)
        values = [critic(torch.cat([obs, action], dim=1))[:, 0] for critic in critics]
        losses = [(value - y).square().mean() for value in values]
        new_action, log_prob = actor.sample(obs)
        pair = torch.cat([obs, new_action], dim=1)
        actor_loss = (price * log_prob - torch.minimum(critics[0](pair), critics[1](pair))[:, 0]).mean()
        for optimizer in adam:
            optimizer.zero_grad()
        actor_loss.backward()
        for optimizer, loss in zip(adam[1:3], losses, strict=True):
            optimizer.zero_grad()  # the actor's loss is no business of the critics
            loss.backward()
        if alpha is None:
            # The target is minus two dimensions for actions in [-1, 1], whose log π is larger by the log of the scale.
            scaled = log_prob.detach() + ((HIGH - LOW) / 2).log().sum()
            (-log_alpha.exp() * (scaled - 2).mean()).backward()
        for optimizer in adam:
            optimizer.step()
        for target, critic in zip(targets, critics, strict=True):
            for old, new in zip(target.parameters(), critic.parameters(), strict=True):
                old.data = 0.9 * old.data + 0.1 * new.data
        expected = [sum(losses).item(), actor_loss.item(), price, -log_prob.mean().item()]
        assert means[:4].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
        smaller = torch.minimum(*values).mean().item()
        assert means[4].item() == pytest.approx(smaller, rel=1e-3, abs=1e-4)
    close = {"rtol": 1e-3, "atol": 1e-4}
    for one, two in zip(agent.actor.parameters(), actor.parameters(), strict=True):
        torch.testing.assert_close(one, two, **close)
    for number in range(2):
        for mine, theirs in ((agent.critic, critics[number]), (agent.target, targets[number])):
            for one, two in zip(separate(mine, number).parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(one, two, **close)
    torch.testing.assert_close(agent.log_alpha, log_alpha, **close)


def test_an_update_changes_the_agent_and_nothing_else():
    torch.manual_seed(0)
    agent, rows = sac.Agent(3, LOW, HIGH, sac.Args(units=16)), batch()
    before, copies = {n: v.clone() for n, v in agent.state_dict().items()}, [column.clone() for column in rows]
    agent.update(*rows)
    unchanged = {name for name, value in agent.state_dict().items() if torch.equal(value, before[name])}
    assert unchanged == {"actor.action_scale", "actor.action_bias"}
    assert all(torch.equal(*pair) for pair in zip(rows, copies, strict=True))
    assert all(p.grad is None for p in agent.target.parameters())
    fixed = sac.Agent(3, LOW, HIGH, sac.Args(units=16, alpha=0.2))
    before = fixed.log_alpha.item()
    fixed.update(*rows)
    assert fixed.temperature().item() == pytest.approx(0.2) and fixed.log_alpha.item() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradients_compile_as_one_program(dtype, monkeypatch):
    """Both ways, forward and back, and without a graph break; the same numbers as without."""
    monkeypatch.setattr(sac, "compiled", lambda f, device: torch.compile(f, backend="aot_eager", fullgraph=True))
    found, rows = [], batch()
    for compile in (False, True):
        torch.manual_seed(0)
        agent = sac.Agent(3, LOW, HIGH, sac.Args(units=16, train_dtype=dtype, compile=compile))
        found.append([agent.update(*rows) for _ in range(3)] + [*agent.parameters()])
    torch._dynamo.reset()
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_function_draws_the_same_random_numbers():
    def draw(x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)

    found = []
    for function in (draw, sac.compiled(draw, torch.device("cpu"))):
        torch.manual_seed(0)
        found.append(function(torch.ones(5)))
    torch._dynamo.reset()
    torch.testing.assert_close(*found)


def test_averages_that_fade_to_denormal_numbers_become_zero():
    torch.set_flush_denormal(False)
    small = torch.full((5,), 1e-38)
    assert (0.01 * small).all()
    sac.prepare_torch(sac.Args(num_threads=1))
    assert not (0.01 * small).any()


def test_bfloat16_products_give_nearly_the_same_update():
    results = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        agent, rows = sac.Agent(3, LOW, HIGH, sac.Args(units=64, train_dtype=dtype)), batch(256)
        results.append(agent.update(*rows))
        assert all(p.dtype == torch.float32 for p in agent.parameters())
    assert not torch.equal(*results)
    torch.testing.assert_close(*results, rtol=0.05, atol=0.02)


def test_the_temperature_moves_the_entropy_to_its_target():
    """With values that do not depend on the action the entropy is free to go where it is asked to."""
    torch.manual_seed(0)
    agent = sac.Agent(3, LOW, HIGH, sac.Args(units=16, target_entropy=-3.0, learning_rate=1e-2))
    with torch.no_grad():
        for weight in (*agent.critic.parameters(), *agent.target.parameters()):
            weight.zero_()
    obs, action, next_obs, _, _ = batch(128)
    for _ in range(600):
        entropy = agent.update(obs, action, next_obs, torch.zeros(128), torch.ones(128))[3]
    assert agent.temperature().item() < 0.2, "too much entropy makes it cheap"
    agent = sac.Agent(3, LOW, HIGH, sac.Args(units=16, target_entropy=5.0, learning_rate=1e-2))
    for _ in range(100):
        agent.update(obs, action, next_obs, torch.zeros(128), torch.ones(128))
    assert agent.temperature().item() > 2, "too little makes it dear"
    assert entropy.isfinite()


def test_pendulum_is_solved(tmp_path):
    changes = dict(total_timesteps=5_000, initial_steps=1_000, eval_every=5_000, max_episode_steps=None, units=64)
    args = tiny(tmp_path, rollout_length=0, batch_size=128, eval_episodes=10, **changes, learning_rate=1e-3)
    result, _ = run(args)
    assert result["eval/episodic_return"] > -250 and result["minutes"] < 2  # random: -1,200; best: about -150


# -------------------------------------------------------------------------------------------------------------- model


def gaussian(**changes) -> sac.GaussianEnsemble:
    shape = dict(ensemble_size=3, num_layers=1, hidden_size=8, activation="tanh", learn_reward=False, skip=0)
    return sac.GaussianEnsemble(4, 2, **(shape | changes))


def filled(count: int = 400, ends: bool = False) -> sac.ReplayBuffer:
    torch.manual_seed(0)
    buffer = sac.ReplayBuffer(count, 4, 2, torch.device("cpu"))
    obs, action = torch.randn(count, 4), torch.rand(count, 2)
    next_obs = obs + 0.1 * action.sum(1, keepdim=True) + 0.2 * obs.roll(1, dims=1) + 0.01 * torch.randn(count, 4)
    rows = dict(obs=obs, action=action, next_obs=next_obs, reward=obs[:, 0], terminated=(obs[:, 1] > 1).float())
    buffer.add(**rows, episode=torch.arange(count))
    return buffer


def model_and_optimizer(buffer, **changes):
    model = gaussian(**changes)
    return model, sac.make_optimizer(model, 1e-2, 0.0)


def test_a_fit_restores_every_members_best(monkeypatch):
    """Members get worse at will: what they were at their best must come back."""
    buffer = filled()
    model, optimizer = model_and_optimizer(buffer)
    args = sac.Args(ensemble_size=3, elite_members=2, model_batch_size=64, max_train_steps=60, patience=None)
    snapshots, errors = [], []
    measure, train, calls = sac.member_errors, sac.train_step, iter(range(10**6))

    def watched(model, x, y):
        snapshots.append({n: p.detach().clone() for n, p in model.named_parameters()})
        errors.append(measure(model, x, y))
        return errors[-1]

    def spoiling(model, *rest):
        if (call := next(calls)) % 20 == 0:
            with torch.no_grad():
                model.mlp.weights[0][call // 20 % 3] += 3.0
        return train(model, *rest)

    monkeypatch.setattr(sac, "member_errors", watched)
    monkeypatch.setattr(sac, "train_step", spoiling)
    elites, metrics = sac.fit_members(model, optimizer, buffer, args)
    best = torch.stack(errors).argmin(dim=0)  # (E,)
    assert len(set(best.tolist())) > 1 and best.min() < len(errors) - 1, "at their best at different times"
    for name, parameter in model.named_parameters():
        for member in range(3):
            assert torch.equal(parameter[member], snapshots[best[member]][name][member])
    lowest = torch.stack(errors).amin(dim=0)
    assert elites == lowest.argsort()[:2].tolist()
    assert metrics["model/holdout_mse"] == pytest.approx(lowest[elites].mean().item())
    assert metrics["model/train_steps"] == 60


def test_a_fit_stops_when_nothing_gets_better_and_learns_before():
    buffer = filled(2_000)
    model, optimizer = model_and_optimizer(buffer)
    order = torch.randperm(2_000)
    test = model.regression_data(buffer, order[:500], fit=True)
    before = sac.member_errors(model, *test)
    args = sac.Args(ensemble_size=3, model_batch_size=64, max_train_steps=20_000, patience=5)
    _, metrics = sac.fit_members(model, optimizer, buffer, args)
    steps, epoch = metrics["model/train_steps"], math.ceil(len(sac.hold_out(buffer, args)[0]) / 64)
    assert 6 * epoch <= steps < 20_000 and steps % epoch == 0, "whole epochs, six stale ones at the end"
    assert (sac.member_errors(model, *test) < 0.2 * before).all()


def test_what_is_held_out_stays_so_as_the_buffer_grows_and_goes_round():
    args, buffer = sac.Args(model_holdout=0.25, seed=3), sac.ReplayBuffer(3_000, 4, 2, torch.device("cpu"))
    known: set[int] = set()
    for number in range(9):
        buffer.add(**{name: column[:500] for name, column in filled(500).columns().items()})
        torch.manual_seed(number)
        train, test = sac.hold_out(buffer, args)
        assert sorted([*train.tolist(), *test.tolist()]) == list(range(buffer.size))
        assert abs(len(test) - 0.25 * buffer.size) < 60 and known <= set(test.tolist())
        known = set(test.tolist())
    buffer.size = 1
    assert sac.hold_out(buffer, args)[1].tolist() == [0]
    many = sac.ReplayBuffer(60_000, 1, 1, torch.device("cpu"))
    many.size = 60_000
    train, test = sac.hold_out(many, args)
    assert len(test) == 5_000 and len(train) == pytest.approx(45_000, abs=500)


def test_no_fit_sees_what_is_held_out():
    buffer, args = filled(), sac.Args(ensemble_size=3, model_batch_size=64, max_train_steps=20)
    _, test = sac.hold_out(buffer, args)
    buffer.next_obs[test] = 1e6
    model, optimizer = model_and_optimizer(buffer)
    _, metrics = sac.fit_members(model, optimizer, buffer, args)
    assert model.target_normaliser.mean.abs().max() < 1 and metrics["model/train_loss"] < 10
    assert metrics["model/holdout_mse"] > 1e6


def test_only_the_elites_are_left():
    torch.manual_seed(0)
    model = gaussian()
    few = sac.only_members(model, [2, 0])
    coarse = sac.only_members(model, [2, 0], "bfloat16")
    obs, action = torch.randn(5, 4), torch.randn(5, 2)
    all_of_them = model.predict(obs.expand(3, -1, -1), action.expand(3, -1, -1))[0]
    torch.testing.assert_close(few.predict(obs.expand(2, -1, -1), action.expand(2, -1, -1))[0], all_of_them[[2, 0]])
    rough = coarse.predict(obs.expand(2, -1, -1), action.expand(2, -1, -1))[0]
    torch.testing.assert_close(rough, all_of_them[[2, 0]], rtol=0.02, atol=0.02)
    assert coarse.mlp.weights[0].dtype == torch.bfloat16 and rough.dtype == torch.float32
    assert len(few.max_logvar) == 2 and len(model.max_logvar) == 3


@pytest.mark.parametrize("count, cached", [(1, 4096), (2, 4096), (7, 3), (300, 4096), (300, 30)])
def test_each_row_goes_to_one_elite_at_random(count, cached, monkeypatch):
    """Members without noise that each add their own number, so that a row tells who took it."""
    monkeypatch.setattr(sac, "CACHED_STATES", cached)
    torch.manual_seed(0)
    model = gaussian()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.mlp.biases[-1][:, 0, :4] = torch.tensor([[1.0], [2.0], [3.0]])
        model.mlp.biases[-1][:, 0, 4:] = -100.0
        model.min_logvar.fill_(-100.0)
    obs = torch.arange(count, dtype=torch.float32)[:, None].expand(-1, 4) * 10
    takers = []
    for _ in range(60):
        next_obs, reward, over = sac.model_step(
            model, (lambda o, a, n: n[:, 0], lambda n: n[:, 0] > 1e9), obs, torch.zeros(count, 2), False
        )
        taker = next_obs - obs
        assert next_obs.shape == (count, 4) and reward.shape == over.shape == (count,)
        assert (
            torch.isin(taker.round(), torch.tensor([1.0, 2.0, 3.0])).all() and (taker - taker[:, :1]).abs().max() < 1e-3
        )
        torch.testing.assert_close(reward, next_obs[:, 0])
        takers.append(taker[:, 0].round())
    shares = torch.stack([(torch.stack(takers) == member).float().mean(dim=0) for member in (1, 2, 3)])  # (3, N)
    assert (shares.mean(dim=1) - 1 / 3).abs().max() < 0.2 and shares.min() > 0, "every row, every elite"
    if count == 300:
        assert all((takers[0] == member).sum() == 100 for member in (1, 2, 3))


def test_samples_have_the_predicted_mean_and_spread():
    torch.manual_seed(0)
    model = gaussian(ensemble_size=2, learn_reward=True)
    model.target_normaliser.std.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    model.target_normaliser.mean.fill_(0.5)
    obs, action = torch.randn(1, 4).repeat(40_000, 1), torch.randn(1, 2).repeat(40_000, 1)
    next_obs, reward, over = sac.model_step(model, None, obs, action, False)
    means, rewards, ends = model.predict(obs[None, :1].expand(2, -1, -1), action[None, :1].expand(2, -1, -1))
    output = model.mlp(model.input_normaliser(torch.cat([obs, action], 1)[:1]).expand(2, -1, -1))
    stds = (0.5 * model.logvar(output)).exp() * model.target_normaliser.std
    mean, spread = means.mean(dim=(0, 1)), (stds[:, 0, :4].square().mean(0) + means[:, 0].var(0, correction=0)).sqrt()
    torch.testing.assert_close(next_obs.mean(dim=0), mean, rtol=0.02, atol=0.1)
    torch.testing.assert_close(next_obs.std(dim=0), spread, rtol=0.05, atol=0.02)
    assert reward.mean().item() == pytest.approx(rewards.mean().item(), abs=0.15)
    assert over.float().mean().item() == pytest.approx(ends.mean().item(), abs=0.01) and over.dtype == torch.bool
    assert 0.1 < ends.mean() < 0.9, "or rounding would do as well"
    averaged, paid, _ = sac.model_step(model, None, obs[:3], action[:3], True)
    torch.testing.assert_close(averaged, mean.expand(3, -1))
    assert paid.tolist() == pytest.approx([rewards.mean().item()] * 3)


@pytest.mark.parametrize("utd_ratio", [0.5, 1.0, 3.0])
def test_with_one_buffer_there_are_as_many_rollouts_as_asked_for(tmp_path, monkeypatch, utd_ratio):
    begun, imagine = [], sac.imagine
    monkeypatch.setattr(sac, "imagine", lambda *rest: begun.append(len(rest[3])) or imagine(*rest))
    settings = dict(rollout_length=1, real_ratio=None, rollouts_per_step=6.0, utd_ratio=utd_ratio)
    run(tiny(tmp_path, total_timesteps=100, initial_steps=40, **settings))
    assert sum(begun) == pytest.approx(6 * 60, rel=0.05)


def test_rollouts_branch_from_real_states_and_stop_at_termination():
    torch.manual_seed(0)
    model, actor = gaussian(ensemble_size=2), sac.Actor(4, LOW, HIGH, 8)
    into = sac.ResizableBuffer(10_000, 4, 2, torch.device("cpu"))
    starts = torch.randn(200, 4)
    ends = lambda next_obs: next_obs[:, 0] > 1.0  # noqa: E731
    sac.imagine(model, (lambda o, a, n: n.sum(-1) + a[:, 0], ends), actor, starts, 6, False, into)
    rows = into.columns()
    assert torch.equal(rows["obs"][:200], starts)
    assert torch.equal(rows["terminated"].bool(), ends(rows["next_obs"])) and 20 < rows["terminated"].sum() < 200
    torch.testing.assert_close(rows["reward"], rows["next_obs"].sum(-1) + rows["action"][:, 0])
    assert (rows["action"] >= LOW).all() and (rows["action"] <= HIGH).all()
    went_on = {tuple(row.tolist()) for row in rows["next_obs"][rows["terminated"] == 0]}
    assert all(tuple(row.tolist()) in went_on for row in rows["obs"][200:]), "each continues one that had not ended"
    assert len(rows["obs"]) < 1_200 and len(went_on) == (rows["terminated"] == 0).sum()
    visits = [sum(tuple(row.tolist()) == tuple(start.tolist()) for row in rows["obs"]) for start in starts[:20]]
    assert visits == [1] * 20


def test_rollouts_drop_what_is_not_finite():
    model, actor = gaussian(ensemble_size=2), sac.Actor(4, LOW, HIGH, 8)
    into = sac.ResizableBuffer(100, 4, 2, torch.device("cpu"))
    bad = lambda o, a, n: torch.where(n[:, 0] > n[:, 0].median(), torch.inf, 1.0)  # noqa: E731
    sac.imagine(
        model, (bad, lambda n: torch.zeros(len(n), dtype=torch.bool)), actor, torch.randn(20, 4), 1, False, into
    )
    assert into.size == 10 and into.reward[:10].isfinite().all()


def test_a_resized_buffer_keeps_the_newest():
    buffer = sac.ResizableBuffer(5, 1, 1, torch.device("cpu"))
    column = torch.arange(8, dtype=torch.float32)
    for value in column:
        rows = dict.fromkeys(("obs", "action", "next_obs"), value.view(1, 1))
        buffer.add(**rows, reward=value.view(1), terminated=torch.zeros(1), episode=torch.zeros(1))
    buffer.resize(7)
    assert buffer.reward[: buffer.size].tolist() == [3, 4, 5, 6, 7] and buffer.capacity == 7
    buffer.resize(2)
    assert buffer.reward.tolist() == [6, 7] and buffer.size == 2
    other = sac.ResizableBuffer(1, 1, 1, torch.device("cpu"))
    other.load_state_dict(buffer.state_dict())
    assert other.capacity == 2 and other.reward.tolist() == [6, 7]


def test_the_schedule():
    args = sac.Args(rollout_schedule=(20, 150, 1, 15), initial_steps=5_000)
    lengths = {0: 1, 25_000: 1, 34_000: 1, 35_000: 2, 90_000: 8, 155_000: 15, 400_000: 15}
    assert {step: sac.scheduled_length(args, step) for step in lengths} == lengths
    assert sac.scheduled_length(sac.Args(rollout_length=4), 10**6) == 4


def test_with_one_buffer_rollouts_follow_the_policy_as_it_changes(tmp_path, monkeypatch):
    seen, imagine = [], sac.imagine

    def watched(elites, formulas, actor, obs, *others):
        seen.append((len(obs), actor.fc1.weight.sum().item()))
        imagine(elites, formulas, actor, obs, *others)

    monkeypatch.setattr(sac, "BLOCK", 8)
    monkeypatch.setattr(sac, "imagine", watched)
    run(tiny(tmp_path, real_ratio=None, initial_steps=20, total_timesteps=60, update_every=20))
    assert [count for count, _ in seen] == 3 * [16, 16, 8]  # of 20 updates, two rollouts each
    assert len({weights for _, weights in seen}) == len(seen)


def test_batches_mix_as_asked():
    real, imagined = filled(50), filled(60)
    real.reward.fill_(1.0)
    imagined.reward.fill_(2.0)
    for ratio, expected in ((0.25, 16), (0.001, 1), (0.0, 0), (1.0, 64), (None, 0)):
        args = sac.Args(batch_size=64, real_ratio=ratio)
        obs, _, next_obs, reward, _ = sac.sample_batch(args, real, imagined, 1)
        assert (reward == 1).sum() == expected and len(reward) == 64 and obs.shape == next_obs.shape == (64, 3)
    imagined.size = 0
    assert (sac.sample_batch(sac.Args(batch_size=64), real, imagined, 0)[3] == 1).all()


def test_rollout_error_is_nothing_for_a_perfect_model_and_leaves_ended_episodes_out():
    model = sac.Ensemble(2, 1, 2, 1, 4, "tanh", False, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.mlp.biases[-1][:] = 1.0  # each step adds one
    obs = torch.arange(10.0)[:, None, None].expand(10, 3, 2).clone()
    action, whole = torch.zeros(10, 3, 1), torch.ones(10, 3, dtype=torch.bool)
    assert sac.rollout_error(model, obs, action, whole, 4)["model/rollout_mse"] == pytest.approx(0.0)
    obs[6:, 2], whole[6:, 2] = 100.0, False  # another episode
    assert sac.rollout_error(model, obs, action, whole, 4)["model/rollout_mse"] == pytest.approx(0.0)
    obs[:, 0] *= 2  # what really happens is twice as fast
    wrong = sac.rollout_error(model, obs, action, whole, 4)["model/rollout_mse"]
    assert wrong > 0.1


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("changes", [{}, {"rollout_length": 0}])
def test_a_run_leaves_its_metrics_and_says_the_same_when_evaluated_again(tmp_path, capsys, changes):
    policy = tmp_path / "policy.pt"
    result, run_dir = run(tiny(tmp_path, save_policy=str(policy), total_timesteps=2_010, **changes))
    tags = {row[1] for row in csv.reader((run_dir / "metrics.csv").open())} - {"tag"}
    prefixes = ("charts/", "eval/", "losses/", "model/", "time/")
    documented = {line.split()[0] for line in sac.__doc__.splitlines() if line.strip().startswith(prefixes)}
    models = {tag for tag in documented if tag.startswith("model/")} | {"time/share_model", "time/share_rollouts"}
    assert tags == (documented - models if changes else documented)
    assert json.loads((run_dir / "result.json").read_text()) == result
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    policy.unlink()
    again = sac.main(sac.parse_args(["--resume", str(run_dir), "--eval-only"]))
    assert not policy.exists(), "written once, when it was asked for"
    sac.main(sac.parse_args(["--resume", str(run_dir), "--eval-only", "--save-policy", str(policy)]))
    with pytest.raises(SystemExit) as exit:
        sac.main(sac.parse_args(["--resume", str(run_dir), "--total-timesteps", "1_000"]))
    assert exit.value.code == 2
    assert ("no model" if changes else "reward and termination learned") in capsys.readouterr().out
    assert again == {name: value for name, value in result.items() if name != "minutes"}
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before
    # The saved actor, rebuilt from its file alone, earns the same.
    saved = torch.load(policy, weights_only=True)
    actor = sac.load_policy(str(policy))
    returns = []
    for episode in range(2):
        env = gym.make(saved["env_id"], max_episode_steps=saved["max_episode_steps"])
        obs, over, total = env.reset(seed=1_000_001 + episode)[0], False, 0.0
        while not over:
            obs, reward, terminated, truncated, _ = env.step(actor.mode(torch.as_tensor(obs).float()).numpy())
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    assert np.mean(returns) == pytest.approx(result["eval/episodic_return"], rel=1e-5)


@pytest.mark.parametrize(
    "changes, call",
    [
        ({"num_envs": 2, "rollout_schedule": (0, 1, 1, 30)}, 33),  # the imagined buffer grows
        ({"real_ratio": None, "update_every": 10, "utd_ratio": 0.5, "average_members": True}, 20),
        ({"rollout_length": 0, "env_id": "HalfCheetah-v5", "buffer_size": 50}, 33),
        ({"env_id": "Hopper-v5", "max_episode_steps": None, "train_dtype": "bfloat16"}, 38),
    ],
)
@pytest.mark.filterwarnings("error:.*does not match any type:tyro._warnings.TyroWarning")
def test_killed_and_resumed_equals_never_stopped(tmp_path, monkeypatch, changes, call):
    _, whole = run(tiny(tmp_path / "whole", **changes))
    args = tiny(tmp_path / "killed", checkpoint_every=7, **changes)
    original, calls = sac.interact, iter(range(10**6))

    def killed(*args, **kwargs):
        if next(calls) == call:
            raise MemoryError
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sac, "interact", killed)
        with pytest.raises(MemoryError):
            sac.main(args)
    run_dir = next(Path(args.log_dir).iterdir())
    sac.main(sac.parse_args(["--resume", str(run_dir)]))
    assert_same(whole, run_dir)


def test_stopped_by_a_signal_and_then_made_longer_equals_never_stopped(tmp_path, monkeypatch):
    _, whole = run(tiny(tmp_path / "whole", interim_episodes=2, total_timesteps=100))
    args = tiny(tmp_path / "stopped", interim_episodes=2, total_timesteps=50)
    original, calls = sac.interact, iter(range(10**6))
    with monkeypatch.context() as patch:
        stop = lambda *a, **k: (next(calls) == 41 and signal.raise_signal(signal.SIGTERM)) or original(*a, **k)  # noqa: E731
        patch.setattr(sac, "interact", stop)
        with pytest.raises(SystemExit) as exit:
            sac.main(args)
    assert exit.value.code == 128 + signal.SIGTERM and next(calls) == 42
    run_dir = next(Path(args.log_dir).iterdir())
    sac.main(sac.parse_args(["--resume", str(run_dir)]))
    sac.main(sac.parse_args(["--resume", str(run_dir), "--total-timesteps", "100"]))
    # Its own end at step 50 logged what the whole run logs later.
    one, two = state(whole), state(run_dir)
    assert [n for n in one if "buffer" not in n and "imagined" not in n and not torch.equal(one[n], two[n])] == []


class Paid(gym.Env):
    """Pays the first action, whatever its batch_reward says."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, paid):
        self.batch_reward, self.batch_terminated = lambda o, a, n: a[..., paid], lambda n: n[..., 0] > 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), float(action[0]), False, False, {}


@pytest.mark.parametrize("paid", [0, 1])
def test_a_known_reward_that_is_not_what_is_paid_is_told(tmp_path, capsys, monkeypatch, paid):
    spec = gym.envs.registration.EnvSpec("Paid-v0", Paid, kwargs={"paid": paid})
    monkeypatch.setitem(gym.registry, "Paid-v0", spec)
    run(tiny(tmp_path, env_id="Paid-v0", total_timesteps=50))
    assert capsys.readouterr().err.count("off what the environment paid") == paid


@pytest.mark.parametrize("bad", ["nan", "huge"])
def test_a_diverged_agent_does_not_overwrite_its_checkpoint(tmp_path, monkeypatch, capsys, bad):
    args = tiny(tmp_path, rollout_length=0, checkpoint_every=5, total_timesteps=60)
    original, calls = sac.Agent.update, iter(range(10**6))

    def diverging(self, *rows):
        means = original(self, *rows)
        if next(calls) == 12:
            return torch.full_like(means, torch.nan) if bad == "nan" else torch.full_like(means, 1e9)
        return means

    monkeypatch.setattr(sac.Agent, "update", diverging)
    with pytest.raises(SystemExit) as exit:
        sac.main(args)
    run_dir = next(Path(args.log_dir).iterdir())
    words = "non-finite losses/qf_loss" if bad == "nan" else "losses/qf_values beyond"
    assert words in exit.value.code and str(run_dir / "checkpoint.pt") in exit.value.code
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["progress"]["step"] == 40


def test_a_diverged_model_does_not_overwrite_the_checkpoint(tmp_path, monkeypatch):
    """Its best weights would be restored after each fit, and nobody would see that it learns no more."""
    original, calls = sac.train_step, iter(range(10**6))
    broken = lambda *rest: original(*rest) * (torch.nan if next(calls) % 3 == 2 else 1)  # noqa: E731
    monkeypatch.setattr(sac, "train_step", broken)
    with pytest.raises(SystemExit) as exit:
        sac.main(tiny(tmp_path, rollout_length=1, checkpoint_every=5, max_train_steps=3))
    assert "non-finite model/train_loss" in exit.value.code and "smaller --model-learning-rate" in exit.value.code


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"gamma": 1.0}, "--gamma must lie in [0, 1)"),
        ({"initial_steps": 80}, "nothing would be learned"),
        ({"buffer_size": 1}, "--buffer-size must be at least 2"),
        ({"elite_members": 4}, "--elite-members 4 of --ensemble-size 3"),
        ({"real_ratio": 1.5}, "--real-ratio"),
        ({"real_ratio": 1.0}, "--real-ratio 1.0 of --batch-size 16 makes no use of a model"),
        ({"real_ratio": 0.05, "batch_size": 1}, "--real-ratio 0.05 of --batch-size 1 makes no use of a model"),
        ({"rollout_schedule": (5, 5, 1, 2)}, "--rollout-schedule"),
        ({"rollout_schedule": (1, 5, 1, 2), "rollout_length": 0}, "without a model nothing grows"),
        ({"eval_only": True}, "--eval-only needs --resume"),
        ({"target_entropy": float("inf")}, "--target-entropy"),
        ({"target_entropy": -1.0, "alpha": 0.1}, "this one is fixed"),
        ({"utd_ratio": 0.0}, "--utd-ratio 0"),
        ({"reward": "known"}, "no formula for Pendulum-v1"),
        ({"env_id": "CartPole-v1"}, "the action space must be a Box"),
        ({"save_policy": "/no/such/folder/policy.pt"}, "--save-policy"),
    ],
)
def test_bad_arguments(tmp_path, capfd, changes, words):
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        sac.main(tiny(tmp_path, **changes))
    lines = capfd.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("initial", "total", "updates"), [(10, 45, 50), (40, 140, 110)])
def test_the_first_round_of_updates_follows_the_random_steps(tmp_path, initial, total, updates):
    """Whatever multiple of update_every they are; the next rounds come when they are due."""
    changes = dict(rollout_length=0, utd_ratio=1, update_every=50, initial_steps=initial, total_timesteps=total)
    _, run_dir = run(tiny(tmp_path, **changes))
    progress = torch.load(run_dir / "checkpoint.pt", weights_only=True)["progress"]
    assert progress["updates"] == updates


def test_ctrl_c_ends_an_evaluation_alone_at_once(tmp_path, monkeypatch):
    """It saves nothing, and so there is nothing to wait for."""
    _, run_dir = run(tiny(tmp_path))
    monkeypatch.setattr(sac, "evaluate", lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        sac.main(replace(sac.load_args(str(run_dir)), resume=str(run_dir), eval_only=True))


def test_a_large_fixed_temperature_is_no_divergence(tmp_path):
    """Entropy alone is worth alpha log 2 / (1 - gamma) for each action."""
    buffer = sac.ReplayBuffer(10, 3, 6, torch.device("cpu"))
    buffer.size = 10  # all rewards are 0
    for alpha, fine in ((100.0, True), (1.0, False)):
        check = partial(sac.check_losses, {"losses/qf_values": 100 * 6 * math.log(2) / 0.01}, buffer)
        with contextlib.nullcontext() if fine else pytest.raises(SystemExit, match="which no policy can earn"):
            check(sac.Args(alpha=alpha, gamma=0.99), 10, tmp_path)


def test_weights_that_have_diverged_are_not_saved(tmp_path, monkeypatch):
    """Those of the last step, which no loss has seen."""
    assert math.isnan(sac.weight_size(torch.nn.ParameterList([torch.ones(2), torch.tensor([torch.nan])]))["weights"])
    monkeypatch.setattr(sac, "weight_size", lambda networks: {"weights": math.nan})
    with pytest.raises(SystemExit, match="non-finite weights"):
        sac.main(tiny(tmp_path))
    assert not list(tmp_path.glob("runs/*/checkpoint.pt"))
