"""Models whose weights cannot be fetched: the error says what was asked for, and what to do."""

import http.server
import threading
import urllib.error

import pytest

pytest.importorskip("transformers")
import huggingface_hub.constants
import huggingface_hub.file_download
from huggingface_hub.errors import LocalEntryNotFoundError

from imu_ray import CheckpointError, ModelSpec
from imu_ray.models.pretrained import load_pretrained


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on the loopback that answers every request with an error code, which the test sets."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        status, code = 403, "GatedRepo"

        def do_HEAD(self):
            self.send_response(self.status)
            self.send_header("X-Error-Code", self.code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *given):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (huggingface_hub.constants, huggingface_hub.file_download):
        for name, value in (("ENDPOINT", url), ("HUGGINGFACE_CO_URL_TEMPLATE", template)):
            monkeypatch.setattr(module, name, value, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    yield Refusing
    server.shutdown()
    server.server_close()


def test_a_gated_model_is_told_with_how_to_get_access(hub):
    with pytest.raises(CheckpointError) as caught:
        load_pretrained("org/model", local_files_only=False)
    assert str(caught.value).startswith("model.factory is 'hf:org/model', which cannot be read (")
    assert "; expected access to it, which its owner gives; ask for it on the model's page, then log in" in str(
        caught.value
    )


def test_a_model_that_is_not_there_is_told_with_its_name(hub):
    hub.status, hub.code = 404, "RepoNotFound"
    with pytest.raises(
        CheckpointError, match="'hf:org/model', .*; expected a model that is there and may be read; mend its name"
    ):
        load_pretrained("org/model", local_files_only=False)


def unreached(**settings):
    raise urllib.error.URLError("Name or service not known")


def chained(**settings):
    try:
        raise LocalEntryNotFoundError("not in the cache")
    except LocalEntryNotFoundError as error:
        raise OSError("We couldn't connect") from error


@pytest.mark.parametrize("factory", [unreached, chained])
def test_weights_that_no_network_brings_are_told_with_what_to_do(factory):
    with pytest.raises(
        CheckpointError,
        match=rf"the weights of .*{factory.__name__}' cannot be fetched .*; expected a network .*; fetch",
    ):
        ModelSpec(factory).build()


def test_a_model_that_is_not_in_the_cache_is_not_downloaded_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"'hf:org/model', .*local_files_only=false downloads it"):
        load_pretrained("org/model")
