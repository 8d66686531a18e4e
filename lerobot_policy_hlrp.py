"""LeRobot imports what is installed under names that start with lerobot_policy_: here it finds the policy `hlrp`."""

from hlrp.policy import HLRPConfig, HLRPPolicy, make_hlrp_pre_post_processors

__all__ = ["HLRPConfig", "HLRPPolicy", "make_hlrp_pre_post_processors"]
