"""mbrl_dynamics.py: its blocks against slow references, its runs against interruption, its errors against bad input."""

import copy
import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mbrl_dynamics as md

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def tiny(tmp_path: Path, **changes: object) -> md.Args:
    small = dict(num_envs=2, initial_steps=600, train_steps=30, eval_every=10, ensemble_size=2, num_layers=1)
    small |= dict(hidden_size=8, batch_size=32, num_threads=1, cuda=False, log_dir=str(tmp_path / "runs"))
    return md.Args(**({"env_id": "Pendulum-v1"} | small | changes))


def run(args: md.Args) -> tuple[dict[str, float], Path]:
    result = md.main(args)
    return result, Path(args.resume) if args.resume else sorted(Path(args.log_dir).iterdir())[-1]


def logged(run_dir: Path) -> list[tuple[str, ...]]:
    """metrics.csv without the tags that depend on the clock."""
    rows = [tuple(row) for row in csv.reader((run_dir / "metrics.csv").open())]
    return sorted(row for row in rows if not row[1].startswith(("time/", "charts/SPS")))


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "model.pt", weights_only=True)["model"]


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def one_line_error(capfd: pytest.CaptureFixture[str], work) -> str:
    """What `work` prints before it exits with code 2, which must be one line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        work()
    assert exit.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


# ------------------------------------------------------------------------------------------------------- environment


class Counter(gym.Env):
    """Observes [step, draw of this episode]; ends after `length` steps, by termination or else by truncation."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))  # shared by all instances: drawing from it must not couple them

    def __init__(self, length: int = 5, terminates: bool = True):
        self.length, self.terminates = length, terminates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.draw = 0, self.np_random.uniform()
        return np.array([0, self.draw], np.float32), {}

    def step(self, action):
        self.count += 1
        self.draw += float(action[0]) * self.np_random.uniform()
        over = self.count == self.length
        obs = np.array([self.count, self.draw], np.float32)
        return obs, float(self.count), over and self.terminates, over and not self.terminates, {}


gym.register("Counter-v0", Counter)
gym.register("CounterTruncates-v0", Counter, kwargs={"terminates": False})


@pytest.mark.parametrize("env_id, terminates", [("Counter-v0", True), ("CounterTruncates-v0", False)])
def test_a_finished_episode_keeps_its_true_last_observation(env_id, terminates):
    envs = md.VectorEnv(env_id, 2, seed=0)
    for step in range(1, 6):
        episode = envs.episode
        next_obs, reward, terminated = envs.step(envs.random_action())
        assert (next_obs[:, 0] == step).all() and (reward == step).all()
        assert (terminated == (terminates and step == 5)).all()
    assert (envs.obs[:, 0] == 0).all(), "the next thing to act on is the new episode"
    assert envs.finished == [(15.0, 5), (15.0, 5)]
    assert set(episode) == {0, 1} and set(envs.episode) == {2, 3}


@pytest.mark.parametrize("env_id", ["Counter-v0", "Pendulum-v1", "HalfCheetah-v5", "envs:Obstacles-v0"])
@pytest.mark.parametrize("steps", [0, 23])
def test_environments_resume_exactly(env_id, steps):
    envs = md.VectorEnv(env_id, 2, seed=3)
    for _ in range(steps):
        action = envs.random_action()
        envs.step(action)
        action[:] = 0  # the caller's array is its own
    saved = envs.state_dict()
    copy = md.VectorEnv(env_id, 2, seed=99)
    copy.load_state_dict(saved)
    assert np.array_equal(copy.obs, envs.obs) and np.array_equal(copy.episode, envs.episode)
    for _ in range(130):  # past the end of an episode for the short ones
        action = envs.random_action()
        assert np.array_equal(copy.random_action(), action)
        for one, two in zip(envs.step(action), copy.step(action), strict=True):
            assert np.array_equal(one, two)
        assert np.array_equal(copy.obs, envs.obs) and copy.finished == envs.finished


def test_an_environment_that_changes_its_action_resumes_exactly_and_one_that_remembers_more_is_told(capsys):
    class Scaling(Counter):
        started = 0

        def reset(self, **kwargs):
            type(self).started += 1
            return super().reset(**kwargs)

        def step(self, action):
            action *= 0.5  # in place
            obs, *rest = super().step(action)
            return obs + action + remembers * type(self).started, *rest

    gym.register("Scaling-v0", Scaling)
    for remembers in (False, True):
        envs, copy = (md.VectorEnv("Scaling-v0", 2, seed=3) for _ in range(2))
        for _ in range(3):
            envs.step(np.ones((2, 1), np.float32))
        copy.load_state_dict(envs.state_dict())
        assert np.array_equal(copy.obs, envs.obs) != remembers
        assert ("not replayed as they were" in capsys.readouterr().err) == remembers


def test_environments_start_and_act_differently():
    envs = md.VectorEnv("Counter-v0", 3, seed=0)
    assert len(set(envs.obs[:, 1])) == 3 and len(set(envs.random_action()[:, 0])) == 3


gym.register("CounterColumn-v0", lambda: gym.wrappers.ReshapeObservation(Counter(), (2, 1)))
matrix = gym.spaces.Box(-1, 1, (1, 1))
gym.register("CounterMatrixAction-v0", lambda: gym.wrappers.TransformAction(Counter(), np.ravel, matrix))


def test_random_actions_are_not_the_numbers_that_the_environment_draws():
    envs = md.VectorEnv("HalfCheetah-v5", 1, seed=3)
    started = envs.obs[0, :6]  # a tenth of what its generator drew
    assert abs(np.corrcoef(started, envs.random_action()[0])[0, 1]) < 0.9


def test_observations_are_flattened_and_actions_must_be_flat(capfd):
    assert np.array_equal(md.VectorEnv("CounterColumn-v0", 2, 0).obs, md.VectorEnv("Counter-v0", 2, 0).obs)
    assert "actions must be vectors" in one_line_error(capfd, lambda: md.make_env("CounterMatrixAction-v0"))


def test_locomotion_tasks_keep_x():
    env, plain = md.make_env("HalfCheetah-v5"), gym.make("HalfCheetah-v5")
    obs, _ = env.reset(seed=0)
    assert np.array_equal(obs[md.POSITIONS["HalfCheetah-v5"] :], plain.reset(seed=0)[0])
    for env_id, positions in md.POSITIONS.items():
        assert md.make_env(env_id).observation_space.shape[0] == gym.make(env_id).observation_space.shape[0] + positions


# -------------------------------------------------------------------------------------------------------------- data


@pytest.mark.filterwarnings("ignore:std_mean")
def test_normaliser_round_trip_and_constant_dimensions():
    x = torch.randn(1000, 4) * torch.tensor([1.0, 100.0, 1e-4, 0.0]) + torch.tensor([5.0, -1e4, 0.0, 0.1])
    normaliser = md.Normaliser(4)
    normaliser.fit(x)
    y = normaliser(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(y.std(0), torch.tensor([1.0, 1.0, 1.0, 0.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(normaliser.inverse(y), x)
    assert normaliser.std[3] == 1, "dividing by the rounding error of a constant would blow it up"
    normaliser.fit(1e4 + 1e-3 * x.sign())  # nothing but rounding: float32 has seven digits
    assert (normaliser.std == 1).all()
    normaliser.fit(x[:1])
    assert torch.equal(normaliser.std, torch.ones(4)), "one row has no standard deviation"
    normaliser.fit(x, constant=0.0)
    assert torch.equal(normaliser.inverse(torch.full((1, 4), 9.0))[0, 3], x[0, 3]), "whatever y is"
    assert normaliser(x).isfinite().all()


@pytest.mark.parametrize("kind", [md.Ensemble, md.GaussianEnsemble])
def test_what_has_never_moved_is_predicted_to_stay(kind):
    """A goal among the observations: a network that is a little wrong about it would let it wander, step by step."""
    model, buffer = kind(**SHAPE, learn_reward=False, skip=0), md.ReplayBuffer(50, 3, 2, torch.device("cpu"))
    obs, next_obs = torch.randn(2, 50, 3)
    next_obs[:, 1] = obs[:, 1]
    buffer.add(obs=obs, action=torch.randn(50, 2), next_obs=next_obs, reward=torch.zeros(50))
    _, y = model.regression_data(buffer, torch.arange(50), fit=True)
    assert (y[:, 1] == 0).all()
    predicted, _, _ = model.predict(obs.expand(4, -1, -1), torch.randn(4, 50, 2))
    assert torch.equal(predicted[..., 1], obs[:, 1].expand(4, -1)) and (predicted[..., 0] != obs[:, 0]).all()
    model.loss(torch.randn(4, 50, 5), y.expand(4, -1, -1)).sum().backward()
    assert (model.mlp.biases[-1].grad[..., :3] != 0).all(), "a mean that nobody has trained would count as an error"
    if kind is md.GaussianEnsemble:  # to be ever surer of it would drag the bounds down, their own penalty across
        for bound in (model.min_logvar, model.max_logvar):
            assert (bound.grad[..., 1] == 0).all() and (bound.grad[..., [0, 2]] != 0).all()


def test_buffer_overwrites_the_oldest():
    buffer = md.ReplayBuffer(5, 1, 1, CPU)
    for start in (0, 3):
        numbers = np.arange(start, start + 3)
        vectors = numbers[:, None].astype(np.float32)
        buffer.add(obs=vectors, action=vectors, next_obs=vectors, reward=numbers, terminated=numbers, episode=numbers)
    assert buffer.size == 5 and buffer.reward.tolist() == [5, 1, 2, 3, 4]
    many = np.arange(6, 18)
    rows = dict.fromkeys(("obs", "action", "next_obs"), many[:, None].astype(np.float32))
    buffer.add(**rows, **dict.fromkeys(("reward", "terminated", "episode"), many))
    assert buffer.reward.tolist() == [15, 16, 17, 13, 14] == buffer.obs[:, 0].tolist()
    copy = md.ReplayBuffer(5, 1, 1, CPU)
    copy.load_state_dict(buffer.state_dict())
    assert copy.position == 3 and copy.size == 5 and torch.equal(copy.reward, buffer.reward)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.99])
def test_whole_episodes_are_held_out(ratio):
    episode = torch.arange(12).repeat(10)  # twelve interleaved episodes of ten steps
    train, test = md.split_episodes(episode, ratio, seed=0)
    assert sorted(torch.cat([train, test]).tolist()) == list(range(120))
    assert not set(episode[train].tolist()) & set(episode[test].tolist())
    assert len(test) == int(ratio * 12) * 10
    for rows in (train, test):  # in order of episode, and of time within one
        assert rows.tolist() == sorted(rows.tolist(), key=lambda row: (episode[row], row))


def test_of_a_long_episode_the_end_is_held_out_for_a_small_share():
    for seed in range(10):
        train, test = md.split_episodes(torch.tensor([0] * 99 + [1]), 0.1, seed)
        assert test.tolist() == list(range(89, 99)) and len(train) == 90


def test_the_held_out_share_counts_transitions_and_its_choice_follows_the_seed():
    lengths = torch.arange(1, 31) ** 2
    episode, chosen = torch.arange(30).repeat_interleave(lengths), set()
    for seed in range(10):
        held_out = episode[md.split_episodes(episode, 0.3, seed)[1]]
        left = 0.3 * len(episode) - len(held_out)
        others = [length for number, length in enumerate(lengths) if number not in held_out]
        assert 0 <= left < min(others), "as many as fit: of the others none does"
        chosen.add(tuple(held_out.unique().tolist()))
    assert len(chosen) == 10


@pytest.mark.parametrize("ratio, cut", [(0.2, 8), (0.01, 9), (0.99, 1)])
def test_a_single_episode_is_split_in_time(ratio, cut):
    train, test = md.split_episodes(torch.zeros(10, dtype=torch.int64), ratio, seed=0)
    assert train.tolist() == list(range(cut)) and test.tolist() == list(range(cut, 10))


def numbered_buffer(episode: list[int]) -> md.ReplayBuffer:
    buffer = md.ReplayBuffer(len(episode), 1, 1, CPU)
    numbers = torch.arange(len(episode), dtype=torch.float32)
    columns = dict(obs=numbers[:, None], action=numbers[:, None], next_obs=numbers[:, None] + 1)
    buffer.add(**columns, reward=numbers, terminated=numbers * 0, episode=torch.tensor(episode))
    return buffer


def test_windows_stay_within_an_episode():
    episode = [0] * 4 + [1] * 2 + [2] * 5
    buffer = numbered_buffer(episode)
    obs, action, next_obs = md.windows(buffer, torch.arange(11), 3)
    assert obs[:, 0].tolist() == [0, 1, 6, 7, 8]
    assert torch.equal(action[..., 0], obs + torch.arange(3)) and torch.equal(next_obs, action + 1)
    assert len(md.windows(buffer, torch.arange(11), 6)[0]) == 0
    assert md.windows(buffer, torch.arange(11), 1, most=3)[0][:, 0].tolist() == [0, 5, 10]


def test_normalisers_see_the_training_split_only(tmp_path):
    """A held-out episode of huge numbers must leave no trace in the statistics, but show in what is measured."""
    numbers = torch.randn(300, 2)
    episode = torch.arange(300) // 30
    _, test = md.split_episodes(episode, 0.1, seed=1)
    numbers[test] *= 1e6
    columns = dict(obs=numbers, action=numbers[:, :1], next_obs=numbers + 1, reward=numbers[:, 0])
    data = {"env_id": "Counter-v0", **columns, "terminated": torch.zeros(300), "episode": episode}
    torch.save(data, tmp_path / "data.pt")
    result, run_dir = run(tiny(tmp_path, env_id="Counter-v0", data=str(tmp_path / "data.pt"), seed=1))
    assert weights(run_dir)["input_normaliser.mean"].abs().max() < 1
    assert result["model/holdout_mse"] > 100  # of the reward, which is huge there, too
    assert result["model/open_loop_baseline_1"] == pytest.approx(1, rel=0.3), "in units of the training split"


# ---------------------------------------------------------------------------------------------------------- networks

SHAPE = dict(obs_dim=3, action_dim=2, ensemble_size=4, num_layers=2, hidden_size=16, activation="tanh")


def batch(outputs: int, generator_seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(generator_seed)
    return torch.randn(4, 7, 5, generator=generator), torch.rand(4, 7, outputs, generator=generator).round(decimals=1)


def test_batched_product_equals_a_loop_over_members():
    mlp = md.StackedMLP(4, [5, 16, 16, 3], "tanh")
    assert all(len(parameter.unique(dim=0)) == 4 for parameter in mlp.parameters()), "each member starts on its own"
    x, _ = batch(3)
    for member, output in enumerate(mlp(x)):
        slow = x[member]
        for layer in range(3):
            slow = F.linear(slow, mlp.weights[layer][member].T, mlp.biases[layer][member, 0])
            slow = torch.tanh(slow) if layer < 2 else slow
        torch.testing.assert_close(output, slow)


@pytest.mark.parametrize("activation, function", [("tanh", torch.tanh), ("relu", F.relu), ("silu", F.silu)])
def test_activations(activation, function):
    mlp = md.StackedMLP(1, [1, 1, 1], activation)
    for parameter in mlp.parameters():
        torch.nn.init.ones_(parameter)
    torch.testing.assert_close(mlp(torch.tensor([[[-2.5]]])), function(torch.tensor([[[-1.5]]])) + 1)


@pytest.mark.parametrize("learn_reward", [False, True])
@pytest.mark.parametrize("kind", [md.Ensemble, md.GaussianEnsemble])
def test_batched_loss_equals_a_loop_over_samples(kind, learn_reward):
    model = kind(**SHAPE, learn_reward=learn_reward, skip=0)
    x, y = batch(5 if learn_reward else 3)
    if learn_reward:
        y[..., -1] = y[..., -1].round()
    targets = 3 + learn_reward
    for member, loss in enumerate(model.loss(x, y)):
        slow = 0.0
        for sample in range(7):
            output = model.mlp(x)[member, sample]
            for dim in range(targets):
                mean, target = output[dim], y[member, sample, dim]
                if kind is md.Ensemble:
                    slow += (mean - target) ** 2 / (7 * targets)
                else:  # twice torch's, up to a constant
                    variance = model.logvar(model.mlp(x))[member, sample, dim].exp()
                    log_prob = torch.distributions.Normal(mean, variance.sqrt()).log_prob(target)
                    slow += (-2 * log_prob - np.log(2 * np.pi)) / (7 * targets)
            if learn_reward:
                slow += F.binary_cross_entropy(output[-1].sigmoid(), y[member, sample, -1]) / 7
        if kind is md.GaussianEnsemble:
            slow += 0.01 / 4 * (model.max_logvar - model.min_logvar)[member].sum()
        torch.testing.assert_close(loss, slow)


def test_log_variance_stays_within_its_soft_bounds():
    model = md.GaussianEnsemble(**SHAPE, learn_reward=False, skip=0)
    logvar = model.logvar(torch.linspace(-1e3, 1e3, 6 * 404).reshape(4, 101, 6))
    assert logvar.min() >= -10 - 1e-4 and logvar.max() <= 0.5 + 1e-4
    assert logvar.max() - logvar.min() > 10


def test_the_variance_that_is_learned_is_the_noise_and_differs_where_the_noise_does():
    """18 dimensions as HalfCheetah's: if the bounds weighed more they would close, and one variance be left for all."""
    torch.manual_seed(0)
    shape = SHAPE | dict(obs_dim=18, ensemble_size=5, num_layers=1, hidden_size=16, activation="silu")
    model = md.GaussianEnsemble(**shape, learn_reward=False, skip=0)
    x = torch.randn(5_000, 20)
    y = torch.where(x[:, :1] > 0, 1.0, 0.1) * torch.randn(5_000, 18)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, fused=True)
    for _ in range(1_500):
        md.train_step(model, optimizer, x, y, 128, 0.0, torch.float32)
    assert (model.min_logvar < model.max_logvar).all()
    logvar = model.logvar(model.mlp(x.expand(5, -1, -1)))
    for side, truth in ((x[:, 0] > 0.5, 1.0), (x[:, 0] < -0.5, 0.1)):
        assert (0.5 * logvar[:, side]).exp().mean().item() == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize("bound", ["max_logvar", "min_logvar"])
def test_the_log_variance_bounds_are_learned(bound):
    """Their gradient, regulariser included, against a difference quotient."""
    model = md.GaussianEnsemble(**SHAPE, learn_reward=False, skip=0)
    parameter, (x, y) = getattr(model, bound), batch(3)
    model.loss(x, y).sum().backward()
    losses = []
    for shift in (0.05, -0.1):
        with torch.no_grad():
            parameter[0, 0, 0] += shift
            losses.append(model.loss(x, y).sum().item())
    assert parameter.grad[0, 0, 0].item() == pytest.approx((losses[0] - losses[1]) / 0.1, abs=1e-3)


@pytest.mark.parametrize("kind", [md.Ensemble, md.GaussianEnsemble])
def test_prediction_is_equation_1(kind):
    """s' = s + Unnormalise(f(Normalise(s, a))), with the position predicted but not seen."""
    model = kind(**SHAPE, learn_reward=True, skip=1)
    for normaliser in (model.input_normaliser, model.target_normaliser):
        normaliser.fit(torch.randn(100, normaliser.mean.shape[0]) * 3 + 1)
    obs, action = torch.randn(4, 7, 3), torch.randn(4, 7, 2)
    next_obs, reward, terminated = model.predict(obs, action)
    x = (torch.cat([obs[..., 1:], action], -1) - model.input_normaliser.mean) / model.input_normaliser.std
    output = model.mlp(x)
    change = output[..., :4] * model.target_normaliser.std + model.target_normaliser.mean
    torch.testing.assert_close(next_obs, obs + change[..., :3])
    torch.testing.assert_close(reward, change[..., 3])
    torch.testing.assert_close(terminated, output[..., -1].sigmoid())
    moved = obs.clone()
    moved[..., 0] += 10
    torch.testing.assert_close(model.predict(moved, action)[0] - next_obs, moved - obs, atol=1e-5, rtol=0)


def linear_data(count: int = 4000, steps: int = 20) -> tuple[md.ReplayBuffer, torch.Tensor]:
    """s' = As + Ba in episodes of `steps`; reward s_0 - a_0; terminated where s'_1 > 0.5."""
    generator = torch.Generator().manual_seed(0)
    A = torch.tensor([[0.9, 0.2, 0.0], [-0.2, 0.9, 0.1], [0.0, 0.0, 0.8]])
    B = torch.randn(3, 2, generator=generator) * 0.3
    buffer, state = md.ReplayBuffer(count, 3, 2, CPU), torch.randn(count // steps, 3, generator=generator)
    for _ in range(steps):
        action = torch.rand(count // steps, 2, generator=generator) * 2 - 1
        next_state = state @ A.T + action @ B.T
        columns = dict(obs=state, action=action, next_obs=next_state, reward=state[:, 0] - action[:, 0])
        buffer.add(**columns, terminated=next_state[:, 1] > 0.5, episode=torch.arange(count // steps))
        state = next_state
    return buffer, torch.cat([A, B], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [md.Ensemble, md.GaussianEnsemble])
def test_ensemble_recovers_a_linear_system(kind, dtype):
    torch.manual_seed(0)
    buffer, _ = linear_data()
    train_rows, test_rows = md.split_episodes(buffer.episode, 0.2, seed=0)
    model = kind(**SHAPE | {"ensemble_size": 2, "hidden_size": 32}, learn_reward=True, skip=0)
    x, y = model.regression_data(buffer, train_rows, fit=True)
    test = model.regression_data(buffer, test_rows)
    scale = buffer.obs.std(0)
    before = md.one_step_metrics(model, *test)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(400):
        md.train_step(model, optimizer, x, y, 128, 0.0, dtype)
    after = md.one_step_metrics(model, *test) | md.open_loop_metrics(model, buffer, test_rows, scale)
    assert before["model/holdout_mse"] > 0.9 and before["model/r2"] < 0.5
    assert after["model/holdout_mse"] < 0.02 and after["model/r2"] > 0.98 and after["model/reward_mse"] < 0.02
    assert after["model/termination_accuracy"] > 0.97 > before["model/termination_accuracy"]
    assert after["model/open_loop_mse_15"] < 0.05 < 0.5 < after["model/open_loop_baseline_15"]
    assert "model/open_loop_mse_50" not in after, "no episode is that long"


def test_members_learn_from_their_own_batches_only():
    """A member's step is the same whether or not another member is there: nothing leaks between them."""
    buffer, _ = linear_data(400)
    models = [md.Ensemble(**SHAPE, learn_reward=False, skip=0) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    with torch.no_grad():
        models[1].mlp.weights[0][1:] += 1.0
    x, y = models[0].regression_data(buffer, torch.arange(400))
    batches, loss = [], md.DynamicsModel.loss
    for model in models:
        torch.manual_seed(5)
        model.loss = lambda x, y, model=model: batches.append((x, y)) or loss(model, x, y)
        before = copy.deepcopy(list(model.parameters()))
        losses = md.train_step(model, torch.optim.SGD(model.parameters(), 0.1), x, y, 16, 0.01, torch.float32)
        assert losses.unique().numel() == 4
    assert all(torch.equal(one[0], two[0]) for one, two in zip(*(model.parameters() for model in models), strict=True))
    after = copy.deepcopy(list(model.parameters()))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    gradients = torch.autograd.grad(loss(model, *batches[-1])[0], list(model.parameters()))
    for old, new, gradient in zip(before, after, gradients, strict=True):  # the full gradient, not a share of it
        torch.testing.assert_close(new[0], old[0] - 0.1 * gradient[0])


def test_bfloat16_is_for_the_products_only():
    buffer, _ = linear_data(400)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = md.Ensemble(**SHAPE, learn_reward=True, skip=0)
        x, y = model.regression_data(buffer, torch.arange(400), fit=True)
        losses.append(md.train_step(model, torch.optim.SGD(model.parameters(), 0.1), x, y, 64, 0.0, dtype))
        assert losses[-1].dtype == torch.float32 and {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=0.02, atol=0)


def test_input_noise_is_added_to_the_inputs_only():
    buffer, _ = linear_data(400)
    model = md.Ensemble(**SHAPE, learn_reward=False, skip=0)
    seen = []
    model.loss = lambda x, y: seen.append((x, y)) or sum(p.sum() for p in model.parameters()) * torch.ones(4)
    x, y = model.regression_data(buffer, torch.arange(400))
    for noise in (0.0, 0.1):
        torch.manual_seed(1)
        md.train_step(model, torch.optim.SGD(model.parameters(), 0.0), x, y, 100, noise, torch.float32)
    (x0, y0), (x1, y1) = seen
    assert torch.equal(y0, y1) and abs((x1 - x0).std().item() - 0.1) < 0.01
    assert not torch.equal(x0[0], x0[1]), "each member has its own batch"
    assert (x1 - x0).std(dim=0).min() > 0.001, "and its own noise"


# -------------------------------------------------------------------------------------------------------- evaluation


def test_one_step_metrics_against_a_loop():
    model = md.Ensemble(**SHAPE, learn_reward=True, skip=0)
    x, y = (part[0] for part in batch(5))
    y[:, 1] = 0.7  # a dimension that never changes
    y[:, -1] = y[:, -1].round()
    metrics = md.one_step_metrics(model, x, y)
    output, truth = model.mlp(x.expand(4, -1, -1)).detach().numpy().astype(float), y.numpy().astype(float)
    error = output[..., :4] - truth[:, :4]
    assert metrics["model/holdout_mse"] == pytest.approx(np.mean(error[..., :3] ** 2))
    assert metrics["model/reward_mse"] == pytest.approx(np.mean(error[..., 3] ** 2))
    spread = [np.sqrt(np.mean((output[:, n, d] - output[:, n, d].mean()) ** 2)) for n in range(7) for d in range(3)]
    assert metrics["model/disagreement"] == pytest.approx(np.mean(spread))
    assert metrics["model/termination_accuracy"] == pytest.approx(np.mean((output[..., -1] > 0) == truth[:, -1]))
    r2 = {d: 1 - np.mean(error[..., d].mean(0) ** 2) / np.var(truth[:, d]) for d in (0, 2)}
    found = {tag: value for tag, value in metrics.items() if "r2" in tag}
    assert found == pytest.approx({"model/r2": np.mean([r2[0], r2[2]]), "model/r2_0": r2[0], "model/r2_2": r2[2]})


def test_open_loop_metrics_by_hand():
    """The state grows by 1 a step; the first member says that it stays where it is, the second is right."""
    model = md.Ensemble(1, 1, 2, 1, 4, "tanh", learn_reward=False, skip=0)
    speed = torch.tensor([0.0, 1.0])[:, None, None]
    model.predict = lambda obs, action: (obs + speed, None, None)
    metrics = md.open_loop_metrics(model, numbered_buffer([0] * 20), torch.arange(20), torch.tensor([2.0]))
    mse = {f"model/open_loop_mse_{horizon}": (horizon / 2) ** 2 / 2 for horizon in (1, 5, 15)}
    assert metrics == mse | {f"model/open_loop_baseline_{horizon}": (horizon / 2) ** 2 for horizon in (1, 5, 15)}


def test_summary_names_the_worst_dimension():
    metrics = {"model/holdout_mse": 0.1, "model/r2": 0.5, "model/r2_0": 0.75, "model/r2_1": 0.25}
    text = md.summary(metrics | {"model/open_loop_mse_5": 0.125, "model/open_loop_baseline_5": 1.5})
    assert "R² 0.5000 (worst: model/r2_1 0.2500)" in text
    assert "5 steps: 0.125 of the variance (nothing changes: 1.5)" in text


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("probabilistic", [False, True])
def test_a_run_learns_and_leaves_everything_behind(tmp_path, probabilistic, capsys):
    args = tiny(tmp_path, probabilistic=probabilistic, reward="learned", train_steps=200, learning_rate=1e-2)
    result, run_dir = run(args)
    rows = [
        (int(step), tag, float(value)) for step, tag, value in list(csv.reader((run_dir / "metrics.csv").open()))[1:]
    ]
    losses = [value for _, tag, value in rows if tag == "model/train_loss"]
    assert len(losses) == 200 and np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    documented = {
        line.split()[0] for line in (md.__doc__ or "").splitlines() if line.strip().startswith(("model/", "ch"))
    }
    found = {tag for _, tag, _ in rows}
    for tag in documented:
        stem = tag.split("{")[0]
        assert any(name == tag or (stem != tag and name.startswith(stem)) for name in found), tag
    assert json.loads((run_dir / "result.json").read_text()) == result and result["minutes"] > 0
    assert md.Args(**json.loads((run_dir / "args.json").read_text())) == args
    names = {path.name.split(".")[0] for path in run_dir.iterdir()}
    assert {"loss_curve", "predictions", "checkpoint", "model", "events"} <= names
    assert "open loop" in capsys.readouterr().out


def test_same_seed_same_weights_other_seed_other_weights(tmp_path):
    runs = [run(tiny(tmp_path / str(i), seed=seed))[1] for i, seed in enumerate([1, 1, 2])]
    assert same(weights(runs[0]), weights(runs[1])) and logged(runs[0]) == logged(runs[1])
    assert not same(weights(runs[0]), weights(runs[2]))


def test_two_runs_in_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)
    for _ in range(2):
        md.main(tiny(tmp_path, train_steps=1))
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_the_run_folder_lies_directly_in_the_log_folder(tmp_path):
    assert md.new_run_dir(tiny(tmp_path, env_id="module:Name/Space-v0")).parent == tmp_path / "runs"


def test_every_training_setting_has_an_effect(tmp_path, monkeypatch):
    monkeypatch.setattr(md, "save_picture", lambda *args: None)
    start = dict(train_steps=3, data=str(tmp_path / "data.pt"))
    run(tiny(tmp_path / "data", initial_steps=800, train_steps=1, save_data=start["data"]))
    usual = weights(run(tiny(tmp_path / "usual", **start))[1])
    changes = dict(learning_rate=0.1, weight_decay=0.5, input_noise=0.5, batch_size=16, train_dtype="bfloat16")
    changes |= dict(holdout_ratio=0.6, activation="relu", train_steps=2)
    for name, value in changes.items():
        other = weights(run(tiny(tmp_path / name, **start | {name: value}))[1])
        assert not torch.equal(usual["mlp.weights.0"], other["mlp.weights.0"]), name
    run(tiny(tmp_path / "threads", **start | {"num_threads": 2}))
    assert torch.get_num_threads() == 2


def test_the_seed_decides_what_is_held_out(tmp_path, monkeypatch):
    seeds, split = [], md.split_episodes
    monkeypatch.setattr(md, "split_episodes", lambda *args: seeds.append(args[2]) or split(*args))
    run(tiny(tmp_path, seed=7, train_steps=1))
    assert seeds == [7]


def test_positions_are_hidden_from_the_model(tmp_path):
    _, run_dir = run(tiny(tmp_path, env_id="Swimmer-v5", train_steps=1))
    assert torch.load(run_dir / "model.pt", weights_only=True)["config"]["skip"] == 2


def test_times_and_speed(tmp_path, monkeypatch):
    """By a clock that only the work moves: 2 s for each collecting step, 100 s for each of the first ten gradient
    steps, 0.5 s for each one after."""
    clock, calls = [0.0], iter(range(10**6))
    env_step, train_step = md.VectorEnv.step, md.train_step

    def slow(seconds, function, *args):
        clock[0] += seconds
        return function(*args)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(md.VectorEnv, "step", lambda *args: slow(2.0, env_step, *args))
    monkeypatch.setattr(md, "train_step", lambda *args: slow(100.0 if next(calls) < 10 else 0.5, train_step, *args))
    result, run_dir = run(tiny(tmp_path, train_steps=30))
    assert result["time/env_s"] == 600 and result["time/train_s"] == 1010 and result["minutes"] == 1610 / 60
    rows = [row for row in csv.DictReader((run_dir / "metrics.csv").open()) if row["tag"] == "charts/SPS"]
    assert [(row["step"], float(row["value"])) for row in rows] == [("10", 0.01), ("20", 2.0), ("30", 2.0)]


def test_a_short_run_logs_every_loss_and_its_speed(tmp_path):
    rows = logged(run(tiny(tmp_path, train_steps=7, eval_every=100))[1])
    assert sorted(int(row[0]) for row in rows if row[1] == "model/train_loss") == list(range(1, 8))
    rows = list(csv.DictReader((next((tmp_path / "runs").iterdir()) / "metrics.csv").open()))
    assert [float(row["value"]) > 0 for row in rows if row["tag"] == "charts/SPS"] == [True]


def test_checkpoints_come_on_time_whatever_the_number_of_environments(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(md.Checkpointer, "save", lambda self: sizes.append(self.parts["buffer"].size))
    run(tiny(tmp_path, num_envs=4, initial_steps=59, checkpoint_every=10, train_steps=1))
    assert sizes == [12, 20, 32, 40, 52, 60, 60], "the last one is that of the finished run"


def test_saving_is_atomic(tmp_path, monkeypatch):
    def full_disk(contents, path):
        Path(path).write_bytes(b"half a file")
        raise OSError

    md.save_file(tmp_path / "file.pt", {"number": 1})
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        md.save_file(tmp_path / "file.pt", {"number": 2})
    assert torch.load(tmp_path / "file.pt", weights_only=True) == {"number": 1}


def test_signals_are_taken_and_given_back(tmp_path):
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before = handlers()
    with md.Checkpointer(tmp_path, {}, {}) as checkpointer:
        signal.raise_signal(signal.SIGTERM)
        assert checkpointer.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):  # asked twice
            signal.raise_signal(signal.SIGINT)
    assert handlers() == before


def test_seconds_add_up_over_sessions(tmp_path, monkeypatch):
    clock = iter([0.0, 5.0, 7.0, 100.0, 110.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    first = md.Checkpointer(tmp_path, {"seconds": 0.0}, {})
    first.save()
    first.save()
    second = md.Checkpointer(tmp_path, {"seconds": 0.0}, {})
    second.restore(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    second.save()
    assert first.progress["seconds"] == 7 and second.progress["seconds"] == 17


def tensorboard(run_dir: Path, tag: str) -> list[int]:
    """The steps at which TensorBoard shows this tag."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "images": 0}).Reload()
    return [event.step for event in (events.Images(tag) if tag.startswith("pictures") else events.Scalars(tag))]


def interrupt_at(monkeypatch, function: str, call: int, stop) -> None:
    original, calls = getattr(md, function), []

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            stop()
        return original(*args, **kwargs)

    monkeypatch.setattr(md, function, wrapper)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_equals_never_stopped(tmp_path, monkeypatch, number, capsys):
    _, whole = run(tiny(tmp_path / "whole"))
    args = tiny(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        interrupt_at(patch, "train_step", 17, lambda: signal.raise_signal(number))
        with pytest.raises(SystemExit) as exit:
            md.main(args)
    assert exit.value.code == 128 + number and "--resume" in capsys.readouterr().err
    run_dir = next(Path(args.log_dir).iterdir())
    assert not (run_dir / "result.json").exists()
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["progress"]["step"] == 17
    md.main(md.parse_args(["--resume", str(run_dir)]))
    assert same(weights(run_dir), weights(whole)) and logged(run_dir) == logged(whole)


@pytest.mark.parametrize(
    "function, call, saved", [("train_step", 17, ("step", 10)), ("collecting", 137, ("size", 270))]
)
def test_killed_and_resumed_equals_never_stopped(tmp_path, monkeypatch, function, call, saved):
    """An exception stands for the kill: nothing may be saved on the way out."""
    _, whole = run(tiny(tmp_path / "whole"))
    args = tiny(tmp_path / "killed", checkpoint_every=10)

    def die():
        raise MemoryError

    with monkeypatch.context() as patch:
        if function == "collecting":
            step = md.VectorEnv.step
            counter = iter(range(10**6))
            patch.setattr(md.VectorEnv, "step", lambda *a: die() if next(counter) == call else step(*a))
        else:
            interrupt_at(patch, function, call, die)
        with pytest.raises(MemoryError):
            md.main(args)
    run_dir = next(Path(args.log_dir).iterdir())
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert {"step": checkpoint["progress"]["step"], "size": len(checkpoint["buffer"]["obs"])}[saved[0]] == saved[1]
    md.main(md.parse_args(["--resume", str(run_dir)]))
    assert same(weights(run_dir), weights(whole)) and logged(run_dir) == logged(whole)


def test_a_process_killed_for_real_resumes_exactly(tmp_path):
    args = tiny(tmp_path, train_steps=3000, eval_every=500, checkpoint_every=100)
    flags = ["--env-id", args.env_id, "--log-dir", args.log_dir, "--no-cuda", "--num-threads", "1", "--num-envs", "2"]
    flags += ["--initial-steps", "600", "--train-steps", "3000", "--eval-every", "500", "--ensemble-size", "2"]
    flags += ["--num-layers", "1", "--hidden-size", "8", "--batch-size", "32", "--checkpoint-every", "100"]
    process = subprocess.Popen([sys.executable, str(ROOT / "mbrl_dynamics.py"), *flags], stderr=subprocess.DEVNULL)

    def step_reached() -> int:
        for path in Path(args.log_dir).glob("*/metrics.csv"):
            steps = [int(row["step"]) for row in csv.DictReader(path.open()) if row["step"].isdigit()]
            return max(steps, default=0)
        return 0

    deadline = time.time() + 60
    while step_reached() < 250 and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run_dir = next(Path(args.log_dir).iterdir())
    assert not (run_dir / "result.json").exists()
    time.sleep(1)  # TensorBoard reads a folder's files in the order of the second they were started in
    md.main(md.parse_args(["--resume", str(run_dir)]))
    _, whole = run(dataclasses.replace(args, log_dir=str(tmp_path / "whole")))
    assert same(weights(run_dir), weights(whole)) and logged(run_dir) == logged(whole)
    assert tensorboard(run_dir, "model/train_loss") == list(range(1, 3001)), "nothing twice, nothing missing"
    assert tensorboard(run_dir, "model/holdout_mse") == list(range(500, 3001, 500))
    assert all(tensorboard(run_dir, f"pictures/{name}") == [3000] for name in ("loss_curve", "predictions"))


def test_a_finished_run_can_be_trained_further(tmp_path):
    _, whole = run(tiny(tmp_path / "whole", train_steps=40))
    _, run_dir = run(tiny(tmp_path / "short", train_steps=30))
    file, unchanged = str(tmp_path / "data.pt"), dataclasses.replace(md.load_args(str(run_dir)), train_steps=40)
    resume = ["--resume", str(run_dir), "--train-steps", "40", "--checkpoint-every", "7", "--save-data", file]
    md.main(md.parse_args(resume))
    assert same(weights(run_dir), weights(whole))
    assert len(torch.load(file, weights_only=True)["obs"]) == 600
    assert md.load_args(str(run_dir)) == dataclasses.replace(unchanged, checkpoint_every=7, save_data=file)


def test_saved_data_trains_the_same_model(tmp_path):
    file = str(tmp_path / "data.pt")
    _, collected = run(tiny(tmp_path / "a", save_data=file))
    _, loaded = run(tiny(tmp_path / "b", data=file))
    assert same(weights(collected), weights(loaded))
    data = torch.load(file, weights_only=True)
    assert data["env_id"] == "Pendulum-v1" and len(data["obs"]) == 600 and len(data["episode"].unique()) == 4
    Path(file).unlink()  # what was read lies in the checkpoint
    assert md.main(md.parse_args(["--resume", str(loaded), "--train-steps", "35"]))
    returns = [data["reward"][data["episode"] == number].sum().item() for number in (0, 1)]  # the finished ones
    charts = {row[1]: float(row[2]) for row in logged(collected) if row[1].startswith("charts")}
    assert charts == pytest.approx({"charts/episodic_return": np.mean(returns), "charts/episodic_length": 200})


def test_steps_are_rounded_up_to_whole_rounds_of_all_environments(tmp_path):
    run(tiny(tmp_path, env_id="Counter-v0", num_envs=7, initial_steps=64, save_data=str(tmp_path / "data.pt")))
    data = torch.load(tmp_path / "data.pt", weights_only=True)
    assert data["obs"][:, 0].tolist() == [step % 5 for step in range(10) for _ in range(7)], "nothing overwritten"


def test_the_saved_model_loads_on_its_own_and_predicts_the_same(tmp_path):
    _, run_dir = run(tiny(tmp_path))
    script = (
        f"import torch, mbrl_dynamics\nmodel = mbrl_dynamics.load_model({str(run_dir / 'model.pt')!r})\n"
        "obs, action = torch.zeros(model.obs_dim), torch.ones(model.action_dim)\n"
        "next_obs, reward, terminated = model.predict(*(x.expand(model.ensemble_size, 1, -1) for x in (obs, action)))\n"
        "print([next_obs.tolist(), reward.tolist(), terminated.tolist()])"
    )
    for line in script.splitlines()[2:4]:
        assert line in (md.__doc__ or ""), "the docstring shows these lines"
    fresh = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    model = md.load_model(run_dir / "model.pt")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    predicted = model.predict(torch.zeros(2, 1, 3), torch.ones(2, 1, 1))
    assert json.loads(fresh.stdout) == [part.tolist() for part in predicted]


def test_known_reward_is_used_where_there_is_one(tmp_path):
    for reward, learned in (("auto", False), ("known", False), ("learned", True)):
        args = tiny(tmp_path / reward, env_id="envs:Obstacles-v0", reward=reward, train_steps=1)
        assert torch.load(run(args)[1] / "model.pt", weights_only=True)["config"]["learn_reward"] is learned
    assert torch.load(run(tiny(tmp_path))[1] / "model.pt", weights_only=True)["config"]["learn_reward"] is True
    half = SimpleNamespace(batch_reward=lambda obs, action, next_obs: 0)
    assert not md.has_known_reward(SimpleNamespace(unwrapped=half)), "it takes both formulas"


def test_divergence_stops_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    def explode():
        with torch.no_grad():
            next(iter(models[0].parameters())).fill_(float("nan"))

    models, make = [], md.make_model
    monkeypatch.setattr(md, "make_model", lambda config: models.append(make(config)) or models[0])
    interrupt_at(monkeypatch, "train_step", 17, explode)
    args = tiny(tmp_path, checkpoint_every=10)
    with pytest.raises(SystemExit) as exit:
        md.main(args)
    run_dir = next(Path(args.log_dir).iterdir())
    message = str(exit.value.code)
    assert "non-finite model/train_loss" in message and str(run_dir / "checkpoint.pt") in message
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert saved["progress"]["step"] == 10 and all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_weights_are_checked_even_if_the_losses_are_finite(tmp_path):
    model = md.Ensemble(**SHAPE, learn_reward=False, skip=0)
    md.check_finite({"model/train_loss": torch.zeros(4)}, model, 3, tmp_path)
    with torch.no_grad():
        model.mlp.biases[1][2] = float("inf")
    with pytest.raises(SystemExit, match=r"non-finite mlp.biases.1 .* step 3; there is no checkpoint yet"):
        md.check_finite({"model/train_loss": torch.zeros(4)}, model, 3, tmp_path)


def test_a_signal_that_comes_after_the_losses_were_left_unread_loses_none(tmp_path, monkeypatch):
    _, whole = run(tiny(tmp_path / "whole"))
    args, update = tiny(tmp_path / "stopped"), md.tqdm.update

    def late(bar, n=1):
        if bar.desc == "train" and bar.n == 16:
            signal.raise_signal(signal.SIGTERM)
        return update(bar, n)

    with monkeypatch.context() as patch:
        patch.setattr(md.tqdm, "update", late)
        with pytest.raises(SystemExit):
            md.main(args)
    run_dir = next(Path(args.log_dir).iterdir())
    md.main(md.parse_args(["--resume", str(run_dir)]))
    assert same(weights(run_dir), weights(whole)) and logged(run_dir) == logged(whole)


def test_a_finished_run_that_goes_on_is_not_finished(tmp_path, monkeypatch):
    _, run_dir = run(tiny(tmp_path))
    interrupt_at(monkeypatch, "train_step", 3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        md.main(md.parse_args(["--resume", str(run_dir), "--train-steps", "60"]))
    assert not (run_dir / "result.json").exists()


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"env_id": "NoSuchEnv-v0"}, "NoSuchEnv"),
        ({"env_id": "no_such_module:Env-v0"}, "no_such_module"),
        ({"env_id": "CartPole-v1"}, "action space must be a Box"),
        ({"env_id": "Blackjack-v1"}, "observation space must be a Box"),
        ({"ensemble_size": 0}, "--ensemble-size must be at least 1"),
        ({"reward": "known"}, "--reward known: Pendulum-v1"),
        ({"initial_steps": 1}, "--initial-steps must be at least 2"),
        ({"weight_decay": -1.0}, "--weight-decay must be at least 0"),
        ({"input_noise": float("inf")}, "--input-noise must be at least 0"),
        ({"input_noise": float("nan")}, "--input-noise must be at least 0"),
        ({"activation": "selu"}, "--activation must be one of tanh, relu, silu"),
        ({"holdout_ratio": 0.0}, "--holdout-ratio"),
        ({"holdout_ratio": 1.0}, "--holdout-ratio"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"learning_rate": float("inf")}, "--learning-rate"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"save_data": "/no/such/folder/data.pt"}, "--save-data"),
        ({"save_data": "."}, "--save-data"),
        ({"log_dir": __file__}, "--log-dir"),
        ({"log_dir": ""}, "--log-dir is empty"),
        ({"seed": 10**20}, "--seed"),
        ({"num_threads": 100_000}, "--num-threads"),
        ({"data": "missing.pt"}, "missing.pt"),
        ({"resume": "missing"}, "--resume missing"),
        ({"track": True}, "pip install wandb"),
    ],
)
def test_bad_arguments(tmp_path, capfd, monkeypatch, changes, words):
    if changes.get("track"):
        find = md.importlib.util.find_spec
        monkeypatch.setattr(md.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    assert words in one_line_error(capfd, lambda: md.main(tiny(tmp_path, **changes)))
    assert not (tmp_path / "runs").exists()


def test_non_finite_observations_are_not_blamed_on_the_learning_rate(tmp_path, capfd, monkeypatch):
    step = Counter.step

    def broken(self, action):
        obs, *rest = step(self, action)
        return np.where([False, self.count == 3], np.nan, obs).astype(np.float32), *rest

    monkeypatch.setattr(Counter, "step", broken)
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        md.main(tiny(tmp_path, env_id="Counter-v0", save_data=str(tmp_path / "data.pt")))
    assert exit.value.code == 2 and "Counter-v0: obs has 120 non-finite values" in capfd.readouterr().err
    assert not (tmp_path / "data.pt").exists()


def test_a_torn_metrics_file_does_not_stop_a_resume(tmp_path):
    _, whole = run(tiny(tmp_path / "whole", train_steps=40))
    _, run_dir = run(tiny(tmp_path / "torn"))
    with (run_dir / "metrics.csv").open("a") as file:
        file.write("31,model/tr")
    md.main(md.parse_args(["--resume", str(run_dir), "--train-steps", "40"]))
    assert set(logged(whole)) <= set(logged(run_dir)) and "model/tr" not in {row[1] for row in logged(run_dir)}


def test_weight_decay_spares_biases_and_bounds():
    model = md.GaussianEnsemble(**SHAPE, learn_reward=False, skip=0)
    optimizer = md.make_optimizer(model, 1e-3, 0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.1 if name.startswith("mlp.weights") else 0), name


def test_a_task_is_the_same_by_any_of_its_names():
    for name in ("HalfCheetah-v5", "gymnasium:HalfCheetah-v5"):
        env = md.make_env(name)
        assert md.hidden_positions(env) == 1 and env.observation_space.shape == (18,)


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda data: data["obs"].__setitem__((5, 2), float("nan")),
            "obs has 1 non-finite values, the first in row 5, dimension 2",
        ),
        (
            lambda data: data["reward"].__setitem__(7, float("inf")),
            "reward has 1 non-finite values, the first in row 7",
        ),
        (lambda data: data.update(env_id="Hopper-v5"), "is from Hopper-v5, not from Pendulum-v1"),
        (
            lambda data: data.update(obs=data["obs"][:, :2], next_obs=data["obs"][:, :2]),
            "obs is not a tensor of shape (20, 3)",
        ),
        (lambda data: data.update(action=data["action"][:5]), "action is not a tensor of shape (20, 1)"),
        (lambda data: data.update({name: data[name][:0] for name in md.COLUMNS}), "0 transitions"),
        (lambda data: data.pop("reward"), "not a file written by --save-data"),
    ],
)
def test_bad_data(tmp_path, capfd, damage, words):
    buffer = md.ReplayBuffer(20, 3, 1, CPU)
    buffer.add(obs=np.random.rand(20, 3), **{name: np.zeros((20, *tail)) for name, tail in
               dict(action=(1,), next_obs=(3,), reward=(), terminated=(), episode=()).items()})  # fmt: skip
    data = {"env_id": "Pendulum-v1", **buffer.state_dict()}
    damage(data)
    torch.save(data, tmp_path / "data.pt")
    assert words in one_line_error(capfd, lambda: md.main(tiny(tmp_path, data=str(tmp_path / "data.pt"))))
    (tmp_path / "data.pt").write_bytes(b"not a torch file")
    words = "not a file written by --save-data"
    assert words in one_line_error(capfd, lambda: md.main(tiny(tmp_path, data=str(tmp_path / "data.pt"))))
    assert not (tmp_path / "runs").exists()


def test_bad_checkpoints(tmp_path, capfd):
    _, run_dir = run(tiny(tmp_path))
    before = sorted((path.name, path.read_bytes()) for path in run_dir.iterdir())
    resume = ["--resume", str(run_dir)]
    shorter = [*resume, "--train-steps", "20"]
    assert "already trained 30" in one_line_error(capfd, lambda: md.main(md.parse_args(shorter)))
    assert "--seed was 1" in one_line_error(capfd, lambda: md.main(md.parse_args([*resume, "--seed", "2"])))
    assert "--hidden-size was 8" in one_line_error(
        capfd, lambda: md.main(md.parse_args([*resume, "--hidden-size", "9"]))
    )
    assert sorted((path.name, path.read_bytes()) for path in run_dir.iterdir()) == before, "nothing half-written"
    checkpoint = run_dir / "checkpoint.pt"
    torch.save({"script": "a2c"}, checkpoint)
    assert "written by a2c.py" in one_line_error(capfd, lambda: md.main(md.parse_args(resume)))
    torch.save({"script": Path("code")}, checkpoint)  # a pickle that could run any code is not even opened
    assert "not a checkpoint" in one_line_error(capfd, lambda: md.main(md.parse_args(resume)))
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    assert "not a checkpoint" in one_line_error(capfd, lambda: md.main(md.parse_args(resume)))
    checkpoint.unlink()
    assert "no checkpoint.pt" in one_line_error(capfd, lambda: md.main(md.parse_args(resume)))
    (run_dir / "args.json").write_text("{}{")
    assert "args.json" in one_line_error(capfd, lambda: md.parse_args(resume))


# ------------------------------------------------------------------------------------------------------------- angles


@pytest.mark.parametrize(
    "env_id, angles",
    [
        ("HalfCheetah-v5", [2]),
        ("Swimmer-v5", [2]),
        ("Ant-v5", []),
        ("Pusher-v5", []),
        ("InvertedPendulum-v5", []),
        ("InvertedDoublePendulum-v5", []),  # its observation holds sines already
        ("Pendulum-v1", []),
        ("envs:PostureCheetah-v0", [2]),
        ("envs:Reacher7DoF-v0", []),
        ("envs:Obstacles-v0", []),
    ],
)
def test_angles_that_turn_without_limit(env_id, angles):
    env = md.make_env(env_id)
    assert md.free_angles(env, np.zeros(99)) == [], "before a reset sines and angles are all 0"
    obs, _ = env.reset(seed=0)
    assert md.free_angles(env, obs.astype(np.float32)) == angles
    assert md.free_angles(env, 2 * obs) == [], "a wrapper shows something else"
    for angle in angles:
        assert obs[angle] == env.unwrapped.data.qpos[angle]


def test_a_full_turn_changes_nothing_and_half_a_turn_does():
    torch.manual_seed(0)
    shape = dict(ensemble_size=2, num_layers=1, hidden_size=8, activation="tanh", learn_reward=False)
    model = md.Ensemble(5, 2, **shape, skip=1, angles=[2])
    obs, action = torch.randn(2, 7, 5), torch.randn(2, 7, 2)
    inputs = model.inputs(obs, action)
    expected = [obs[..., 1:2], obs[..., 3:], obs[..., 2:3].sin(), obs[..., 2:3].cos(), action]
    torch.testing.assert_close(inputs, torch.cat(expected, dim=-1))
    turn = torch.tensor([3.0, 0, 2 * torch.pi, 0, 0])  # nor does where it is
    change = model.predict(obs, action)[0] - obs
    torch.testing.assert_close(model.predict(obs + turn, action)[0] - obs - turn, change, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model.predict(obs + turn / 2, action)[0] - obs - turn / 2, change, atol=1e-2)
    plain = md.Ensemble(5, 2, **shape, skip=1)
    torch.testing.assert_close(plain.inputs(obs, action), torch.cat([obs[..., 1:], action], dim=-1))


def test_a_run_wraps_angles_unless_told_not_to(tmp_path):
    for wrap in (True, False):
        args = md.Args(env_id="HalfCheetah-v5", log_dir=str(tmp_path / str(wrap)), wrap_angles=wrap)
        args.initial_steps, args.train_steps, args.hidden_size, args.cuda = 2_100, 2, 8, False
        md.main(args)
        model = md.load_model(next(Path(args.log_dir).iterdir()) / "model.pt")
        assert model.angles == ([2] if wrap else []) and model.mlp.weights[0].shape[1] == 17 + 6 + wrap


def test_an_action_is_stored_as_it_was_done():
    """In the space's own precision, so that replaying it is doing it again."""
    done = []
    env = md.Replayable(md.make_env("Pendulum-v1"))
    step = env.env.step
    env.env.step = lambda action: done.append(action) or step(action)
    env.reset(seed=0)
    env.step(np.array([0.1], np.float64))
    assert done[0].dtype == env.actions[0].dtype == np.float32 and env.actions[0] == np.float32(0.1)


def test_where_nobody_can_tell_there_are_no_free_angles():
    env = gym.make("InvertedDoublePendulum-v5")
    env.reset(seed=0)
    assert md.free_angles(env, np.zeros(2)) == [], "an observation shorter than the positions"
    positions = env.unwrapped.data.qpos.copy()
    for name, value in {"model": object(), "data": [1, 2]}.items():  # what an environment of another kind calls so
        setattr(env.unwrapped, name, value)
        assert md.free_angles(env, positions) == []
