"""gs:// without Google: an emulator in this process, which subprocesses reach too.

What is not Google's: it knows no credentials and no permissions, and answers one request at a time.
"""

import contextlib
import itertools
import logging
import os
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

BUCKET = "bucket"
_numbers = itertools.count()

# gcsfs reads this when it is imported, by whoever comes first: the emulator has no gRPC, by which it would ask what kind of
# bucket it is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


@contextlib.contextmanager
def emulator():
    """Serves a bucket, and sets the environment variables by which gcsfs, orbax and tensorstore find it."""
    from gcp_storage_emulator.server import Router, create_server

    handle = Router.handle
    Router.handle = lambda router, method: _with_generations(handle, router, method)
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # what is not there is an error to it
    http = server._api._httpd
    http.socket.listen(128)  # it takes 5 and drops the others, who wait for minutes until they ask again
    http.handle_error = lambda *_: None  # gcsfs hangs up where another answer came first; the emulator prints a traceback then
    address = f"http://127.0.0.1:{http.server_address[1]}"
    here = {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "FSSPEC_GCS_TOKEN": "anon",
    }
    before = {name: os.environ.get(name) for name in here}
    os.environ.update(here)
    _forget()
    try:
        yield server
    finally:
        server.stop()
        Router.handle = handle
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        _forget()


def _with_generations(handle, router, method):
    """What the emulator leaves out and tensorstore needs: the generation of what is read, and conditions on it."""
    from gcp_storage_emulator.exceptions import NotFound

    request = router._request_handler
    url = urlsplit(request.path)
    query = parse_qs(url.query)
    _, is_object, name = url.path.partition(f"/b/{BUCKET}/o/")
    name = query["name"][0] if "name" in query else unquote(name) if is_object else None
    try:
        generation = "0" if name is None else request.storage.get_file_obj(BUCKET, name)["generation"]
    except NotFound:
        generation = "0"
    if query.get("ifGenerationMatch", [generation]) != [generation]:
        status = 412
    elif query.get("ifGenerationNotMatch") == [generation]:
        status = 304
    else:
        if method == "GET" and generation != "0":
            send_response = request.send_response

            def send_with_generation(*status):
                send_response(*status)
                request.send_header("X-Goog-Generation", generation)

            request.send_response = send_with_generation
        return handle(router, method)
    request.rfile.read(int(request.headers.get("Content-Length", 0)))
    request.send_response(status)
    request.send_header("Content-Length", "0")
    return request.end_headers()


def _forget():
    """Makes the libraries read the environment again."""
    import fsspec
    import gcsfs
    from etils import epath
    from orbax.checkpoint._src.path import gcs_utils

    from gqa_jax import gcs

    fsspec.config.conf.pop("gcs", None)
    fsspec.config.set_conf_env(fsspec.config.conf)
    gcsfs.GCSFileSystem.clear_instance_cache()
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    gcs_utils.get_bucket.cache_clear()
    gcs.system.cache_clear()


@pytest.fixture(scope="session")
def gcs_server():
    with emulator() as server:
        yield server


@pytest.fixture
def gcs_root(gcs_server):
    """A folder of its own on gs://."""
    return f"gs://{BUCKET}/{next(_numbers)}"
