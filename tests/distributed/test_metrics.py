import types

from imu_ray.distributed import metrics


def test_a_gauge_is_set_at_every_flush_and_a_count_is_added_once(monkeypatch):
    """Ray exports a gauge once for each time it is set."""
    said = []

    def recorder(name):
        return types.SimpleNamespace(
            inc=lambda value, tags: said.append((name, value)), set=lambda value, tags: said.append((name, value))
        )

    monkeypatch.setattr(metrics, "_metric", recorder)
    monkeypatch.setattr(metrics, "_counted", {})
    monkeypatch.setattr(metrics, "_gauges", {})
    metrics.gauge("feature_bytes", 5.0, "features")
    metrics.count("samples", 3, "features")
    metrics.count("samples", 4, "features")
    metrics.flush()
    metrics.flush()
    assert said == [("samples", 7.0), ("feature_bytes", 5.0), ("feature_bytes", 5.0)]
