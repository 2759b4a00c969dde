"""Where a picture's time goes: named ranges over one annotated run, a table by scale and step, a file for a profiler's window.

ranges    what a range is called, and what was seen of each: begin, end, FLOPs and bytes
seams     which functions get ranges while tracing is on; nothing is changed, imported or paid while it is off
work      FLOPs and bytes that a step must spend
backends  who else hears of a range: nvtx, torch.profiler, Triton's proton; and the commands for nsys and ncu
table     ranges -> time, share and % of limit by scale and step
chrome    the trace file: read, checked, its kernels by name
runs      what is traced: one picture, or one layer of a model that is known by its shapes alone

with traced(Tracer("my model")) as tracer:
    model.draw(...)
frame(tracer.spans(), limits)
"""

from sparvar_tune.tracing.ranges import Label, Span, Tracer
from sparvar_tune.tracing.seams import traced
from sparvar_tune.tracing.table import frame

__all__ = ["Label", "Span", "Tracer", "frame", "traced"]
