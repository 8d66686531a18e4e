"""What LeRobot asks of LIBERO, without its assets: four suites of two tasks with 50 init states each."""

import os
from types import SimpleNamespace

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


class Suite:
    def __init__(self, name):
        self.tasks = [
            SimpleNamespace(
                name=f"{name}_task_{i}",
                language=f"do task {i} of {name}",
                problem_folder=name,
                bddl_file=f"{name}_{i}.bddl",
                init_states_file=f"{name}_{i}.pruned_init",
            )
            for i in range(2)
        ]

    def get_task(self, i):
        return self.tasks[i]


benchmark = SimpleNamespace(get_benchmark_dict=lambda: {name: lambda name=name: Suite(name) for name in SUITES})


def get_libero_path(name):
    return os.path.join(os.environ["LIBERO_STUB"], name)
