"""What a profile file holds: words, a table, and how the paper's policy does on every GPU that has a profile."""

import pandas

from sparvar_tune.profile import store
from sparvar_tune.profile.describe import describe

folder = store.shipped_folder()
profile = store.load(folder / "cpu" / "pocketvar.json")
print(f"{profile.workload.model} on {profile.silicon.name}: {profile.state}, policy {profile.policy_state}")
print(describe(profile.policy))
print(profile.to_frame().to_string())

found = [store.load(path) for path in sorted(folder.glob("*/hart.json"))]
rows = {p.silicon.gpu: p.to_frame().loc[12, ["state", "dense_ms", "tuned_ms", "speedup"]] for p in found}
print("\nHART's last scale, one layer:")
print(pandas.DataFrame(rows).T.to_string())
