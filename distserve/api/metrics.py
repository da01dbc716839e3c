"""Prometheus metrics of one API process, named as vLLM names them, with the prefix ``distserve:``.

Latencies are observed here as requests pass; queues, memory, preemptions and migration totals come from the cluster's
last status at the time of the scrape.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from distserve.api.timeline import RequestTimeline
from distserve.core.messages import Status

FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TOKEN_BUCKETS = (
    0.0025,
    0.005,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    1,
    2.5,
    5,
)
REQUEST_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
MIGRATION_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
LENGTH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _ClusterCollector(Collector):
    """Reads the cluster's status when scraped."""

    def __init__(self, status: Callable[[], Status | None]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """One sample per live instance; sums over a label ``pool`` give the pools."""
        labels = ["pool", "instance"]
        running = GaugeMetricFamily("distserve:num_requests_running", "Sequences being computed.", labels=labels)
        waiting = GaugeMetricFamily("distserve:num_requests_waiting", "Requests queued.", labels=labels)
        tokens = GaugeMetricFamily("distserve:num_tokens_waiting", "Prompt tokens queued.", labels=labels)
        usage = GaugeMetricFamily("distserve:kv_cache_usage_perc", "Used share of KV blocks, 0 to 1.", labels=labels)
        preempted = CounterMetricFamily("distserve:num_preemptions", "Sequences preempted.", labels=labels)
        migrations = CounterMetricFamily("distserve:kv_migrations", "KV pulls.", labels=labels)
        seconds = CounterMetricFamily("distserve:kv_migration_seconds", "Seconds spent pulling KV.", labels=labels)
        num_bytes = CounterMetricFamily("distserve:kv_migration_bytes", "Bytes of KV pulled.", labels=labels)
        queries = CounterMetricFamily(
            "distserve:prefix_cache_queries", "Tokens looked up in the prefix cache.", labels=labels
        )
        hits = CounterMetricFamily(
            "distserve:prefix_cache_hits",
            "Tokens found there: not computed (prefill, mixed) or not pulled (decode).",
            labels=labels,
        )
        prefills = CounterMetricFamily(
            "distserve:prefills",
            "Prompts by where they were sent: to an instance that decodes them too (local), or to a prefill instance.",
            labels=["where"],
        )
        changes = CounterMetricFamily("distserve:role_changes", "Changes of the instance's role.", labels=labels)
        becoming = GaugeMetricFamily(
            "distserve:role_change_pending",
            "1 while the instance is about to take the role.",
            labels=[*labels, "role"],
        )
        status = self._status()
        if status is not None:
            prefills.add_metric(["local"], status.num_local_prefills)
            prefills.add_metric(["remote"], status.num_remote_prefills)
        for spec, report in status.instances if status is not None else ():
            key = [spec.role.value, spec.instance_id]
            running.add_metric(key, report.num_running)
            waiting.add_metric(key, report.num_waiting)
            tokens.add_metric(key, report.num_waiting_tokens)
            usage.add_metric(key, 1 - report.num_free_blocks / spec.kv.num_blocks)
            preempted.add_metric(key, report.num_preempted)
            migrations.add_metric(key, report.num_pulls)
            seconds.add_metric(key, report.pull_seconds)
            num_bytes.add_metric(key, report.pulled_bytes)
            queries.add_metric(key, report.num_queried_tokens)
            hits.add_metric(key, report.num_hit_tokens)
            changes.add_metric(key, report.num_role_changes)
            if report.becoming is not None:
                becoming.add_metric([*key, report.becoming.value], 1)
        yield from (running, waiting, tokens, usage, preempted, migrations, seconds, num_bytes, queries, hits)
        yield from (changes, becoming, prefills)


class Metrics:
    """All metrics of one app, in a registry of their own."""

    def __init__(self, model_name: str, status: Callable[[], Status | None]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ClusterCollector(status))
        ProcessCollector(registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(f"distserve:{name}", text, ["model_name"], buckets=buckets, registry=self._registry)
            return family.labels(model_name)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"distserve:{name}", text, labels, registry=self._registry)

        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_BUCKETS)
        self.itl = histogram("inter_token_latency_seconds", "Gap between two tokens.", TOKEN_BUCKETS)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "Mean gap between a choice's tokens.", TOKEN_BUCKETS
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to the end of the answer.", REQUEST_BUCKETS)
        self.queue = histogram("request_queue_time_seconds", "Arrival to start of prefill.", REQUEST_BUCKETS)
        self.prefill = histogram("request_prefill_time_seconds", "Duration of prefill.", REQUEST_BUCKETS)
        self.migration = histogram("request_migration_time_seconds", "Duration of KV migration.", MIGRATION_BUCKETS)
        self.decode = histogram("request_decode_time_seconds", "Duration of decoding.", REQUEST_BUCKETS)
        self.prompt_lengths = histogram("request_prompt_tokens", "Tokens per prompt.", LENGTH_BUCKETS)
        self.output_lengths = histogram("request_generation_tokens", "Tokens per choice.", LENGTH_BUCKETS)
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests served.", "model_name").labels(
            model_name
        )
        self.cached_tokens = counter(
            "prompt_tokens_cached", "Prompt tokens of requests served that were not computed.", "model_name"
        ).labels(model_name)
        self.output_tokens = counter("generation_tokens", "Tokens generated.", "model_name").labels(model_name)
        self._model_name = model_name
        self._success = counter("request_success", "Choices by how they ended.", "model_name", "finished_reason")
        self._outcomes = counter(
            "requests", "HTTP requests for generation by outcome: ok, an HTTP error status, or abandoned.", "outcome"
        )

    def on_prompt(self, num_tokens: int) -> None:
        """A prompt was submitted."""
        self.prompt_tokens.inc(num_tokens)
        self.prompt_lengths.observe(num_tokens)

    def on_outcome(self, outcome: str) -> None:
        """An HTTP request for generation has ended."""
        self._outcomes.labels(outcome).inc()

    def on_choice_end(self, timeline: RequestTimeline, num_tokens: int, finish_reason: str) -> None:
        """A choice has ended: what its timeline says, as far as it says it."""
        self._success.labels(self._model_name, finish_reason).inc()
        self.output_lengths.observe(num_tokens)
        for metric, seconds in (
            (self.tpot, timeline.tpot),
            (self.queue, timeline.queue),
            (self.prefill, timeline.prefill),
            (self.migration, timeline.migration),
            (self.decode, timeline.decode),
        ):
            if seconds is not None:
                metric.observe(seconds)

    def expose(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self._registry)
