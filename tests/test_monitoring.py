"""The monitor: it counts what ran, samples fidelity without changing a picture, and is gone when it is off."""

from __future__ import annotations

import dataclasses
import http.server
import importlib.util
import json
import math
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
import warnings
from collections import Counter
from pathlib import Path

import adapter_checks as checks
import block_lookalikes
import lookalikes
import numpy
import pytest
import tiny
import torch
import var_hart_lookalikes
from PIL import Image
from test_adapters import tuned_for
from test_runtime import profile

import sparvar_tune
from sparvar_kernels import AttentionProblem, Policy, Pooled, Rule
from sparvar_kernels.backends.cpu.layer import Layer
from sparvar_tune.catalog.gpus import device_row, find_gpu
from sparvar_tune.catalog.metrics import METRICS
from sparvar_tune.generation import DropUnconditional, SkipScales
from sparvar_tune.measure.fidelity import compare_pictures
from sparvar_tune.monitoring import metrics, watch
from sparvar_tune.monitoring.images import pictures_of
from sparvar_tune.pocketvar.model import Generation, draw_noise
from sparvar_tune.runtime import Tuned

ROOT = Path(__file__).parent.parent
SHOWN = ROOT / "examples" / "monitoring"
LABELS = {"model": "pocketvar", "gpu": "cpu", "preset": "near-lossless"}


class Told:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.counts, self.values, self.gauges = Counter(), {}, {}

    def add(self, name, value, labels):
        self.counts[(name, *(labels[key] for key in metrics.INSTRUMENTS[name].labels))] += value
        assert set(labels) == {*metrics.BASE, *metrics.INSTRUMENTS[name].labels}

    def record(self, name, value, labels):
        self.values.setdefault((name, *(labels[key] for key in metrics.INSTRUMENTS[name].labels)), []).append(value)

    def set(self, name, value, labels):
        self.gauges[name] = value


def tuned_one(**changes) -> Tuned:
    """A profile of the tiny model with sparse rows at scales 5 and 6."""
    return Tuned(find_gpu("cpu"), profile(), None, (), **changes)


def drawing(model, seed: int = 7):
    return lambda: Generation(model, [1], draw_noise(model.schedule, 16, seed), 0.7).run().pictures()


@pytest.fixture
def applied(monkeypatch):
    model = tiny.make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other weights than the profile's
        return model, sparvar_tune.apply(model, tuned_one())


def test_counts_rows_scales_and_generations(applied):
    model, on = applied
    plain = drawing(model)()
    with sparvar_tune.monitor(on, to=(told := Told())) as watched:
        assert torch.equal(watched.draw(drawing(model)), plain) and watched.last_reason is None
        assert torch.equal(drawing(model)(), plain)  # nobody says when it ends: with the last layer's attention
    assert told.counts == {
        ("sparvar.generations",): 2,
        ("sparvar.rows.used", "5", "cpu"): 2,
        ("sparvar.rows.used", "6", "cpu"): 2,
    }
    assert {name: len(found) for name, found in told.values.items()} == {
        ("sparvar.generation.seconds",): 2, **{("sparvar.scale.seconds", str(s)): 2 for s in range(7)}
    }  # fmt: skip
    whole, scales = (
        told.values[("sparvar.generation.seconds",)],
        [told.values[("sparvar.scale.seconds", str(s))] for s in range(7)],
    )
    assert all(sum(found[i] for found in scales) <= whole[i] for i in (0, 1)) and min(map(min, scales)) > 0
    assert told.gauges == {"sparvar.sampling.every": 0, "sparvar.certified.psnr_db": 35.0, "sparvar.certified.ssim": 0.96}


def test_off_leaves_nothing(applied):
    model, on = applied
    attend = model.attend
    plain, before, ready = drawing(model)(), dict(vars(attend)), dict(attend._ready)
    watched = sparvar_tune.monitor(on, to=(told := Told()))
    drawing(model)()
    assert any(type(found) is not Layer for found in attend._ready.values())
    watched.undo(), watched.undo()
    assert vars(attend).keys() == before.keys() and "_prepare" not in vars(attend) and not attend._ready
    assert torch.equal(drawing(model)(), plain)
    assert attend._ready == ready and all(type(found) is Layer for found in attend._ready.values())  # the very layers
    seen = told.counts.copy()
    watched.draw(drawing(model))
    assert told.counts == seen
    first, second = sparvar_tune.monitor(on, to=Told()), sparvar_tune.monitor(on, to=Told())
    first.undo(), second.undo()  # in any order
    assert "_prepare" not in vars(attend)


def test_every_second_generation_is_drawn_densely_too(applied):
    model, on = applied
    numbers = iter(range(100))

    def draw():
        """Noise from torch's own generator: each picture another."""
        seed = int(torch.randint(1 << 30, (1,))) + next(numbers) * 0
        return drawing(model, seed)()

    torch.manual_seed(5)
    plain = [draw() for _ in range(4)]
    state = torch.get_rng_state()
    with on._change.paused():
        torch.manual_seed(5)
        dense = [draw() for _ in range(4)]
    torch.manual_seed(5)
    with sparvar_tune.monitor(on, to=(told := Told()), every=2) as watched:
        got = [watched.draw(draw) for _ in range(4)]
    assert all(map(torch.equal, got, plain)) and torch.equal(torch.get_rng_state(), state)  # as if nobody had looked
    want = [compare_pictures(plain[i], dense[i]) for i in (1, 3)]
    assert told.values[("sparvar.sampled.psnr_db",)] == [w["psnr"] for w in want] and want[0]["psnr"] < 60
    assert told.values[("sparvar.sampled.ssim",)] == [w["ssim"] for w in want]
    assert told.counts[("sparvar.sampled.psnr_db.squares",)] == pytest.approx(sum(w["psnr"] ** 2 for w in want))
    assert told.counts[("sparvar.generations",)] == 4 and ("sparvar.samples.failed",) not in told.counts
    assert told.counts[("sparvar.rows.used", "6", "cpu")] == 4  # the twins are not counted


def test_what_cannot_be_compared_is_counted_and_served(applied):
    model, on = applied
    seeds = iter(range(100))
    for draw, why in (
        (lambda: drawing(model, next(seeds))(), "two drawings from one random state differ"),
        (lambda: torch.zeros(1, 3, 8, 8), "no attention of this model was called"),  # such as a captured graph
        (lambda: (drawing(model)(), "text")[1], "want a tensor"),
    ):
        with sparvar_tune.monitor(on, to=(told := Told()), every=1) as watched, pytest.warns(UserWarning, match=why):
            assert watched.draw(draw) is not None
        assert told.counts[("sparvar.samples.failed",)] == 1 and ("sparvar.sampled.psnr_db",) not in told.values
    with sparvar_tune.monitor(on, to=(told := Told()), every=1) as watched, pytest.raises(ZeroDivisionError):
        watched.draw(lambda: 1 // 0)  # the caller's own
    assert ("sparvar.generation.seconds",) not in told.values


def test_random_state_is_that_of_one_drawing(applied):
    """Also where drawings take more of it each time, or fail."""
    model, on = applied
    takes = iter((3, 5, 7, 11))

    def draw():
        torch.rand(next(takes)), numpy.random.rand(2)
        return drawing(model, seed=int(torch.randint(1 << 30, (1,))))()

    torch.manual_seed(3), numpy.random.seed(3)
    torch.rand(3), numpy.random.rand(2), torch.randint(1 << 30, (1,))
    want, more = torch.get_rng_state(), numpy.random.rand()
    torch.manual_seed(3), numpy.random.seed(3)
    with sparvar_tune.monitor(on, to=Told(), every=1) as watched, pytest.warns(UserWarning, match="two drawings"):
        watched.draw(draw)
    assert next(takes) == 7 and torch.equal(torch.get_rng_state(), want) and numpy.random.rand() == more


def test_reasons_for_running_dense():
    model = tiny.make_model()
    on = sparvar_tune.apply(model, Tuned(find_gpu("cpu"), None, None, ("none",)))
    with sparvar_tune.monitor(on, to=(told := Told()), every=1) as watched:
        watched.draw(drawing(model))
    assert told.counts[("sparvar.dense.fallbacks", "all", "no profile")] == 1 and not told.gauges.keys() & {
        "sparvar.certified.ssim"
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on = sparvar_tune.apply(model, tuned_one(demoted={6: "its gain is not certain"}))
    with sparvar_tune.monitor(on, to=(told := Told())) as watched:
        watched.draw(drawing(model))
    assert told.counts[("sparvar.dense.fallbacks", "6", "demoted")] == 1
    assert ("sparvar.rows.used", "6", "cpu") not in told.counts and told.counts[("sparvar.rows.used", "5", "cpu")] == 1
    assert {key[2] for key in told.counts if key[0] == "sparvar.dense.fallbacks"} <= set(metrics.REASONS)


def test_single_calls():
    tuned = tuned_one()
    w = tuned.profile.workload
    problem = AttentionProblem(w.schedule, 5, 1, 2, 32, "fp32", w.softmax_scale, w.logit_bound)
    q, k, v = problem.make_inputs(0)
    want = tuned.attention(problem)(q, k, v, layer=0)
    with sparvar_tune.monitor(tuned, to=(told := Told())):
        assert torch.equal(tuned.attention(problem)(q, k, v, layer=0), want)  # an object that was there before
        other = dataclasses.replace(problem, logit_bound=90.0)
        tuned.attention(other)(q, k, v, layer=0)  # and one that was not
        tuned.attention(dataclasses.replace(problem, heads=4))
    assert told.counts[("sparvar.dense.fallbacks", "5", "problem")] == 1 and "attention" not in vars(tuned)
    with pytest.raises(ValueError, match="single calls make no picture"):
        sparvar_tune.monitor(tuned, to=Told(), every=3)


@pytest.mark.parametrize(
    "kind, model, path",
    [("Var", "var-d16", "attention"), ("Infinity", "infinity-2b", "attention"), ("Hart", "hart", "attention"),
     ("Infinity", "infinity-2b", "fused"), ("Var", "var-d16", "fused"), ("Hart", "hart", "fused")],
)  # fmt: skip
def test_a_live_model_is_watched_by_itself(kind, model, path):
    """Sampling, its dense twin and the fallback of another aspect, with nothing said but `monitor`."""
    whole = block_lookalikes if kind == "Infinity" else var_hart_lookalikes
    driven = getattr(whole if path == "fused" else lookalikes, kind)()
    layers = len(driven.blocks)
    policy = checks.policies(layers, len(driven.grids()))["windows"]
    dense = checks.draw(driven)
    tuned = tuned_for(driven, model, policy)
    workload = dataclasses.replace(tuned.profile.workload, layers=layers)
    row = dataclasses.replace(profile().rows[0], scale_index=max(r.scale_index for r in policy.rules))
    tuned.profile = dataclasses.replace(tuned.profile, rows=(row,), workload=workload)
    with sparvar_tune.apply(driven.model, tuned, path) as on:
        sparse, before = checks.draw(driven), checks.everything(driven)
        pairs = zip(pictures_of(sparse.pictures), pictures_of(dense.pictures), strict=True)
        want = [METRICS["psnr"].compare(*pair) for pair in pairs]
        with sparvar_tune.monitor(on, to=(told := Told()), every=1):
            drawn, n = checks.draw(driven), len(sparse.logits)
            assert torch.equal(drawn.pictures, sparse.pictures) and told.values[("sparvar.sampled.psnr_db",)] == want
            for i, way in enumerate((sparse, sparse, dense)):  # the picture, whether it repeats, its dense twin
                assert all(map(torch.equal, drawn.logits[i * n : (i + 1) * n], way.logits)) and len(drawn.logits) == 3 * n
            assert not all(map(torch.equal, sparse.logits, dense.logits))
            assert told.counts[("sparvar.generations",)] == 1 and ("sparvar.samples.failed",) not in told.counts
            assert told.counts[("sparvar.rows.used", str(row.scale_index), "cpu")] == 1
            assert {key[1] for key in told.values if key[0] == "sparvar.scale.seconds"} == {
                str(s) for s in range(len(driven.grids()))
            }
            if kind == "Infinity":
                with pytest.warns(UserWarning, match="own attention"):
                    driven.sample(aspect=1.5)
                assert told.counts[("sparvar.dense.fallbacks", "all", "schedule")] == 1
                assert told.counts[("sparvar.unfused",)] == (path == "fused")
        assert checks.everything(driven) == before
        assert checks.same(checks.draw(driven), sparse)
    assert checks.same(checks.draw(driven), dense)


@pytest.mark.parametrize("path", ["attention", "fused"])
def test_a_twin_does_no_step_of_the_policy(path):
    """Guidance whose unconditional half is dropped, and a scale left out: the certificate is against pictures without either."""
    driven = (var_hart_lookalikes if path == "fused" else lookalikes).Var()
    layers, last = len(driven.blocks), len(driven.grids()) - 1
    rules = (Rule(last - 1, "A", Pooled(2, 2)),)
    steps = (DropUnconditional(last - 2), SkipScales((last,)))
    policy = Policy(("AB",) * layers, rules, steps)
    dense = checks.draw(driven)
    tuned = tuned_for(driven, "var-d16", policy)
    meaning = tuple(sorted({**dict(tuned.profile.meaning), **{step.kind: step.meaning for step in steps}}.items()))
    workload = dataclasses.replace(tuned.profile.workload, layers=layers)
    tuned.profile = dataclasses.replace(tuned.profile, workload=workload, meaning=meaning)
    with sparvar_tune.apply(driven.model, tuned, path) as on:
        sparse = checks.draw(driven)
        with sparvar_tune.monitor(on, to=(told := Told()), every=1):
            drawn, n = checks.draw(driven), len(sparse.logits)
        assert n == last and torch.equal(drawn.pictures, sparse.pictures) and ("sparvar.samples.failed",) not in told.counts
        assert all(map(torch.equal, drawn.logits, [*sparse.logits, *sparse.logits, *dense.logits]))
        assert checks.same(checks.draw(driven), sparse)  # and afterwards every step again
    assert checks.same(checks.draw(driven), dense)


def test_a_twin_needs_what_the_model_cannot_run_without(monkeypatch):
    """Infinity without flash-attn: our cross-attention stays while the dense twin is drawn."""
    driven = lookalikes.Infinity()
    monkeypatch.setattr(lookalikes, "flash_attn_varlen_kvpacked_func", None)
    tuned = tuned_for(driven, "infinity-2b", checks.policies(4, len(driven.grids()))["windows"])
    with sparvar_tune.apply(driven.model, tuned) as on, sparvar_tune.monitor(on, to=(told := Told()), every=1):
        driven.sample()
    assert len(told.values[("sparvar.sampled.psnr_db",)]) == 1


def test_a_gpu_is_not_waited_for(applied, monkeypatch):
    """Times are of events; a generation whose events are not done stays pending until a later one finds them done."""
    done, log = [False], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(log)
            log.append("record")

        def query(self):
            log.append("query")
            return done[0]

        def elapsed_time(self, later):
            assert done[0], "read before it is done"
            return 1e3 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    model, on = applied
    watched = sparvar_tune.monitor(on, to=(told := Told()))
    watched.on_gpu = True
    watched.draw(drawing(model))
    watched.draw(drawing(model))
    assert "synchronize" not in log and ("sparvar.generation.seconds",) not in told.values and len(watched.pending) == 2
    done[0] = True
    watched.draw(drawing(model))
    assert "synchronize" not in log and len(told.values[("sparvar.generation.seconds",)]) == 3 and not watched.pending
    done[0] = False
    for _ in range(watch.MOST_PENDING + 3):  # a device far behind does not fill the memory
        watched.draw(lambda: None)
    assert len(watched.pending) == watch.MOST_PENDING
    done[0] = True
    watched.undo()
    assert log.count("synchronize") == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    watched = sparvar_tune.monitor(on, to=(told := Told()))
    watched.on_gpu = True
    drawing(model)()
    assert not told.counts  # nothing is recorded into a graph
    watched.undo()


def test_bad_input_is_one_line(applied, monkeypatch):
    _, on = applied
    for what, more, why in (
        (3, {}, "want what sparvar_tune.apply or load_profile returned"), (on, {"every": -1}, "every=-1"),
        (on, {"every": 1.5}, "every=1.5"), (on, {"to": "statsd"}, "want one of prometheus, opentelemetry"),
        (on, {"to": object()}, "want a CollectorRegistry, a MeterProvider or a Sink"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why) as error:
            sparvar_tune.monitor(what, **more)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for to in (None, "prometheus", "opentelemetry"):
        with pytest.raises(ValueError, match=r"pip install 'sparvar-tune\[monitor\]'"):
            sparvar_tune.monitor(on, to=to)


def test_pictures_of_what_models_return():
    floats = torch.rand(2, 3, 8, 6)
    bytes_ = (floats * 255).round().byte()
    images = [Image.fromarray(b.permute(1, 2, 0).numpy()) for b in bytes_]
    want = [b[None].float() / 255 for b in bytes_]
    ids = [torch.zeros(2, 4, 3, dtype=torch.long)]
    pipeline = type("Output", (), {"images": images})()
    for returned in (bytes_, bytes_.permute(0, 2, 3, 1), bytes_.permute(0, 2, 3, 1).numpy(), images, pipeline,
                     (torch.zeros(2, 5), ids, bytes_.permute(0, 2, 3, 1)), [numpy.asarray(images[0]), images]):  # fmt: skip
        assert all(map(torch.equal, pictures_of(returned), want))
    assert [p.shape for p in pictures_of(floats[0])] == [(1, 3, 8, 6)]
    for wrong in (None, "text", torch.zeros(2, 4, 8, 8), torch.zeros(5), []):
        with pytest.raises(ValueError, match="want a tensor"):
            pictures_of(wrong)


# Libraries


def test_prometheus_shows_it(applied):
    client = pytest.importorskip("prometheus_client")
    model, on = applied
    registry = client.CollectorRegistry()
    for _ in range(2):  # a second monitor goes on where the first stopped
        with sparvar_tune.monitor(on, to=registry, every=1) as watched:
            watched.draw(drawing(model))
    text = client.generate_latest(registry).decode()
    assert registry.get_sample_value("sparvar_generations_total", LABELS) == 2
    assert registry.get_sample_value("sparvar_rows_used_total", {**LABELS, "scale": "6", "kernel": "cpu"}) == 2
    assert registry.get_sample_value("sparvar_scale_seconds_count", {**LABELS, "scale": "6"}) == 2
    mean = registry.get_sample_value("sparvar_sampled_psnr_db_sum", LABELS) / 2
    assert registry.get_sample_value("sparvar_sampled_psnr_db_squares_total", LABELS) == pytest.approx(2 * mean**2)
    assert registry.get_sample_value("sparvar_certified_psnr_db", LABELS) == 35.0
    assert all(f"# HELP {row.exposed} " in text for row in metrics.INSTRUMENTS.values())


def test_rules_and_dashboard_ask_for_what_is_told():
    """Every name in them is a number of the monitor or a recorded one; all but MS-SSIM's, which few ask for, are looked at."""
    told = {row.exposed + end for row in metrics.INSTRUMENTS.values()
            for end in (("_bucket", "_sum", "_count") if row.kind == "histogram" else ("",))}  # fmt: skip
    rules, board = (SHOWN / "rules.yml").read_text(), json.loads((SHOWN / "grafana.json").read_text())
    recorded = set(re.findall(r"record: (\S+)", rules))
    asked = rules + " ".join(t["expr"] for panel in board["panels"] for t in panel["targets"])
    names = set(re.findall(r"\bsparvar[_:][a-z0-9_:]+", re.sub(r"record: \S+|#.*", "", asked)))
    assert names <= told | recorded, names - told - recorded
    looked_at = {row.exposed for row in metrics.INSTRUMENTS.values() if any(name.startswith(row.exposed) for name in names)}
    assert {row.exposed for row in metrics.INSTRUMENTS.values()} - looked_at == {
        "sparvar_sampled_ms_ssim", "sparvar_sampled_ms_ssim_squares_total", "sparvar_certified_ms_ssim"
    }  # fmt: skip
    boxes = [panel["gridPos"] for panel in board["panels"]]
    cells = [(x, y) for b in boxes for x in range(b["x"], b["x"] + b["w"]) for y in range(b["y"], b["y"] + b["h"])]
    assert (
        len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24 and len({p["id"] for p in board["panels"]}) == len(boxes)
    )


class Collector(http.server.BaseHTTPRequestHandler):
    """An OTLP collector's receiver, as far as a test needs one."""

    got: list[tuple[str, bytes]]

    def do_POST(self):
        self.got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_opentelemetry_sends_it_to_a_collector(applied):
    exporter = pytest.importorskip("opentelemetry.exporter.otlp.proto.http.metric_exporter")
    sdk = pytest.importorskip("opentelemetry.sdk.metrics")
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    Collector.got = []
    server = http.server.HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        send = exporter.OTLPMetricExporter(endpoint=f"http://127.0.0.1:{server.server_port}/v1/metrics")
        provider = sdk.MeterProvider([PeriodicExportingMetricReader(send, export_interval_millis=math.inf)])
        model, on = applied
        with sparvar_tune.monitor(on, to=provider, every=1) as watched:
            watched.draw(drawing(model))
        provider.force_flush()
        provider.shutdown()
    finally:
        server.shutdown(), server.server_close()
    ((path, body),) = Collector.got
    assert path == "/v1/metrics"
    request = ExportMetricsServiceRequest.FromString(body)
    found = {m.name: m for r in request.resource_metrics for scope in r.scope_metrics for m in scope.metrics}
    assert set(found) <= set(metrics.INSTRUMENTS) and found["sparvar.generations"].sum.data_points[0].as_int == 1
    assert found["sparvar.generations"].sum.is_monotonic and found["sparvar.scale.seconds"].unit == "s"
    assert len(found["sparvar.scale.seconds"].histogram.data_points) == 7
    (sampled,) = found["sparvar.sampled.psnr_db"].histogram.data_points
    assert sampled.count == 1 and tuple(sampled.explicit_bounds) == metrics.DECIBELS
    assert found["sparvar.certified.psnr_db"].gauge.data_points[0].as_double == 35.0


# A real server, where it is installed: prometheus 2 or newer and its promtool


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_takes_the_rules_and_they_go_off():
    for words in (["check", "rules", str(SHOWN / "rules.yml")], ["test", "rules", str(ROOT / "tests" / "alert_rules.yml")]):
        done = subprocess.run(["promtool", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def ask(port: int, path: str, **query):
    address = f"http://127.0.0.1:{port}{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(address, timeout=10) as answer:
        return json.load(answer)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_a_real_prometheus_scrapes_and_answers(applied, tmp_path):
    client = pytest.importorskip("prometheus_client")
    model, on = applied
    registry, port = client.CollectorRegistry(), free_port()
    served, stop = client.start_http_server(0, "127.0.0.1", registry)
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 200ms, evaluation_interval: 200ms}\n"
        f"rule_files: [{SHOWN / 'rules.yml'}]\n"
        f"scrape_configs: [{{job_name: sparvar, static_configs: [{{targets: ['127.0.0.1:{served.server_port}']}}]}}]\n"
    )
    server = subprocess.Popen(
        ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
         f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        with sparvar_tune.monitor(on, to=registry, every=1) as watched:
            watched.draw(drawing(model))
            sampled = registry.get_sample_value("sparvar_sampled_psnr_db_sum", LABELS)
            want = {"sparvar_generations_total": 1.0, 'sparvar_rows_used_total{scale="6"}': 1.0,
                    "sparvar_certified_psnr_db": 35.0, "sparvar_sampled_psnr_db_sum": sampled}  # fmt: skip
            got: dict[str, float] = {}
            for _ in range(300):  # until it has scraped
                try:
                    for query in want:
                        for found in ask(port, "/api/v1/query", query=query)["data"]["result"]:
                            got[query] = float(found["value"][1])
                except OSError:
                    pass
                if got.keys() == want.keys():
                    break
                time.sleep(0.1)
            assert got == want
            groups = ask(port, "/api/v1/rules")["data"]["groups"]
            assert sorted(g["name"] for g in groups) == ["sparvar-dense", "sparvar-fidelity"]
            for panel in json.loads((SHOWN / "grafana.json").read_text())["panels"]:
                for target in panel["targets"]:  # as Grafana would put it
                    query = target["expr"].replace("$__rate_interval", "1m").replace("$__range", "1h")
                    answer = ask(port, "/api/v1/query", query=query.replace("$model", ".*").replace("$gpu", ".*"))
                    assert answer["status"] == "success", query
    finally:
        server.terminate(), server.wait(), served.shutdown(), served.server_close(), stop.join()


def test_a_policy_of_one_layer_has_first_and_last_at_once():
    """Both ends of a scale in one call."""
    base = profile()
    small = dataclasses.replace(base.workload, layers=1)
    policy = Policy(("AB",), (Rule(5, "A", Pooled(3, 2)),))
    tuned = Tuned(find_gpu("cpu"), dataclasses.replace(base, policy=policy, workload=small, rows=base.rows[:1]), None, ())
    with sparvar_tune.monitor(tuned, to=(told := Told())):
        for s in range(7):
            problem = AttentionProblem(small.schedule, s, 1, 2, 32, "fp32", small.softmax_scale, small.logit_bound)
            tuned.attention(problem)(*problem.make_inputs(0), layer=0)
    assert len(told.values[("sparvar.scale.seconds", "6")]) == 1 and told.counts[("sparvar.rows.used", "5", "cpu")] == 1


@pytest.mark.gpu
def test_on_a_gpu_times_come_without_waiting(monkeypatch):
    """Real events: nothing synchronises while pictures are drawn that nobody samples, and every time is there in the end."""
    model = tiny.make_model().to("cuda")
    tuned = Tuned(device_row(), dataclasses.replace(profile(), rows=()), None, ())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on = sparvar_tune.apply(model, tuned)
    drawing(model)()
    waited, synchronize = [], torch.cuda.synchronize
    watched = sparvar_tune.monitor(on, to=(told := Told()), every=4)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: waited.append(a))
    for _ in range(3):
        watched.draw(drawing(model))
    assert not waited and watched.on_gpu
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    watched.draw(drawing(model))
    watched.undo()
    assert all(len(told.values[("sparvar.scale.seconds", str(s))]) == 4 for s in range(7))
    assert min(min(found) for found in told.values.values()) > 0
    assert len(told.values[("sparvar.sampled.psnr_db",)]) == 1 and ("sparvar.samples.failed",) not in told.counts
