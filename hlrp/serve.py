"""LeRobot's asynchronous policy server, which then serves hlrp policies too; its flags are LeRobot's.

    python -m hlrp.serve --host=127.0.0.1 --port=8080 --fps=20

It unpickles what its clients send, as LeRobot wrote it: open it to a network that you trust, and to no other.
"""

from lerobot.async_inference import constants
from lerobot.async_inference.policy_server import serve

import hlrp.policy  # noqa: F401  LeRobot knows the type by this import


def main() -> None:
    constants.SUPPORTED_POLICIES.append("hlrp")  # the server's own list, which no plugin can join
    serve()  # pyright: ignore[reportCallIssue]  LeRobot's decorator reads the config from the command line


if __name__ == "__main__":
    main()
