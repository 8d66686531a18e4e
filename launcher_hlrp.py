from hlrp.cli import be_brief  # noqa: F401
