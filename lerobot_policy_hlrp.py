"""LeRobot imports what is installed under names that start with lerobot_policy_: here it finds what hlrp adds to it."""

from hlrp.metaworld_env import HLRPMetaWorld
from hlrp.policy import HLRPConfig, HLRPPolicy, make_hlrp_pre_post_processors
from hlrp.world_env import HLRPWorld

__all__ = ["HLRPConfig", "HLRPMetaWorld", "HLRPPolicy", "HLRPWorld", "make_hlrp_pre_post_processors"]
