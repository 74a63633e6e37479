"""bc_variants.py: each loss against its definition, two modes, data of all kinds, DAgger, runs."""

import csv
import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import bc_variants as bc
import mbpo_sac

LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])
NAMES = ["mse", "gaussian", "gmm", "diffusion", "autoregressive"]


def small(variant: str, **changes) -> bc.Policy:
    torch.manual_seed(0)
    args = bc.Args(**({"variant": variant, "hidden_size": 16, "activation": "tanh"} | changes))
    policy = bc.VARIANTS[variant](3, LOW, HIGH, args)
    policy.normaliser.fit(torch.randn(100, 3) * 5 + 2)
    return policy


# ----------------------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("variant", NAMES)
def test_actions_are_scaled_standardised_and_within_bounds(variant):
    policy = small(variant)
    action = LOW + (HIGH - LOW) * torch.rand(50, 2)
    u = policy.scale(action)
    assert u.abs().max() <= 1
    torch.testing.assert_close(policy.low + (u + 1) / 2 * (policy.high - policy.low), action)
    seen = []
    policy.decide = lambda x, sample: seen.append((x, sample)) or torch.full((len(x), 2), 3.0)
    obs = torch.randn(4, 3)
    assert torch.equal(policy.act(obs, True), HIGH.expand(4, -1)), "clipped to the bounds"
    torch.testing.assert_close(seen[0][0], (obs - policy.normaliser.mean) / policy.normaliser.std)
    assert seen[0][1] is True
    policy.error = lambda x, u: seen.append((x, u)) or u.sum(-1)
    assert policy.loss(obs, action[:4]).item() == pytest.approx(u[:4].sum(-1).mean().item())
    torch.testing.assert_close(seen[1][0], seen[0][0])


@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize("sample", [False, True])
def test_a_policy_acts_and_is_saved_whole(variant, sample, tmp_path):
    policy = small(variant)
    obs = torch.randn(7, 3)
    torch.manual_seed(1)
    action = policy.act(obs, sample)
    assert action.shape == (7, 2) and (action >= LOW).all() and (action <= HIGH).all()
    torch.save(policy.state_dict(), tmp_path / "policy.pt")
    args = bc.Args(variant=variant, hidden_size=16, activation="tanh")
    again = bc.VARIANTS[variant](3, torch.zeros(2), torch.ones(2), args)
    again.load_state_dict(torch.load(tmp_path / "policy.pt", weights_only=True))
    torch.manual_seed(1)
    assert torch.equal(again.act(obs, sample), action)
    torch.manual_seed(2)
    assert (not torch.equal(policy.act(obs, sample), action)) == (
        (sample and variant != "mse") or variant == "diffusion"
    )


def test_the_gaussians_density_is_torchs():
    policy = small("gaussian")
    x, u = torch.randn(40, 3), torch.rand(40, 2) * 1.9 - 0.95
    mean, log_std = policy.moments(x)
    reference = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), TanhTransform())
    torch.testing.assert_close(policy.error(x, u), -reference.log_prob(u), rtol=1e-4, atol=1e-4)
    assert log_std.exp().min() >= 1e-3 and log_std.exp().max() <= 3
    assert policy.error(x, torch.ones(40, 2)).isfinite().all(), "a saturated expert"


def test_the_mixtures_density_is_a_sum_of_gaussians():
    policy = small("gmm", num_components=3)
    x, u = torch.randn(5, 3), torch.rand(5, 2) * 2 - 1
    out = policy.net(x)
    for b in range(5):
        weights, density = torch.softmax(out[b, :3], 0), 0.0
        for k in range(3):
            mean, spread = out[b, 3 + 4 * k : 5 + 4 * k].tanh(), out[b, 5 + 4 * k : 7 + 4 * k]
            std = 0.1 + torch.nn.functional.softplus(spread)
            density += weights[k] * Normal(mean, std).log_prob(u[b]).sum().exp()
        assert policy.error(x, u)[b].item() == pytest.approx(-math.log(density.item()), abs=1e-4)
        best = int(weights.argmax())
        torch.testing.assert_close(policy.decide(x, False)[b], out[b, 3 + 4 * best : 5 + 4 * best].tanh())


def test_the_autoregressive_probabilities_sum_to_one_and_see_only_what_came_before():
    policy = small("autoregressive", num_bins=6)
    x, centres = torch.randn(1, 3), torch.linspace(-1, 1, 6)
    grid = torch.cartesian_prod(centres, centres)  # every action there is
    assert (-policy.error(x.expand(36, -1), grid)).exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    u = torch.tensor([-1.0, 0.93, 0.1, 1.0])
    torch.testing.assert_close(policy.shares(u) @ centres, u), torch.testing.assert_close(policy.shares(u).sum(1), u**0)
    assert (policy.shares(u) > 0).sum(1).max() == 2, "the two centres around it"
    between = 0.25 * policy.error(x, grid[[1]]) + 0.75 * policy.error(x, grid[[2]])  # of the last dimension's centres
    torch.testing.assert_close(policy.error(x, 0.25 * grid[[1]] + 0.75 * grid[[2]]), between)
    one, other = policy.log_probs(x, torch.tensor([[0.2, 0.9]])), policy.log_probs(x, torch.tensor([[0.2, -0.9]]))
    assert torch.equal(one, other), "the last dimension is seen by none"
    third = policy.log_probs(x, torch.tensor([[-0.7, 0.9]]))
    assert torch.equal(one[0], third[0]) and not torch.allclose(one[1], third[1])
    policy.nets.weights[0].data *= 10  # so that what came before matters
    many = torch.randn(20, 3)
    decided = policy.decide(many, False)
    again = policy.log_probs(many, policy.bins(decided, 0.5))[1].exp()
    near = again * ((torch.arange(6) - again.argmax(1, keepdim=True)).abs() <= 1)
    torch.testing.assert_close(decided[:, 1], near @ centres / near.sum(1))


def test_what_came_before_is_seen_as_a_bin_and_drawn_as_in_a_sample():
    policy = small("autoregressive", num_bins=6)  # centres -1, -0.6, -0.2, ..
    u = torch.tensor([[-1.0, -0.7], [-0.55, 1.0]])
    torch.testing.assert_close(policy.bins(u, 0.5), torch.tensor([[-1.0, -0.6], [-0.6, 1.0]]))
    torch.manual_seed(0)
    drawn = policy.bins(u.expand(20_000, 2, 2), torch.rand(20_000, 2, 2))
    share = (drawn[..., None] - policy.centres).abs().argmin(-1)
    counts = torch.nn.functional.one_hot(share, 6).float().mean(0)
    torch.testing.assert_close(counts, policy.shares(u), atol=0.02, rtol=0)
    x, b = torch.randn(7, 3), policy.bins(torch.rand(7, 2) * 2 - 1, 0.5)
    for i in range(2):
        torch.testing.assert_close(policy.probs(i, x, b), policy.log_probs(x, b)[i].exp())
    seen, original = [], policy.log_probs
    policy.log_probs = lambda x, b: seen.append(b) or original(x, b)
    policy.error(torch.randn(500, 3), torch.full((500, 2), -0.7))
    assert seen[0].unique().tolist() == pytest.approx([-1.0, -0.6]), "training sees both of them"


def test_the_best_bin_is_averaged_with_its_neighbours_and_with_no_other():
    policy = small("autoregressive", num_bins=5)  # centres -1, -0.5, 0, 0.5, 1
    for weight, bias in zip(policy.nets.weights, policy.nets.biases, strict=True):
        torch.nn.init.zeros_(weight), torch.nn.init.zeros_(bias)
    policy.nets.biases[-1].data[:] = torch.tensor([0.1, 0.5, 0.1, 0.01, 0.29]).log()
    expected = (-1 * 0.1 - 0.5 * 0.5) / 0.7
    torch.testing.assert_close(policy.decide(torch.randn(4, 3), False), torch.full((4, 2), expected))
    sampled = policy.decide(torch.randn(4_000, 3), True)
    assert (sampled == 1).float().mean().item() == pytest.approx(0.29, abs=0.03)


def test_the_noise_schedule():
    """The cosine schedule's betas for T = 10, and nearly nothing of the action left at the end."""
    kept = small("diffusion").alpha_bar
    betas = 1 - kept[1:] / kept[:-1]
    expected = [0.0279, 0.0755, 0.1244, 0.1772, 0.2373, 0.3099, 0.4040, 0.5370, 0.7438, 0.999]
    assert betas.tolist() == pytest.approx(expected, abs=6e-5) and kept[0] == 1 and kept[-1] < 0.01


@pytest.mark.parametrize("sample", [False, True])
def test_denoising_with_a_perfect_guess_gives_the_action_and_stays_on_the_forward_process(sample):
    policy, seen = small("diffusion"), []
    target = torch.tensor([0.3, -0.8])

    def clean(x, noisy, t):
        seen.append((int(t[0]), noisy.clone()))
        return target.expand(len(x), -1)

    policy.clean = clean
    found = policy.decide(torch.zeros(20_000, 3), sample)
    torch.testing.assert_close(found, target.expand(20_000, -1), atol=1e-5, rtol=0)
    assert [t for t, _ in seen] == list(range(10, 0, -1))
    for t, noisy in seen:
        torch.testing.assert_close(noisy.mean(0), policy.alpha_bar[t].sqrt() * target, atol=0.06, rtol=0)
        torch.testing.assert_close(noisy.var(0), (1 - policy.alpha_bar[t]).expand(2), atol=0.06, rtol=0.05)


@pytest.mark.parametrize("sample", [False, True])
def test_denoising_keeps_modes_apart(sample):
    """The best possible guess for an expert at ±0.8: with T = 10 hardly an action may fall between."""
    policy = small("diffusion")

    def clean(x, noisy, t):
        kept = policy.alpha_bar[t][:, None]
        return 0.8 * torch.tanh(0.8 * kept.sqrt() * noisy / (1 - kept))

    policy.clean = clean
    torch.manual_seed(0)
    found = policy.decide(torch.zeros(20_000, 3), sample)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    torch.randn(20_000, 2)
    assert torch.equal(after, torch.get_rng_state()) != sample, "noise is added only to sample"
    assert (found.abs() < 0.6).float().mean() < 0.02 and abs((found > 0).float().mean().item() - 0.5) < 0.02


def test_what_was_held_out_stays_held_out_through_dagger():
    torch.manual_seed(0)
    rows = lambda episodes: (torch.randn(10 * episodes, 2), torch.randn(10 * episodes, 1))  # noqa: E731
    data = bc.Demonstrations(*rows(20), torch.arange(20).repeat_interleave(10), 1.0)
    train, test = data.split(0.1, seed=1)
    assert sorted(torch.cat([train, test]).tolist()) == list(range(200)) and len(test) == 20
    data.add(*rows(5), torch.arange(5).repeat_interleave(10))
    more_train, more_test = data.split(0.1, seed=1)
    assert set(test.tolist()) <= set(more_test.tolist()) and set(train.tolist()) <= set(more_train.tolist())
    assert sorted(torch.cat([more_train, more_test]).tolist()) == list(range(250))
    assert sorted(more_test.tolist())[20:] == [*range(more_test.max() - 4, more_test.max() + 1)], "half of an episode"
    held = data.episode[test].unique()
    assert len(more_test) == 25 and not torch.isin(data.episode[more_train], held).any()


def test_the_diffusion_loss_hides_the_action_by_the_schedule():
    policy, seen = small("diffusion"), []
    policy.clean = lambda x, noisy, t: seen.append((noisy, t)) or torch.zeros_like(noisy)
    u = torch.full((50_000, 2), 0.5)
    assert policy.error(torch.zeros(50_000, 3), u).mean().item() == pytest.approx(0.5)
    noisy, t = seen[0]
    assert t.min() == 1 and t.max() == 10
    for step in (1, 5, 10):
        rows = noisy[t == step]
        kept = policy.alpha_bar[step]
        torch.testing.assert_close(rows.mean(0), (kept.sqrt() * 0.5).expand(2), atol=0.05, rtol=0)
        torch.testing.assert_close(rows.var(0), (1 - kept).expand(2), atol=0.05, rtol=0)


def two_modes(variant: str) -> torch.Tensor:
    """Half of the experts go left, half go right, both dimensions together. 2,000 samples of what is learned."""
    torch.manual_seed(0)
    args = bc.Args(variant=variant, hidden_size=64, num_bins=21)
    policy = bc.VARIANTS[variant](1, -torch.ones(2), torch.ones(2), args)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    obs = torch.zeros(1_000, 1)
    action = torch.where(torch.arange(1_000)[:, None] % 2 == 0, 0.7, -0.7) + 0.02 * torch.randn(1_000, 2)
    for _ in range(800):
        bc.train_batch(policy, optimizer, obs, action, 256, 0.0)
    with torch.no_grad():
        return policy.act(torch.zeros(2_000, 1), sample=True)


@pytest.mark.parametrize("variant", NAMES)
def test_two_modes(variant):
    action = two_modes(variant)
    near = [((action - mode).abs().amax(1) < 0.25).float().mean().item() for mode in (-0.7, 0.7)]
    if variant == "mse":
        assert action.abs().max() < 0.1, "the mean of two good actions"
    elif variant == "gaussian":
        assert sum(near) < 0.6, "one broad hump over both"
    else:
        assert min(near) > 0.35 and sum(near) > 0.93, "both modes, dimensions together"


# --------------------------------------------------------------------------------------------------------------- data


def make_expert(path: Path, env_id: str = "Pendulum-v1", seed: int = 0) -> mbpo_sac.Actor:
    torch.manual_seed(seed)
    env = gym.make(env_id)
    low, high = torch.as_tensor(env.action_space.low), torch.as_tensor(env.action_space.high)
    actor = mbpo_sac.Actor(env.observation_space.shape[0], low, high, 8)
    with torch.no_grad():
        actor.fc_mean.weight *= 5
    torch.save({"env_id": env_id, "actor": actor.state_dict()}, path)
    return actor


TINY = dict(env_id="Pendulum-v1", max_episode_steps=20, num_episodes=4, train_steps=40, batch_size=16, hidden_size=8)
TINY |= dict(eval_every=20, eval_episodes=2, interim_episodes=2, num_threads=1, cuda=False)


def tiny(tmp_path: Path, **changes: object) -> bc.Args:
    tmp_path.mkdir(exist_ok=True)
    expert = tmp_path / "expert.pt"
    if not expert.exists():
        make_expert(expert)
    return bc.Args(**({"log_dir": str(tmp_path / "runs"), "expert": str(expert)} | TINY | changes))


def run(args) -> tuple[dict[str, float], Path]:
    result = bc.main(args)
    return result, Path(args.resume) if args.resume else sorted(Path(args.log_dir).iterdir())[-1]


def stored(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def test_the_expert_is_rolled_out_and_its_return_is_its_own(tmp_path):
    actor = make_expert(tmp_path / "expert.pt")
    _, run_dir = run(tiny(tmp_path))
    data = stored(run_dir)["data"]
    assert data["obs"].shape == (80, 3) and data["episode"].bincount().tolist() == [20] * 4
    torch.testing.assert_close(data["action"], actor.mode(data["obs"]).detach())
    returns = []
    for episode in range(4):
        env = gym.make("Pendulum-v1", max_episode_steps=20)
        obs, total = env.reset(seed=2_001_000 + episode)[0], 0.0
        rows = data["obs"][data["episode"] == episode]
        for t in range(20):
            np.testing.assert_allclose(rows[t], obs, rtol=1e-5)
            obs, reward, *_ = env.step(actor.mode(torch.from_numpy(obs)[None])[0].detach().numpy())
            total += float(reward)
        returns.append(total)
    assert data["expert_return"] == pytest.approx(np.mean(returns), rel=1e-5)


@pytest.mark.parametrize("kind", ["state dict", "tuple", "double"])
def test_cleanrls_files_load(tmp_path, kind):
    actor = make_expert(tmp_path / "ours.pt")
    weights = actor.state_dict()
    if kind == "double":  # its scale is (1, A) in some versions
        weights = {n: v[None] if n.startswith("action") else v for n, v in weights.items()}
    torch.save((weights, {}, {}) if kind == "tuple" else weights, tmp_path / "theirs.pt")
    loaded = bc.load_expert(str(tmp_path / "theirs.pt"), "Pendulum-v1", 3, torch.tensor([-2.0]), torch.tensor([2.0]))
    obs = torch.randn(5, 3)
    assert torch.equal(loaded.mode(obs), actor.mode(obs))


def test_recorded_data_of_both_kinds(tmp_path):
    make_expert(tmp_path / "expert.pt")
    _, run_dir = run(tiny(tmp_path))
    data = stored(run_dir)["data"]
    plain = {"observations": data["obs"], "actions": data["action"], "mean_reward": 50.0, "std_reward": 1.0}
    torch.save(plain, tmp_path / "plain.pt")
    again, other = run(tiny(tmp_path, data=str(tmp_path / "plain.pt"), expert=None))
    assert torch.equal(stored(other)["data"]["obs"], data["obs"])
    assert again["eval/expert_fraction"] == pytest.approx(again["eval/episodic_return"] / 50.0)
    arrays = {"observations": data["obs"].double().numpy(), "actions": data["action"].numpy()}
    numbers = data["episode"].numpy().astype(np.uint8)
    torch.save(arrays | {"mean_reward": np.float64(50.0), "episode": numbers}, tmp_path / "arrays.pt")
    found = bc.from_file(str(tmp_path / "arrays.pt"), "Pendulum-v1", 3, 0, 1)
    assert torch.equal(found.obs, data["obs"]) and found.expert_return == 50.0
    torch.save(arrays, tmp_path / "arrays.pt")
    _, measured = run(tiny(tmp_path / "measured", data=str(tmp_path / "arrays.pt"), expert=str(tmp_path / "expert.pt")))
    expert = bc.load_expert(str(tmp_path / "expert.pt"), "Pendulum-v1", 3, torch.tensor([-2.0]), torch.tensor([2.0]))
    returns = bc.run_episodes(expert.mode, "Pendulum-v1", 10, 2_001_000, torch.device("cpu"), 20)[3]
    assert stored(measured)["data"]["expert_return"] == pytest.approx(returns.mean().item())
    ours = {
        "env_id": "HalfCheetah-v5",
        "obs": torch.randn(60, 18),
        "action": torch.rand(60, 6),
        "reward": torch.ones(60),
    }
    ours |= {"next_obs": torch.randn(60, 18), "terminated": torch.zeros(60), "episode": torch.arange(60) // 20}
    torch.save(ours, tmp_path / "ours.pt")
    changes = {"env_id": "HalfCheetah-v5", "data": str(tmp_path / "ours.pt"), "expert": None}
    _, third = run(tiny(tmp_path / "third", **changes))
    kept = stored(third)["data"]
    assert torch.equal(kept["obs"], ours["obs"][:, 1:]), "x is hidden from a policy"
    assert kept["expert_return"] == pytest.approx(20.0)
    ours |= {"episode": torch.tensor([7] * 40 + [3] * 15 + [5] * 5), "terminated": torch.zeros(60)}
    ours["terminated"][54] = 1.0
    torch.save(ours, tmp_path / "ours.pt")
    cut = bc.from_file(str(tmp_path / "ours.pt"), "HalfCheetah-v5", 17, 1, 6)
    assert cut.expert_return == pytest.approx((40 + 15) / 2), "the last was cut short: neither long nor terminated"
    torch.save(arrays | {"episode": np.repeat([4, 2], len(data["obs"]) // 2)}, tmp_path / "arrays.pt")
    numbered = bc.from_file(str(tmp_path / "arrays.pt"), "Pendulum-v1", 3, 0, 1)
    assert numbered.episode.unique().tolist() == [2, 4]


def test_a_minari_dataset_made_here_loads_and_trains(tmp_path, monkeypatch, capsys):
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    rng, env = np.random.default_rng(0), gym.make("InvertedPendulum-v5")
    space = gym.spaces.Box(-0.4, 0.4, (1,), np.float32)
    buffers = []
    for length, ended in ((12, True), (9, False), (15, True)):
        obs, action = rng.normal(size=(length + 1, 4)), rng.uniform(-0.4, 0.4, (length, 1)).astype(np.float32)
        ends = np.zeros(length, bool)
        ends[-1] = True
        rows = {"observations": list(obs), "actions": list(action), "rewards": [1.0] * length}
        rows |= {"terminations": list(ends & ended), "truncations": list(ends & (not ended))}
        buffers.append(EpisodeBuffer(id=len(buffers), **rows))
    minari.create_dataset_from_buffers(
        "toy/falls-v0", buffers, env=env, observation_space=env.observation_space, action_space=space
    )
    with pytest.raises(SystemExit) as exit:
        bc.from_minari("toy/falls-v0", 2, "Hopper-v5", 4, 1)
    assert exit.value.code == 2 and "is from InvertedPendulum-v5, not from Hopper-v5" in capsys.readouterr().err
    changes = {"env_id": "InvertedPendulum-v5", "minari_id": "toy/falls-v0", "expert": None, "num_episodes": 2}
    result, run_dir = run(tiny(tmp_path, **changes))
    data = stored(run_dir)["data"]
    assert data["episode"].bincount().tolist() == [12, 9] and data["obs"].shape == (21, 4)
    np.testing.assert_allclose(data["obs"][12:], np.asarray(buffers[1].observations)[:9], rtol=1e-6)
    np.testing.assert_allclose(data["action"][:12], np.asarray(buffers[0].actions))
    assert data["expert_return"] == pytest.approx(10.5) and math.isfinite(result["losses/train_loss"])


class Bare(gym.Env):
    """The least that an environment can be."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([1, 0], np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 1.0, False, False, {}


def test_an_environment_without_render_mode_and_one_whose_actions_cannot_be_scaled(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gym.registry, "Bare-v0", gym.envs.registration.EnvSpec("Bare-v0", Bare, max_episode_steps=5))
    act = lambda obs: torch.zeros(len(obs), 2)  # noqa: E731
    assert bc.run_episodes(act, "Bare-v0", 2, 1, torch.device("cpu"), None)[3].tolist() == [5, 5]
    with pytest.raises(SystemExit) as exit:
        bc.main(tiny(tmp_path, env_id="Bare-v0", max_episode_steps=None))
    assert exit.value.code == 2 and "has no range" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- DAgger


def test_dagger_asks_the_expert_everywhere_and_goes_where_the_policy_goes(tmp_path):
    expert = make_expert(tmp_path / "expert.pt")
    policy = bc.MSE(3, torch.tensor([-2.0]), torch.tensor([2.0]), bc.Args(hidden_size=8))
    args = tiny(tmp_path, dagger_episodes=3)
    start = lambda: bc.Demonstrations(torch.zeros(2, 3), torch.zeros(2, 1), torch.tensor([0, 1]), 0.0)  # noqa: E731
    visited = {}
    for beta in (0.0, 0.5, 1.0):
        args.dagger_beta, data = beta, start()
        torch.manual_seed(0)
        bc.dagger(args, policy, expert, data, 1, torch.device("cpu"))
        assert len(data.obs) == 62 and data.episode[2:].bincount().tolist() == [0, 0, 20, 20, 20]
        torch.testing.assert_close(data.action[2:], expert.mode(data.obs[2:]).detach())
        visited[beta] = data.obs[2:].view(20, 3, 3)  # the three episodes side by side
    device, seed = torch.device("cpu"), 3_100_000 + 1_000 * args.seed
    for beta, act in ((0.0, policy.act), (1.0, expert.mode)):
        alone = bc.run_episodes(act, args.env_id, 3, seed, device, 20)[0]
        torch.testing.assert_close(visited[beta].reshape(60, 3), alone)
    assert not torch.equal(visited[0.5], visited[0.0]) and not torch.equal(visited[0.5], visited[1.0])
    args.dagger_beta, data = 0.5, start()
    asked = []
    expert.mode = lambda obs: asked.append(len(obs)) or torch.zeros(len(obs), 1)
    torch.manual_seed(0)
    shares = []
    where = torch.where
    try:
        count = lambda condition: condition.shape == (3, 1) and shares.append(condition.float().mean().item())  # noqa: E731
        torch.where = lambda condition, *rest: count(condition) or where(condition, *rest)
        bc.dagger(args, policy, expert, data, 3, device)
    finally:
        torch.where = where
    assert np.mean(shares) == pytest.approx(0.125, abs=0.09), "beta to the power of the round"


def test_dagger_helps_where_cloning_drifts(tmp_path):
    """One expert episode, then its corrections: how far the clone is from the expert where the clone itself goes."""
    expert = make_expert(tmp_path / "expert.pt")
    changes = dict(num_episodes=1, train_steps=300, max_episode_steps=100, learning_rate=3e-3)
    errors = []
    for rounds in (0, 4):
        _, run_dir = run(tiny(tmp_path, dagger_rounds=rounds, **changes))
        assert len(stored(run_dir)["data"]["obs"]) == 100 * (1 + rounds * 5)
        obs, action, *_ = bc.run_episodes(
            bc.load_clone(str(run_dir)).act, "Pendulum-v1", 10, 7, torch.device("cpu"), 100
        )
        errors.append((action - expert.mode(obs)).abs().mean().item())
    assert errors[1] < 0.5 * errors[0]


# --------------------------------------------------------------------------------------------------------------- runs


def logged(run_dir: Path) -> list[tuple[str, ...]]:
    rows = [tuple(row) for row in csv.reader((run_dir / "metrics.csv").open())]
    return sorted(row for row in rows if not row[1].startswith(("time/", "charts/SPS")))


@pytest.mark.parametrize("variant", NAMES)
def test_a_run_leaves_its_metrics_and_says_the_same_when_evaluated_again(tmp_path, variant):
    result, run_dir = run(tiny(tmp_path, variant=variant, dagger_rounds=1, dagger_episodes=2))
    tags = {row[1] for row in csv.reader((run_dir / "metrics.csv").open())} - {"tag"}
    prefixes = ("charts/", "eval/", "losses/", "time/")
    documented = {line.split()[0] for line in bc.__doc__.splitlines() if line.strip().startswith(prefixes)}
    assert tags == documented
    assert json.loads((run_dir / "result.json").read_text()) == result
    again = bc.main(bc.parse_args(["--resume", str(run_dir), "--eval-only"]))
    for name in ("eval/episodic_return", "eval/episodic_return_std", "eval/expert_fraction"):
        assert again[name] == result[name]
    if variant != "diffusion":  # its best guess depends on the noise that it begins with
        clone = bc.load_clone(str(run_dir))
        returns = bc.run_episodes(clone.act, "Pendulum-v1", 2, 1_001_000, torch.device("cpu"), 20)[3]
        assert returns.mean() == pytest.approx(result["eval/episodic_return"])


def test_a_finished_run_is_not_resumed_as_another_one(tmp_path, capsys):
    _, run_dir = run(tiny(tmp_path, dagger_rounds=1, dagger_episodes=1))
    before = (run_dir / "args.json").read_text()
    for flags, words in (
        (["--eval-episodes", "3"], "has finished; evaluate it with --eval-only"),
        (["--dagger-rounds", "0"], f"--dagger-rounds 0: {run_dir} has had 1"),
    ):
        with pytest.raises(SystemExit) as exit:
            bc.main(bc.parse_args(["--resume", str(run_dir), *flags]))
        assert exit.value.code == 2 and words in capsys.readouterr().err
    assert (run_dir / "args.json").read_text() == before
    more = bc.parse_args(["--resume", str(run_dir), "--dagger-rounds", "2", "--eval-episodes", "3"])
    assert bc.main(more)["eval/episodic_return"]
    assert json.loads((run_dir / "args.json").read_text())["dagger_rounds"] == 2


def test_a_run_does_not_end_with_an_evaluation_in_between(tmp_path, monkeypatch, capsys):
    """Stopped after round 0 and resumed to have no other, it would have had no last evaluation."""
    args = tiny(tmp_path, dagger_rounds=1, dagger_episodes=1, checkpoint_every=20)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(bc, "dagger", lambda *rest: (_ for _ in ()).throw(MemoryError))
        bc.main(args)
    run_dir = next(Path(args.log_dir).iterdir())
    with pytest.raises(SystemExit):
        bc.main(bc.parse_args(["--resume", str(run_dir), "--dagger-rounds", "0"]))
    assert "--dagger-rounds 0" in capsys.readouterr().err
    bc.main(bc.parse_args(["--resume", str(run_dir)]))


def test_a_fresh_process_evaluates_to_the_same_return(tmp_path):
    result, run_dir = run(tiny(tmp_path, variant="gmm"))
    script = [sys.executable, bc.__file__, "--resume", str(run_dir), "--eval-only", "--num-threads", "1"]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert f"return {result['eval/episodic_return']:.1f} " in printed


@pytest.mark.parametrize("variant, call", [("mse", 57), ("diffusion", 33), ("autoregressive", 50), ("gmm", 12)])
def test_killed_and_resumed_equals_never_stopped(tmp_path, monkeypatch, variant, call):
    changes = {"variant": variant, "dagger_rounds": 1, "dagger_episodes": 2}
    _, whole = run(tiny(tmp_path / "whole", **changes))
    args = tiny(tmp_path / "killed", checkpoint_every=7, **changes)
    original, calls = bc.train_batch, iter(range(10**6))

    def killed(*args):
        if next(calls) == call:
            raise MemoryError
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(bc, "train_batch", killed)
        with pytest.raises(MemoryError):
            bc.main(args)
    run_dir = next(Path(args.log_dir).iterdir())
    bc.main(bc.parse_args(["--resume", str(run_dir)]))
    one, two = stored(whole), stored(run_dir)
    for part in ("policy", "average", "data"):
        same = [torch.equal(one[part][n], two[part][n]) for n in one[part] if isinstance(one[part][n], torch.Tensor)]
        assert all(same) and same
    assert logged(whole) == logged(run_dir)


def test_an_early_stop_goes_back_to_the_best(tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5, 9.0])
    weights = []

    def measured(policy, *rest):
        weights.append({name: value.clone() for name, value in policy.state_dict().items()})
        return {"losses/train_loss": 0.0, "losses/holdout_loss": next(losses), "losses/action_error": 0.0}

    monkeypatch.setattr(bc, "measure", measured)
    _, run_dir = run(tiny(tmp_path, train_steps=1_000, stop_after=2))
    assert len(weights) == 5, "it stops after two evaluations without a lower loss, and measures what it went back to"
    final = stored(run_dir)["average"]
    assert all(torch.equal(final[name], weights[1][name]) for name in final)
    assert not all(torch.equal(final[name], weights[3][name]) for name in final)
    found = [float(row[2]) for row in csv.reader((run_dir / "metrics.csv").open()) if row[1] == "losses/holdout_loss"]
    assert found == [3.0, 1.0, 2.0, 9.0], "losses and returns of a step are of the same weights"


def test_the_running_mean_is_one(tmp_path):
    _, run_dir = run(tiny(tmp_path, ema_decay=0.9))
    saved = stored(run_dir)
    assert not torch.equal(saved["policy"]["net.0.weight"], saved["average"]["net.0.weight"])
    _, run_dir = run(tiny(tmp_path, ema_decay=0.0))
    saved = stored(run_dir)
    assert torch.equal(saved["policy"]["net.0.weight"], saved["average"]["net.0.weight"])


def test_the_running_mean_forgets_where_it_began(tmp_path):
    """After 40 steps with a memory of a thousand, what acts has to have learned, too."""
    _, still = run(tiny(tmp_path / "still", learning_rate=1e-12))
    _, moved = run(tiny(tmp_path / "moved", learning_rate=1e-2))
    first, now, average = stored(still)["policy"], stored(moved)["policy"], stored(moved)["average"]
    for name in ("net.0.weight", "net.2.weight", "net.4.weight"):
        assert (average[name] - now[name]).norm() < 0.7 * (first[name] - now[name]).norm(), name


def test_demonstrations_that_cannot_be(tmp_path, capsys):
    data = {"observations": torch.randn(50, 3), "actions": 20 * torch.ones(50, 1), "mean_reward": 1.0}
    torch.save(data, tmp_path / "big.pt")
    with pytest.raises(SystemExit) as exit:
        bc.main(tiny(tmp_path, data=str(tmp_path / "big.pt")))
    assert exit.value.code == 2 and "exceed the bounds of Pendulum-v1 by up to 18" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        bc.main(tiny(tmp_path, num_episodes=1, max_episode_steps=1))
    assert exit.value.code == 2 and "one transition" in capsys.readouterr().err
    narrow = bc.Demonstrations(torch.zeros(9, 3), torch.tensor([[500.0, 1.5]] * 9), torch.zeros(9), 1.0)
    with pytest.raises(SystemExit):  # half as much again as the second may be, and little beside the first
        bc.check_demonstrations(narrow, "X-v0", torch.zeros(2), torch.tensor([1000.0, 1.0]))
    assert "by up to 0.5" in capsys.readouterr().err
    expert = torch.load(tmp_path / "expert.pt", weights_only=True)
    expert["actor"]["fc2.weight"][0, 0] = torch.nan
    torch.save(expert, tmp_path / "expert.pt")
    with pytest.raises(SystemExit) as exit:
        bc.main(tiny(tmp_path))
    err = capsys.readouterr().err
    assert exit.value.code == 2 and "expert.pt: fc2.weight has 1 non-finite values, the first in row 0" in err


def test_a_moved_expert_is_asked_and_samples_are_evaluated_after_all(tmp_path, capsys):
    result, run_dir = run(tiny(tmp_path, variant="gmm"))
    moved = (tmp_path / "expert.pt").rename(tmp_path / "moved.pt")
    again = bc.main(bc.parse_args(["--resume", str(run_dir), "--eval-only", "--sample"]))
    assert again["eval/episodic_return"] != result["eval/episodic_return"]
    bc.main(bc.parse_args(["--resume", str(run_dir), "--dagger-rounds", "1", "--expert", str(moved)]))
    with pytest.raises(SystemExit):
        bc.main(bc.parse_args(["--resume", str(run_dir), "--dagger-rounds", "2", "--sample"]))
    moved.unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        bc.main(bc.parse_args(["--resume", str(run_dir), "--dagger-rounds", "2"]))
    assert exit.value.code == 2 and f"no expert in {moved}" in capsys.readouterr().err


def test_a_diverged_policy_does_not_overwrite_its_checkpoint(tmp_path):
    args = tiny(tmp_path, learning_rate=1e30, checkpoint_every=20)
    with pytest.raises(SystemExit) as exit:
        bc.main(args)
    assert "non-finite losses/" in str(exit.value.code)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"expert": "no-such-file.pt"}, "no expert in no-such-file.pt"),
        ({"expert": None}, "make it with: python mbpo_sac.py --env-id Pendulum-v1"),
        ({"expert": "scaled"}, "exceeds the bounds of Pendulum-v1's actions by up to 2"),
        ({"expert": "scaled", "data": "plain", "dagger_rounds": 1}, "exceeds the bounds"),
        ({"sample": True}, "--sample: mse is a point"),
        ({"expert": None, "data": "plain", "dagger_rounds": 1}, "needs an expert to ask"),
        ({"data": "plain", "minari_id": "x"}, "two sources"),
        ({"expert": "other"}, "was made for Other-v0, not for Pendulum-v1"),
        ({"expert": "shape"}, "is no actor"),
        ({"expert": "headless"}, "is no actor"),
        ({"expert": "listed"}, "is no actor"),
        ({"expert": None, "data": "wrong"}, "not (N, 3) and (N, 1)"),
        ({"expert": None, "data": "empty"}, "N > 1"),
        ({"expert": None, "data": "nan"}, "non-finite"),
        ({"expert": None, "data": "strange"}, "holds neither"),
        ({"expert": None, "data": "code"}, "it may hold tensors, numpy's arrays of numbers, and numbers"),
        ({"expert": None, "data": "returnless"}, "has no finite mean_reward"),
        ({"expert": None, "data": "elsewhere"}, "is from Other-v0, not from Pendulum-v1"),
        ({"expert": None, "minari_id": "x/y-v0", "dagger_rounds": 1}, "needs an expert to ask"),
        ({"num_bins": 1}, "--num-bins"),
        ({"dagger_beta": 2.0}, "--dagger-beta"),
        ({"eval_only": True}, "--eval-only needs --resume"),
    ],
)
def test_bad_arguments(tmp_path, capfd, changes, words):
    rows = {"observations": torch.randn(10, 3), "actions": torch.rand(10, 1), "mean_reward": 1.0}
    files = {"plain": rows, "wrong": rows | {"actions": torch.rand(10, 2)}, "strange": {"x": 1}}
    files["code"] = rows | {"actions": Path("anything")}
    files |= {"returnless": {name: rows[name] for name in ("observations", "actions")}}
    files |= {"elsewhere": rows | {"env_id": "Other-v0"}}
    files |= {"nan": rows | {"actions": torch.full((10, 1), torch.nan)}}
    files |= {"empty": rows | {"observations": torch.randn(0, 3), "actions": torch.rand(0, 1)}}
    actor = make_expert(tmp_path / "good.pt")
    files |= {"other": {"env_id": "Other-v0", "actor": actor.state_dict()}, "shape": {"fc1.weight": torch.zeros(3)}}
    whole = actor.state_dict()
    files |= {"scaled": whole | {"action_scale": 2 * whole["action_scale"]}}
    files |= {"headless": {k: v for k, v in whole.items() if k != "fc_mean.bias"}, "listed": whole | {"fc2.bias": [1]}}
    for name, contents in files.items():
        torch.save(contents, tmp_path / name)
    changes = {k: str(tmp_path / v) if isinstance(v, str) and v in files else v for k, v in changes.items()}
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        bc.main(tiny(tmp_path, **changes))
    lines = capfd.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_ends_an_evaluation_alone_at_once(tmp_path, monkeypatch):
    """It saves nothing, and so there is nothing to wait for."""
    _, run_dir = run(tiny(tmp_path))
    monkeypatch.setattr(bc, "run_episodes", lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        bc.main(replace(bc.load_args(str(run_dir)), resume=str(run_dir), eval_only=True))


def test_weights_that_have_diverged_are_not_saved(tmp_path, monkeypatch):
    """Those of the last step, which no loss has seen."""
    monkeypatch.setattr(bc, "weight_size", lambda networks: {"weights": torch.nan})
    with pytest.raises(SystemExit, match="non-finite weights"):
        bc.main(tiny(tmp_path))
    assert not list(tmp_path.glob("runs/*/checkpoint.pt"))
