"""The planners: plans against slow references, formulas against the simulator, runs. Particles: test_pets.py."""

import csv
import dataclasses
import functools
import json
import signal
import statistics
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import mpc_cem as cem
import mpc_random_shooting as rs
import pets

SCRIPTS = [rs, cem, pets]
TINY = dict(num_envs=2, initial_steps=60, steps_per_iteration=20, num_iterations=2, train_steps=10, eval_every=20)
TINY |= dict(num_layers=1, hidden_size=8, batch_size=32, horizon=4, num_candidates=20, eval_episodes=2)
TINY |= dict(
    ensemble_size=2, interim_episodes=1, max_episode_steps=15, num_threads=1, cuda=False, planner_dtype="float32"
)


def tiny(script, tmp_path: Path, **changes: object):
    few = {rs: {}, cem: {"num_elites": 4}, pets: {"num_elites": 4, "num_particles": 2}}[script]
    return script.Args(**({"env_id": "Pendulum-v1", "log_dir": str(tmp_path / "runs")} | TINY | few | changes))


def run(script, args) -> tuple[dict[str, float], Path]:
    result = script.main(args)
    return result, Path(args.resume) if args.resume else sorted(Path(args.log_dir).iterdir())[-1]


def logged(run_dir: Path) -> list[tuple[str, ...]]:
    rows = [tuple(row) for row in csv.reader((run_dir / "metrics.csv").open())]
    return sorted(row for row in rows if not row[1].startswith(("time/", "charts/SPS")))


def model_state(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)["model"]


# ---------------------------------------------------------------------------------------------------------- formulas

FORMULAS = ["HalfCheetah", "Swimmer", "Hopper", "Walker2d", "Ant", "Reacher", "Pusher", "InvertedPendulum"]


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_pay_what_the_simulator_pays(name):
    """1,000 real steps, with torques that also make the walkers fall."""
    env = rs.make_env(f"{name}-v5")
    formulas = rs.known_formulas(env)
    assert formulas is not None
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    steps, falls = [], 0
    for _ in range(1000):
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        steps.append((obs, action, next_obs, reward, terminated))
        falls += terminated
        obs = env.reset()[0] if terminated or truncated else next_obs
    columns = [torch.as_tensor(np.array(column), dtype=torch.float64) for column in zip(*steps, strict=True)]
    obs, action, next_obs, reward, terminated = columns
    # Ant is paid for the torso's position as it was before the last substep, which lags behind the joints'.
    mean_off, most_off = (0.02, 0.3) if name == "Ant" else (1e-6, 1e-5)
    off = (formulas[0](obs, action, next_obs) - reward).abs()
    assert off.mean() < mean_off and off.max() < most_off
    assert torch.equal(formulas[1](next_obs).double(), terminated)
    assert falls > 10 or name in ("HalfCheetah", "Swimmer", "Reacher", "Pusher", "Ant")


def test_ant_pays_for_its_contacts():
    """The term alone, exactly: it is too small beside the lag of the torso's position to be seen in the reward."""
    env = rs.make_env("Ant-v5")
    formulas = rs.known_formulas(env)
    assert formulas is not None
    env.action_space.seed(1)
    obs, _ = env.reset(seed=1)
    costs = []
    for _ in range(200):
        action = env.action_space.sample()
        next_obs, _, terminated, truncated, info = env.step(action)
        without = next_obs.copy()
        without[29:] = 0  # after 15 positions and 14 velocities come the contact forces
        paid, free = (formulas[0](*(torch.as_tensor(x) for x in (obs, action, end))) for end in (next_obs, without))
        assert (paid - free).item() == pytest.approx(info["reward_contact"], abs=1e-6)
        costs.append(-info["reward_contact"])
        obs = env.reset()[0] if terminated or truncated else next_obs
    assert max(costs) > 1e-3


def test_weights_are_read_from_the_environment():
    env = gym.make(
        "Hopper-v5", exclude_current_positions_from_observation=False, healthy_reward=7.0, ctrl_cost_weight=1.0
    )
    env.reset(seed=0)
    obs, action = torch.zeros(12, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    obs[1] = 1.2
    assert rs.known_formulas(env)[0](obs, action, obs).item() == pytest.approx(7.0 - 3.0)
    assert not rs.known_formulas(env)[1](obs)
    obs[-1] = 150.0  # the environment, too, ends where any part of its state is beyond 100
    assert rs.known_formulas(env)[1](obs) and rs.known_formulas(env)[0](obs, action, obs).item() == -3.0


def test_a_hopper_that_may_lie_down_is_still_paid_for_standing():
    env = gym.make("Hopper-v5", exclude_current_positions_from_observation=False, terminate_when_unhealthy=False)
    obs, _ = env.reset(seed=0)
    env.action_space.seed(0)
    reward, over = rs.known_formulas(env)
    paid = set()
    for _ in range(60):
        action = env.action_space.sample()
        next_obs, expected, terminated, _, info = env.step(action)
        step = [torch.as_tensor(each, dtype=torch.float64) for each in (obs, action, next_obs)]
        assert reward(*step).item() == pytest.approx(float(expected), abs=1e-6) and not terminated and not over(step[2])
        paid.add(info["reward_survive"])
        obs = next_obs
    assert paid == {0.0, 1.0}


def test_an_environment_without_formulas_is_learned():
    assert rs.known_formulas(rs.make_env("Pendulum-v1")) is None
    assert rs.known_formulas(rs.make_env("Humanoid-v5")) is None
    assert rs.known_formulas(rs.make_env("envs:Obstacles-v0")) is not None


# ------------------------------------------------------------------------------------------------------------- plans

B, K, H, D, A = 3, 5, 4, 3, 2
LOW, HIGH = torch.tensor([-1.0, 0.5]), torch.tensor([0.0, 2.0])


def toy_reward(obs, action, next_obs):
    return next_obs.sum(-1) - action.square().sum(-1)


def toy_terminated(next_obs):
    return next_obs[..., 0] > 0.3


@pytest.mark.parametrize("script, own", [(rs, False), (cem, False), (cem, True)])
@pytest.mark.parametrize("learned, states", [(False, 4096), (True, 4096), (False, 16), (True, 1)])
def test_imagined_returns_equal_a_loop_over_environments_members_and_candidates(
    script, own, learned, states, monkeypatch
):
    monkeypatch.setattr(script, "CACHED_STATES", states)  # also in groups of four candidates, and one by one
    torch.manual_seed(0)
    model = script.Ensemble(D, A, 4, 2, 16, "tanh", learned, 0)
    model.target_normaliser.std.fill_(0.5)
    formulas = None if learned else (toy_reward, toy_terminated)
    obs, candidates = torch.randn(B, D) * 0.3, torch.randn(B, K, H, A)
    if own:
        mine = script.Ensemble(D, A, B, 2, 16, "tanh", learned, 0)
        mine.target_normaliser = model.target_normaliser
        script.take_members(mine, model, torch.tensor([2, 0, 3]))
        fast = script.imagined_returns(mine, formulas, 0.9, obs, candidates, own=True)
    else:
        fast = script.imagined_returns(model, formulas, 0.9, obs, candidates)
    ends = 0
    for b in range(B):
        for k in range(K):
            returns = []
            for member in [(2, 0, 3)[b]] if own else range(4):
                state, total, alive = obs[b], 0.0, 1.0
                for t in range(H):
                    action = candidates[b, k, t]
                    inputs = (state.expand(4, 1, -1), action.expand(4, 1, -1))
                    next_state, reward, over = (
                        part[member, 0] if part is not None else None for part in model.predict(*inputs)
                    )
                    if not learned:
                        reward, over = toy_reward(state, action, next_state), toy_terminated(next_state)
                    total = total + alive * 0.9**t * reward
                    state, alive = next_state, alive * (1 - float(over))
                ends += 1 - alive
                returns.append(total)
            torch.testing.assert_close(fast[b, k], sum(returns) / len(returns))
    assert 0 < ends < B * K * 4


def test_the_best_candidate_wins_and_nonsense_never_does():
    torch.manual_seed(0)
    seen = []

    def imagine(obs, candidates):
        seen.append(candidates)
        returns = candidates[..., 0, 0].clone()
        returns[:, 0], returns[:, 1] = torch.nan, torch.inf
        return returns

    action, promise = rs.plan(imagine, torch.zeros(B, D), LOW, HIGH, 50, H)
    assert torch.equal(action[:, 0], seen[0][:, 2:, 0, 0].max(dim=1).values) and torch.equal(promise, action[:, 0])
    assert (seen[0] >= LOW).all() and (seen[0] <= HIGH).all() and seen[0].shape == (B, 50, H, A)


def test_all_environments_are_planned_for_on_their_own():
    """Each environment wants another action; one call finds them all."""
    torch.manual_seed(0)
    wanted = torch.tensor([[-0.9, 0.6], [-0.5, 1.0], [-0.1, 1.9]])
    imagine = lambda obs, candidates: -(candidates - obs[:, None, None]).square().sum((-1, -2))  # noqa: E731
    args = cem.Args(horizon=H, num_candidates=200, cem_iterations=8, num_elites=10, noise_beta=0.0)
    planner = cem.Planner(args, imagine, LOW, HIGH, B)
    torch.testing.assert_close(planner(wanted)[0], wanted, atol=0.05, rtol=0)


def quadratic(obs, candidates):
    """s' = s + a (two dimensions), reward -|s'|² - 0.1|a|², from s = (2, -1): a linear-quadratic system."""
    state, total = obs[:, None], 0.0
    for t in range(candidates.shape[2]):
        state = state + candidates[:, :, t]
        total = total - state.square().sum(-1) - 0.1 * candidates[:, :, t].square().sum(-1)
    return total


def best_return(horizon: int) -> tuple[float, float]:
    """By the Riccati recursion: cost x² p, from the last step back; and the optimal first gain."""
    p, gain = 0.0, 0.0
    for _ in range(horizon):
        gain = (1 + p) / (1 + p + 0.1)
        p = (1 + p) * (1 - gain) ** 2 + 0.1 * gain**2
    return -p * (2**2 + 1**2), gain


def test_cem_reaches_the_optimum_and_beats_random_shooting_which_beats_chance():
    torch.manual_seed(0)
    horizon, low, high, obs = 6, -3 * torch.ones(2), 3 * torch.ones(2), torch.tensor([[2.0, -1.0]])
    best, gain = best_return(horizon)
    args = cem.Args(horizon=horizon, num_candidates=500, cem_iterations=15, num_elites=20, noise_beta=0.0)
    args.candidate_decay, args.execute = 1.0, "best"
    action, promise = cem.Planner(args, quadratic, low, high, 1)(obs)
    _, shot = rs.plan(quadratic, obs, low, high, 500, horizon)
    chance = quadratic(obs, low + (high - low) * torch.rand(1, 500, horizon, 2)).mean()
    assert best - 0.05 < promise.item() <= best + 1e-4
    torch.testing.assert_close(action, -gain * obs, atol=0.05, rtol=0)
    assert chance + 10 < shot.item() < promise.item() - 1


def slow_cem(imagine, b, obs, mean, kept, args, draws):
    """The docstring's equations for environment b alone, one candidate and one number at a time."""
    half = (HIGH - LOW) / 2
    uniform = args.start == "uniform"
    std = [[half[a].item() * (3**-0.5 if uniform else args.start_std) for a in range(A)] for _ in range(H)]
    kept = list(kept[b])
    mean = mean[b].clone()
    for iteration in range(args.cem_iterations):
        candidates = []
        for noise in draws[iteration][b]:  # (H, A)
            plan = torch.empty(H, A)
            for t in range(H):
                for a in range(A):
                    if uniform and iteration == 0:
                        plan[t, a] = LOW[a] + (HIGH[a] - LOW[a]) * noise[t, a]
                        continue
                    spread, epsilon = std[t][a], noise[t, a].item()
                    if args.bounded_sampling:
                        to_bounds = min((mean[t, a] - LOW[a]).item(), (HIGH[a] - mean[t, a]).item())
                        spread = min(spread, to_bounds / 2)
                        normal = statistics.NormalDist()
                        share = normal.cdf(-2) + (normal.cdf(2) - normal.cdf(-2)) * normal.cdf(epsilon)
                        epsilon = normal.inv_cdf(share)
                    plan[t, a] = mean[t, a].item() + spread * epsilon
            candidates.append(plan)
        candidates += kept
        if args.mean_candidate and iteration == args.cem_iterations - 1:
            candidates.append(mean.clone())
        tried = [torch.minimum(torch.maximum(plan, LOW), HIGH) for plan in candidates]
        returns = [imagine(obs[b : b + 1], plan[None, None])[0, 0].item() for plan in tried]
        order = sorted(range(len(candidates)), key=lambda k: -returns[k])[: args.num_elites]
        elites = torch.stack([candidates[k] for k in order])
        for t in range(H):
            for a in range(A):
                values = elites[:, t, a]
                variance = ((values - values.mean()) ** 2).sum().item() / (len(values) - 1)
                std[t][a] = (args.cem_alpha * variance + (1 - args.cem_alpha) * std[t][a] ** 2) ** 0.5
                wanted = (args.cem_alpha * values.mean() + (1 - args.cem_alpha) * mean[t, a]).item()
                mean[t, a] = min(max(wanted, LOW[a].item()), HIGH[a].item())
        kept = list(elites[: round(args.keep_elites * args.num_elites)])
    promises = [returns[k] for k in order]
    if args.execute == "mean":
        return mean[0], sum(promises) / len(promises), mean, elites
    return tried[order[0]][0], promises[0], mean, elites


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"start": "uniform", "shift_plan": False, "cem_alpha": 1.0, "keep_elites": 0.0, "mean_candidate": False},
        {"bounded_sampling": True, "execute": "best", "start_std": 1.5, "noise_beta": 0.0},
        {"cem_alpha": 0.3, "candidate_decay": 2.0, "keep_elites": 1.0, "cem_iterations": 2},
    ],
)
def test_cem_is_the_equations_of_the_docstring(flags):
    args = cem.Args(horizon=H, num_candidates=14, num_elites=4, cem_iterations=3)
    vars(args).update(flags)
    torch.manual_seed(0)
    goal = LOW + (HIGH - LOW) * (1.4 * torch.rand(H, A) - 0.2)  # some of it out of reach
    imagine = lambda obs, plans: obs.sum(1)[:, None] - (plans - goal).square().sum((-1, -2))  # noqa: E731
    obs, mean = torch.randn(B, D), (LOW + HIGH) / 2 + 0.1 * torch.randn(B, H, A)
    kept = LOW + (HIGH - LOW) * torch.rand(B, round(args.keep_elites * 4), H, A)
    torch.manual_seed(1)
    action, promise, plan, elites, spread = cem.cem(imagine, obs, mean, kept, LOW, HIGH, args)
    torch.manual_seed(1)
    filter, draws = cem.coloured_filter(H, args.noise_beta, torch.device("cpu")), []
    for iteration in range(args.cem_iterations):
        count = max(int(14 / args.candidate_decay**iteration), 8)
        if iteration == 0 and args.start == "uniform":
            draws.append(torch.rand(B, count, H, A))
        else:
            draws.append((torch.randn(B, count, A, H) @ filter).transpose(-1, -2))
    for b in range(B):
        slow_action, slow_promise, slow_plan, slow_elites = slow_cem(imagine, b, obs, mean, kept, args, draws)
        torch.testing.assert_close(action[b], slow_action)
        assert promise[b].item() == pytest.approx(slow_promise, rel=1e-4)
        torch.testing.assert_close(plan[b], slow_plan)
        torch.testing.assert_close(elites[b], slow_elites)
    half = (HIGH - LOW) / 2
    assert spread.item() == pytest.approx((elites.std(1) / half).mean().item(), rel=1e-4)


def test_alpha_one_forgets_the_prior_and_a_small_alpha_does_not():
    prior = (LOW + 0.3).expand(1, H, A)
    imagine = lambda obs, candidates: candidates.sum((-1, -2))  # noqa: E731
    found = {}
    for alpha in (1.0, 0.1):
        args = cem.Args(
            horizon=H, cem_alpha=alpha, cem_iterations=1, num_elites=5, mean_candidate=False, noise_beta=0.0
        )
        torch.manual_seed(0)
        _, _, mean, elites, _ = cem.cem(imagine, torch.zeros(1, D), prior, prior[:, None][:, :0], LOW, HIGH, args)
        found[alpha] = mean
        torch.testing.assert_close(mean, (alpha * elites.mean(1) + (1 - alpha) * prior).clamp(LOW, HIGH))
    assert (found[0.1] - prior).abs().max() < 0.2 < (found[1.0] - prior).abs().max()


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_coloured_noise_has_its_spectrum_and_unit_variance(beta):
    torch.manual_seed(0)
    noise = torch.randn(20_000, 16) @ cem.coloured_filter(16, beta, torch.device("cpu"))
    torch.testing.assert_close(noise.std(0), torch.ones(16), atol=0.03, rtol=0)
    power = torch.fft.rfft(noise).abs().square().mean(0)[1:]  # frequencies 1/16 .. 8/16
    expected = torch.arange(1, 9) ** -beta
    torch.testing.assert_close(power / power[0], expected, atol=0.03, rtol=0.1)


def test_plan_and_elites_are_shifted_and_forgotten_at_the_end_of_an_episode():
    starts = []

    def search(imagine, obs, mean, kept, low, high, args):
        starts.append((mean.clone(), kept.clone()))
        plan = torch.arange(H).float()[:, None].expand(2, H, A)
        return obs[:, :A], obs[:, 0], plan, plan[:, None].expand(-1, 10, -1, -1) + 100, torch.zeros(())

    planner = cem.Planner(cem.Args(horizon=H, keep_elites=0.3), quadratic, LOW, HIGH, 2)
    planner.search = search
    middle = (LOW + HIGH) / 2
    planner(torch.zeros(2, D))
    planner(torch.zeros(2, D))
    planner.reset(np.array([False, True]))
    planner(torch.zeros(2, D))
    (first, first_kept), (second, second_kept), (third, third_kept) = starts
    assert (first == middle).all() and (first_kept == middle).all()
    assert second[0, :, 0].tolist() == [1, 2, 3, 3] and second_kept[0, 2, :, 0].tolist() == [101, 102, 103, 103]
    assert second_kept.shape[1] == 3
    assert torch.equal(third[0], second[0]) and (third[1] == middle).all() and (third_kept[1] == middle).all()
    planner = cem.Planner(cem.Args(horizon=H, shift_plan=False), quadratic, LOW, HIGH, 2)
    planner.search = search
    starts.clear()
    planner(torch.zeros(2, D))
    planner(torch.zeros(2, D))
    assert (starts[1][0] == middle).all(), "it starts from the middle each time"


@pytest.mark.parametrize("flags", [{}, {"bounded_sampling": True}, {"start": "uniform", "shift_plan": False}])
def test_actions_stay_within_asymmetric_bounds(flags):
    torch.manual_seed(0)
    seen = []
    imagine = lambda obs, candidates: seen.append(candidates) or candidates.sum((-1, -2))  # noqa: E731
    planner = cem.Planner(cem.Args(horizon=H, **flags), imagine, LOW, HIGH, B)
    for _ in range(3):
        action, _ = planner(torch.zeros(B, D))
        assert (action >= LOW).all() and (action <= HIGH).all()
    for candidates in seen:
        assert (candidates >= LOW - 1e-6).all() and (candidates <= HIGH + 1e-6).all()
    sizes = [candidates.shape[1] for candidates in seen[-4:]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1], "the population decays"


@pytest.mark.parametrize("execute", ["mean", "best"])
def test_what_is_executed(execute):
    args = cem.Args(horizon=H, execute=execute, cem_iterations=1, num_elites=5, cem_alpha=1.0)
    imagine = lambda obs, candidates: candidates.sum((-1, -2))  # noqa: E731
    torch.manual_seed(0)
    start = torch.zeros(1, H, A)
    action, _, mean, elites, _ = cem.cem(imagine, start[:, 0], start, start[:, None], LOW, HIGH, args)
    assert torch.equal(action, mean[:, 0] if execute == "mean" else elites[:, 0, 0].clamp(LOW, HIGH))
    assert not torch.equal(mean[:, 0], elites[:, 0, 0])


@pytest.mark.parametrize("activation", ["tanh", "relu", "silu"])
def test_the_planners_copy_is_the_same_model(activation):
    """Exactly in float32 (where tanh becomes a sigmoid), nearly in bfloat16, and after every fit."""
    torch.manual_seed(0)
    model = rs.Ensemble(D, A, 3, 2, 64, activation, False, 0)
    obs, candidates = torch.randn(B, D), torch.randn(B, 200, H, A)
    exact, rough = rs.planning_copy(model, "float32"), rs.planning_copy(model, "bfloat16")
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    returns = []
    for copy in (model, exact, rough):
        if copy is not model:
            rs.refresh(copy, model)
        returns.append(rs.imagined_returns(copy, (toy_reward, lambda s: s[..., 0] > 1e9), 1.0, obs, candidates))
    torch.testing.assert_close(returns[1], returns[0], atol=1e-4, rtol=1e-4)
    assert returns[2].dtype == torch.float32 and not torch.equal(returns[2], returns[0])
    for one, two in zip(returns[0].detach(), returns[2], strict=True):
        assert np.corrcoef(one, two)[0, 1] > 0.999


def test_true_dynamics_predict_what_the_simulator_does():
    """The return of one candidate, from the middle of an episode, against stepping a copy of the environment."""
    envs = cem.VectorEnv("HalfCheetah-v5", 2, seed=0)
    for _ in range(5):
        envs.step(envs.random_action())
    formulas = cem.known_formulas(envs.envs[0])
    candidates = torch.from_numpy(np.stack([[envs.random_action() for _ in range(6)] for _ in range(3)])).transpose(
        1, 2
    )
    candidates = candidates.transpose(0, 1)  # (B, K, H, A)
    returns = cem.simulated_returns(envs, formulas, 1.0, torch.from_numpy(envs.obs), candidates)
    for b in range(2):
        for k in range(3):
            copy = cem.VectorEnv("HalfCheetah-v5", 2, seed=9)
            copy.load_state_dict(envs.state_dict())
            paid = sum(copy.envs[b].step(action.numpy())[1] for action in candidates[b, k])
            assert returns[b, k].item() == pytest.approx(paid, abs=0.02)


# ------------------------------------------------------------------------------------------- the value of a plan's end


def filled_value(steps: int = 0, num_values: int = 1, unit: float = 1.0) -> tuple[cem.Value, cem.ReplayBuffer]:
    """A corridor 0, 1, 2, 3: each step pays 5 plus the place that it leaves; the one from 3 ends it."""
    torch.manual_seed(0)
    model = cem.Ensemble(1, 1, 2, 1, 8, "tanh", False, 0)
    value = cem.Value(model, num_values, 16, "tanh", gamma=0.8)
    buffer = cem.ReplayBuffer(40, 1, 1, torch.device("cpu"))
    place = np.tile(np.arange(4.0), 10)
    buffer.add(
        obs=place[:, None], action=0 * place[:, None], next_obs=place[:, None] + 1, reward=unit * (5 + place),
        terminated=place == 3, episode=np.repeat(np.arange(10), 4),
    )  # fmt: skip
    value.begin_anew(buffer)
    optimizer = torch.optim.Adam(value.parameters(), 1e-2)
    data = value.data(buffer)
    for _ in range(steps):
        cem.value_step(value, optimizer, data, 40)
    return value, buffer


def test_the_value_becomes_the_discounted_sum_of_what_follows():
    value, _ = filled_value(steps=1500)
    expected = [5 + 0.8 * (6 + 0.8 * (7 + 0.8 * 8)), 6 + 0.8 * (7 + 0.8 * 8), 7 + 0.8 * 8, 8.0]
    found = value(torch.arange(4.0).view(2, 2, 1))  # any leading shape
    torch.testing.assert_close(found, torch.tensor(expected).view(2, 2), atol=0.15, rtol=0)


def test_values_learn_as_fast_whatever_the_unit_of_the_reward():
    places = torch.arange(4.0)[:, None]
    usual, _ = filled_value(steps=200)
    for unit in (1e-3, 1e3):
        value, _ = filled_value(steps=200, unit=unit)
        torch.testing.assert_close(value(places) / unit, usual(places), rtol=1e-3, atol=0)
    fresh, buffer = filled_value()
    usual, spread = buffer.reward.mean() / (1 - 0.8), buffer.reward.std() / (1 - 0.8)
    assert (fresh(places) - usual).abs().max() < spread, "a V that has seen nothing promises the mean reward for ever"


def test_of_several_values_each_learns_by_itself_and_the_least_counts():
    value, buffer = filled_value(steps=100, num_values=3)
    places = torch.linspace(-4, 8, 25)[:, None]  # most of them were never seen
    alone = []
    for v in range(3):
        one, _ = filled_value()
        one.load_state_dict(
            {name: t[v : v + 1] if name.startswith(("mlp", "slow")) else t for name, t in value.state_dict().items()}
        )
        alone.append(one(places))
    assert len({member.argmin().item() for member in torch.stack(alone, dim=1)}) > 1, "each is the least somewhere"
    torch.testing.assert_close(value(places), torch.stack(alone).amin(dim=0))

    with torch.no_grad():
        value.slow.biases[-1][1] += 7  # what the second promises concerns the targets of the second alone
    data = {name: column.expand(3, -1, -1) for name, column in value.data(buffer).items()}
    value.loss(**data).backward()
    moved = [value.mlp.biases[-1].grad[v].abs().item() for v in range(3)]
    assert moved[1] > 10 * max(moved[0], moved[2]), moved


def test_one_step_of_the_value_moves_its_network_and_its_running_mean_a_little():
    value, buffer = filled_value()
    before = {name: tensor.clone() for name, tensor in value.state_dict().items()}
    cem.value_step(value, torch.optim.Adam(value.parameters(), 1e-2), value.data(buffer), 40)
    after = value.state_dict()
    for name, tensor in before.items():
        if name.startswith("slow"):
            expected = tensor.lerp(after[name.replace("slow", "mlp")], 0.1)
            torch.testing.assert_close(after[name], expected)
            assert not torch.equal(after[name], tensor)
        else:
            assert torch.equal(after[name], tensor) != name.startswith("mlp")


def test_a_value_promises_no_more_than_can_be_earned():
    value, buffer = filled_value()
    places = torch.linspace(-1, 4, 6)[:, None]
    for unit, best in ((5, 5 * 8 / (1 - 0.8)), (-5, 0)):  # an episode that has ended is worth 0: nothing is worth less
        buffer.reward[:] = unit * (5 + buffer.obs[:, 0])
        value.begin_anew(buffer)
        with torch.no_grad():
            value.slow.biases[-1].add_(1e3)
        torch.testing.assert_close(value(places), torch.full((6,), float(best)))


def test_a_value_is_learned_anew_with_each_model(tmp_path, monkeypatch):
    """All that was learned is forgotten, and Adam's averages with it; but not in the middle of a fit."""
    args, places = cem.Args(log_dir=str(tmp_path), train_steps=3, batch_size=8), torch.arange(4.0)[:, None]
    value, buffer = filled_value(steps=500)
    model, optimizer = cem.Ensemble(1, 1, 2, 1, 8, "tanh", False, 0), torch.optim.Adam(value.mlp.parameters(), 1e-2)
    cem.value_step(value, optimizer, value.data(buffer), 40)
    learned, value_step, seen = value(places), cem.value_step, []

    def watched(value, optimizer, *rest):
        seen.append((value(places).detach(), len(optimizer.state)))
        return value_step(value, optimizer, *rest)

    monkeypatch.setattr(cem, "value_step", watched)
    checkpointer = cem.Checkpointer(tmp_path, {"fit_step": 2}, {})  # two of its three steps are done
    fit = (args, model, cem.make_optimizer(model, 1e-3, 0), value, optimizer, buffer, cem.Logger(tmp_path, args))
    monkeypatch.setattr(cem.Checkpointer, "save", lambda self: None)
    cem.fit_model(*fit, checkpointer)
    assert len(seen) == 1 and torch.equal(seen[0][0], learned) and seen[0][1] > 0
    checkpointer.progress["fit_step"] = 0
    cem.fit_model(*fit, checkpointer)
    assert len(seen) == 4 and seen[1][1] == 0 and (seen[1][0] - learned).abs().max() > 1, seen
    assert all(state > 0 for _, state in seen[2:])


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Walker2d-v5"])
def test_the_simulator_shows_the_value_what_the_environment_shows(env_id):
    """Joints that turn faster than 10 rad/s are observed as 10."""
    envs = cem.VectorEnv(env_id, 1, seed=0)
    formulas, shown = cem.known_formulas(envs.envs[0]), []
    plan = torch.ones(2, *envs.action_space.shape)
    envs.envs[0].unwrapped.data.qvel[2] = 30  # falls over fast
    worth = lambda state: shown.append(state) or state[..., 0]  # noqa: E731
    cem.simulated_returns(envs, formulas, 0.9, torch.from_numpy(envs.obs), plan[None, None], worth)
    for action in plan:
        obs = envs.envs[0].step(action.numpy())[0]
    assert np.abs(envs.envs[0].unwrapped.data.qvel).max() > 10 and np.abs(shown[0].numpy() - obs).max() < 1e-4


@pytest.mark.parametrize("true", [False, True])
def test_a_plan_is_paid_the_value_of_its_end_unless_it_has_ended_before(true):
    """Plans of three steps."""
    value, _ = filled_value(steps=200)
    worth = lambda state: value(state[..., :1])  # noqa: E731
    if true:
        envs = cem.VectorEnv("InvertedPendulum-v5", 1, seed=0)
        formulas = cem.known_formulas(envs.envs[0])
        obs = torch.from_numpy(envs.obs)
        candidates = torch.zeros(1, 2, 3, 1)
        rollout = lambda formulas, value=None: cem.simulated_returns(  # noqa: E731
            envs, formulas, 0.9, obs, candidates, value
        )
        copy = cem.VectorEnv("InvertedPendulum-v5", 1, seed=0)
        end = torch.from_numpy([copy.envs[0].step(np.zeros(1))[0] for _ in range(3)][-1]).float()
    else:
        model = cem.Ensemble(1, 1, 1, 1, 8, "tanh", False, 0)
        model.predict = lambda obs, action: (obs + 1, None, None)
        formulas = (lambda o, a, n: n[..., 0], lambda n: n[..., 0] > 1e9)
        rollout = lambda formulas, value=None: cem.imagined_returns(  # noqa: E731
            model, formulas, 0.9, torch.zeros(1, 1), torch.zeros(1, 2, 3, 1), value
        )
        end = torch.tensor([3.0])
    plain, paid = rollout(formulas), rollout(formulas, worth)
    expected = (plain + 0.9**3 * worth(end)).tolist()
    assert paid.tolist() == [pytest.approx(expected[0], abs=1e-5)] and abs(paid - plain).min() > 0.01
    never = (formulas[0], lambda n: torch.ones(n.shape[:-1], dtype=torch.bool))
    assert torch.equal(rollout(never), rollout(never, worth))


def test_promises_are_held_against_the_value_that_was_reached():
    """Four steps of one environment, a horizon of two; the second environment falls at its third step."""
    args = cem.Args(horizon=2, gamma=0.5)
    rewards, values = np.array([[1.0, 1], [2, 2], [3, 3], [4, 0]]), np.array([[10.0, 10], [20, 20], [30, 99], [40, 99]])
    alive = np.array([[1, 1], [1, 1], [1, 1], [1, 0]], bool)
    terminated = np.array([[0, 0], [0, 0], [0, 1], [0, 0]], bool)
    found = cem.promise_kept(np.ones((4, 2)), rewards, alive, terminated, values, args)["eval/realised_return"]
    first = [1 + 0.5 * 2 + 0.25 * 20, 2 + 0.5 * 3 + 0.25 * 30, 3 + 0.5 * 4 + 0.25 * 40]
    second = [1 + 0.5 * 2 + 0.25 * 20, 2 + 0.5 * 3, 3.0]  # a plan that led to the fall is worth what it was paid
    assert found == pytest.approx(np.mean(first + second))


# ----------------------------------------------------------------------------------------------------------- compiled


def toy_planner(script, device: str, **changes: object):
    """Plans for two environments in a model with known reward; and what compiles of it."""
    torch.manual_seed(0)
    low, high = -torch.ones(2, device=device), torch.ones(2, device=device)
    args = script.Args(**(dict(horizon=3, num_candidates=24, ensemble_size=2) | changes))
    kind = script.GaussianEnsemble if script is pets else script.Ensemble
    model = kind(4, 2, 2, 1, 8, "tanh", learn_reward=False, skip=0).requires_grad_(False).to(device)
    formulas = (lambda obs, action, next_obs: -next_obs.square().sum(-1)), (lambda next_obs: next_obs[..., 0] > 9)
    imagine = functools.partial(script.imagined_returns, model, formulas, args if script is pets else args.gamma)
    return script.Planner(args, imagine, low, high, 2), "plan" if script is rs else "search"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_plan_compiles_as_one_program(script, monkeypatch):
    """No graph breaks, and the same plan as without. Without a C++ compiler: one warning, and the function as it is."""
    few = {} if script is rs else {"num_elites": 4}
    few |= {"num_particles": 2} if script is pets else {}
    obs = torch.randn(2, 4)
    found = []
    for compile in (False, True):
        planner, name = toy_planner(script, "cpu", **few)
        if compile:
            monkeypatch.setattr(planner, name, torch.compile(getattr(planner, name), backend="eager", fullgraph=True))
        torch.manual_seed(1)
        found.append(planner(obs))
    torch.testing.assert_close(found[0], found[1])
    torch._dynamo.reset()
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="needs a C\\+\\+ compiler") as warned:
        assert script.compiled(len, torch.device("cpu")) is len
    assert len(warned) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_cuda_graph_draws_new_candidates_at_each_replay(script):
    few = {} if script is rs else {"num_elites": 4}
    few |= {"num_particles": 2} if script is pets else {}
    planner, _ = toy_planner(script, "cuda", compile=True, num_candidates=200, **few)
    obs = torch.randn(2, 4, device="cuda")
    actions = []
    for _ in range(4):
        planner.reset(np.ones(2, bool))
        actions.append(planner(obs)[0])
    assert not torch.equal(actions[-1], actions[-2])
    slow, _ = toy_planner(script, "cuda", num_candidates=200, **few)
    promises = []
    for each in (planner, slow):
        each.reset(np.ones(2, bool))
        promises.append(torch.stack([each(obs)[1] for _ in range(20)]).mean())
    torch.testing.assert_close(promises[0], promises[1], rtol=0.2, atol=0.1)


# -------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_leaves_its_metrics_and_says_the_same_when_evaluated_again(script, tmp_path):
    args = tiny(script, tmp_path)
    result, run_dir = run(script, args)
    tags = {row[1] for row in csv.reader((run_dir / "metrics.csv").open())} - {"tag"}
    prefixes = ("charts/", "eval/", "model/", "time/")
    documented = {line.split()[0] for line in script.__doc__.splitlines() if line.strip().startswith(prefixes)}
    assert tags == documented
    buffer = torch.load(run_dir / "checkpoint.pt", weights_only=True)["buffer"]
    assert len(buffer["obs"]) == 80, "random steps and one collection: nothing is collected after the last fit"
    assert json.loads((run_dir / "result.json").read_text()) == result
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    again = script.main(script.parse_args(["--resume", str(run_dir), "--eval-only"]))
    assert again == {name: value for name, value in result.items() if name != "minutes"}
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_evaluation_may_plan_in_another_way_and_a_run_may_not(script, tmp_path, capsys):
    result, run_dir = run(script, tiny(script, tmp_path, num_iterations=1))
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    other = ["--resume", str(run_dir), "--horizon", "3", "--num-candidates", "30"]
    again = script.main(script.parse_args([*other, "--eval-only"]))
    assert again["eval/episodic_return"] != result["eval/episodic_return"]
    shorter = script.main(script.parse_args([*other, "--eval-only", "--max-episode-steps", "5"]))
    assert shorter["eval/episodic_length"] == 5
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before
    for words in (other, ["--resume", str(run_dir), "--eval-only", "--hidden-size", "5"]):
        with pytest.raises(SystemExit) as exit:
            script.main(script.parse_args(words))
        assert exit.value.code == 2 and "cannot change to" in capsys.readouterr().err
    assert {field.name for field in dataclasses.fields(script.Args)} >= script.MAY_CHANGE_TO_EVALUATE


def test_defaults_suit_the_task_and_flags_come_first():
    found = {
        env_id: dataclasses.replace(cem.parse_args(["--env-id", env_id]), env_id="")
        for env_id in (
            "HalfCheetah-v5",
            "Endless-v0",
            "Hopper-v5",
            "envs:PostureCheetah-v0",
            "Pusher-v5",
            "Pendulum-v1",
        )
    }
    usual = cem.Args(env_id="")
    assert usual.reset_every and found["HalfCheetah-v5"] == found["Endless-v0"] == usual
    short_steps = dataclasses.replace(usual, horizon=20, noise_beta=1.0, gamma=0.992, num_values=5, reset_every=625)
    assert found["Hopper-v5"] == found["envs:PostureCheetah-v0"] == short_steps
    slow = dataclasses.replace(usual, horizon=20, noise_beta=2.0, reset_every=None)
    assert found["Pusher-v5"] == found["Pendulum-v1"] == slow
    words = "--env-id Hopper-v5 --horizon 7 --noise-beta 0.5 --gamma 0.9"
    own = cem.Args(env_id="Hopper-v5", horizon=7, noise_beta=0.5, gamma=0.9, num_values=5, reset_every=625)
    assert cem.parse_args(words.split()) == own
    assert cem.parse_args(["--env-id", "Pusher-v5", "--reset-every", "30"]).reset_every == 30
    cut = cem.parse_args(["--env-id", "HalfCheetah-v5", "--max-episode-steps", "12"])
    assert cut == dataclasses.replace(slow, env_id="HalfCheetah-v5", horizon=12, max_episode_steps=12)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_finished_run_is_not_resumed_to_be_shorter_or_evaluated_at_greater_length(script, tmp_path, capsys):
    _, run_dir = run(script, tiny(script, tmp_path))
    with pytest.raises(SystemExit) as exit:
        script.main(script.parse_args(["--resume", str(run_dir), "--num-iterations", "1"]))
    assert exit.value.code == 2 and f"--num-iterations 1: {run_dir} has had 2" in capsys.readouterr().err
    settings = (run_dir / "args.json").read_bytes()
    with pytest.raises(SystemExit) as exit:  # it would evaluate nothing, and its args.json would say otherwise
        script.main(script.parse_args(["--resume", str(run_dir), "--eval-episodes", "3"]))
    assert exit.value.code == 2 and "has finished; evaluate it with --eval-only" in capsys.readouterr().err
    assert (run_dir / "args.json").read_bytes() == settings
    more = ["--resume", str(run_dir), "--eval-episodes", "3", "--num-iterations", "3"]
    assert script.main(script.parse_args(more))["eval/episodic_return"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_evaluation_in_between_is_not_the_last_one(script, tmp_path, monkeypatch):
    """Killed after an evaluation of one episode, and resumed to end there: the last one has two."""
    args = tiny(script, tmp_path, num_iterations=3, interim_episodes=1, eval_episodes=2)
    collect, evaluate, seen = script.collect, script.evaluate, []
    with monkeypatch.context() as patch:
        patch.setattr(script, "collect", lambda *a: collect(*a) if a[3] is None else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            script.main(args)
    run_dir = next(Path(args.log_dir).iterdir())
    monkeypatch.setattr(script, "evaluate", lambda *a: seen.append(a[2]) or evaluate(*a))
    script.main(script.parse_args(["--resume", str(run_dir), "--num-iterations", "1"]))
    assert seen == [2]


def test_what_was_not_learned_is_not_planned_with(tmp_path, capsys):
    _, run_dir = run(cem, tiny(cem, tmp_path, num_iterations=1, terminal_value=False))
    with pytest.raises(SystemExit) as exit:
        cem.main(cem.parse_args(["--resume", str(run_dir), "--eval-only", "--terminal-value"]))
    assert exit.value.code == 2 and "has learned no value" in capsys.readouterr().err


def test_a_value_that_has_diverged_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(cem.Value, "loss", lambda self, **data: self.mlp(data["obs"]).mean() * torch.nan)
    with pytest.raises(SystemExit, match="non-finite"):
        cem.main(tiny(cem, tmp_path))
    assert not list(tmp_path.glob("runs/*/checkpoint.pt"))


def test_each_episode_is_collected_with_a_member_of_its_own(tmp_path, monkeypatch):
    members, asked = [], []
    take, imagine = cem.take_members, cem.imagined_returns
    monkeypatch.setattr(cem, "take_members", lambda *given: members.append(given[2].tolist()) or take(*given))

    def counted(*given, own, **named):
        asked.append((own, given[4].shape[1]))
        return imagine(*given, own=own, **named)

    monkeypatch.setattr(cem, "imagined_returns", counted)
    args = tiny(cem, tmp_path, num_envs=3, ensemble_size=2, reset_every=4, cem_iterations=1, steps_per_iteration=30)
    args = dataclasses.replace(args, keep_elites=0.0, mean_candidate=False)
    _, run_dir = run(cem, args)
    episodes = torch.load(run_dir / "checkpoint.pt", weights_only=True)["buffer"]["episode"][60:].view(-1, 3)
    assert len(episodes.unique()) > 3, "some episode ended, and another one began"
    for own, mine in zip(episodes.T.tolist(), zip(*members, strict=True), strict=True):
        for before, after, first, second in zip(own, own[1:], mine, mine[1:], strict=False):
            assert (first != second) == (before != after), "another member in another episode, and only there"
    evaluated, collected = [(False, 20)] * 15, [(True, 40)] * 10
    assert asked == evaluated + collected + evaluated, "all members evaluate; alone, each can try more"
    asked.clear()
    cem.main(dataclasses.replace(args, thompson=False, seed=2))
    assert asked == [(False, 20)] * 40


def test_with_data_environments_still_collect_with_members_of_their_own(tmp_path, monkeypatch):
    """The data's episodes are not a multiple of the environments."""
    saved = str(tmp_path / "data.pt")
    run(cem, tiny(cem, tmp_path, num_iterations=1, save_data=saved))
    data = torch.load(saved, weights_only=True)
    torch.save({**data, "episode": torch.full_like(data["episode"], 22)}, saved)
    members, take = [], cem.take_members
    monkeypatch.setattr(cem, "take_members", lambda *given: members.append(given[2].tolist()) or take(*given))
    run(cem, tiny(cem, tmp_path, num_envs=3, ensemble_size=3, data=saved, seed=2))
    assert members and all(sorted(mine) == [0, 1, 2] for mine in members[:1])


def test_bounded_samples_are_of_a_gaussian_that_is_cut_off():
    torch.manual_seed(0)
    noise = torch.randn(100_000)
    cut = cem.truncated(noise)
    assert cut.abs().max() < 2 and (cut[noise.argsort()].diff() >= 0).all()
    assert cut.std() == pytest.approx(0.8796, abs=0.005)  # of a standard normal variable between -2 and 2
    assert ((cut > 1.9) & (cut < 2)).float().mean() < 0.01, "nothing is piled up at the end"


def test_a_run_is_evaluated_with_the_simulator_in_place_of_its_model(tmp_path):
    changes = dict(env_id="HalfCheetah-v5", initial_steps=20, num_iterations=1, train_steps=5, terminal_value=False)
    changes |= dict(learning_rate=0.1)  # a model that is clearly wrong
    result, run_dir = run(cem, tiny(cem, tmp_path, **changes))
    again = cem.main(cem.parse_args(["--resume", str(run_dir), "--eval-only", "--true-dynamics"]))
    gap = lambda found: abs(found["eval/predicted_return"] - found["eval/realised_return"])  # noqa: E731
    assert gap(again) < gap(result)


def stop_at(monkeypatch, script, place: str, call: int) -> None:
    """An exception stands for a kill at the given call."""
    owner, name = {"fit": (script, "train_step"), "act": (script.Planner, "__call__")}[place]
    original, calls = getattr(owner, name), iter(range(10**6))

    def wrapper(*args, **kwargs):
        if next(calls) == call:
            raise MemoryError
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("place, call", [("fit", 6), ("act", 3), ("act", 20), ("fit", 16)])
def test_killed_and_resumed_equals_never_stopped(script, tmp_path, monkeypatch, capsys, place, call):
    """In the first fit, an evaluation, the collection and the second fit; episodes end in between."""
    _, whole = run(script, tiny(script, tmp_path / "whole"))
    args = tiny(script, tmp_path / "killed", checkpoint_every=2)
    with monkeypatch.context() as patch:
        stop_at(patch, script, place, call)
        with pytest.raises(MemoryError):
            script.main(args)
    run_dir = next(Path(args.log_dir).iterdir())
    if place == "fit":  # what has been fitted by halves is not judged
        with pytest.raises(SystemExit):
            script.main(script.parse_args(["--resume", str(run_dir), "--eval-only"]))
        assert "before or in a fit of its model" in capsys.readouterr().err
    script.main(script.parse_args(["--resume", str(run_dir)]))
    one, two = model_state(whole), model_state(run_dir)
    assert all(torch.equal(one[name], two[name]) for name in one) and logged(run_dir) == logged(whole)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("call", [3, 20])
def test_stopped_while_evaluating_or_acting_and_resumed_equals_never_stopped(script, tmp_path, monkeypatch, call):
    _, whole = run(script, tiny(script, tmp_path / "whole"))
    args = tiny(script, tmp_path / "stopped")
    act, calls = script.Planner.__call__, iter(range(10**6))
    with monkeypatch.context() as patch:
        stop = lambda *a: (next(calls) == call and signal.raise_signal(signal.SIGTERM)) or act(*a)  # noqa: E731
        patch.setattr(script.Planner, "__call__", stop)
        with pytest.raises(SystemExit) as exit:
            script.main(args)
    assert exit.value.code == 128 + signal.SIGTERM and next(calls) == call + 1, "it leaves at once"
    run_dir = next(Path(args.log_dir).iterdir())
    script.main(script.parse_args(["--resume", str(run_dir)]))
    one, two = model_state(whole), model_state(run_dir)
    assert all(torch.equal(one[name], two[name]) for name in one) and logged(run_dir) == logged(whole)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_evaluation_that_was_stopped_names_the_command_that_repeats_it(script, tmp_path, monkeypatch, capsys):
    _, run_dir = run(script, tiny(script, tmp_path, num_iterations=1))
    act = script.Planner.__call__
    monkeypatch.setattr(script.Planner, "__call__", lambda *a: signal.raise_signal(signal.SIGINT) or act(*a))
    with pytest.raises(SystemExit):
        script.main(script.parse_args(["--resume", str(run_dir), "--eval-only"]))
    assert capsys.readouterr().err.rstrip().endswith(f"--resume {run_dir} --eval-only")
    with pytest.raises(SystemExit):
        script.main(tiny(script, tmp_path / "first"))
    assert capsys.readouterr().err.rstrip().endswith(f"--resume {next((tmp_path / 'first').glob('runs/*'))}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluations_come_every_so_many_steps_and_at_the_end(script, tmp_path):
    _, run_dir = run(script, tiny(script, tmp_path, num_iterations=6, eval_every=50, train_steps=1))
    evaluated = [int(step) for step, tag, _ in logged(run_dir) if tag == "eval/episodic_return"]
    fitted = [int(step) for step, tag, _ in logged(run_dir) if tag == "model/train_loss"]
    assert sorted(fitted) == [60, 80, 100, 120, 140, 160]
    assert sorted(evaluated) == [60, 120, 160], "after 0, 60 (the first fit after 50) and, the last, 100 steps"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("num_envs", [1, 3])
def test_collecting_begins_anew_now_and_then_and_evaluating_does_not(script, tmp_path, num_envs):
    changes = dict(num_envs=num_envs, initial_steps=600, train_steps=1, max_episode_steps=40)
    result, run_dir = run(script, tiny(script, tmp_path / "cut", reset_every=10, **changes))
    assert result["eval/episodic_length"] == 40
    buffer = torch.load(run_dir / "checkpoint.pt", weights_only=True)["buffer"]
    lengths = buffer["episode"].unique(return_counts=True)[1].float()
    assert 7 < lengths.mean() < 13 and lengths.max() > 20, "of no fixed length, ten on average"
    follows = (buffer["obs"][num_envs:] == buffer["next_obs"][:-num_envs]).all(1)
    same = buffer["episode"][num_envs:] == buffer["episode"][:-num_envs]
    assert torch.equal(follows, same), "a new number, and a new beginning"
    finished = [float(value) for _, tag, value in logged(run_dir) if tag == "charts/episodic_length"]
    assert np.mean(finished) == pytest.approx(lengths.mean().item(), rel=0.2)
    _, run_dir = run(script, tiny(script, tmp_path / "whole", reset_every=None, **changes))
    episode = torch.load(run_dir / "checkpoint.pt", weights_only=True)["buffer"]["episode"]
    assert (episode.unique(return_counts=True)[1][:-num_envs] == 40).all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_cannot_be_evaluated_or_resumed_says_so(script, tmp_path, capsys, monkeypatch):
    args = tiny(script, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # stopped while still acting at random
        act = script.VectorEnv.random_action
        patch.setattr(script.VectorEnv, "random_action", lambda envs: signal.raise_signal(signal.SIGTERM) or act(envs))
        script.main(args)
    run_dir = next(Path(args.log_dir).iterdir())
    with pytest.raises(SystemExit) as exit:
        script.main(script.parse_args(["--resume", str(run_dir), "--eval-only"]))
    assert exit.value.code == 2 and "before or in a fit of its model" in capsys.readouterr().err
    saved = json.loads((run_dir / "args.json").read_text())
    del saved["reset_every"], saved["eval_every"]
    (run_dir / "args.json").write_text(json.dumps(saved))
    with pytest.raises(SystemExit) as exit:
        script.parse_args(["--resume", str(run_dir)])
    assert exit.value.code == 2 and "without reset_every, eval_every" in capsys.readouterr().err


def test_an_episode_is_numbered_by_its_environment(monkeypatch):
    """Environment i counts i, i + num_envs, ..: whichever ends first, each goes through all members in turn."""
    envs = cem.VectorEnv("Pendulum-v1", 3, seed=1, max_episode_steps=4)
    for _ in range(2):
        envs.step(envs.random_action())
    draws = iter([0.9, 0.0, 0.9])
    monkeypatch.setattr(torch, "rand", lambda size: torch.tensor(next(draws)))
    cem.cut_short(envs, 0.5)
    assert envs.episode.tolist() == [0, 4, 2]
    for _ in range(2):
        envs.step(envs.random_action())
    assert envs.episode.tolist() == [3, 4, 5], "the others have reached their time limit"


@pytest.mark.parametrize("right", [True, False])
def test_only_a_reward_of_the_joints_is_planned_with_in_the_simulator(right):
    env = cem.make_env("InvertedPendulum-v5")
    upright = cem.known_formulas(env)[0]
    formula = upright if right else lambda obs, action, next_obs: upright(obs, action, next_obs) - 0.2
    assert cem.can_simulate(env, formula) == right
    do = env.unwrapped.do_simulation  # a task that makes something else of its action
    env.unwrapped.do_simulation = lambda ctrl, frames: do(0.4 * ctrl, frames)
    assert not cem.can_simulate(env, formula)


def test_a_plan_does_not_stay_at_a_bound_where_bounded_sampling_leaves_no_spread():
    nothing = lambda obs, plans: torch.zeros(plans.shape[:2])  # noqa: E731
    planner = cem.Planner(cem.Args(horizon=4, num_elites=2, bounded_sampling=True), nothing, LOW, HIGH, 2)
    planner.mean = HIGH.expand(2, 4, A).clone()
    for _ in range(4):
        planner(torch.zeros(2, D))
    assert (planner.mean < HIGH - 0.1).all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_data_and_learned_reward_of_any_environment(script, tmp_path):
    file = str(tmp_path / "data.pt")
    run(script, tiny(script, tmp_path / "a", save_data=file))
    assert len(torch.load(file, weights_only=True)["obs"]) == 80
    saved = Path(file).stat().st_mtime_ns
    script.main(script.parse_args(["--resume", str(next((tmp_path / "a" / "runs").iterdir())), "--eval-only"]))
    assert Path(file).stat().st_mtime_ns == saved, "an evaluation collects nothing"
    _, run_dir = run(script, tiny(script, tmp_path / "b", data=file))
    buffer = torch.load(run_dir / "checkpoint.pt", weights_only=True)["buffer"]
    assert len(buffer["obs"]) == 100 and len(buffer["episode"].unique()) > 4
    Path(file).unlink()  # what was read lies in the checkpoint
    longer = script.parse_args(["--resume", str(run_dir), "--num-iterations", "3"])
    script.main(longer)
    assert len(torch.load(run_dir / "checkpoint.pt", weights_only=True)["buffer"]["obs"]) == 120


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_blows_up_after_the_end_of_an_episode_is_no_matter(script):
    """The second step ends it; the third would be paid infinity."""

    class Model(torch.nn.Module):
        ensemble_size = num_targets = 1

        def predict(self, obs, action):
            return obs + 1, None, None

    formulas = (
        lambda o, a, n: torch.where(n[..., 0] > 2.5, torch.inf, n[..., 0]),
        lambda n: n[..., 0] > 1.5,
    )
    plans = torch.zeros(1, 2, 4, 1)
    if script is pets:
        args = pets.Args(propagation="expectation")
        found = pets.imagined_returns(Model(), formulas, args, torch.zeros(1, 1), plans)
    else:
        found = script.imagined_returns(Model(), formulas, 1.0, torch.zeros(1, 1), plans)
    assert found.tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_learned_end_counts_by_its_probability(script):
    """Each step pays 1 and ends the episode in three of ten cases: 1 + 0.7 + 0.49 + ..; V is 10 and counts by 0.7^4."""

    class Model(torch.nn.Module):
        ensemble_size = num_targets = 1

        def predict(self, obs, action):
            return obs, torch.ones_like(obs[..., 0]), 0.3 * torch.ones_like(obs[..., 0])

    obs, plans, lived = torch.zeros(1, 1), torch.zeros(1, 2, 4, 1), [0.7**t for t in range(4)]
    if script is pets:
        found = pets.imagined_returns(Model(), None, pets.Args(propagation="expectation", gamma=0.9), obs, plans)
    else:
        found = script.imagined_returns(Model(), None, 0.9, obs, plans)
    expected = sum(0.9**t * alive for t, alive in enumerate(lived))
    assert found[0].tolist() == pytest.approx([expected, expected])
    if script is cem:
        found = cem.imagined_returns(Model(), None, 0.9, obs, plans, lambda state: 10 + 0 * state[..., 0])
        assert found[0, 0].item() == pytest.approx(expected + 10 * (0.9 * 0.7) ** 4)


@pytest.mark.parametrize("env_id", ["envs:Obstacles-v0", "HalfCheetah-v5"])
def test_a_video_is_written_without_a_display(tmp_path, env_id, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    args = tiny(cem, tmp_path, env_id=env_id, capture_video=True, num_iterations=1)
    _, run_dir = run(cem, args)
    assert (run_dir / "videos" / "60.mp4").stat().st_size > 1000


class Endless(gym.Env):
    """Goes on for ever, cannot be drawn, and says about its reward whatever it is made with."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, render_mode=None, **formulas):
        for name, formula in formulas.items():
            setattr(self, name, formula)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 0.0, False, False, {}


class Whole(Endless):
    action_space = gym.spaces.Box(-2, 2, (2,), np.int64)


class Paid(Endless):
    """Pays the first action, whatever `batch_reward` says; its bounds are no numbers of 32 bits."""

    action_space = gym.spaces.Box(-0.1, 0.1, (2,), np.float64)

    def __init__(self, **formulas):
        assert "render_mode" not in formulas, "not every environment knows of it"
        super().__init__(**formulas)

    def step(self, action):
        assert self.action_space.contains(action)
        return np.zeros(3, np.float32), float(action[0]), False, False, {}


class Odd(Endless):
    """Pays nothing that is a number, now and then."""

    def step(self, action):
        return np.zeros(3, np.float32), 0.0 if action[0] < 0 else np.nan, False, False, {}


COLUMN = {"batch_reward": lambda o, a, n: n[..., :1], "batch_terminated": lambda n: n[..., 0] > 1}
NUMPY = {"batch_reward": lambda o, a, n: n[..., 0].numpy(), "batch_terminated": lambda n: n[..., 0] > 1}
RAISES = {"batch_reward": lambda o, a, n: n[..., 0], "batch_terminated": lambda o, n: n[..., 0] > 1}
gym.register("Endless-v0", Endless)
gym.register("Whole-v0", Whole)
gym.register("Odd-v0", Odd)
for name, formula in {"Honest-v0": lambda o, a, n: a[..., 0], "Other-v0": lambda o, a, n: a[..., 1]}.items():
    never = {"batch_terminated": lambda n: n[..., 0] > 1}
    gym.register(name, Paid, kwargs={"batch_reward": formula} | never)
always = {"batch_terminated": lambda n: n[..., 0] > -1}
gym.register("Ending-v0", Paid, kwargs={"batch_reward": lambda o, a, n: a[..., 0]} | always)
number = {"batch_terminated": lambda n: 1.0 * (n[..., 0] > 1)}
gym.register("Number-v0", Endless, kwargs={"batch_reward": RAISES["batch_reward"]} | number)
gym.register("HalfKnown-v0", Endless, kwargs={"batch_reward": RAISES["batch_reward"]})
gym.register("Column-v0", Endless, kwargs=COLUMN)
gym.register("Numpy-v0", Endless, kwargs=NUMPY)
gym.register("Raises-v0", Endless, kwargs=RAISES)


@pytest.mark.parametrize(
    "script, changes, words",
    [
        (rs, {"horizon": 16}, "--horizon 16 is longer than an episode"),
        (rs, {"eval_only": True}, "--eval-only needs --resume"),
        (rs, {"resume": "runs/any", "eval_only": True, "save_data": "data.pt"}, "--save-data with --eval-only"),
        (rs, {"gamma": 0.0}, "--gamma"),
        (rs, {"env_id": "unbounded"}, "actions must be bounded"),
        (rs, {"reward": "known"}, "no formula for Pendulum-v1"),
        (rs, {"num_envs": 40}, "--steps-per-iteration 20 is less than one step of --num-envs 40"),
        (rs, {"env_id": "Endless-v0", "max_episode_steps": None}, "it has no time limit"),
        (pets, {"env_id": "HalfKnown-v0"}, "both of batch_reward and batch_terminated, or neither"),
        (rs, {"env_id": "Column-v0"}, "batch_reward of (2, 3, D) must be a tensor (2, 3), it is (2, 3, 1)"),
        (rs, {"env_id": "Numpy-v0"}, "batch_reward of (2, 3, D) must be a tensor (2, 3), it is ndarray"),
        (cem, {"env_id": "Raises-v0"}, "batch_terminated failed on zeros"),
        (cem, {"env_id": "Endless-v0", "capture_video": True}, "cannot be drawn"),
        (cem, {"num_elites": 20}, "--num-elites 20 of --num-candidates 20"),
        (cem, {"cem_alpha": 1.5}, "--cem-alpha"),
        (cem, {"start": "uniform"}, "--no-shift-plan"),
        (cem, {"gamma": 1.0}, "--no-terminal-value"),
        (cem, {"gamma": 1 - 1e-9}, "--no-terminal-value"),
        (cem, {"env_id": "Ant-v5", "true_dynamics": True}, "V has seen more than joints"),
        (cem, {"keep_elites": 1.5}, "--keep-elites"),
        (cem, {"true_dynamics": True}, "--true-dynamics needs a MuJoCo task"),
        (cem, {"env_id": "envs:Reacher7DoF-v0", "true_dynamics": True}, "--true-dynamics needs a MuJoCo task"),
        (rs, {"env_id": "Number-v0"}, "batch_terminated must be of dtype bool, it is torch.float32"),
        (cem, {"start": "uniform", "shift_plan": False}, "--keep-elites 0"),
        (cem, {"noise_beta": 11.0}, "--noise-beta must be at most 10"),
        (cem, {"candidate_decay": 1e200}, "--candidate-decay must be at most 100"),
        (rs, {"exp_name": "x" * 101}, "--exp-name has 101 bytes"),
        (rs, {"env_id": "Whole-v0"}, "actions must be vectors of real numbers"),
    ],
)
def test_bad_arguments(script, tmp_path, capfd, changes, words):
    if changes.get("env_id") == "unbounded":
        space = gym.spaces.Box(-np.inf, np.inf, (1,))
        gym.register(
            "Unbounded-v0", lambda **kwargs: gym.wrappers.TransformAction(gym.make("Pendulum-v1").unwrapped, abs, space)
        )
        changes = {"env_id": "Unbounded-v0"}
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        script.main(tiny(script, tmp_path, **changes))
    lines = capfd.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("env_id, told", [("Honest-v0", None), ("Other-v0", "reward"), ("Ending-v0", "end")])
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_not_as_it_is_planned_with_is_noticed(script, env_id, told, tmp_path, capsys):
    script.main(tiny(script, tmp_path, env_id=env_id, num_iterations=1))
    errors = capsys.readouterr().err
    for part in ("reward", "end"):
        assert (f"the {part} by formula is" in errors) == (part == told)


def test_actions_at_a_rounded_bound_are_within_the_bounds(tmp_path):
    envs = cem.VectorEnv("Honest-v0", 1, 0, max_episode_steps=5)
    low, high = cem.action_bounds(envs, "Honest-v0", torch.device("cpu"))
    assert high.double().max() > 0.1  # rounded up
    envs.step(high[None].numpy())  # the environment itself checks
    envs.step(low[None].numpy())


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_the_environment_gets_wrong_is_not_blamed_on_the_model(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(tiny(script, tmp_path, env_id="Odd-v0"))
    assert "Odd-v0: reward has" in capsys.readouterr().err


def test_a_torn_row_is_dropped_and_the_rest_kept(tmp_path):
    args = tiny(rs, tmp_path)
    rs.Logger(tmp_path, args).scalars({"eval/episodic_return": 1.5}, 3)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,eval/episodic_return,12")  # of 12.5, say
    assert rs.Logger(tmp_path, args, step=9).history["eval/episodic_return"] == [(3, 1.5)]


def test_a_run_of_another_script_is_not_resumed(tmp_path, capsys):
    _, run_dir = run(rs, tiny(rs, tmp_path, num_iterations=1))
    with pytest.raises(SystemExit) as exit:
        cem.parse_args(["--resume", str(run_dir)])
    assert exit.value.code == 2 and "its args.json is from another script" in capsys.readouterr().err


def test_the_example_of_the_readme_runs():
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    torch.manual_seed(0)
    exec(code, names)
    assert names["action"].shape == (8, 1) and names["promised_return"].isfinite().all()
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
