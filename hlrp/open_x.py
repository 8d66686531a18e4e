"""Open X-Embodiment: where the data sets of the Octo mixture keep what, how fast they run, and their shares.

Keys are names in a data set's features.json, as the TFDS catalogue lists them (tensorflow.org/datasets/catalog).
Which camera, state and action is Octo's choice (Octo Model Team 2024, arXiv:2405.12213;
octo/data/oxe/oxe_{dataset_configs,standardization_transforms}.py), but the values stay as they are published: no
sign is turned, no gripper command is made absolute, nothing is padded. taco_play differs: Octo takes column 7 of
its state, a joint, for the gripper, which by its description is column 6.

fps are the control frequencies in the Open X-Embodiment Collaboration's sheet of data sets (arXiv:2310.08864), as
two others copied them, in agreement: RDT-1B (arXiv:2410.07864, configs/dataset_control_freq.json) and openx2lerobot
(oxe_utils/configs.py). RLDS files have no time stamps that could confirm them.

bgr are the cameras whose published frames have red and blue exchanged (kpertsch/rlds_dataset_mod, prepare_open_x.sh).
That script makes all frames 256 pixels square and mends these: frames of that size are taken for mended.

Shares [%] are those of Octo's model card, of 25 data sets (huggingface.co/rail-berkeley/octo-base-1.5), without NYU
Door Opening (0.1 %), whose only camera is in the hand; UCSD Kitchen's is given there as < 0.1. The weights in Octo's
oxe_dataset_mixes.py are something else: they are multiplied by the number of frames of a data set.
"""

from typing import NamedTuple

BUCKET = "gs://gresearch/robotics"  # where the collection is published


class OpenX(NamedTuple):
    fps: float  # control frequency [Hz]
    share: float  # in octo24 [%]
    camera: str
    instruction: str
    action: str  # keys by commas, each with a range of its numbers or without, such as action[:7]
    state: str  # likewise; "" where there is none
    bgr: tuple[str, ...] = ()
    version: str = "0.1.0"  # of several, the one that this describes


EXTERNAL = "_converted_externally_to_rlds"
TEXT, NATURAL = "language_instruction", "natural_language_instruction"
MOVE, GRIPPER = "world_vector,rotation_delta", "gripper_closedness_action"
POSE = "base_pose_tool_reached"

# fmt: off
DATASETS = {
    "fractal20220817_data": OpenX(3, 17.0, "image", NATURAL, f"{MOVE},{GRIPPER}", f"{POSE},gripper_closed"),
    "kuka": OpenX(10, 17.0, "image", NATURAL, f"{MOVE},{GRIPPER}", f"clip_function_input/{POSE},gripper_closed"),
    "bridge_dataset": OpenX(5, 17.0, "image_0", TEXT, "action", "state", version="1.0.0"),
    "bc_z": OpenX(
        10, 9.1, "image", NATURAL, "future/xyz_residual[:3],future/axis_angle_residual[:3],future/target_close[:1]",
        "present/xyz,present/axis_angle,present/sensed_close"),
    f"stanford_hydra_dataset{EXTERNAL}": OpenX(
        10, 6.0, "image", TEXT, "action", "state[:3],state[7:10],state[-3:-2]", bgr=("image", "wrist_image")),
    "language_table": OpenX(10, 5.9, "rgb", "instruction", "action", "effector_translation"),
    "taco_play": OpenX(15, 3.6, "rgb_static", NATURAL, "rel_actions_world", "robot_obs[:7]"),
    f"furniture_bench_dataset{EXTERNAL}": OpenX(10, 3.3, "image", TEXT, "action", "state[:7],state[-1:]"),
    "utaustin_mutex": OpenX(20, 3.0, "image", TEXT, "action", "state[:8]", bgr=("image", "wrist_image")),
    f"austin_sailor_dataset{EXTERNAL}": OpenX(20, 2.9, "image", TEXT, "action", "state"),
    "roboturk": OpenX(10, 2.8, "front_rgb", NATURAL, f"{MOVE},{GRIPPER}", ""),
    "toto": OpenX(30, 2.4, "image", NATURAL, f"{MOVE},open_gripper", "state"),
    f"austin_sirius_dataset{EXTERNAL}": OpenX(20, 2.3, "image", TEXT, "action", "state"),
    "berkeley_autolab_ur5": OpenX(
        5, 1.5, "image", NATURAL, f"{MOVE},{GRIPPER}", "robot_state[6:14]", bgr=("hand_image",)),
    f"iamlab_cmu_pickup_insert{EXTERNAL}": OpenX(20, 1.2, "image", TEXT, "action", "state[:8]"),
    "viola": OpenX(20, 1.2, "agentview_rgb", NATURAL, f"{MOVE},{GRIPPER}", "joint_states,gripper_states"),
    "berkeley_fanuc_manipulation": OpenX(
        10, 1.0, "image", TEXT, "action", "state[:7]", bgr=("image", "wrist_image")),
    f"nyu_franka_play_dataset{EXTERNAL}": OpenX(3, 0.9, "image", TEXT, "action[-8:-1]", "state[-6:]"),
    "jaco_play": OpenX(10, 0.6, "image", NATURAL, f"world_vector,{GRIPPER}", "end_effector_cartesian_pos"),
    "berkeley_cable_routing": OpenX(10, 0.3, "image", NATURAL, MOVE, "robot_state"),
    f"austin_buds_dataset{EXTERNAL}": OpenX(20, 0.3, "image", TEXT, "action", "state[:8]"),
    "cmu_stretch": OpenX(10, 0.2, "image", TEXT, "action[:7]", "state"),
    f"ucsd_kitchen_dataset{EXTERNAL}": OpenX(2, 0.1, "image", TEXT, "action[:7]", "state[:7]"),
    f"dlr_edan_shared_control{EXTERNAL}": OpenX(5, 0.1, "image", TEXT, "action", "state"),
}
# fmt: on

MIXTURES = {"octo24": {name: dataset.share for name, dataset in DATASETS.items()}}  # [%]

# bridge_dataset by the names that the bucket and OpenVLA give it, and its older release in the bucket
DATASETS["bridge_data_v2"] = DATASETS["bridge_orig"] = DATASETS["bridge_dataset"]
DATASETS["bridge"] = OpenX(5, 0, "image", NATURAL, f"{MOVE},open_gripper", "state")


def mixture(name: str, root: str | None) -> list[tuple[str, float]]:
    """The sources of a mixture: a URI each, of the folder in `root` named after the data set; weights of sum 1."""
    if name not in MIXTURES:
        raise ValueError(f"rlds:{name}: no mixture of this name; {', '.join(MIXTURES)} fits")
    if not root:
        raise ValueError(f"rlds:{name}: where are its data sets? ?root=DIR or ?root={BUCKET} fits")
    root, total = root.rstrip("/"), sum(MIXTURES[name].values())
    folders = {"bridge_dataset": "bridge_data_v2"} if root == BUCKET else {}  # tfds/robotics/rtx/rtx.py
    return [
        (f"rlds:{root}/{folders.get(dataset, dataset)}", share / total) for dataset, share in MIXTURES[name].items()
    ]
