"""adversarial_imitation.py: the equations, the absorbing state, what the agent may not know, runs."""

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
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import adversarial_imitation as adv
import bc_variants

TINY = dict(env_id="Pendulum-v1", max_episode_steps=15, num_episodes=3, total_timesteps=80, initial_steps=30)
TINY |= dict(eval_every=25, eval_episodes=2, interim_episodes=1, batch_size=16, units=8, discriminator_units=8)
TINY |= dict(num_threads=1, cuda=False)
LOW, HIGH = torch.tensor([-1.0, 0.5]), torch.tensor([0.0, 2.0])
CPU = torch.device("cpu")


def make_expert(path: Path, env_id: str = "Pendulum-v1") -> adv.Actor:
    torch.manual_seed(0)
    env = gym.make(env_id)
    low, high = torch.as_tensor(env.action_space.low), torch.as_tensor(env.action_space.high)
    actor = adv.Actor(env.observation_space.shape[0], low, high, 8)
    torch.save({"env_id": env_id, "actor": actor.state_dict()}, path)
    return actor


def tiny(tmp_path: Path, **changes: object) -> adv.Args:
    tmp_path.mkdir(exist_ok=True)
    env_id = str(changes.get("env_id", "Pendulum-v1"))
    expert = tmp_path / f"{env_id}.pt"
    if not expert.exists():
        make_expert(expert, env_id)
    changes = {"expert": None if {"data", "minari_id"} & {*changes} else str(expert)} | changes
    return adv.Args(**({"log_dir": str(tmp_path / "runs")} | TINY | changes))


def recorded(count: int, **columns: torch.Tensor) -> dict[str, object]:
    """What --save-data writes."""
    rows = {"obs": torch.randn(count, 3), "action": torch.zeros(count, 1), "next_obs": torch.randn(count, 3)}
    rows |= {"reward": torch.ones(count), "terminated": torch.zeros(count)}
    return {"env_id": "Pendulum-v1", "episode": torch.zeros(count, dtype=torch.int64), **rows} | columns


def run(args) -> tuple[dict[str, float], Path]:
    result = adv.main(args)
    return result, Path(args.resume) if args.resume else sorted(Path(args.log_dir).iterdir())[-1]


def logged(run_dir: Path) -> list[tuple[str, ...]]:
    rows = [tuple(row) for row in csv.reader((run_dir / "metrics.csv").open())]
    return sorted(row for row in rows if not row[1].startswith(("time/", "charts/SPS")))


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    flat = {}
    for part in ("agent", "discriminator", "buffer", "data"):
        flat |= {f"{part}.{k}": v for k, v in checkpoint[part].items() if isinstance(v, torch.Tensor)}
    return flat


def assert_same(one: Path, two: Path) -> None:
    a, b = state(one), state(two)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert logged(one) == logged(two)


def discriminator(algo: str = "airl", **changes) -> adv.Discriminator:
    torch.manual_seed(0)
    made = adv.Discriminator(3, LOW, HIGH, adv.Args(algo=algo, discriminator_units=16, **changes))
    made.normaliser.fit(2 * torch.randn(50, 3) + 1)
    return made


def tiny_agent() -> adv.Agent:
    return adv.Agent(3, LOW, HIGH, adv.Args(units=8))


def batch(count: int = 32, shift: float = 0.0) -> adv.Transitions:
    obs, next_obs = shift + torch.randn(count, 3), shift + torch.randn(count, 3)
    action = LOW + torch.rand(count, 2) * (HIGH - LOW)
    return obs, action, next_obs, (torch.rand(count) < 0.3).float()


# ---------------------------------------------------------------------------------------------------------- equations


def test_the_density_of_given_actions_is_torchs_and_saturated_ones_are_finite():
    torch.manual_seed(0)
    actor, obs = adv.Actor(3, LOW, HIGH, 16), torch.randn(40, 3)
    action, expected = actor.sample(obs)
    torch.testing.assert_close(adv.log_prob(actor, obs, action), expected, rtol=1e-3, atol=1e-3)
    mean, log_std = actor(obs)
    theirs = Independent(TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform()]), 1)
    scaled = (action - actor.action_bias) / actor.action_scale
    torch.testing.assert_close(adv.log_prob(actor, obs, action), theirs.log_prob(scaled), rtol=1e-3, atol=1e-3)
    assert adv.log_prob(actor, obs, HIGH.expand(40, -1)).isfinite().all()


@pytest.mark.parametrize("alpha, spread", [(1.0, 1.0), (0.4, 2.0), (0.0, 1.0), (0.5, 1e-6)])
def test_airls_logit_is_that_of_its_discriminator(alpha, spread):
    """D = exp f / (exp f + π), Fu et al. 2018, at temperature 1; exp f / (exp f + π^α) at SAC's times the spread."""
    judge, rows, log_prob = discriminator(), batch(), torch.randn(32)
    judge.spread.fill_(spread)
    step, temperature = judge.steps(*rows), torch.tensor(alpha)
    far = torch.full((32,), 40.0)
    for sign in (1, -1):  # ±5
        bound = judge.logit(step, sign * far / 8, temperature)
        torch.testing.assert_close(judge.logit(step, sign * far, temperature), bound)
    many = adv.Discriminator(3, -torch.ones(12), torch.ones(12), adv.Args(algo="airl"))
    assert many.bound == 12, "as large as the mean log π of a policy that has SAC's usual target entropy"
    f = judge.score(step)
    expected = f.exp() / (f.exp() + log_prob.exp() ** (alpha * max(spread, 0.1)))
    torch.testing.assert_close(torch.sigmoid(judge.logit(step, log_prob, temperature)), expected)
    x, next_x = judge.normaliser(rows[0]), judge.normaliser(rows[2])
    u = 2 * (rows[1] - LOW) / (HIGH - LOW) - 1
    shaped = judge.head(torch.cat([x, u], 1)) - judge.potential(x)
    shaped = shaped + 0.99 * (1 - rows[3])[:, None] * judge.potential(next_x)
    torch.testing.assert_close(f, shaped[:, 0])
    assert torch.equal(judge.reward(f), f), "not f - log π: the entropy is SAC's"


def test_gails_logit_knows_no_density_and_its_reward_is_positive():
    judge, rows = discriminator("gail"), batch()
    step = judge.steps(*rows)
    score = judge.score(step)
    same = torch.equal(judge.logit(step, torch.randn(32), torch.ones(())), score)
    assert same and not hasattr(judge, "potential")
    torch.testing.assert_close(judge.reward(score), -(1 - torch.sigmoid(score)).log())
    other = judge.steps(rows[0], rows[1], torch.randn(32, 3), 1 - rows[3])
    assert torch.equal(judge.score(other), score), "what comes after is not seen"


@pytest.mark.parametrize("algo", ["gail", "airl"])
def test_the_discriminators_loss_falls_on_a_fixed_batch(algo):
    judge = discriminator(algo)
    optimizer = torch.optim.Adam(judge.parameters(), 1e-3)
    agent = tiny_agent()
    actor, expert, policy = agent.actor, batch(shift=1.0), batch(shift=-1.0)
    expert, policy = ((rows[0], actor.sample(rows[0])[0].detach(), *rows[2:]) for rows in (expert, policy))
    losses = [adv.train_discriminator(judge, optimizer, agent, expert, policy, 0.1) for _ in range(200)]
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][2] > losses[-1][3] + 2, "the expert's logit above the policy's"
    assert all(weight.grad is None for weight in actor.parameters())


@pytest.mark.parametrize("algo, scale", [("gail", 3.0), ("gail", 0.5), ("airl", 3.0)])
def test_equation_4_and_the_penalty(algo, scale):
    judge, expert, policy = discriminator(algo), batch(), batch()
    # With linear functions the slope is the same everywhere: over u and x, and for AIRL over next_x.
    judge.head = torch.nn.Linear(5, 1)
    judge.head.weight.data *= scale / judge.head.weight.norm()
    w, gamma = judge.head.weight[0].detach(), 0.99
    if algo == "gail":
        slope = w.norm()
    else:  # with no ended step, so that γ counts in full
        judge.potential = torch.nn.Linear(3, 1)
        v = judge.potential.weight[0].detach()
        expert, policy = (*expert[:3], torch.zeros(32)), (*policy[:3], torch.zeros(32))
        slope = torch.cat([w[:3] - v, w[3:], gamma * v]).norm()
    agent = tiny_agent()
    logits = []
    for rows in (expert, policy):
        density = adv.log_prob(agent.actor, rows[0], rows[1]) if algo == "airl" else torch.zeros(())
        logits.append(judge.logit(judge.steps(*rows), density, agent.temperature()).detach())
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    expected = entropy(logits[0], torch.ones(32)) + entropy(logits[1], torch.zeros(32))
    before = {name: weight.detach().clone() for name, weight in judge.named_parameters()}
    found = adv.train_discriminator(judge, torch.optim.SGD(judge.parameters(), 0.1), agent, expert, policy, 0.0)
    penalty = (slope - 1).clamp(min=0) ** 2
    torch.testing.assert_close(found, torch.stack([expected, penalty, logits[0].mean(), logits[1].mean()]))
    plain = {name: weight.detach().clone() for name, weight in judge.named_parameters()}
    assert any(not torch.equal(plain[name], before[name]) for name in before)
    judge.load_state_dict(before, strict=False)
    adv.train_discriminator(judge, torch.optim.SGD(judge.parameters(), 0.1), agent, expert, policy, 5.0)
    as_before = torch.equal(judge.head.weight, plain["head.weight"])
    assert as_before == (scale < 1), "the penalty is trained on, where the slope is above 1"


@pytest.mark.parametrize("algo", ["gail", "airl"])
def test_the_discriminators_gradients_compile_as_one_program(algo, monkeypatch):
    """With the penalty's slopes of slopes, and without a graph break; the same numbers as without."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(adv, "compiled", lambda f, device: torch.compile(f, backend=backend, fullgraph=True))
    found, agent, expert, policy = [], tiny_agent(), batch(), batch()
    for compile in (False, True):
        torch.manual_seed(0)
        judge = adv.Discriminator(3, LOW, HIGH, adv.Args(algo=algo, discriminator_units=16, compile=compile))
        optimizer = torch.optim.Adam(judge.parameters(), 1e-2)
        steps = [adv.train_discriminator(judge, optimizer, agent, expert, policy, 10.0) for _ in range(3)]
        found.append([*steps, *judge.parameters()])
        assert len(graphs) == compile
    torch._dynamo.reset()
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------- the absorbing state


@pytest.mark.parametrize("algo", ["gail", "airl"])
def test_a_step_that_ends_an_episode_is_paid_for_what_comes_after(algo):
    judge, rows = discriminator(algo), batch(500)
    raw = judge.reward(judge.score(judge.steps(*rows))).detach()
    judge.spread.fill_(2.0)
    judge.centre.fill_(0.5 if algo == "airl" else 0.0)
    absorbing = judge.absorbing_reward(-1.5)
    torch.testing.assert_close(absorbing, torch.tensor(-1.5) if algo == "airl" else torch.tensor(-1.5).exp().log1p())
    found = adv.learned_reward(judge, rows, -1.5, 0.0)
    spread = 0.999 * 2.0 + 0.001 * raw.std()
    centre = 0.999 * 0.5 + 0.001 * raw.mean() if algo == "airl" else torch.zeros(())  # AIRL's rewards are shifted
    torch.testing.assert_close([judge.spread, judge.centre], [spread, centre])
    torch.testing.assert_close(found, (raw - centre + rows[3] * 99 * (absorbing - centre)) / spread)
    rows = (*rows[:3], torch.zeros(500))
    raw = judge.score(judge.steps(*rows)).detach()
    more = adv.learned_reward(judge, rows, -1.5, 2.0) * judge.spread + judge.centre
    torch.testing.assert_close(more, raw + 2.0 if algo == "airl" else torch.nn.functional.softplus(raw + 2.0))
    judge.spread.fill_(1e-6)
    assert adv.learned_reward(judge, rows, -1.5, 0.0).abs().max() < 100


@pytest.mark.parametrize("algo", ["gail", "airl"])
def test_without_an_absorbing_state_nothing_comes_after_the_end_and_nothing_is_shifted(algo):
    judge, rows = discriminator(algo), batch(500)
    raw = judge.reward(judge.score(judge.steps(*rows))).detach()
    found = adv.learned_reward(judge, rows, None, 0.0)
    torch.testing.assert_close(found, raw / judge.spread)
    assert judge.absorbing_reward(None) == 0 and judge.centre == 0


def test_shares_of_the_absorbing_state():
    absorption = adv.Absorption(expert_share=0.25, limit=100, newest=1_000)
    assert absorption.logits() == (0, 0), "nothing is known yet"
    absorption.add([100, 50])  # one whole episode, one that ended half way
    assert absorption.logits() == pytest.approx((0.0, 0.0))
    absorption.add([25] * 18)
    share = (50 + 18 * 75) / 2_000
    assert absorption.logits() == pytest.approx((math.log(0.25 / share), math.log(0.75 / (1 - share))))
    absorption.add([100] * 20)  # the oldest are forgotten; a share of nothing counts as a thousandth
    assert absorption.logits() == pytest.approx((5.0, math.log(0.75))), "within ±5"
    absorption.add([20] * 60)
    assert list(absorption.lengths) == [20] * 50, "the last 1,000 steps: those that D sees"
    rare = adv.Absorption(expert_share=1e-6, limit=1_000, newest=10_000)
    rare.lengths.append(1)
    assert rare.logits() == (-5.0, 5.0)


def test_where_neither_ever_ends_ending_is_not_paid_for():
    """Whatever the number of the expert's episodes: a policy that never falls must not be paid to."""
    for episodes in (1, 10, 100):
        obs = torch.zeros(1_000 * episodes, 1)
        episode = torch.arange(episodes).repeat_interleave(1_000)
        expert = adv.Demonstrations(obs, obs, episode, 1.0, torch.zeros(len(obs)))
        absorption = adv.Absorption(expert.absorbed(1_000), 1_000, 10_000)
        absorption.add([1_000] * 20)
        there, elsewhere = absorption.logits()
        assert there < -4 and elsewhere == 0
        judge = adv.Discriminator(1, LOW, HIGH, adv.Args(algo="gail"))
        assert judge.absorbing_reward(there) < 0.1 * judge.absorbing_reward(0.0), "for ever less than a life at 0"
        absorption.add([900])
        assert absorption.logits()[0] < -4


def test_transitions_follow_each_other_within_an_episode():
    """Rows of episodes that ran side by side, as run_episodes gives them; the second one was shorter."""
    episode = torch.tensor([0, 1, 0, 1, 0, 0])
    obs = torch.tensor([0.0, 10, 1, 11, 2, 3])[:, None]
    ended = torch.tensor([0, 0, 0, 1, 0, 0])  # the last step of episode 1; what followed episode 0 is not known
    data = adv.Demonstrations(obs, obs + 0.5, episode, 1.0, ended)
    found = data.transitions()
    assert found[0][:, 0].tolist() == [0, 1, 2, 10, 11] and found[2][:3, 0].tolist() == [1, 2, 3]
    assert found[2][3].item() == 11 and found[3].tolist() == [0, 0, 0, 0, 1]
    assert found[1][:, 0].tolist() == [0.5, 1.5, 2.5, 10.5, 11.5]
    assert data.absorbed(4) == pytest.approx(2 / 8) and data.absorbed(3) == pytest.approx(1 / 6)
    assert data.absorbed(2) == 0
    cut = adv.Demonstrations(obs, obs + 0.5, episode, 1.0, torch.zeros(6))
    assert cut.transitions()[0][:, 0].tolist() == [0, 1, 2, 10] and cut.absorbed(100) == 0
    unordered = adv.Demonstrations(obs, obs + 0.5, torch.zeros(6), 1.0)
    found = unordered.transitions()
    assert found[0].shape == (6, 1) and found[3].sum() == 0
    assert unordered.absorbed(10) == 0, "not an early end"


def test_a_file_says_which_of_its_episodes_ended(tmp_path):
    """Neither episodes cut short nor a single one are taken for something else; a policy's own ended if short."""
    low, high = torch.tensor([-2.0]), torch.tensor([2.0])
    data = adv.from_file(str(saved(tmp_path, recorded(30))), "Pendulum-v1", 3, 0, 1)
    assert len(data.transitions()[0]) == 29 and data.absorbed(200) == 0
    ended = recorded(30, terminated=torch.arange(30) == 29)
    data = adv.from_file(str(saved(tmp_path, ended)), "Pendulum-v1", 3, 0, 1)
    assert data.transitions()[3].tolist() == [0.0] * 29 + [1.0] and data.absorbed(200) == pytest.approx(0.85)
    args = tiny(tmp_path, algo="airl", data=str(tmp_path / "data.pt"))
    assert adv.expert_data(args, None, (3, 0, 1), low, high, 200)[2] == pytest.approx(0.85), "one episode is in order"
    run(replace(args, total_timesteps=42))
    args = tiny(tmp_path, env_id="Hopper-v5", num_episodes=3, max_episode_steps=None)
    low, high = torch.full((3,), -1.0), torch.ones(3)
    data, transitions, absorbed = adv.expert_data(args, None, (11, 1, 3), low, high, 1_000)
    assert transitions[3].sum() == 3 and absorbed == pytest.approx(1 - len(data.obs) / 3_000), "all of them fell"
    short = adv.expert_data(replace(args, max_episode_steps=5), None, (11, 1, 3), low, high, 5)
    assert short[1][3].sum() == 0 and len(short[0].obs) == 15, "none fell before its limit"


def test_a_dict_may_tell_episodes_apart_and_say_which_ended(tmp_path):
    rows = {"observations": torch.arange(5.0)[:, None], "actions": torch.zeros(5, 1), "mean_reward": 7.0}
    rows["episode"] = torch.tensor([3, 3, 3, 8, 8])
    told = adv.from_file(str(saved(tmp_path, rows)), "Pendulum-v1", 1, 0, 1)
    assert told.transitions()[2][:, 0].tolist() == [1, 2, 4] and told.absorbed(10) == 0 and told.expert_return == 7
    rows["terminated"] = torch.tensor([False, False, False, False, True])
    told = adv.from_file(str(saved(tmp_path, rows)), "Pendulum-v1", 1, 0, 1)
    assert told.transitions()[3].tolist() == [0, 0, 0, 1] and told.absorbed(10) == pytest.approx(8 / 20)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"terminated": torch.tensor([0, 1, 0, 0, 0])}, "goes on after a row that is terminated"),
        ({"terminated": torch.tensor([0, 0, 0, 0, math.nan])}, "terminated has 1 non-finite values"),
        ({"terminated": torch.zeros(5), "episode": None}, "terminated needs episode"),
    ],
)
def test_ends_that_cannot_be_are_refused(tmp_path, capfd, changes, words):
    rows = {"observations": torch.arange(5.0)[:, None], "actions": torch.zeros(5, 1), "mean_reward": 7.0}
    rows |= {"episode": torch.tensor([3, 3, 3, 8, 8])} | changes
    with pytest.raises(SystemExit) as exit:
        adv.from_file(str(saved(tmp_path, {k: v for k, v in rows.items() if v is not None})), "Pendulum-v1", 1, 0, 1)
    assert exit.value.code == 2 and words in capfd.readouterr().err


def test_pieces_of_episodes_do_not_count_as_returns(tmp_path):
    rows = recorded(30) | {"reward": torch.ones(30), "episode": torch.tensor([0] * 20 + [1] * 5 + [2] * 5)}
    rows["terminated"] = torch.zeros(30)
    rows["terminated"][24] = 1
    found = adv.from_file(str(saved(tmp_path, rows)), "Pendulum-v1", 3, 0, 1)
    assert found.expert_return == pytest.approx((20 + 5) / 2), "the last five rows were only cut short"


def test_a_minari_dataset_says_which_of_its_episodes_ended(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    env, buffers = gym.make("InvertedPendulum-v5"), []
    for length, ended in ((4, True), (3, False), (5, True)):
        last = np.arange(length) == length - 1
        rows = {"observations": list(np.full((length + 1, 4), length) + np.arange(length + 1)[:, None] / 10)}
        rows |= {"actions": list(np.full((length, 1), 0.5, np.float32)), "rewards": [2.0] * length}
        rows |= {"terminations": list(last & ended), "truncations": list(last & (not ended))}
        buffers.append(EpisodeBuffer(id=len(buffers), **rows))
    minari.create_dataset_from_buffers("toy/falls-v0", buffers, env=env)
    data = adv.from_minari("toy/falls-v0", 2, "InvertedPendulum-v5", 4, 1)
    obs, _, next_obs, terminated = data.transitions()
    torch.testing.assert_close(obs[:, 0], torch.tensor([4, 4.1, 4.2, 4.3, 3, 3.1]))  # what followed 3.2 is not asked
    torch.testing.assert_close(next_obs[[0, 1, 2, 4], 0], torch.tensor([4.1, 4.2, 4.3, 3.1]))
    assert terminated.tolist() == [0, 0, 0, 1, 0, 0]
    assert data.absorbed(10) == pytest.approx(6 / 20) and data.expert_return == pytest.approx(7.0)
    with pytest.raises(SystemExit):
        adv.from_minari("toy/falls-v0", 2, "Hopper-v5", 4, 1)


def saved(tmp_path: Path, contents: dict[str, object]) -> Path:
    torch.save(contents, tmp_path / "data.pt")
    return tmp_path / "data.pt"


@pytest.mark.parametrize("algo", ["gail", "airl"])
def test_a_sure_discriminator_still_leans_towards_the_expert(algo):
    """Expert and policy far apart: hardly a loss is left, but every step of the way to the expert pays."""
    torch.manual_seed(0)
    judge, agent = discriminator(algo), tiny_agent()
    optimizer = torch.optim.Adam(judge.parameters(), 1e-3)
    for _ in range(1_500):
        adv.train_discriminator(judge, optimizer, agent, batch(64, shift=3.0), batch(64, shift=-3.0), 10.0)
    between = torch.linspace(-3.0, 3.0, 13)[:, None].expand(-1, 3)
    actions, ends = ((LOW + HIGH) / 2).expand(13, -1), torch.zeros(13)
    scores = judge.score(judge.steps(between, actions, between, ends))
    assert (scores.diff() > 0).all()


def test_the_newest_steps_are_the_newest_even_when_the_buffer_has_gone_round():
    args, buffer = adv.Args(batch_size=400), adv.ReplayBuffer(10, 3, 1, CPU)
    for number in range(23):
        rows = {"obs": np.full((1, 3), number), "action": [[0.0]], "next_obs": np.zeros((1, 3)), "reward": [0.0]}
        buffer.add(**rows, terminated=[False], episode=[0])
        seen = adv.sample_batch(args, buffer, 1, newest=4)[0]
        assert seen.shape == (400, 2)
        assert seen.unique().tolist() == list(range(max(0, number - 3), number + 1))
    assert adv.sample_batch(args, buffer, 1)[0].unique().tolist() == list(range(13, 23))


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("algo", ["gail", "airl"])
def test_a_given_temperature_stays(tmp_path, algo):
    _, run_dir = run(tiny(tmp_path, algo=algo, alpha=0.3))
    found = [float(row[2]) for row in logged(run_dir) if row[1] == "losses/alpha"]
    assert found and all(value == pytest.approx(0.3) for value in found)


def test_airls_discriminator_counts_the_density_at_the_policys_temperature(tmp_path, monkeypatch):
    original, seen = adv.Discriminator.logit, []

    def watched(self, step, log_prob, alpha):
        seen.append(alpha.item())
        return original(self, step, log_prob, alpha)

    monkeypatch.setattr(adv.Discriminator, "logit", watched)
    run(tiny(tmp_path, algo="airl", learning_rate=1e-2))
    assert seen[0] > 0.98 and seen[-1] < 0.9, "SAC's, which adapts itself"


def test_the_discriminator_sees_the_policys_newest_steps(tmp_path, monkeypatch):
    original, sizes = adv.sample_batch, []

    def watched(args, buffer, skip, newest=None):
        sizes.append(newest)
        return original(args, buffer, skip, newest)

    monkeypatch.setattr(adv, "sample_batch", watched)
    _, run_dir = run(tiny(tmp_path, newest=7))
    assert sizes.count(7) == 25 and sizes.count(None) == 50
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    random = saved["buffer"]["obs"][: tiny(tmp_path).initial_steps]
    scale = torch.cat([saved["data"]["obs"][:-1], random]).std(dim=0), random.std(dim=0)
    torch.testing.assert_close(saved["discriminator"]["normaliser.std"], scale[0], rtol=0.05, atol=0)
    assert not torch.allclose(scale[0], scale[1], rtol=0.05), "of expert and policy alike"


@pytest.mark.parametrize("algo", ["gail", "airl", "control"])
def test_the_true_reward_is_not_used(tmp_path, monkeypatch, algo):
    _, fair = run(tiny(tmp_path / "fair", algo=algo))
    original = adv.VectorEnv.step

    def lying(self, action):
        next_obs, reward, terminated = original(self, action)
        return next_obs, 1_000 - 7 * reward, terminated

    monkeypatch.setattr(adv.VectorEnv, "step", lying)
    _, unfair = run(tiny(tmp_path / "unfair", algo=algo))
    one, two = state(fair), state(unfair)
    names = [name for name in one if not name.startswith("buffer.reward")]
    assert [name for name in names if not torch.equal(one[name], two[name])] == []
    assert not torch.equal(one["buffer.reward"], two["buffer.reward"])


def test_the_control_is_paid_one_for_each_step_and_knows_no_expert(tmp_path, monkeypatch):
    rewards, original = [], adv.Agent.update
    seen = lambda self, *rows: rewards.append(rows[3]) or original(self, *rows)  # noqa: E731
    monkeypatch.setattr(adv.Agent, "update", seen)
    _, run_dir = run(tiny(tmp_path, algo="control"))
    assert len(rewards) == 50 and all((reward == 1).all() for reward in rewards)
    assert not any(row[1].startswith("losses/discriminator") for row in logged(run_dir))


@pytest.mark.parametrize("absorbing", [True, False])
def test_what_comes_after_the_end_reaches_discriminator_and_agent(tmp_path, monkeypatch, absorbing):
    """Expert and policy fall, each at its own times; --no-absorbing ends the episode where it ends."""
    seen: list[adv.Absorption] = []
    begin, reward = adv.Absorption.__init__, adv.learned_reward

    def remembered(self, *rest):
        begin(self, *rest)
        seen.append(self)

    def paid(discriminator, batch, beyond, elsewhere):
        assert (beyond, elsewhere) == (seen[0].logits() if absorbing else (None, 0.0))
        return reward(discriminator, batch, beyond, elsewhere)

    monkeypatch.setattr(adv.Absorption, "__init__", remembered)
    monkeypatch.setattr(adv, "learned_reward", paid)
    changes = dict(env_id="InvertedPendulum-v5", max_episode_steps=20, total_timesteps=90, absorbing=absorbing)
    _, run_dir = run(tiny(tmp_path, **changes))
    lengths = [float(row[2]) for row in logged(run_dir) if row[1] == "charts/episodic_length"]
    assert len(lengths) > 3 and sorted(seen[0].lengths) == sorted(lengths) and min(lengths) < 20
    assert 0 < seen[0].expert_share != seen[0].policy_share() > 0


class CutShort(gym.Env):
    """Gives up after five steps, by itself, and never ends."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.full(3, self.steps / 5, np.float32), 0.0, False, self.steps == 5, {}


def test_an_episode_that_was_cut_short_has_not_ended(tmp_path, monkeypatch):
    spec = gym.envs.registration.EnvSpec("CutShort-v0", CutShort, max_episode_steps=20)
    monkeypatch.setitem(gym.registry, "CutShort-v0", spec)
    rows = {"observations": torch.randn(40, 3), "actions": torch.rand(40, 1), "mean_reward": 1.0}
    torch.save(rows, tmp_path / "data.pt")
    changes = dict(env_id="CutShort-v0", data=str(tmp_path / "data.pt"), expert=None, max_episode_steps=None)
    _, run_dir = run(tiny(tmp_path, **changes))
    lengths = torch.load(run_dir / "checkpoint.pt", weights_only=True)["absorption"]["lengths"]
    assert lengths and set(lengths) == {20}
    assert {float(row[2]) for row in logged(run_dir) if row[1] == "charts/episodic_length"} == {5.0}


def test_an_environment_that_does_not_exist_is_named_before_its_expert(tmp_path, capfd):
    with pytest.raises(SystemExit) as exit:
        adv.main(replace(tiny(tmp_path), env_id="Typo-v0", expert=None))
    assert exit.value.code == 2 and "Environment `Typo` doesn't exist" in capfd.readouterr().err


def test_how_often_each_is_trained(tmp_path, monkeypatch):
    calls = {"discriminator": 0, "agent": 0}
    train, update = adv.train_discriminator, adv.Agent.update

    def count(name, original, *rest):
        calls[name] += 1
        return original(*rest)

    monkeypatch.setattr(adv, "train_discriminator", lambda *rest: count("discriminator", train, *rest))
    monkeypatch.setattr(adv.Agent, "update", lambda *rest: count("agent", update, *rest))
    run(tiny(tmp_path, num_envs=4, discriminator_every=3, total_timesteps=80))
    assert calls == {"discriminator": 80 // 3 - 30 // 3, "agent": 50}


@pytest.mark.parametrize("algo", ["gail", "airl"])
def test_a_run_leaves_its_metrics_and_says_the_same_when_evaluated_again(tmp_path, algo, capsys):
    policy = tmp_path / "policy.pt"
    result, run_dir = run(tiny(tmp_path, algo=algo, save_policy=str(policy), total_timesteps=2_010, eval_every=1_000))
    tags = {row[1] for row in csv.reader((run_dir / "metrics.csv").open())} - {"tag"}
    prefixes = ("charts/", "eval/", "losses/", "time/")
    assert tags == {line.split()[0] for line in adv.__doc__.splitlines() if line.strip().startswith(prefixes)}
    assert json.loads((run_dir / "result.json").read_text()) == result
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    (tmp_path / "Pendulum-v1.pt").unlink()  # the demonstrations lie in the checkpoint
    again = adv.main(adv.parse_args(["--resume", str(run_dir), "--eval-only"]))
    assert again == {name: value for name, value in result.items() if name != "minutes"}
    with pytest.raises(SystemExit) as exit:  # it would evaluate nothing, and its args.json would say otherwise
        adv.main(adv.parse_args(["--resume", str(run_dir), "--eval-episodes", "3"]))
    assert exit.value.code == 2 and "has finished; evaluate it with --eval-only" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before
    # The imitator can be an expert itself.
    actor = bc_variants.load_expert(str(policy), "Pendulum-v1", 3, torch.tensor([-2.0]), torch.tensor([2.0]))
    returns = adv.run_episodes(actor.mode, "Pendulum-v1", 2, 1_001_000, CPU, 15)[3]
    assert np.mean(returns) == pytest.approx(result["eval/episodic_return"], rel=1e-5)


@pytest.mark.parametrize(
    "changes, call",
    [
        ({}, 61),
        ({"algo": "airl", "num_envs": 2, "env_id": "Hopper-v5", "max_episode_steps": None}, 33),
        ({"env_id": "HalfCheetah-v5", "buffer_size": 50, "train_dtype": "bfloat16"}, 61),
    ],
)
def test_killed_and_resumed_equals_never_stopped(tmp_path, monkeypatch, changes, call):
    _, whole = run(tiny(tmp_path / "whole", **changes))
    args = tiny(tmp_path / "killed", checkpoint_every=7, **changes)
    original, calls = adv.interact, iter(range(10**6))

    def killed(*args, **kwargs):
        if next(calls) == call:
            raise MemoryError
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(adv, "interact", killed)
        with pytest.raises(MemoryError):
            adv.main(args)
    run_dir = next(Path(args.log_dir).iterdir())
    adv.main(adv.parse_args(["--resume", str(run_dir)]))
    assert_same(whole, run_dir)


def test_stopped_by_a_signal_and_resumed_equals_never_stopped(tmp_path, monkeypatch):
    _, whole = run(tiny(tmp_path / "whole"))
    args = tiny(tmp_path / "stopped")
    original, calls = adv.interact, iter(range(10**6))
    with monkeypatch.context() as patch:
        stop = lambda *a, **k: (next(calls) == 55 and signal.raise_signal(signal.SIGTERM)) or original(*a, **k)  # noqa: E731
        patch.setattr(adv, "interact", stop)
        with pytest.raises(SystemExit) as exit:
            adv.main(args)
    assert exit.value.code == 128 + signal.SIGTERM and next(calls) == 56
    run_dir = next(Path(args.log_dir).iterdir())
    adv.main(adv.parse_args(["--resume", str(run_dir)]))
    assert_same(whole, run_dir)


def test_a_diverged_agent_does_not_overwrite_its_checkpoint(tmp_path, monkeypatch):
    args = tiny(tmp_path, checkpoint_every=5)
    original, calls = adv.train_discriminator, iter(range(10**6))
    diverging = lambda *rest: original(*rest) * (math.nan if next(calls) == 7 else 1)  # noqa: E731
    monkeypatch.setattr(adv, "train_discriminator", diverging)
    with pytest.raises(SystemExit) as exit:
        adv.main(args)
    run_dir = next(Path(args.log_dir).iterdir())
    assert "non-finite losses/discriminator_loss" in exit.value.code and "checkpoint.pt" in exit.value.code
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["progress"]["step"] == 45


def test_weights_that_the_last_step_broke_do_not_overwrite_the_checkpoint(tmp_path, monkeypatch):
    """The losses are those before the step, and still finite."""
    original, calls = adv.Agent.update, iter(range(10**6))

    def breaking(self, *rest):
        losses = original(self, *rest)
        if next(calls) == 9:  # at step 40
            self.log_alpha.data.fill_(math.nan)
        return losses

    monkeypatch.setattr(adv.Agent, "update", breaking)
    with pytest.raises(SystemExit) as exit:
        adv.main(tiny(tmp_path, checkpoint_every=5))
    assert "non-finite weights at or before step 40" in exit.value.code
    run_dir = next((tmp_path / "runs").iterdir())
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["progress"]["step"] == 35


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"gamma": 1.0}, "--gamma must lie in [0, 1)"),
        ({"initial_steps": 80}, "nothing would be learned"),
        ({"discriminator_every": 81}, "the discriminator would not learn in this run"),
        ({"discriminator_every": 30, "initial_steps": 60}, "the discriminator would not learn in this run"),
        ({"expert": "nowhere/expert.pt"}, "make it with: mkdir -p nowhere && python mbpo_sac.py --env-id Pendulum-v1"),
        ({"expert": __file__}, "is no actor of mbpo_sac.py"),
        ({"env_id": "Hopper-v5", "expert": "{tmp}/Pendulum-v1.pt"}, "was made for Pendulum-v1, not for Hopper-v5"),
        ({"data": "nothing.pt"}, "there is no such file"),
        ({"data": "{tmp}/plain.pt", "algo": "airl"}, "does not tell episodes apart, and AIRL needs to know"),
        ({"data": "{tmp}/short.pt"}, "observations must be (N, 3), N > 1"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"data": "{tmp}/plain.pt", "expert": "{tmp}/Pendulum-v1.pt"}, "--expert and --data are two sources"),
        ({"data": "{tmp}/plain.pt", "minari_id": "x/y-v0"}, "--data and --minari-id are two sources"),
        ({"data": "{tmp}/tall.pt"}, "episodes and rewards are not one number for each of 30"),
        ({"data": "{tmp}/real.pt"}, "episodes must be numbered by integers"),
        ({"algo": "airl", "alpha": 0.1, "target_entropy": -3.0}, "this one is fixed"),
        ({"log_dir": f"{__file__}/runs"}, "--log-dir"),
        ({"eval_only": True}, "--eval-only needs --resume"),
        ({"discriminator_learning_rate": 0.0}, "--discriminator-learning-rate"),
        ({"target_entropy": math.inf}, "--target-entropy"),
        ({"save_policy": "/no/such/folder/policy.pt"}, "--save-policy"),
    ],
)
def test_bad_arguments(tmp_path, capfd, changes, words):
    make_expert(tmp_path / "Pendulum-v1.pt")
    plain = {"observations": torch.randn(40, 3), "actions": torch.zeros(40, 1), "mean_reward": 5.0}
    torch.save(plain, tmp_path / "plain.pt")
    torch.save(plain | {"observations": torch.randn(1, 3), "actions": torch.zeros(1, 1)}, tmp_path / "short.pt")
    torch.save(recorded(30) | {"episode": torch.zeros(30, 1, dtype=torch.int64)}, tmp_path / "tall.pt")
    torch.save(recorded(30) | {"episode": torch.zeros(30)}, tmp_path / "real.pt")
    changes = {k: v.replace("{tmp}", str(tmp_path)) if isinstance(v, str) else v for k, v in changes.items()}
    args = tiny(tmp_path, **changes)
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        adv.main(args)
    lines = capfd.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_ends_an_evaluation_alone_at_once(tmp_path, monkeypatch):
    """It saves nothing, and so there is nothing to wait for."""
    _, run_dir = run(tiny(tmp_path))
    monkeypatch.setattr(adv, "run_episodes", lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        adv.main(replace(adv.load_args(str(run_dir)), resume=str(run_dir), eval_only=True))
