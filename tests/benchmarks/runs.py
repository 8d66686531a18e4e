"""What a run costs beside its steps: its start, a second run beside it, and memory over a long time.

    python tests/benchmarks/runs.py                  # about ten minutes on two idle cores
    python tests/benchmarks/runs.py --part startup   # or: --part threads, --part soak

startup   CPU time of --help of each script and of hlrp's own commands, less that of `import torch`; and the wall time
          from the command to the first step of a small run of each of stages 1 and 2.
threads   The same run of stage 1, with its own choice of threads, alone and two at once: wall time of the two by that
          of the one. 2 is what cores can give that both need.
soak      A long run of a small LAQ with validations: memory of its processes at a tenth of the steps and at the end,
          a page that several share counted once.

The exit status is 1 where a goal is missed.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["train_laq.py", "train_vla.py", "finetune_policy.py"]
COMMANDS = ["probe", "rollout", "curve", "label", "inverse", "shards", "metaworld", "runs"]  # serve is LeRobot's own
WORLD = "world:hand?kinds=move&episodes=200"
SMALL = ["--data", WORLD, "--image-size", "32", "--num-tokens", "4", "--codebook-size", "8", "--pictures", "usage"]


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def begin(script: str, folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / script), "--output-dir", str(folder), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)


def end(process: subprocess.Popen) -> None:
    if process.wait():
        sys.exit(f"{process.args} ended with {process.returncode}")


def steps_done(folder: Path) -> int:
    """The last step that metrics.jsonl has."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def startup(folder: Path, _) -> list[tuple[str, float, str, float]]:
    torch = min(cpu_seconds([sys.executable, "-c", "import torch"]) for _ in range(3))
    rows = []
    for name in SCRIPTS + COMMANDS:
        command = [name] if name in SCRIPTS else ["-m", f"hlrp.{name}"]
        seconds = min(cpu_seconds([sys.executable, *command, "--help"]) for _ in range(3)) - torch
        rows.append((f"{' '.join(command)} --help, over import torch ({torch:.1f} CPU-s)", seconds, "CPU-s", 1.0))
    stage2 = ["--laq", str(folder / "train_laq.py/checkpoints/last/pretrained_model"), "--accept-failed-laq"]
    for script, flags in (("train_laq.py", SMALL), ("train_vla.py", [*stage2, "--pictures", "usage"])):
        start = time.monotonic()
        run = begin(script, folder / script, *flags, "--steps", "2", "--log-freq", "1", "--val-samples", "32")
        while not steps_done(folder / script) and run.poll() is None:
            time.sleep(0.05)
        rows.append((f"{script}, small run, first step", time.monotonic() - start, "s", 10.0))
        end(run)
    return rows


def threads(folder: Path, steps: int) -> list[tuple[str, float, str, float]]:
    flags = [*SMALL, "--steps", str(steps), "--val-samples", "32", "--num-workers", "1"]
    walls = []
    for number in (1, 2):
        start = time.monotonic()
        runs = [begin("train_laq.py", folder / f"{number}_{i}", *flags) for i in range(number)]
        for run in runs:
            end(run)
        walls.append(time.monotonic() - start)
    what = f"two runs at once on {len(os.sched_getaffinity(0))} cores, by one alone ({walls[0]:.0f} s)"
    return [(what, walls[1] / walls[0], "x", 2.3)]


def soak(folder: Path, steps: int) -> list[tuple[str, float, str, float]]:
    run = begin("train_laq.py", folder, *SMALL, "--steps", str(steps), "--batch-size", "2", "--val-samples", "32",
                "--eval-freq", str(max(1, steps // 20)), "--save-freq", str(steps), "--log-freq", "50")  # fmt: skip
    sizes: list[tuple[int, int]] = []
    while run.poll() is None:
        sizes.append((steps_done(folder), resident(run.pid)))
        time.sleep(0.5)
    end(run)
    early = [size for step, size in sizes if steps // 10 <= step < steps // 5]
    late = [size for step, size in sizes if steps * 9 // 10 <= step < steps]
    what = f"resident memory after {steps} steps, by that after {steps // 10} ({max(early) / 2**20:.0f} MiB)"
    return [(what, max(late) / max(early), "x", 1.03)]


def resident(session: int) -> int:
    """Bytes of memory of the processes of a session, without what they map of files; what n of them share counts an
    n-th for each (Pss_Anon)."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[3]) == session:
                lines = (stat.parent / "smaps_rollup").read_text().splitlines()[1:]
                fields = dict(line.split(":") for line in lines)
                total += 1024 * int(fields["Pss_Anon"].split()[0])
        except (OSError, KeyError):  # it has just ended
            continue
    return total


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--part", choices=("startup", "threads", "soak", "all"), default="all")
    parser.add_argument("--thread-steps", type=int, default=150)
    parser.add_argument("--soak-steps", type=int, default=20000)
    args = parser.parse_args()

    parts = {"startup": (startup, 0), "threads": (threads, args.thread_steps), "soak": (soak, args.soak_steps)}
    failed = False
    for name, (measure, steps) in parts.items():
        if args.part in (name, "all"):
            with tempfile.TemporaryDirectory() as folder:
                for what, value, unit, most in measure(Path(folder), steps):
                    failed |= value > most
                    print(f"{value:7.2f} {unit:6}{what}; at most {most:g} is asked for", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
