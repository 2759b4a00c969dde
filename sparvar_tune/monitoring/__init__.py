"""What a serving process tells of its pictures: which rows ran, what fell back to dense and why, time by scale, sampled fidelity.

    metrics   every number there is: name, kind, labels
    sinks     where they go: prometheus-client or OpenTelemetry, whichever is installed
    images    pictures out of what a generation returned, and the random state it began with
    watch     the hooks: put on by `monitor`, taken off exactly by `undo`

Nothing of it is imported, and nothing hangs in a model, before `monitor` is called.
"""

from sparvar_tune.monitoring.watch import Monitor, monitor

__all__ = ["Monitor", "monitor"]
