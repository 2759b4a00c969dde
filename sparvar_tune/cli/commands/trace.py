"""The command `trace`: one annotated picture or layer, a table by scale and step, and a file for a profiler's window."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.policy import Policy
from sparvar_tune.cli.commands.generate import class_index
from sparvar_tune.cli.console import note, require_here, say
from sparvar_tune.cli.exit_codes import ExitCode
from sparvar_tune.cli.json_answer import Asked, print_answer
from sparvar_tune.cli.options import TraceOptions
from sparvar_tune.measure.limits import machine_limits
from sparvar_tune.policy_search.menu import paper_policy
from sparvar_tune.profile.schema import Workload
from sparvar_tune.profile.store import require_writable, write_atomic
from sparvar_tune.tracing import chrome, runs, table
from sparvar_tune.tracing.backends import open_session
from sparvar_tune.tracing.backends.nsight import TOOLS, WRITES

if TYPE_CHECKING:
    import pandas


def run(options: TraceOptions) -> int:
    subject = options.subject
    stem = _stem(options, options.way)
    if options.tell in TOOLS:
        return _under_tool(options, stem)
    require_here("trace", subject)
    require_writable(stem.with_name(f"{stem.name}.csv"))
    open_session(options.tell, subject.gpu.device)  # refused before anything runs
    traced, way = _subject(options)
    stem = _stem(options, way)
    dtype = "fp32" if subject.gpu.device == "cpu" else subject.model.dtype  # a CPU multiplies half precision in fp32
    limits = machine_limits(subject.gpu.device, dtype)
    spans = runs.spans_of(traced, options.cold)
    limits = limits.best(machine_limits(subject.gpu.device, dtype))
    found = table.frame(spans, limits)
    files = [stem.with_name(f"{stem.name}.csv")]
    of = found.assign(model=subject.model.slug, gpu=subject.gpu.slug, layer=None if options.is_picture else options.layer or 0)
    write_atomic(files[0], of.to_csv(index=False, float_format="%.6g").encode())  # so that a report knows whose it is
    told = runs.tell(traced, options.tell, stem, options.graph)
    files += told
    launched = chrome.kernels(chrome.read_trace(told[0])) if options.tell == "torch" else None
    if launched is not None and len(launched):
        files.append(stem.with_name(f"{stem.name}.kernels.csv"))
        write_atomic(files[-1], launched.to_csv(index=False, float_format="%.6g").encode())
    if options.json:
        print_answer("trace", ExitCode.DONE, Asked.of(subject), {
            "way": way, "what": traced.what, "limits": vars(limits), "rows": _records(found),
            "kernels": [] if launched is None else _records(launched), "files": [str(path) for path in files], "run": None,
        })  # fmt: skip
        return ExitCode.DONE
    say(f"{subject.model.slug} on {subject.gpu.slug}, {way}: {traced.what}, one run; its {found.ms.sum():.1f} ms:")
    say(table.text(found))
    say(f"% of limit: of this machine's own rates, {limits.gemm_flops_per_s / 1e12:.3g} TFLOP/s in {dtype} and "
        f"{limits.copy_bytes_per_s / 1e9:.3g} GB/s")  # fmt: skip
    if launched is not None and len(launched):
        say(f"kernels{', replayed' if options.graph else ''}:\n{launched.head(12).to_string(index=False)}")
    say(f"wrote {', '.join(map(str, files))}" + ("; open the .trace.json at ui.perfetto.dev" if options.tell == "torch" else ""))
    return ExitCode.DONE


def _stem(options: TraceOptions, way: str) -> Path:
    """What the names of all files begin with."""
    return options.out / f"{options.subject.model.slug}-{options.subject.gpu.slug}-{way}"


def _records(found: pandas.DataFrame) -> list[dict[str, Any]]:
    return list(json.loads(found.to_json(orient="records")))


def _under_tool(options: TraceOptions, stem: Path) -> int:
    """Runs this very command under nsys or ncu, or prints how."""
    command = TOOLS[options.tell](stem, options.words)
    report = f"{stem}.{WRITES[options.tell]}"
    if shutil.which(command[0]) is None:
        if options.json:
            _answer_run(options, ExitCode.MISSING_TOOL, command, [])
        else:
            say(f"{command[0]} is not on the PATH; where it is, run\n{shlex.join(command)}\nand open {report}")
        return ExitCode.MISSING_TOOL
    require_here("trace", options.subject)
    if options.tell == "ncu" and options.subject.gpu.device == "cpu":
        raise ValueError("--with ncu: it counts what a GPU's kernels do; want a CUDA GPU, or --with torch")
    options.out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, stdout=subprocess.DEVNULL if options.json else None)
    if done.returncode:
        raise ValueError(f"{command[0]}: ended with exit code {done.returncode}; run it by hand: {shlex.join(command)}")
    if options.json:
        _answer_run(options, ExitCode.DONE, command, [report])
    else:
        say(f"wrote {report}")
    return ExitCode.DONE


def _answer_run(options: TraceOptions, code: ExitCode, command: list[str], files: list[str]) -> None:
    print_answer("trace", code, Asked.of(options.subject), {
        "way": options.way, "what": None, "limits": None, "rows": [], "kernels": [], "files": files, "run": command
    })  # fmt: skip


def _subject(options: TraceOptions) -> tuple[runs.Run, str]:
    """What is run, and which way: dense where there is no profile."""
    subject, model, way = options.subject, options.subject.model, options.way
    device = subject.gpu.device
    adapter = subject.adapter if options.is_picture else None
    schedule = model.schedule(subject.resolution, subject.aspect)
    attend: Any = None
    if way == "tuned":
        tuned = subject.load(options.profile)
        if tuned.profile is not None:
            attend = tuned.sparse_attention()
        else:
            way = "dense"
            (note if options.json else say)(f"no profile: {'; '.join(tuned.reasons)}; what is traced is dense")
    elif way == "paper":
        attend = SparseAttention(paper_policy(schedule, model.layers, model.heads), schedule,
                                 softmax_scale=model.softmax_scale, logit_bound=model.logit_bound)  # fmt: skip
    if adapter is not None:
        label = class_index(options.label, adapter)
        return runs.one_picture(adapter, adapter.dense if attend is None else attend, (label, options.seed)), way
    if attend is None:
        attend = SparseAttention(Policy.uniform(model.layers, model.heads, {}), schedule,
                                 softmax_scale=model.softmax_scale, logit_bound=model.logit_bound)  # fmt: skip
    one = Workload.of(model, subject.resolution, subject.aspect)
    problems = replace(one, batch=one.batch * subject.images).problems()
    return runs.one_layer(model.slug, list(problems.values()), attend, options.layer or 0, device), way
