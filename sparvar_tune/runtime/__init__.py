"""Using a profile: find it, check it against this machine, run attention by it. Imports neither optuna nor pandas."""

from sparvar_tune.runtime.tuned import Tuned, apply, launch_of, load_profile

__all__ = ["Tuned", "apply", "launch_of", "load_profile"]
