"""A simulator with LIBERO's names and shapes. Its state is the number of an init state."""

from types import SimpleNamespace

import numpy as np

LENGTH = 3  # steps until an even init state succeeds


class OffScreenRenderEnv:
    def __init__(self, bddl_file_name, camera_heights, camera_widths, control_freq, hard_reset):
        self.size, self.control_freq = (camera_heights, camera_widths), control_freq
        self.robots = [SimpleNamespace(controller=SimpleNamespace(use_delta=None, ee_ori_mat=np.eye(3)))]
        self.env = SimpleNamespace(_get_observations=self.observations)
        self.state = -1

    def seed(self, seed):
        self.seeded = seed

    def reset(self):
        self.state, self.t = -1, 0
        return self.observations()

    def set_init_state(self, state):
        self.state = int(state[0])
        return self.observations()

    def step(self, action):
        self.t += not isinstance(action, list)  # LeRobot's own, while the objects settle
        return self.observations(), float(self.check_success()), False, {}

    def check_success(self):
        return self.t >= LENGTH and self.state % 2 == 0

    def observations(self):
        """The pictures are upside down, as robosuite draws them: their first pixel is the last of the upright one."""
        found = {}
        for i, camera in enumerate(("agentview", "robot0_eye_in_hand")):
            picture = np.zeros((*self.size, 3), dtype=np.uint8)
            picture[0, 0] = self.state + 100 * i + 1
            found[f"{camera}_image"] = picture
        half = np.sqrt(0.5)  # a quarter turn about z
        found |= {"robot0_eef_pos": np.array([0.1, 0.2, 0.3]), "robot0_eef_quat": np.array([0, 0, half, half])}
        found |= {"robot0_gripper_qpos": np.array([0.04, -0.04]), "robot0_gripper_qvel": np.zeros(2)}
        return found | {"robot0_joint_pos": np.zeros(7), "robot0_joint_vel": np.zeros(7)}

    def close(self):
        self.state = None
