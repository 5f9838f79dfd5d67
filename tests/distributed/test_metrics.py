from imu_ray.distributed import metrics


def test_a_gauge_is_set_at_every_flush_and_a_count_is_added_once(monkeypatch):
    """Ray exports a gauge once for each time it is set."""
    said = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def inc(self, value, tags):
            said.append((self.name, value))

        def set(self, value, tags):
            said.append((self.name, value))

    monkeypatch.setattr(metrics, "_metric", Recorder)
    monkeypatch.setattr(metrics, "_counted", {})
    monkeypatch.setattr(metrics, "_gauges", {})
    metrics.gauge("feature_bytes", 5.0, "features")
    metrics.count("samples", 3, "features")
    metrics.count("samples", 4, "features")
    metrics.flush()
    metrics.flush()
    assert said == [("samples", 7.0), ("feature_bytes", 5.0), ("feature_bytes", 5.0)]
