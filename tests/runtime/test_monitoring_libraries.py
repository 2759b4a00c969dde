"""What the monitor tells, as Prometheus and OpenTelemetry show it; the rules and the dashboard that ask for it."""

from __future__ import annotations

import http.server
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
from pathlib import Path

import pytest
from places import ROOT
from watched import drawing

import sparvar_tune
from sparvar_tune.monitoring import metrics

SHOWN = ROOT / "examples" / "monitoring"
LABELS = {"model": "pocketvar", "gpu": "cpu", "preset": "near-lossless"}


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
    cases = Path(__file__).with_name("alert_rules.yml")
    for words in (["check", "rules", str(SHOWN / "rules.yml")], ["test", "rules", str(cases)]):
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
