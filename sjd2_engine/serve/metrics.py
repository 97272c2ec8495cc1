"""What Prometheus reads from a server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..results import Picture

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
ACCEPTED = (0, 1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server, in a registry of their own; queue and slots are asked for when they are read."""

    def __init__(self, waiting: Callable[[], int], active: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("sjd2_requests", "Requests for pictures.", ["status"], registry=self.registry)
        self.latency = Histogram(
            "sjd2_request_seconds", "From request to the end of the answer.", registry=self.registry, buckets=SECONDS
        )
        self.images = Counter("sjd2_images", "Finished pictures.", ["decoder"], registry=self.registry)
        self.failures = Counter("sjd2_image_failures", "Pictures that failed.", registry=self.registry)
        self.cancelled = Counter("sjd2_images_cancelled", "Pictures nobody waited for.", registry=self.registry)
        self.passes = Counter(
            "sjd2_forward_passes", "Forward passes, counted per picture.", ["decoder"], registry=self.registry
        )
        self.accepted = Histogram(
            "sjd2_accepted_tokens_per_step",
            "Tokens that a forward pass won for a picture.",
            ["decoder"],
            registry=self.registry,
            buckets=ACCEPTED,
        )
        for name, text, read in (
            ("sjd2_queue_length", "Pictures without a slot.", waiting),
            ("sjd2_active_slots", "Pictures in slots.", active),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def count(self, decoder: str, picture: Picture) -> None:
        """Take in a picture that is over, for better or worse."""
        if picture.image is None:
            self.failures.inc()
            return
        self.images.labels(decoder).inc()
        self.passes.labels(decoder).inc(picture.forward_passes)
        accepted = self.accepted.labels(decoder)
        for tokens, steps in picture.accepted_per_step.items():
            for _ in range(steps):
                accepted.observe(tokens)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
