"""Using a profile: find it, check it against this machine, run attention by it. Imports neither optuna nor pandas.

    tuned = sparvar_tune.load_profile("pocketvar")     # exact silicon -> near silicon -> dense, and it says which
    sparvar_tune.apply(model, tuned)                   # the model samples with it from now on; .undo() takes it back
    attend = tuned.attention(problem)                  # or one call at a time: attend(q, k, v, layer=17)

load -> demote -> tuned: what is found, which scales of it run dense here, and what then runs.
"""

from sparvar_tune.runtime.kept_memory import keep_memory
from sparvar_tune.runtime.load import load_profile
from sparvar_tune.runtime.tuned import Applied, Tuned, apply, launch_of

__all__ = ["Applied", "Tuned", "apply", "keep_memory", "launch_of", "load_profile"]
