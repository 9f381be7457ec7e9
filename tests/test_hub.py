"""The hub: what a repository's name is, what is said when it gives nothing, and that of a model the files that
transformers would load are fetched, and no others."""

import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from meswitch.checkpoint import COMPANION_FILES, Checkpoint
from meswitch.configuration import read_config
from meswitch.errors import AdapterError, CheckpointError
from meswitch.hub import check_model, from_hub, is_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NOT_LOADED = (
    "README.md",
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "onnx/model.safetensors",
    "original/config.json",
    "original/consolidated.00.pth",
    "pytorch_model.bin",
)


def httpx_error(name):
    """A class of errors of the HTTP library that the hub's own uses: httpx or httpx2."""
    return getattr(sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]], name)


class Hub:
    """A hub with one repository, the files of a directory.

    Args:
        directory: of the files.
        status: what it answers to everything, None where it answers rightly.

    asked: names of the files that were fetched.
    """

    def __init__(self, directory: Path, status: int | None = None) -> None:
        self.directory, self.asked = directory, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(with_body=False)

            def do_GET(self):
                self.answer(with_body=True)

            def answer(self, with_body):
                path = self.path.partition("?")[0]
                if status is not None:
                    self.send_response(status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if f"{path}/".startswith("/api/models/org/name/"):
                    body, headers = json.dumps(hub.listing("/tree/" in path)).encode(), {}
                elif path.startswith("/org/name/resolve/") and (file := hub.file(path)).is_file():
                    body = file.read_bytes()
                    headers = {"ETag": f'"{len(body)}-{file.name}"', "X-Repo-Commit": COMMIT}
                    if with_body:
                        hub.asked.append(str(file.relative_to(hub.directory)))
                else:
                    headers = {"X-Error-Code": "EntryNotFound" if "/resolve/" in path else "RepoNotFound"}
                    body = b"{}"
                self.send_response(404 if "X-Error-Code" in headers else 200)
                for name, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def file(self, path: str) -> Path:
        return self.directory / path.split("/", 5)[5]

    def listing(self, as_tree: bool):
        names = sorted(str(file.relative_to(self.directory)) for file in self.directory.rglob("*") if file.is_file())
        if as_tree:
            return [
                {"type": "file", "path": name, "oid": f"{i:040x}", "size": (self.directory / name).stat().st_size}
                for i, name in enumerate(names)
            ]
        return {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(directory)` serves it as the repository `org/name`, or `hub(directory, 503)` answers that alone."""
    from huggingface_hub import constants

    served = []

    def serve(directory: Path, status: int | None = None) -> Hub:
        made = Hub(directory, status)
        served.append(made)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        return made

    yield serve
    for made in served:
        made.server.shutdown()


def add_what_is_not_loaded(directory: Path) -> None:
    for name in NOT_LOADED:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"x")


def test_one_file_of_weights_is_fetched_with_its_companions(pair, hub):
    _, directory = pair()
    add_what_is_not_loaded(directory)
    served = hub(directory)
    assert Checkpoint.open("org/name").tensors.keys() == Checkpoint.open(directory).tensors.keys()
    assert set(served.asked) == {WEIGHTS, *(name for name in COMPANION_FILES if (directory / name).is_file())}


def test_the_shards_that_the_index_names_are_fetched(pair, hub):
    _, directory = pair(shard="300KB")
    add_what_is_not_loaded(directory)
    shutil.copyfile(directory / "model-00001-of-00003.safetensors", directory / "model-00009-of-00009.safetensors")
    served = hub(directory)
    assert Checkpoint.open("org/name").tensors.keys() == Checkpoint.open(directory).tensors.keys()
    named = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
    assert {name for name in served.asked if name.endswith(".safetensors")} == named
    assert INDEX in served.asked


def test_an_adapters_repository_is_recognised(hub, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    served = hub(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="a PEFT adapter of org/base"):
        Checkpoint.open("org/name")
    assert served.asked == ["adapter_config.json"]


def test_a_configuration_alone_is_fetched_alone(pair, hub):
    _, directory = pair()
    served = hub(directory)
    assert read_config("org/name").model_type == "mistral"
    assert served.asked == ["config.json"]


def test_a_hub_that_cannot_be_reached_is_told_apart_from_a_wrong_name(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="org/absent: no such directory here, and the hub cannot be reached"):
        read_config("org/absent")


def test_a_repository_that_is_not_there_is_one_line(hub, pair):
    hub(pair()[0])
    with pytest.raises(CheckpointError, match=r"org/other: neither a directory here nor a model that the hub gives \("):
        Checkpoint.open("org/other")


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("ask", [Checkpoint.open, read_config, check_model])
def test_a_hub_that_is_out_of_order_says_so_and_not_that_the_name_is_wrong(hub, tmp_path, monkeypatch, status, ask):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub's library asks again, later each time
    hub(tmp_path, status)
    said = rf"^org/name: .*an error of its own \(status {status}: .*; try again later$"
    with pytest.raises(CheckpointError, match=said):
        ask("org/name")


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("org/name", True),
        ("org/name-1.5_b", True),
        ("name", False),
        ("./name", False),
        ("../org/name", False),
        ("/org/name", False),
        ("~/name", False),
        ("models/org/name", False),
        ("org/", False),
        ("org name/x", False),
        ("org\\name", False),
    ],
)
def test_a_repository_is_named_by_its_owner_and_its_name(text, is_one):
    assert is_hub_id(text) is is_one


def test_a_directory_here_is_no_repository(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("org/name")


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (httpx_error("ConnectError")("name or service not known"), "the hub cannot be reached .*name or service not"),
        (httpx_error("ReadTimeout")("timed out"), "the hub cannot be reached"),
        (ConnectionResetError(104, "reset by peer"), "the hub cannot be reached"),
        (OfflineModeIsEnabled("offline mode"), "the hub cannot be reached"),
        (OSError(28, "No space left on device"), r"cannot be fetched from the hub \(.*No space left"),
        (RuntimeError("Data processing error: CAS service"), r"cannot be fetched from the hub \(Data processing error"),
        (KeyError(), r"cannot be fetched from the hub \(KeyError\)"),
        (HFValidationError("Repo id must be"), r"nor a model that the hub gives \(Repo id must be"),
    ],
)
def test_whatever_fails_on_the_way_is_one_line_with_its_reason(problem, message):
    def ask():
        raise problem

    with pytest.raises(CheckpointError, match=rf"^org/name: .*{message}") as raised:
        from_hub("org/name", ask)
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is problem


def test_whether_a_model_can_be_had_is_asked_without_fetching_it(pair, hub):
    served = hub(pair()[0])
    check_model("org/name")
    assert served.asked == []
    with pytest.raises(CheckpointError, match="org/other: neither a directory here nor a model that the hub gives"):
        check_model("org/other")


@pytest.mark.parametrize("source", ["org/a--b", "org/a..b", "org/name.git"])
def test_a_name_that_no_repository_may_have_is_one_line_before_anything_is_asked(source):
    with pytest.raises(CheckpointError, match=rf"^{source}: neither a directory here nor a model that the hub gives"):
        check_model(source)


def test_a_model_of_the_cache_is_not_asked_for_again(pair, hub):
    served = hub(pair()[0])
    read_config("org/name")
    served.server.shutdown()
    served.server.server_close()
    check_model("org/name")
