"""A run's metrics at http://HOST:PORT/metrics, for Prometheus."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector


class Exporter(Collector):
    """Tags become names: `train/loss` is metafleet_train_loss; what only ever grows is a counter,
    metafleet_fleet_applied_total.

    Shares of the work are one metric, metafleet_share, labelled by worker.
    """

    def __init__(self, values: Mapping[str, float], counters: Collection[str]) -> None:
        """`values`: the newest of every tag, read at each request; `counters`: names under `fleet/` that only ever
        grow.
        """
        self._values, self._counters = values, counters

    def collect(self) -> Iterator[Metric]:
        share = GaugeMetricFamily("metafleet_share", "Share of the last meta-iteration's answers.", labels=["worker"])
        for tag, value in dict(self._values).items():
            group, _, name = tag.partition("/")
            metric = re.sub(r"\W", "_", f"metafleet_{tag}")
            if group == "share":
                share.add_metric([name], value)
            elif group == "fleet" and name in self._counters:
                yield CounterMetricFamily(metric, f"{name} since the run began", value=value)
            else:
                yield GaugeMetricFamily(metric, tag, value=value)
        yield share


def serve(port: int, values: Mapping[str, float], counters: Collection[str]) -> Callable[[], None]:
    """Serve until the returned function is called. Raises OSError where the port is taken."""
    registry = CollectorRegistry()
    registry.register(Exporter(values, counters))
    try:
        server, thread = start_http_server(port, registry=registry)
    except OSError as error:
        raise OSError(
            error.errno, f"prometheus_port={port} cannot be served ({error.strerror}); another port, or 0 for none"
        ) from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
