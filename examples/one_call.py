"""Single attention calls by a profile, for a model that is not driven by an adapter."""

import sparvar_tune
from sparvar_kernels import AttentionProblem

tuned = sparvar_tune.load_profile("pocketvar", gpu="cpu")
w = tuned.profile.workload

# Calls of one image come in the model's order: the keys that later scales read are ranked at the decision scale.
for scale_index in range(10, len(w.schedule)):
    problem = AttentionProblem(w.schedule, scale_index, w.batch, w.heads, w.head_dim, w.dtype, w.softmax_scale, w.logit_bound)
    q, k, v = problem.make_inputs(seed=scale_index)  # random here: q [B, H, Nq, D], k and v [B, H, Nk, D]
    attend = tuned.attention(problem)  # dense where the profile is not for such a problem
    out = attend(q, k, v, layer=0)
    print(f"scale {scale_index}: q {tuple(q.shape)}, k {tuple(k.shape)} -> {tuple(out.shape)}")
    print(tuned.explain(problem).splitlines()[-1])
