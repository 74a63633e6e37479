"""Three small control tasks for model-based reinforcement learning, as Gymnasium environments.

    gym.make("envs:Obstacles-v0")        # the part before the colon is this module: Gymnasium imports it

Each task tells a planner what it rewards: `batch_reward(obs, action, next_obs)` and `batch_terminated(next_obs)` take
torch tensors of shape (..., D), on any device, and return shape (...). `step` scores itself through the same two
functions, so the reward that is planned for and the reward that is paid cannot drift apart. All randomness comes
from `np_random`: its state before a reset, plus the actions since, replays an episode bit for bit. A pickle or a deep
copy continues where the original stands.

Obstacles-v0: walk around five walls to a goal in the plane. 100 steps.
    obs (4)      x, y, goal x, goal y (0.7, -0.8); always inside (-0.99, 0.99)
    action (2)   the step, in units of 0.1; in [-0.99, 0.99]
    dynamics     a step that would end in a wall or outside the box is not made
    reward       minus the distance to the goal after the step
    terminates   within 0.1 of the goal, and nowhere else
    Why: dynamics with jumps, easy to look at. The reward is negative everywhere, so ending early is worth a lot: a
    planner that took the edge of the box for an exit would run into it. Random actions return about -160.

PostureCheetah-v0: Gymnasium's half-cheetah, which must run with its front leg held back. 500 steps of 0.01 s.
    obs (21)     9 joint positions, 9 joint velocities, position of the torso
    action (6)   joint torques in [-1, 1]
    reward       x velocity, -10 if the front thigh is beyond 0.2 rad, -10 if the front shin is beyond 0, -10 if the
                 front foot is beyond 0
    terminates   never
    Why: a reward with cliffs, exactly known, that a random policy falls down all the time (about -2,500); and an
    observation that never changes (y of the torso), where a careless normaliser divides by zero.

Reacher7DoF-v0: a seven-joint arm reaches for a point in the air, without gravity. 200 steps of 0.02 s.
    obs (20)     7 joint positions, 7 joint velocities / 10, position of the fingertip, position of the target
                 (0.1, 0.1, 0.1)
    action (7)   motor torques in [-1, 1], times a gear of 20 for the first joint and 10 for the others
    reward       -10 times the distance from fingertip to target
    terminates   never
    Why: mostly smooth, every episode starts alike, and seven actions: too many for random search to be good at.
    Random actions return about -1,770.
"""

import copy
import os
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.mujoco import MujocoEnv  # without mujoco, this line says what to install
from numpy.typing import NDArray

Array = NDArray[np.float64]
Action = NDArray[np.float32]
Step = tuple[Array, float, bool, bool, dict[str, Any]]


def score(env: Any, obs: Array, action: Action, next_obs: Array) -> tuple[float, bool]:
    """Reward and termination of one step, from the functions that planners use for millions of them."""
    o, a, n = torch.tensor(obs), torch.tensor(action), torch.tensor(next_obs)
    return float(env.batch_reward(o, a, n)), bool(env.batch_terminated(n))


# ---------------------------------------------------------------------------------------------------- Obstacles-v0

LIMIT = 0.99  # every coordinate stays strictly inside
GOAL = np.array([0.7, -0.8])
GOAL_RADIUS = 0.1
WALLS = np.array(
    [  # left x, top y, width, height
        [-0.4, 0.8, 0.4, 0.3],
        [-0.9, 0.3, 0.2, 0.6],
        [0.6, -0.1, 0.12, 0.4],
        [-0.1, 0.2, 0.15, 0.4],
        [0.1, -0.7, 0.3, 0.15],
    ]
)
WALLS_MIN = np.stack([WALLS[:, 0], WALLS[:, 1] - WALLS[:, 3]], axis=-1)  # (5, 2) lower left corners
WALLS_MAX = np.stack([WALLS[:, 0] + WALLS[:, 2], WALLS[:, 1]], axis=-1)  # (5, 2) upper right corners


def is_free(points: Array) -> NDArray[np.bool_]:
    """Whether the agent may stand at each of the points, (..., 2) -> (...)."""
    p = points[..., None, :]  # (..., 1, 2), against the five walls
    in_a_wall = np.any(np.all((p >= WALLS_MIN) & (p <= WALLS_MAX), axis=-1), axis=-1)
    in_the_box = np.all(np.abs(points) < LIMIT, axis=-1)
    return np.asarray(in_the_box & ~in_a_wall)


class Obstacles(gym.Env[Array, Action]):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  # Gymnasium declares it so

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(-LIMIT, LIMIT, (4,), np.float64)
        self.action_space = gym.spaces.Box(-0.99, 0.99, (2,), np.float32)

    @staticmethod
    def batch_reward(obs: torch.Tensor, action: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
        distance: torch.Tensor = torch.linalg.vector_norm(next_obs[..., :2] - next_obs[..., 2:4], dim=-1)
        return -distance

    @staticmethod
    def batch_terminated(next_obs: torch.Tensor) -> torch.Tensor:
        distance: torch.Tensor = torch.linalg.vector_norm(next_obs[..., :2] - next_obs[..., 2:4], dim=-1)
        return distance < GOAL_RADIUS

    def _get_obs(self) -> Array:
        return np.concatenate([self.position, GOAL])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = self.np_random.uniform([-0.99, 0.26], [0.59, 0.99])
        while not is_free(self.position):
            self.position = self.np_random.uniform([-0.99, 0.26], [0.59, 0.99])
        self.trail = [self.position]  # of this episode, for the pictures
        return self._get_obs(), {}

    def step(self, action: Action) -> Step:
        obs = self._get_obs()
        # In double precision from the first operation on: the action may come in single
        position = self.position + np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0) / 10
        if is_free(position):
            self.position = position
        self.trail.append(self.position)
        next_obs = self._get_obs()
        reward, terminated = score(self, obs, action, next_obs)
        return next_obs, reward, terminated, False, {}

    def render(self) -> NDArray[np.uint8]:
        side = 400
        axis = np.linspace(-1, 1, side)
        pixels = np.stack(np.meshgrid(axis, -axis), axis=-1)  # (side, side, 2), the x and y of every pixel, y upwards
        image = np.full((side, side, 3), 255, dtype=np.uint8)
        image[~is_free(pixels)] = (70, 70, 80)
        image[np.linalg.norm(pixels - GOAL, axis=-1) < GOAL_RADIUS] = (120, 200, 120)

        trail = np.array(self.trail)  # (T, 2)
        part = np.linspace(0, 1, 21)[:, None, None]  # a step is at most 20 pixels in x and in y: no gaps
        line = (1 - part) * trail[:-1] + part * trail[1:]  # (21, T - 1, 2)
        column, row = np.rint((line * [1, -1] + 1) / 2 * (side - 1)).astype(int).reshape(-1, 2).T
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):  # two pixels wide; |coordinate| < 0.99 keeps it inside
            image[row + down, column + right] = (240, 160, 60)
        image[np.linalg.norm(pixels - self.position, axis=-1) < 0.03] = (200, 50, 50)
        return image


# ------------------------------------------------------------------------------------------------ the two MuJoCo tasks


class PlannableMujocoEnv(MujocoEnv):
    """What the two tasks share: a step that is scored by the batch functions, and pictures without a display."""

    def _get_obs(self) -> Array:
        raise NotImplementedError

    def step(self, action: Action) -> Step:  # type: ignore[override]  # MujocoEnv asks for an np.float64 reward
        obs = self._get_obs()
        self.do_simulation(action, self.frame_skip)
        next_obs = self._get_obs()
        reward, terminated = score(self, obs, action, next_obs)
        return next_obs, reward, terminated, False, {}

    def render(self) -> Any:
        # MuJoCo's default, GLFW, opens a window even for pictures, so it needs a display; EGL does not
        chosen = any(os.environ.get(name) for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"))
        if sys.platform == "linux" and not chosen:
            os.environ["MUJOCO_GL"] = "egl"
        if self.mujoco_renderer.viewer is not None:  # another environment may have drawn since
            self.mujoco_renderer.viewer.make_context_current()
        return super().render()

    def close(self) -> None:
        viewer = self.mujoco_renderer.viewer
        if viewer is not None:
            # OpenGL objects are numbers within their context. Left to the garbage collector, they are freed in whatever
            # context is current by then, and the environment that it belongs to draws black from there on.
            viewer.make_context_current()
            viewer.con.free()
        super().close()
        self.mujoco_renderer.viewer, self.mujoco_renderer._viewers = None, {}

    def __getstate__(self) -> dict[str, Any]:
        # Model, data and generator all copy with their state; only an open graphics context belongs to this process,
        # and the renderer makes another one when it is asked for a picture.
        renderer = copy.copy(self.mujoco_renderer)
        renderer.viewer, renderer._viewers = None, {}
        return self.__dict__ | {"mujoco_renderer": renderer}


class PostureCheetah(PlannableMujocoEnv):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 100}  # noqa: RUF012  # Gymnasium declares it so

    def __init__(self, render_mode: str | None = None) -> None:
        space = gym.spaces.Box(-np.inf, np.inf, (21,), np.float64)
        super().__init__("half_cheetah.xml", 1, space, render_mode, camera_name="track")

    @staticmethod
    def batch_reward(obs: torch.Tensor, action: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
        front_thigh, front_shin, front_foot = next_obs[..., 6:9].unbind(-1)
        faults = (front_thigh > 0.2).int() + (front_shin > 0).int() + (front_foot > 0).int()
        return next_obs[..., 9] - 10 * faults

    @staticmethod
    def batch_terminated(next_obs: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(next_obs[..., 0], dtype=torch.bool)

    def _get_obs(self) -> Array:
        # A MuJoCo step computes where the bodies are first and moves the joints last, so after a step the torso's
        # position belongs to the joints of one substep ago. Calling mj_forward here would make it another task.
        return np.concatenate([self.data.qpos, self.data.qvel, self.data.body("torso").xpos])

    def reset_model(self) -> Array:
        qpos = self.init_qpos + self.np_random.uniform(-0.1, 0.1, self.model.nq)
        qvel = self.init_qvel + 0.1 * self.np_random.standard_normal(self.model.nv)
        self.set_state(qpos, qvel)
        return self._get_obs()


# The arm stretches along x in its zero pose, with the shoulder beside a table. Only the hand and the table collide.
ARM = """
<mujoco model="reacher_7dof">
  <compiler angle="radian" inertiafromgeom="true"/>
  <option timestep="0.01" gravity="0 0 0" integrator="Euler"/>
  <default>
    <joint type="hinge" limited="true" armature="0.004" damping="0.8"/>
    <geom type="capsule" contype="0" conaffinity="0" margin="0.002" rgba="0.75 0.77 0.8 1"/>
    <motor ctrllimited="true" ctrlrange="-1 1" gear="10"/>
  </default>
  <visual>
    <headlight ambient="0.4 0.4 0.4" diffuse="0.5 0.5 0.5" specular="0.1 0.1 0.1"/>
  </visual>
  <asset>
    <texture type="skybox" builtin="gradient" rgb1="0.95 0.97 1" rgb2="0.6 0.7 0.8" width="64" height="64"/>
    <texture name="squares" type="2d" builtin="checker" rgb1=".45 .4 .35" rgb2=".5 .45 .4" width="64" height="64"/>
    <material name="table" texture="squares" texrepeat="8 8"/>
  </asset>
  <worldbody>
    <light directional="true" pos="0.5 0.5 3" dir="-0.2 -0.3 -1" diffuse="0.4 0.4 0.4"/>
    <camera name="view" pos="1.5 1 0.9" xyaxes="-0.735 0.678 0 -0.294 -0.319 0.902"/>
    <geom name="table" type="plane" pos="0 0.5 -0.425" size="1 1 0.1" contype="1" conaffinity="1" material="table"/>
    <site name="target" pos="0.1 0.1 0.1" size="0.04" rgba="0.2 0.75 0.3 1"/>
    <body name="shoulder_pan" pos="0 -0.6 0">
      <joint name="shoulder_pan" axis="0 0 1" range="-2.2854 1.7146" damping="2"/>
      <geom fromto="0 0 -0.4 0 0 0.2" size="0.1"/>
      <geom type="sphere" pos="-0.06 0.05 0.2" size="0.05"/>
      <geom type="sphere" pos="0.06 0.05 0.2" size="0.05"/>
      <geom type="sphere" pos="-0.06 0.09 0.2" size="0.03" rgba="0.2 0.2 0.25 1"/>
      <geom type="sphere" pos="0.06 0.09 0.2" size="0.03" rgba="0.2 0.2 0.25 1"/>
      <body name="shoulder_lift" pos="0.1 0 0">
        <joint name="shoulder_lift" axis="0 1 0" range="-0.5236 1.3963" damping="2"/>
        <geom fromto="0 -0.1 0 0 0.1 0" size="0.1"/>
        <body name="upper_arm_roll">
          <joint name="upper_arm_roll" axis="1 0 0" range="-1.5 1.7"/>
          <geom fromto="-0.1 0 0 0.1 0 0" size="0.02"/>
          <geom fromto="0 0 0 0.4 0 0" size="0.06"/>
          <body name="elbow_flex" pos="0.4 0 0">
            <joint name="elbow_flex" axis="0 1 0" range="-2.3213 0"/>
            <geom fromto="0 -0.02 0 0 0.02 0" size="0.06"/>
            <body name="forearm_roll">
              <joint name="forearm_roll" axis="1 0 0" range="-1.5 1.5"/>
              <geom fromto="-0.1 0 0 0.1 0 0" size="0.02"/>
              <geom fromto="0 0 0 0.291 0 0" size="0.05"/>
              <body name="wrist_flex" pos="0.321 0 0">
                <joint name="wrist_flex" axis="0 1 0" range="-1.094 0"/>
                <geom fromto="0 -0.02 0 0 0.02 0" size="0.01"/>
                <body name="wrist_roll">
                  <joint name="wrist_roll" axis="1 0 0" range="-1.5 1.5"/>
                  <geom name="hand" type="sphere" pos="0.03 0 0" size="0.08" contype="1" conaffinity="1"
                        rgba="0.9 0.5 0.2 1"/>
                  <site name="fingertip" size="0.01"/>
                </body>
              </body>
            </body>
          </body>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator>
    <motor joint="shoulder_pan" gear="20"/>
    <motor joint="shoulder_lift"/>
    <motor joint="upper_arm_roll"/>
    <motor joint="elbow_flex"/>
    <motor joint="forearm_roll"/>
    <motor joint="wrist_flex"/>
    <motor joint="wrist_roll"/>
  </actuator>
</mujoco>
"""


class Reacher7DoF(PlannableMujocoEnv):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012  # Gymnasium declares it so

    def __init__(self, render_mode: str | None = None) -> None:
        space = gym.spaces.Box(-np.inf, np.inf, (20,), np.float64)
        # MujocoEnv wants the file that holds the model: it is this one
        super().__init__(os.path.abspath(__file__), 2, space, render_mode, camera_name="view")

    def _initialize_simulation(self) -> tuple[Any, Any]:
        import mujoco

        model = mujoco.MjModel.from_xml_string(ARM)
        return model, mujoco.MjData(model)

    @staticmethod
    def batch_reward(obs: torch.Tensor, action: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
        distance: torch.Tensor = torch.linalg.vector_norm(next_obs[..., 14:17] - next_obs[..., 17:20], dim=-1)
        return -10 * distance

    @staticmethod
    def batch_terminated(next_obs: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(next_obs[..., 0], dtype=torch.bool)

    def _get_obs(self) -> Array:
        # The sites, like the torso of the cheetah, are as the last step left them: one substep behind the joints
        fingertip, target = self.data.site("fingertip").xpos, self.data.site("target").xpos
        return np.concatenate([self.data.qpos, self.data.qvel / 10, fingertip, target])

    def reset_model(self) -> Array:
        self.set_state(np.zeros(self.model.nq), np.zeros(self.model.nv))
        return self._get_obs()


gym.register("Obstacles-v0", f"{__name__}:Obstacles", max_episode_steps=100)
gym.register("PostureCheetah-v0", f"{__name__}:PostureCheetah", max_episode_steps=500)
gym.register("Reacher7DoF-v0", f"{__name__}:Reacher7DoF", max_episode_steps=200)
