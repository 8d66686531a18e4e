"""LeRobot imports what is installed under names that start with lerobot_policy_: here it finds what hlrp adds to it."""

from hlrp.envs import HLRPMetaWorld, HLRPWorld
from hlrp.policy import HLRPConfig, HLRPPolicy, make_hlrp_pre_post_processors

__all__ = ["HLRPConfig", "HLRPMetaWorld", "HLRPPolicy", "HLRPWorld", "make_hlrp_pre_post_processors"]
