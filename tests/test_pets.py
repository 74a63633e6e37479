"""pets.py: particles and their members, the search, the Gaussian's likelihood. The loop is tested in test_mpc.py."""

import math
from functools import partial

import numpy as np
import pytest
import torch

import mpc_cem
import pets

LOW, HIGH = torch.tensor([-1.0, 0.5]), torch.tensor([0.0, 2.0])


def model(members: int = 3, learn_reward: bool = False, spread: float | None = None) -> pets.GaussianEnsemble:
    """A random one; with `spread` its log-variance is that number's."""
    torch.manual_seed(0)
    made = pets.GaussianEnsemble(4, 2, members, 2, 16, "silu", learn_reward, 0).requires_grad_(False)
    made.input_normaliser.fit(torch.randn(50, 6))
    made.target_normaliser.fit(0.1 * torch.randn(50, made.num_targets))
    if spread is not None:
        made.max_logvar.fill_(2 * math.log(max(spread, 1e-20)))
        made.min_logvar.copy_(made.max_logvar)
        bias, targets = made.mlp.biases[-1], made.num_targets
        made.mlp.weights[-1][..., targets : 2 * targets] = 0
        bias[..., targets : 2 * targets] = 1e3  # above the upper bound, and so the lower one decides
    return made


def reward(obs: torch.Tensor, action: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
    return next_obs[..., 0] - obs[..., 1] ** 2 + action.sum(dim=-1)


def over(next_obs: torch.Tensor) -> torch.Tensor:
    return next_obs[..., 2] > 1.0


FORMULAS = (reward, over)


def candidates(B: int = 2, K: int = 5, H: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, 4), LOW + torch.rand(B, K, H, 2) * (HIGH - LOW)


@pytest.mark.parametrize("cached", [7, 10_000])
def test_without_noise_and_with_one_member_it_is_the_deterministic_plan(monkeypatch, cached):
    """TS1 and TSinf have no one else to ask, and the mean over the members is that member."""
    monkeypatch.setattr(pets, "CACHED_STATES", cached)
    made, (obs, plans) = model(members=1, spread=0.0), candidates()
    expected = mpc_cem.imagined_returns(made, FORMULAS, 0.9, obs, plans)
    for propagation in ("ts1", "tsinf", "expectation"):
        args = pets.Args(propagation=propagation, num_particles=4, gamma=0.9)
        found = pets.imagined_returns(made, FORMULAS, args, obs, plans)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learned", [False, True])
def test_tsinf_keeps_the_member_of_a_particle(learned):
    """Without noise each member is a deterministic model: the mean over the particles is that over the members."""
    made, (obs, plans) = model(3, learned, spread=0.0), candidates()
    formulas = None if learned else FORMULAS
    expected = mpc_cem.imagined_returns(made, formulas, 1.0, obs, plans)  # every member on its own, and then the mean
    found = pets.imagined_returns(made, formulas, pets.Args(propagation="tsinf", num_particles=6), obs, plans)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def visits(monkeypatch, propagation: str, particles: int, horizon: int) -> np.ndarray:
    """Which member moved each particle, (H, P). A particle is known by its first coordinate, which never changes."""
    made, seen, numbers = model(3), [], torch.arange(float(particles)).view(3, -1)

    def step(model, state, action, noise):
        if not seen:  # they all start alike: now each gets its number
            state = torch.cat([numbers[..., None], state[..., 1:]], dim=-1)
        seen.append(state[..., 0].clone())
        return state, None, None

    monkeypatch.setattr(pets, "sample_step", step)
    args = pets.Args(propagation=propagation, num_particles=particles)
    formulas = (lambda o, a, n: torch.zeros_like(n[..., 0]), lambda n: torch.zeros_like(n[..., 0], dtype=torch.bool))
    pets.imagined_returns(made, formulas, args, torch.zeros(1, 4), torch.zeros(1, 1, horizon, 2))
    return np.array([[int((at == number).nonzero()[0, 0]) for number in range(particles)] for at in seen])


def test_which_member_moves_a_particle(monkeypatch):
    torch.manual_seed(0)
    kept = visits(monkeypatch, "tsinf", 6, 5)
    assert (kept == [0, 0, 1, 1, 2, 2]).all()
    changing = visits(monkeypatch, "ts1", 6, 3_000)
    assert all(np.bincount(at, minlength=3).tolist() == [2, 2, 2] for at in changing), "each member has its share"
    share = np.array([np.bincount(particle, minlength=3) for particle in changing[1:].T]) / (len(changing) - 1)
    np.testing.assert_allclose(share, 1 / 3, atol=0.04)  # any particle, any member
    same = (changing[1:-1] == changing[2:]).mean()
    assert same == pytest.approx(1 / 3, abs=0.03), "the next member does not depend on the last"


def test_an_ended_particle_takes_its_end_with_it_to_the_next_member():
    """Ends must move with the particle: member 0 ends it at once, members 1 and 2 never do, each step pays 1."""
    made = model(3)
    formulas = (lambda o, a, n: torch.ones_like(n[..., 0]), lambda n: n[..., 0] > 0.5)

    def step(model, state, action, noise):
        jump = torch.tensor([1.0, 0.0, 0.0])[:, None, None] * torch.tensor([1.0, 0, 0, 0])
        return state.clamp(max=0) + jump, None, None  # where it was is forgotten, so that only the flag remembers

    original, pets.sample_step = pets.sample_step, step
    try:
        H, args = 4, pets.Args(propagation="ts1", num_particles=3)
        torch.manual_seed(0)
        found = [
            pets.imagined_returns(made, formulas, args, torch.zeros(1, 4), torch.zeros(1, 1, H, 2)).item()
            for _ in range(3_000)
        ]
    finally:
        pets.sample_step = original
    expected = sum((2 / 3) ** t for t in range(H))  # a third of the living ends at each step, and is paid for it
    assert np.mean(found) == pytest.approx(expected, abs=0.02)


def test_a_learned_end_counts_by_its_probability(monkeypatch):
    """Each step pays 1 and ends the episode in three of ten cases: 1 + 0.7 + 0.49 + ..., and not all or nothing."""
    ones = torch.ones(3, 1)
    monkeypatch.setattr(pets, "sample_step", lambda model, state, action, noise: (state, ones, 0.3 * ones))
    args = pets.Args(propagation="ts1", num_particles=3)
    found = pets.imagined_returns(model(3), None, args, torch.zeros(1, 4), torch.zeros(1, 1, 4, 2))
    assert found.item() == pytest.approx(sum(0.7**t for t in range(4)))


@pytest.mark.parametrize("propagation", ["ts1", "tsinf"])
def test_candidates_meet_the_same_luck_and_particles_do_not(propagation, monkeypatch):
    made, (obs, plans) = model(3), candidates()
    monkeypatch.setattr(pets, "CACHED_STATES", 12)  # not all of them are rolled out together
    args = pets.Args(propagation=propagation, num_particles=6)
    twins = plans[:1, :1].expand(1, 7, -1, -1)
    found = pets.imagined_returns(made, FORMULAS, args, obs[:1], twins)
    torch.testing.assert_close(found, found[:, :1].expand(1, 7))
    assert not torch.allclose(found, pets.imagined_returns(made, FORMULAS, args, obs[:1], twins))
    seen, original = [], pets.sample_step

    def step(model, state, action, noise):
        seen.append(noise.view(6, -1, noise.shape[-1])[:, 0])
        return original(model, state, action, noise)

    monkeypatch.setattr(pets, "sample_step", step)
    pets.imagined_returns(made, FORMULAS, args, obs[:1], plans[:1, :1])
    assert len(torch.cat(seen).unique()) == torch.cat(seen).numel(), "of no two particles, steps or dimensions"


def test_draws_have_the_predicted_mean_and_spread():
    made, obs, action = model(2), torch.randn(1, 4), torch.randn(1, 2)
    state, act = obs.expand(2, 40_000, -1), action.expand(2, 40_000, -1)
    found, _, _ = pets.sample_step(made, state, act, torch.randn(2, 40_000, 4))
    mean, _, _ = made.predict(state[:, :1], act[:, :1])
    output = made.mlp(made.input_normaliser(made.inputs(state[:, :1], act[:, :1])))
    std = (0.5 * made.logvar(output)).exp() * made.target_normaliser.std
    torch.testing.assert_close(found.mean(1), mean[:, 0], rtol=0, atol=4 * std.max().item() / 200)
    torch.testing.assert_close(found.std(1), std[:, 0], rtol=0.03, atol=0)
    one, _, _ = pets.mean_step(made, obs[None], action[None])
    torch.testing.assert_close(one[0], mean.mean(0))


def test_the_variance_stays_in_its_bounds_and_the_likelihood_is_torchs():
    made = model(2)
    output = 100 * torch.randn(2, 50, 8)
    logvar, rounding = made.logvar(output), 1e-3
    assert (logvar <= made.max_logvar + rounding).all() and (logvar >= made.min_logvar - rounding).all()
    target = torch.randn(2, 50, 4)
    output = torch.randn(2, 50, 8)
    std = (0.5 * made.logvar(output)).exp()
    nll = -torch.distributions.Normal(output[..., :4], std).log_prob(target)
    expected = 2 * nll.mean(dim=(1, 2)) - math.log(2 * math.pi)
    bounds = 0.01 / 2 * (made.max_logvar - made.min_logvar).sum(dim=(1, 2))
    torch.testing.assert_close(made.regression_loss(output, target), expected + bounds)


# --------------------------------------------------------------------------------------------------------- the search


def plan(imagine, B: int = 2, **changes):
    args = pets.Args(horizon=3, **({"num_candidates": 50, "num_elites": 5} | changes))
    mean = ((LOW + HIGH) / 2).expand(B, 3, 2).clone()
    return args, pets.cem(imagine, torch.zeros(B, 4), mean, LOW, HIGH, args)


def test_cem_is_equations_3_and_4():
    drawn = []

    def imagine(obs, plans):
        drawn.append(plans)
        return -(plans - LOW).square().sum(dim=(2, 3))

    torch.manual_seed(0)
    _, (mean, promise, spread) = plan(imagine, cem_alpha=0.7, cem_iterations=3)
    middle, var = ((LOW + HIGH) / 2).expand(2, 3, 2), ((HIGH - LOW) / 4).square().expand(2, 3, 2)
    for plans in drawn:
        std = torch.minimum(var.sqrt(), torch.minimum(middle - LOW, HIGH - middle) / 2)
        noise = (plans - middle[:, None]) / std[:, None]
        assert noise.abs().max() <= 2 + 1e-3 and (plans >= LOW).all() and (plans <= HIGH).all()
        values = -(plans - LOW).square().sum(dim=(2, 3))
        best = values.argsort(dim=1, descending=True)[:, :5]
        elites = torch.stack([plans[b, best[b]] for b in range(2)])
        middle = 0.7 * elites.mean(1) + 0.3 * middle
        var = 0.7 * elites.var(1, correction=0) + 0.3 * var
    torch.testing.assert_close(mean, middle)
    torch.testing.assert_close(promise, torch.stack([values[b, best[b]].mean() for b in range(2)]))
    torch.testing.assert_close(spread, (elites.std(1, correction=0) / ((HIGH - LOW) / 2)).mean())


def test_the_noise_is_a_gaussian_cut_off_at_two():
    drawn = []
    imagine = lambda obs, plans: drawn.append(plans) or torch.zeros(plans.shape[:2])  # noqa: E731
    torch.manual_seed(0)
    plan(imagine, B=1, num_candidates=100_000, cem_iterations=1)
    noise = (drawn[0] - (LOW + HIGH) / 2) / ((HIGH - LOW) / 4)
    kept = torch.randn(500_000)
    kept = kept[kept.abs() <= 2]
    assert noise.std().item() == pytest.approx(kept.std().item(), rel=0.01)
    assert (noise.abs() > 1).float().mean().item() == pytest.approx((kept.abs() > 1).float().mean().item(), abs=0.005)


def test_the_plan_is_shifted_and_forgotten_at_the_end_of_an_episode():
    made = model(3)
    args = pets.Args(horizon=5, num_candidates=30, num_elites=5, num_particles=3)
    planner = pets.Planner(args, partial(pets.imagined_returns, made, FORMULAS, args), LOW, HIGH, 2)
    torch.manual_seed(0)
    found = []
    search = planner.search
    planner.search = lambda *rest: found.append(search(*rest)) or found[-1]
    action, _ = planner(torch.randn(2, 4))
    torch.testing.assert_close(action, found[0][0][:, 0])
    torch.testing.assert_close(planner.mean[:, :-1], found[0][0][:, 1:])
    assert torch.equal(planner.mean[:, -1], planner.middle[-1:].expand(2, -1))
    planner.reset(np.array([False, True]))
    assert not torch.equal(planner.mean[0], planner.middle) and torch.equal(planner.mean[1], planner.middle)


def test_a_plan_at_a_bound_comes_back():
    """What pays changes its sign every 20 steps, and the plans see it coming: none may stay at its old bound."""
    low, high = -torch.ones(1), torch.ones(1)
    sign = torch.ones(300)
    sign[20:40] = sign[60:80] = -1
    now = 0
    imagine = lambda obs, plans: (plans[..., 0] * sign[now : now + plans.shape[2]]).sum(-1)  # noqa: E731
    planner = pets.Planner(pets.Args(), imagine, low, high, 4)
    torch.manual_seed(0)
    earned = []
    for now in range(80):
        action, _ = planner(torch.zeros(4, 1))
        earned.append((action * sign[now]).mean().item())
    assert np.mean(earned) > 0.95


def test_bad_arguments(tmp_path, capfd):
    for changes, words in (
        ({"num_particles": 7}, "--num-particles 7 must be a multiple of --ensemble-size 5"),
        ({"propagation": "both"}, "--propagation must be one of ts1, tsinf, expectation"),
        ({"num_elites": 100}, "--num-elites 100 of --num-candidates 100"),
        ({"start_std": 0.6}, "--start-std must lie in (0, 0.5], got 0.6"),
    ):
        with pytest.raises(SystemExit) as exit:
            pets.main(pets.Args(log_dir=str(tmp_path / "runs"), **changes))
        lines = capfd.readouterr().err.strip().splitlines()
        assert exit.value.code == 2 and len(lines) == 1 and words in lines[0]
