"""The command line: what its help says, and how a user's mistake ends."""

import importlib
import re
import warnings

import pytest
import tyro

import finetune_policy
import train_laq
import train_vla
from hlrp.metaworld import render

COMMANDS = "bakeoff curve inverse label probe rollout runs shards".split()
DERIVED = {
    "--action-dim",
    "--action-sources",
    "--feature-dim",
    "--policy.stage2",
    "--policy.device",
    "--policy.optimizer-lr",
}


def help_of(parsed, config=()) -> dict[str, str]:
    """The help of each flag, without its default."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # until tyro has another way to a parser
        parser = tyro.extras.get_parser(parsed, config=config)
    names = {action.option_strings[0] if action.option_strings else action.dest: action for action in parser._actions}
    return {
        name: re.sub(r"\s*\((default|required).*", "", action.help or "", flags=re.S) for name, action in names.items()
    }


@pytest.mark.parametrize(
    ("parsed", "config"),
    [
        (train_laq.Args, ()),
        (train_vla.Args, (tyro.conf.OmitArgPrefixes,)),
        (finetune_policy.Args, (tyro.conf.AvoidSubcommands,)),
        (render, ()),
        *((importlib.import_module(f"hlrp.{name}").Args, ()) for name in COMMANDS),
    ],
    ids=["train_laq", "train_vla", "finetune_policy", "metaworld", *COMMANDS],
)
def test_every_flag_has_help_of_its_own_and_derived_values_are_no_flags(parsed, config):
    texts = help_of(parsed, config)
    assert not [name for name, text in texts.items() if len(text) < 8]
    shared = {text: [name for name in texts if texts[name] == text] for text in texts.values()}
    assert not [names for names in shared.values() if len(names) > 1]
    assert not DERIVED & texts.keys()
