"""The three environments against their written definition.

The constants here are typed in by hand and the formulas are numpy, on purpose: comparing `step` with the function it
calls would prove nothing.
"""

import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.utils.env_checker import check_env

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["Obstacles", "PostureCheetah", "Reacher7DoF"]
OBS_DIM = {"Obstacles": 4, "PostureCheetah": 21, "Reacher7DoF": 20}
ACTION_DIM = {"Obstacles": 2, "PostureCheetah": 6, "Reacher7DoF": 7}

WALLS = [  # left, right, bottom, top
    (-0.4, 0.0, 0.5, 0.8),
    (-0.9, -0.7, -0.3, 0.3),
    (0.6, 0.72, -0.5, -0.1),
    (-0.1, 0.05, -0.2, 0.2),
    (0.1, 0.4, -0.85, -0.7),
]


def make(name: str, **kwargs: Any) -> gym.Env[Any, Any]:
    return gym.make(f"envs:{name}-v0", **kwargs)


def reward_by_hand(name: str, obs: Any) -> float:
    if name == "Obstacles":
        return float(-(((obs[0] - 0.7) ** 2 + (obs[1] + 0.8) ** 2) ** 0.5))
    if name == "PostureCheetah":
        return float(obs[9] - 10.0 * (obs[6] > 0.2) - 10.0 * (obs[7] > 0.0) - 10.0 * (obs[8] > 0.0))
    return float(-10.0 * ((obs[14] - 0.1) ** 2 + (obs[15] - 0.1) ** 2 + (obs[16] - 0.1) ** 2) ** 0.5)


def terminated_by_hand(name: str, obs: Any) -> bool:
    return name == "Obstacles" and (obs[0] - 0.7) ** 2 + (obs[1] + 0.8) ** 2 < 0.01


def free_by_hand(x: float, y: float) -> bool:
    hit = any(left <= x <= right and bottom <= y <= top for left, right, bottom, top in WALLS)
    return abs(x) < 0.99 and abs(y) < 0.99 and not hit


def wave(t: int, action_dim: int) -> Any:
    """A deterministic action that needs no generator."""
    return 0.9 * np.sin(0.2 * t + np.arange(action_dim)) - (0.3 if action_dim == 2 else 0.0) * np.arange(action_dim)


def rollout(env: gym.Env[Any, Any], steps: int, start: int = 0) -> Any:
    """One row per step: next_obs, reward."""
    assert env.action_space.shape is not None
    rows = []
    for t in range(start, start + steps):
        obs, reward, *_ = env.step(wave(t, env.action_space.shape[0]))
        rows.append([*obs, reward])
    return np.array(rows)


# ---------------------------------------------------------------------------------------------- reward and termination


@pytest.mark.parametrize(
    ("thigh", "shin", "foot", "penalty"),
    [
        (0.19, -0.01, -0.01, 0),
        (0.21, -0.01, -0.01, 10),
        (0.19, 0.01, -0.01, 10),
        (0.19, -0.01, 0.01, 10),
        (0.21, 0.01, -0.01, 20),
        (0.19, 0.01, 0.01, 20),
        (0.21, 0.01, 0.01, 30),
        (0.2, 0.0, 0.0, 0),
    ],
)
def test_cheetah_reward_on_both_sides_of_each_threshold(thigh: float, shin: float, foot: float, penalty: int) -> None:
    env: Any = make("PostureCheetah").unwrapped
    # Every other entry is positive and large: reading a neighbouring index must show
    obs = torch.full((21,), 5.0, dtype=torch.float64)
    obs[6], obs[7], obs[8], obs[9] = thigh, shin, foot, 1.75
    zeros = torch.zeros(21, dtype=torch.float64)
    assert env.batch_reward(zeros, torch.zeros(6), obs).item() == pytest.approx(1.75 - penalty, abs=1e-12)
    assert not env.batch_terminated(obs)


def test_obstacles_terminates_inside_the_goal_disc_only() -> None:
    env: Any = make("Obstacles").unwrapped
    for angle in np.linspace(0, 2 * np.pi, 13):
        for distance in (0.0, 0.05, 0.099, 0.101, 0.15):
            x, y = 0.7 + distance * np.cos(angle), -0.8 + distance * np.sin(angle)
            obs = torch.tensor([x, y, 0.7, -0.8], dtype=torch.float64)
            assert bool(env.batch_terminated(obs)) == (distance < 0.1)
            assert env.batch_reward(-obs, torch.zeros(2), obs).item() == pytest.approx(-distance, abs=1e-12)
    edge = torch.linspace(-0.989, 0.989, 50, dtype=torch.float64)
    side = torch.full_like(edge, 0.989)
    for x, y in ((edge, side), (edge, -side), (side, edge), (-side, edge)):  # no way out through the edge of the box
        obs = torch.stack([x, y, torch.full_like(x, 0.7), torch.full_like(x, -0.8)], dim=-1)
        assert not env.batch_terminated(obs).any()


def test_reacher_reward() -> None:
    env: Any = make("Reacher7DoF").unwrapped
    obs = torch.full((20,), 3.0, dtype=torch.float64)
    obs[14:17] = torch.tensor([0.821, -0.6, 0.0])
    obs[17:20] = 0.1
    expected = -10 * (0.721**2 + 0.7**2 + 0.1**2) ** 0.5
    assert env.batch_reward(obs * 0, torch.ones(7), obs).item() == pytest.approx(expected, abs=1e-6)
    obs[14:17] = 0.1
    assert env.batch_reward(obs * 0, torch.ones(7), obs).item() == 0.0
    assert not env.batch_terminated(obs)


@pytest.mark.parametrize("name", NAMES)
def test_batch_functions_take_any_shape_dtype_and_device(name: str) -> None:
    env: Any = make(name).unwrapped
    rng = np.random.default_rng(0)
    table = rng.uniform(-1, 1, (3, 4, 5, OBS_DIM[name]))
    if name == "Obstacles":
        table[..., 2:] = 0.7, -0.8
        table[0, 0, :, :2] = 0.72, -0.77  # some at the goal
    if name == "Reacher7DoF":
        table[..., 17:] = 0.1
    rewards = np.array([reward_by_hand(name, row) for row in table.reshape(60, -1)])
    dones = np.array([terminated_by_hand(name, row) for row in table.reshape(60, -1)])
    action = torch.zeros(3, 4, 5, ACTION_DIM[name])
    for shape in [(60,), (3, 4, 5), (1, 60)]:
        next_obs = torch.tensor(table, dtype=torch.float32).reshape(*shape, -1)
        got = env.batch_reward(torch.zeros_like(next_obs), action.reshape(*shape, -1), next_obs)
        done = env.batch_terminated(next_obs)
        assert got.shape == done.shape == shape
        assert got.dtype == torch.float32 and done.dtype == torch.bool
        np.testing.assert_allclose(got.flatten().numpy(), rewards, rtol=1e-5, atol=1e-5)
        assert (done.flatten().numpy() == dones).all()

    rough = torch.tensor(table).bfloat16()  # in bfloat16, and in bfloat16 promoted to float32
    expected = np.array([reward_by_hand(name, row) for row in rough.double().reshape(60, -1).numpy()])
    promoted = env.batch_reward(rough.float(), action, rough.float()).flatten()
    np.testing.assert_allclose(promoted.numpy(), expected, rtol=0.02, atol=0.02)
    in_bfloat16 = env.batch_reward(rough, action.bfloat16(), rough).flatten()
    assert in_bfloat16.dtype == torch.bfloat16
    np.testing.assert_allclose(in_bfloat16.float().numpy(), expected, rtol=0.02, atol=0.02)

    # A tensor of the function's own making would stay on the CPU and refuse to be combined with one on "meta"
    for device in ["meta"] + ["cuda"] * torch.cuda.is_available():
        there = next_obs.to(device)
        assert env.batch_reward(there, action.to(device), there).device.type == device
        assert env.batch_terminated(there).device.type == device


@pytest.mark.parametrize("name", NAMES)
def test_steps_pay_and_end_as_written(name: str) -> None:
    env = make(name, max_episode_steps=1000)
    env.action_space.seed(0)
    env.reset(seed=0)
    rewards = []
    for _ in range(300):
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert type(reward) is float and type(terminated) is bool and not truncated
        assert reward == pytest.approx(reward_by_hand(name, obs), abs=1e-9)
        assert terminated == terminated_by_hand(name, obs)
        assert env.observation_space.contains(obs)
        rewards.append(reward)
        if terminated:
            env.reset()
    assert np.std(rewards) > 0.01


# ------------------------------------------------------------------------------------------------- golden trajectories

GOLDEN: dict[str, Any] = {  # seed 3: steps, some entries of the first and of the last observation, the return
    "Obstacles": (
        60,
        {0: -0.854674315913, 1: 0.432871669815, 2: 0.7, 3: -0.8},
        {0: -0.745915347765, 1: -0.348364472713, 2: 0.7, 3: -0.8},
        -108.1263995851178,
    ),
    "PostureCheetah": (
        60,
        {0: -0.082870166571, 3: 0.016432407213, 8: 0.046915430282, 9: 0.332299951664, 17: -0.023855360657, 19: 0.0},
        {0: -0.077495604836, 3: -0.611882177094, 8: -0.35223863406, 9: -0.072576681037, 18: -0.076769838026},
        -719.462543826522,
    ),
    "Reacher7DoF": (
        100,
        {0: 0.0, 3: 0.0, 7: 0.0, 14: 0.821, 15: -0.6, 16: 0.0, 17: 0.1, 18: 0.1, 19: 0.1},
        {0: 0.73521171019, 3: -1.493240195295, 6: -0.374752403516, 7: 0.070415377289, 14: 0.293056896528, 19: 0.1},
        -544.0887924424972,
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_golden_trajectory(name: str) -> None:
    steps, first, last, total = GOLDEN[name]
    env = make(name)
    obs, _ = env.reset(seed=3)
    rows = rollout(env, steps)
    for i, value in first.items():
        assert obs[i] == pytest.approx(value, abs=1e-9)
    for i, value in last.items():
        assert rows[-1, i] == pytest.approx(value, rel=1e-5, abs=1e-5)
    assert rows[:, -1].sum() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "episodes", "mean", "margin"),
    # margin: about four standard errors of so few episodes
    [("Obstacles", 40, -160, 25), ("PostureCheetah", 8, -2516, 600), ("Reacher7DoF", 20, -1770, 380)],
)
def test_random_policy_returns(name: str, episodes: int, mean: float, margin: float) -> None:
    env = make(name)
    env.action_space.seed(1)
    returns = []
    for episode in range(episodes):
        env.reset(seed=episode)
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    assert abs(np.mean(returns) - mean) < margin
    if name == "Reacher7DoF":
        assert 200 < np.std(returns) < 650


# ---------------------------------------------------------------------------------------------- the Gymnasium contract


@pytest.mark.parametrize("name", NAMES)
def test_gymnasium_checker_is_content(name: str) -> None:
    env = make(name, render_mode="rgb_array")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(
            env.unwrapped, skip_render_check=name != "Obstacles"
        )  # pictures of the others: below, where GL may lack
    messages = [str(w.message) for w in caught]
    if name != "Obstacles":  # velocities have no bound; Gymnasium's own MuJoCo tasks say the same
        messages = [m for m in messages if "A Box observation space m" not in m]
    assert messages == []


@pytest.mark.parametrize("name", NAMES)
def test_spaces(name: str) -> None:
    env = make(name)
    low, high = (-0.99, 0.99) if name == "Obstacles" else (-1, 1)
    assert env.action_space == gym.spaces.Box(low, high, (ACTION_DIM[name],), np.float32)
    bound = 0.99 if name == "Obstacles" else np.inf
    assert env.observation_space == gym.spaces.Box(-bound, bound, (OBS_DIM[name],), np.float64)


@pytest.mark.parametrize(("name", "steps"), [("Obstacles", 100), ("PostureCheetah", 500), ("Reacher7DoF", 200)])
def test_time_limit(name: str, steps: int) -> None:
    for env, limit in ((make(name), steps), (make(name, max_episode_steps=60), 60)):
        env.reset(seed=0)
        ends = [env.step(np.zeros(ACTION_DIM[name]))[2:4] for _ in range(limit)]
        assert ends == [(False, False)] * (limit - 1) + [(False, True)]


@pytest.mark.parametrize("name", NAMES)
def test_seed_decides_everything(name: str) -> None:
    def trajectory(seed: int, elsewhere: int) -> Any:
        np.random.seed(elsewhere)
        torch.manual_seed(elsewhere)
        env = make(name)
        first, _ = env.reset(seed=seed)
        rows = rollout(env, 20)
        second, _ = env.reset()
        return np.concatenate([first, rows.flatten(), second])

    assert np.array_equal(trajectory(seed=4, elsewhere=0), trajectory(seed=4, elsewhere=1))
    if name != "Reacher7DoF":  # which has nothing random
        assert not np.array_equal(trajectory(seed=4, elsewhere=0), trajectory(seed=5, elsewhere=0))


@pytest.mark.parametrize("name", NAMES)
def test_generator_state_and_actions_replay_an_episode(name: str) -> None:
    env = make(name)
    env.reset(seed=7)
    rollout(env, 30)  # an earlier episode, that must leave nothing behind
    state = copy.deepcopy(env.unwrapped.np_random.bit_generator.state)
    first, _ = env.reset()
    rows = rollout(env, 50)

    other = make(name)
    other.reset(seed=8)
    other.unwrapped.np_random.bit_generator.state = state
    again, _ = other.reset()
    assert np.array_equal(first, again)
    assert np.array_equal(rows, rollout(other, 50))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_continue_where_the_original_stands(name: str, duplicate: Any) -> None:
    env = make(name)
    env.reset(seed=1)
    rollout(env, 30)
    twin = duplicate(env)
    ours, next_start = rollout(env, 30, start=30), env.reset()[0]
    assert np.array_equal(rollout(twin, 30, start=30), ours)  # and the original's steps did not move the twin
    assert np.array_equal(twin.reset()[0], next_start)


# ----------------------------------------------------------------------------------------------------------- Obstacles


def test_a_step_is_made_exactly_if_it_ends_in_the_open() -> None:
    env: Any = make("Obstacles").unwrapped
    env.reset(seed=0)
    seen = {True: 0, False: 0}
    for x in np.linspace(-1.03, 1.03, 52):
        for y in np.linspace(-1.03, 1.03, 52):
            before = np.array([x - 0.05, y + 0.03])
            env.position = before
            obs, reward, terminated, _, _ = env.step(np.array([0.5, -0.3]))
            free = free_by_hand(x, y)
            np.testing.assert_allclose(obs, [*((x, y) if free else before), 0.7, -0.8], atol=1e-12)
            assert terminated == terminated_by_hand("Obstacles", obs)
            assert reward == pytest.approx(reward_by_hand("Obstacles", obs), abs=1e-12)
            seen[free] += 1
    assert min(seen.values()) > 300


@pytest.mark.parametrize("wall", WALLS)
def test_walls_stop_from_every_side(wall: tuple[float, float, float, float]) -> None:
    left, right, bottom, top = wall
    x, y = (left + right) / 2, (bottom + top) / 2
    env: Any = make("Obstacles").unwrapped
    env.reset(seed=0)
    for place, action in [
        ((left - 0.01, y), (0.2, 0.0)),
        ((right + 0.01, y), (-0.2, 0.0)),
        ((x, bottom - 0.01), (0.0, 0.2)),
        ((x, top + 0.01), (0.0, -0.2)),
    ]:
        assert free_by_hand(*place)
        env.position = np.array(place)
        assert np.array_equal(env.step(np.array(action))[0][:2], place)
        assert np.array_equal(env.step(np.array(action) * 0.4)[0][:2], np.array(place) + np.array(action) * 0.4 / 10)


@pytest.mark.parametrize("outwards", [(1, 0), (-1, 0), (0, 1), (0, -1)])
def test_the_edge_of_the_box_stops_and_never_ends_the_episode(outwards: tuple[int, int]) -> None:
    env: Any = make("Obstacles").unwrapped
    env.reset(seed=0)
    direction = np.array(outwards, dtype=np.float64)
    env.position = place = 0.95 * direction
    for length in (0.41, 1.0, 30.0):
        obs, reward, terminated, truncated, _ = env.step(length * direction)
        assert np.array_equal(obs[:2], place) and not terminated and not truncated
        assert reward == pytest.approx(reward_by_hand("Obstacles", obs))
    assert np.allclose(env.step(0.39 * direction)[0][:2], 0.989 * direction)


def test_action_is_clipped_and_in_units_of_a_tenth() -> None:
    env: Any = make("Obstacles").unwrapped
    env.reset(seed=0)
    for action, moved in [((0.5, -0.25), (0.05, -0.025)), ((7.0, -0.25), (0.1, -0.025)), ((0.1, -3.0), (0.01, -0.1))]:
        env.position = np.array([0.3, 0.3])
        obs = env.step(np.array(action, dtype=np.float32))[0]
        np.testing.assert_allclose(obs[:2] - 0.3, moved, atol=1e-8)


def test_starts_are_free_and_fill_the_start_region() -> None:
    env = make("Obstacles")
    starts = np.array([env.reset(seed=0 if i == 0 else None)[0] for i in range(2000)])
    assert all(free_by_hand(x, y) for x, y in starts[:, :2])
    assert (starts[:, 2:] == [0.7, -0.8]).all()
    assert -0.99 < starts[:, 0].min() < -0.97 and 0.57 < starts[:, 0].max() < 0.59
    assert 0.26 < starts[:, 1].min() < 0.27 and 0.98 < starts[:, 1].max() < 0.99
    beside = starts[(starts[:, 1] < 0.5) | (starts[:, 1] > 0.8)]  # at these heights hardly anything is resampled
    assert beside[:, 0].mean() == pytest.approx(-0.2, abs=0.05)


def test_walking_into_the_goal_ends_the_episode() -> None:
    env: Any = make("Obstacles").unwrapped
    env.reset(seed=0)
    env.position = np.array([0.7, -0.55])
    ends = [env.step(np.array([0.0, -0.5]))[2] for _ in range(4)]  # distances 0.2, 0.15, 0.1 (rounded), 0.05
    assert ends[:2] == [False, False] and ends[3]


# ------------------------------------------------------------------------------------------------------ PostureCheetah


def test_cheetah_observation_is_what_the_last_step_left() -> None:
    env: Any = make("PostureCheetah").unwrapped
    obs, _ = env.reset(seed=0)
    assert env.dt == pytest.approx(0.01)
    assert (obs[18], obs[19]) == (obs[0], 0.0) and obs[20] == pytest.approx(0.7 + obs[1])
    for t in range(50):
        before, obs = obs, env.step(wave(t, 6))[0]
        assert np.array_equal(obs[:18], np.concatenate([env.data.qpos, env.data.qvel]))
        # The torso hangs on slides along x and z, 0.7 above the ground: its position is of the joints before the step
        assert obs[18] == pytest.approx(before[0], abs=1e-12) and obs[20] == pytest.approx(0.7 + before[1], abs=1e-12)
        assert obs[19] == 0.0
        assert abs(obs[0] - before[0] - 0.01 * obs[9]) < 1e-12
    assert abs(obs[0] - obs[18]) > 1e-5


def test_cheetah_starts() -> None:
    env = make("PostureCheetah")
    starts = np.array([env.reset(seed=0 if i == 0 else None)[0] for i in range(400)])
    qpos, qvel = starts[:, :9], starts[:, 9:18]
    assert (abs(qpos) <= 0.1).all() and (abs(qpos).max(0) > 0.095).all()
    assert qpos.std() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert qvel.std() == pytest.approx(0.1, rel=0.05) and 0.3 < abs(qvel).max() < 0.6  # normal: tails, but no others


# --------------------------------------------------------------------------------------------------------- Reacher7DoF


def rotation(axis: str, angle: float) -> Any:
    c, s = np.cos(angle), np.sin(angle)
    if axis == "x":
        return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    if axis == "y":
        return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def fingertip_by_hand(q: Any) -> Any:
    hand = rotation("y", q[3]) @ rotation("x", q[4]) @ np.array([0.321, 0, 0])
    elbow = rotation("y", q[1]) @ rotation("x", q[2]) @ (np.array([0.4, 0, 0]) + hand)
    return np.array([0, -0.6, 0]) + rotation("z", q[0]) @ (np.array([0.1, 0, 0]) + elbow)


def test_reacher_observation_is_what_the_last_step_left() -> None:
    env: Any = make("Reacher7DoF").unwrapped
    obs, _ = env.reset(seed=0)
    np.testing.assert_allclose(obs, [0] * 14 + [0.821, -0.6, 0, 0.1, 0.1, 0.1], atol=1e-12)
    for t in range(100):
        obs = env.step(wave(t, 7))[0]
        assert np.array_equal(obs[:7], env.data.qpos) and np.array_equal(obs[7:14] * 10, env.data.qvel / 10 * 10)
        # Two substeps of 0.01 s, and the sites are from before the joints moved in the second
        np.testing.assert_allclose(obs[14:17], fingertip_by_hand(obs[:7] - 0.01 * 10 * obs[7:14]), atol=1e-9)
        assert (obs[17:] == 0.1).all()
    assert abs(fingertip_by_hand(obs[:7]) - obs[14:17]).max() > 1e-4
    assert env.data.time == pytest.approx(100 * 0.02)


def test_reacher_joints() -> None:
    model = make("Reacher7DoF").unwrapped.model  # type: ignore[attr-defined]
    expected = [  # axis, lower, upper, gear, damping, offset of the body from its parent
        ((0, 0, 1), -2.2854, 1.7146, 20, 2.0, (0, -0.6, 0)),
        ((0, 1, 0), -0.5236, 1.3963, 10, 2.0, (0.1, 0, 0)),
        ((1, 0, 0), -1.5, 1.7, 10, 0.8, (0, 0, 0)),
        ((0, 1, 0), -2.3213, 0.0, 10, 0.8, (0.4, 0, 0)),
        ((1, 0, 0), -1.5, 1.5, 10, 0.8, (0, 0, 0)),
        ((0, 1, 0), -1.094, 0.0, 10, 0.8, (0.321, 0, 0)),
        ((1, 0, 0), -1.5, 1.5, 10, 0.8, (0, 0, 0)),
    ]
    assert model.njnt == model.nv == model.nu == 7 and model.jnt_limited.all()
    for j, (axis, lower, upper, gear, damping, offset) in enumerate(expected):
        assert tuple(model.jnt_axis[j]) == axis
        assert tuple(model.jnt_range[j]) == pytest.approx((lower, upper))
        assert model.actuator_trnid[j, 0] == j and model.actuator_gear[j, 0] == gear
        assert model.dof_damping[j] == damping and model.dof_armature[j] == 0.004
        assert tuple(model.body_pos[model.jnt_bodyid[j]]) == pytest.approx(offset)
        assert model.body_parentid[model.jnt_bodyid[j]] == (model.jnt_bodyid[j - 1] if j else 0)
    assert model.opt.timestep == 0.01 and model.opt.integrator == 0 and not model.opt.gravity.any()
    assert (model.geom_margin == 0.002).all()


def test_reacher_links_weigh_what_their_shapes_weigh() -> None:
    model = make("Reacher7DoF").unwrapped.model  # type: ignore[attr-defined]

    def sphere(radius: float) -> Any:
        return 4000 / 3 * np.pi * radius**3  # 1000 kg per cubic metre

    def capsule(length: float, radius: float) -> Any:
        return 1000 * np.pi * radius**2 * length + sphere(radius)

    masses = [
        capsule(0.6, 0.1) + 2 * sphere(0.05) + 2 * sphere(0.03),
        capsule(0.2, 0.1),
        capsule(0.2, 0.02) + capsule(0.4, 0.06),
        capsule(0.04, 0.06),
        capsule(0.2, 0.02) + capsule(0.291, 0.05),
        capsule(0.04, 0.01),
        sphere(0.08),
    ]
    np.testing.assert_allclose(model.body_mass[1:], masses, rtol=1e-9)
    middles = [  # centres of mass, x and y, that a misplaced shape would move
        (0, 2 * (0.05 * sphere(0.05) + 0.09 * sphere(0.03)) / masses[0]),
        (0, 0),
        (0.2 * capsule(0.4, 0.06) / masses[2], 0),
        (0, 0),
        (0.1455 * capsule(0.291, 0.05) / masses[4], 0),
        (0, 0),
        (0.03, 0),
    ]
    np.testing.assert_allclose(model.body_ipos[1:, :2], middles, atol=1e-9)
    heads = 2 * 0.2 * (sphere(0.05) + sphere(0.03))
    assert model.body_ipos[1, 2] == pytest.approx((heads - 0.1 * capsule(0.6, 0.1)) / masses[0])
    # The capsules of shoulder lift, elbow and wrist lie along y
    across = [model.geom_quat[g] for g in range(model.ngeom) if model.geom_bodyid[g] in (2, 4, 6)]
    for w, x, y, z in across:
        assert abs(abs(2 * (y * z - w * x)) - 1) < 1e-9  # the shape's z axis, turned, has y = ±1


def test_only_the_hand_touches_the_table() -> None:
    env: Any = make("Reacher7DoF").unwrapped
    env.reset(seed=0)
    table, hand = env.model.geom("table"), env.model.geom("hand")
    assert tuple(table.pos) == (0, 0.5, -0.425)
    for lift, contacts in [(0.4, 0), (0.6, 1)]:  # the hand hangs 0.28 below the shoulder, and 0.41: it has radius 0.08
        env.set_state(np.array([1.5, lift, 0, 0, 0, 0, 0.0]), np.zeros(7))
        assert env.data.ncon == contacts
    assert {int(g) for g in env.data.contact.geom[0]} == {table.id, hand.id}


# ------------------------------------------------------------------------------------------------------------ pictures


def test_obstacles_picture_shows_what_there_is() -> None:
    env: Any = make("Obstacles", render_mode="rgb_array")
    env.reset(seed=0)
    fresh = env.render()
    env.unwrapped.position = np.array([0.9, 0.9])
    picture = env.render()
    assert picture.shape == (400, 400, 3) and picture.dtype == np.uint8

    def colour(x: float, y: float) -> tuple[int, ...]:
        return tuple(int(v) for v in picture[round((1 - y) / 2 * 399), round((x + 1) / 2 * 399)])

    open_space, wall, goal, agent = colour(0.9, 0.0), colour(-0.2, 0.65), colour(0.7, -0.8), colour(0.9, 0.9)
    assert len({open_space, wall, goal, agent}) == 4
    for left, right, bottom, top in WALLS:
        for x, y in [
            (left + 0.01, top - 0.01),
            (right - 0.01, bottom + 0.01),
            ((left + right) / 2, (bottom + top) / 2),
        ]:
            assert colour(x, y) == wall
    assert colour(0.7 - 0.09, -0.8) == goal and colour(0.7 - 0.11, -0.8) == open_space

    for t in range(30):
        env.step(wave(t, 2))
    assert not np.array_equal(env.render(), picture)  # the agent's trail
    env.reset(seed=0)
    assert np.array_equal(env.render(), fresh)  # ends with the episode


SHOW = """
import gc, os, pickle, sys
import gymnasium as gym, numpy as np
before = dict(os.environ)
import envs
assert dict(os.environ) == before, "importing envs changed the environment variables"
try:
    from mujoco.egl import GLContext
    GLContext(16, 16).free()
except Exception as error:
    print("no EGL:", error)
    sys.exit(77)
os.environ.pop("PYOPENGL_PLATFORM", None)
pictures = {}
for name in ("PostureCheetah", "Reacher7DoF"):
    env = gym.make(f"envs:{name}-v0", render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    twin = pickle.loads(pickle.dumps(env))  # with an open graphics context
    for _ in range(40):
        obs = env.step(np.full(env.action_space.shape, -0.8))[0]
        twin_obs = twin.step(np.full(env.action_space.shape, -0.8))[0]
    assert np.array_equal(obs, twin_obs)
    second = env.render()
    assert np.array_equal(second, twin.render())
    assert np.array_equal(second, env.render())
    twin.close()
    del twin
    gc.collect()  # must take only its own graphics with it
    assert np.array_equal(second, env.render())
    pictures[name] = np.stack([first, second])
    env.close()
    assert np.array_equal(second, env.render())  # a fresh context
    env.close()
    env.close()
np.savez(sys.argv[1], **pictures)
"""


def test_pictures_without_a_display(tmp_path: Path) -> None:
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL", "PYOPENGL_PLATFORM")
    variables = {k: v for k, v in os.environ.items() if k not in hidden}
    command = [sys.executable, "-c", SHOW, str(tmp_path / "pictures.npz")]
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    if result.returncode == 77:
        pytest.skip(f"no headless OpenGL on this machine ({result.stdout.strip()})")
    assert result.returncode == 0, result.stderr
    pictures = np.load(tmp_path / "pictures.npz")
    for name in ("PostureCheetah", "Reacher7DoF"):
        first, second = pictures[name]
        assert first.shape == (480, 480, 3) and first.dtype == np.uint8
        assert min(first.std(), second.std()) > 10
        assert (first != second).any(-1).mean() > 0.005  # the agent is in view and moved
    for picture in pictures["Reacher7DoF"].astype(int):
        red, green, blue = picture.reshape(-1, 3).T
        assert ((red > green + 40) & (green > blue + 20)).sum() > 300  # the orange hand
        assert ((green > red + 40) & (green > blue + 40)).sum() > 100  # the green target


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the choice between GLFW and EGL")
@pytest.mark.parametrize(
    ("given", "chosen"),
    [({}, "egl"), ({"MUJOCO_GL": "osmesa"}, "osmesa"), ({"DISPLAY": ":0"}, None), ({"WAYLAND_DISPLAY": "w"}, None)],
)
def test_egl_only_without_display_and_without_a_choice(
    given: dict[str, str], chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.setenv(variable, "to be restored")  # so that what render sets is undone, too
        monkeypatch.delenv(variable)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(MujocoEnv, "render", lambda self: "picture")
    env: Any = make("Reacher7DoF", render_mode="rgb_array").unwrapped
    assert env.render() == "picture"
    assert os.environ.get("MUJOCO_GL") == chosen
