"""Every Prometheus collector, declared once. Labels are bounded: no speaker, key, path or free text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from service.errors import codes

REQUEST_BUCKETS_S = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STAGE_BUCKETS_S = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
STAGES = ("receive", "decode", "queue", "inference", "postprocess")
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
# The route of what never got to one.
UNMATCHED = "unmatched"


class Metrics:
    """One instance an application, on a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self.request_duration = Histogram(
            "sotto_request_duration_seconds",
            "Time from request headers to the last byte of the response.",
            ("route", "method", "status"),
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.stage_duration = Histogram(
            "sotto_stage_duration_seconds",
            "Time one request, or each of its clips, spent in one stage.",
            ("stage",),
            buckets=STAGE_BUCKETS_S,
            registry=registry,
        )
        # Looked up once, as every request observes five.
        self.stages = {stage: self.stage_duration.labels(stage) for stage in STAGES}
        self.batch_size = Histogram(
            "sotto_batch_size", "Clips in one graph call.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.padded_seconds = Counter(
            "sotto_padded_audio_seconds_total", "Silence computed to bring clips to one length.", registry=registry
        )
        self.queue_depth = Gauge("sotto_queue_depth", "Clips waiting for a graph call.", registry=registry)
        self.queued_audio = Gauge("sotto_queued_audio_seconds", "Audio waiting for a graph call.", registry=registry)
        self.upload_bytes = Gauge("sotto_upload_bytes", "Bodies of requests in memory.", registry=registry)
        self.rejects = Counter(
            "sotto_rejects_total", "Requests refused, by error code.", ("reason",), registry=registry
        )
        for code in codes():
            self.rejects.labels(code)
        self.audio_seconds = Counter("sotto_audio_seconds_total", "Audio analysed.", registry=registry)
        self.detections = Counter(
            "sotto_detections_total", "Keyword detections reported.", ("keyword",), registry=registry
        )
        self.verifications = Counter(
            "sotto_verifications_total", "Verification attempts by outcome.", ("outcome",), registry=registry
        )
        for outcome in ("accepted", "rejected"):
            self.verifications.labels(outcome)
        self.identifications = Counter(
            "sotto_identifications_total", "Identification attempts by outcome.", ("outcome",), registry=registry
        )
        for outcome in ("identified", "unknown"):
            self.identifications.labels(outcome)
        self.enrolment_clips = Counter(
            "sotto_enrolment_clips_total", "Enrolment clips by outcome.", ("outcome",), registry=registry
        )
        self.worker_failures = Counter(
            "sotto_worker_failures_total", "Graph calls that raised or hung, workers that died, decoders that hung.",
            ("kind",), registry=registry,
        )  # fmt: skip
        for kind in ("call", "restart", "hang", "decode"):
            self.worker_failures.labels(kind)
        self.dropped = Counter(
            "sotto_dropped_total", "Clips taken from the queue without a graph call.", ("reason",), registry=registry
        )
        for reason in ("expired", "abandoned"):
            self.dropped.labels(reason)
        self.ready = Gauge("sotto_ready", "1 while the service takes requests.", registry=registry)
        self.inference_threads = Gauge("sotto_inference_threads", "Concurrent graph calls in use.", registry=registry)
        self.intra_op_threads = Gauge("sotto_intra_op_threads", "Threads in one graph call.", registry=registry)
        self.clips_a_call = Gauge("sotto_clips_a_call", "Clips that may share one graph call.", registry=registry)
        self.loop_lag = Histogram(
            "sotto_event_loop_lag_seconds", "How late the event loop wakes what sleeps.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5), registry=registry,
        )  # fmt: skip
        self.streams = Gauge("sotto_streams", "WebSocket streams open.", registry=registry)
        self.stream_delay = Histogram(
            "sotto_stream_delay_seconds",
            "From when a message that completes a window came to its detections. One that was there before it could be "
            "read came when a microphone would have sent it, its own length after the one before, at the latest.",
            buckets=REQUEST_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self.model = Info("sotto_model", "The default model.", registry=registry)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """One request. Methods are whatever clients write, and a label has to be bounded."""
        known = method if method in METHODS else "other"
        self.request_duration.labels(route, known, str(status)).observe(seconds)
