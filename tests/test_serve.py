"""The policy server, as LeRobot's robot client calls it."""

import pickle
import socket
import subprocess
import sys
import time

import grpc
import numpy as np
import torch
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import send_bytes_in_chunks
from toys import CHUNK, TOP, make_policy

from hlrp.policy import make_hlrp_pre_post_processors


def test_the_server_answers_an_observation_with_a_chunk(tmp_path):
    policy = make_policy()
    policy.save_pretrained(tmp_path)
    stats = {
        key: {"mean": torch.zeros(n), "std": torch.ones(n)} for key, n in (("observation.state", 3), ("action", 2))
    }
    for pipeline in make_hlrp_pre_post_processors(policy.config, stats):
        pipeline.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    command = [sys.executable, "-m", "hlrp.serve", "--host=127.0.0.1", f"--port={port}"]
    server = subprocess.Popen(command, cwd=tmp_path)  # where it writes logs
    try:
        channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        grpc.channel_ready_future(channel).result(timeout=120)
        client = services_pb2_grpc.AsyncInferenceStub(channel)
        client.Ready(services_pb2.Empty())
        features = {
            "observation.state": {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]},
            TOP: {"dtype": "image", "shape": (40, 40, 3), "names": ["height", "width", "channels"]},
        }
        asked = RemotePolicyConfig("hlrp", str(tmp_path), features, actions_per_chunk=CHUNK)
        client.SendPolicyInstructions(services_pb2.PolicySetup(data=pickle.dumps(asked)))
        seen = {"a": 0.1, "b": 0.2, "c": 0.3, "top": np.zeros((40, 40, 3), np.uint8), "task": "open the door"}
        seen = pickle.dumps(TimedObservation(timestamp=time.time(), timestep=0, observation=seen, must_go=True))
        client.SendObservations(send_bytes_in_chunks(seen, services_pb2.Observation))
        answer = pickle.loads(client.GetActions(services_pb2.Empty()).data)
    finally:
        server.kill()
        server.wait()
    assert [timed.get_timestep() for timed in answer] == [0, 1, 2, 3]
    assert all(timed.get_action().shape == (2,) and timed.get_action().isfinite().all() for timed in answer)
