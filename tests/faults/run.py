"""Runs a script that was written when the modules lay flat: `python tests/faults/run.py SCRIPT [ARGS]`.

The names such a script imports by lead to the rooms the modules live in today. Exits as the script does.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import runpy
import sys
from pathlib import Path

ROOMS = {
    "sparvar_kernels.configs": "sparvar_kernels.backends.configs",
    "sparvar_kernels.csla": "sparvar_kernels.variants.csla.planner",
    "sparvar_kernels.dense": "sparvar_kernels.backends.dense",
    "sparvar_kernels.pooled": "sparvar_kernels.variants.pooled.planner",
    "sparvar_kernels.reference": "sparvar_kernels.oracle",
    "sparvar_kernels.selecting_triton": "sparvar_kernels.backends.triton.selecting",
    "sparvar_kernels.work": "sparvar_kernels.backends.triton.work",
    "sparvar_tune.compiling": "sparvar_tune.launch_search.compiling",
    "sparvar_tune.profiles": "sparvar_tune.profile.store",
    "sparvar_tune.search": "sparvar_tune.policy_search.study",
    "sparvar_tune.workers": "sparvar_tune.launch_search.process_pool",
}


class Rooms(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in ROOMS else None

    def create_module(self, spec):
        module = importlib.import_module(ROOMS[spec.name])
        self.own = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = self.own


if __name__ == "__main__":
    sys.meta_path.insert(0, Rooms())
    from sparvar_kernels import variants
    from sparvar_tune.policy_search import planned_trials, study, trial

    variants.at_decision = lambda variant, schedule, scale: variant.at_decision(schedule, scale)  # a method since

    vars(study).update(vars(planned_trials) | vars(trial) | vars(study))  # files of their own since

    class Verdict(study.Verdict):  # its metrics were positions
        def __init__(self, *given, **named):
            by_name = (*given[:2], {"psnr": given[2], "ssim": given[3]}, given[4]) if len(given) == 5 else given
            super().__init__(*by_name, **named)

    study.Verdict = Verdict
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
