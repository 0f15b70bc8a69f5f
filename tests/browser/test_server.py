"""The running page over plain HTTP: what is served, what is refused, and what a program can ask."""

import http.client
import json

import pytest

BOUNDARY = "----edge"


def ask(server, method, path, body=None, **headers):
    """Send one request exactly as written and return status and text."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    given = {"Host": f"127.0.0.1:{server.port}", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in given.items():
        connection.putheader(name, value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    text = answer.read().decode("utf-8", "replace")
    connection.close()
    return answer.status, text


def upload(server, content, name="a.png", **headers):
    """Upload a file as a form does."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()
    return ask(server, "POST", "/gradio_api/upload", body, Content_Type=f"multipart/form-data; boundary={BOUNDARY}", **headers)


def test_the_page_is_there(server):
    assert ask(server, "GET", "/")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example"])
def test_a_foreign_host_is_refused_everywhere(server, host):
    for path in ("/", "/config", "/gradio_api/info"):
        assert ask(server, "GET", path, Host=host)[0] == 403


def test_an_ssh_tunnel_may_have_another_port(server):
    assert ask(server, "GET", "/", Host="localhost:9000", Origin="http://localhost:9000")[0] == 200


@pytest.mark.parametrize("origin", ["null", "http://evil.example", "https://127.0.0.1", "http://127.0.0.1:3000"])
def test_an_upload_from_another_site_is_refused(server, origin):
    assert upload(server, b"x", Origin=origin)[0] == 403
    assert upload(server, b"x", Origin=server.address)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../etc/passwd",
        "%2e%2e%2f%2e%2e%2fetc/passwd",
        "pyproject.toml",
        "http://127.0.0.1:1/x",
        "/etc/pass%00wd",
    ],
)
def test_no_file_of_this_machine_is_served(server, path):
    assert ask(server, "GET", f"/gradio_api/file={path}")[0] in (400, 403, 404)


def test_neither_the_subspace_nor_the_secret_is_served(server):
    for path in (server.file, server.folder / "outputs" / "app" / "secret"):
        assert path.is_file()
        assert ask(server, "GET", f"/gradio_api/file={path}")[0] == 403


def test_a_link_out_of_the_history_is_not_followed(server):
    link = server.folder / "outputs" / "app" / "history" / "20260101-000000-000000-abcd.png"
    link.symlink_to("/etc/passwd")
    try:
        assert "root:" not in ask(server, "GET", f"/gradio_api/file={link}")[1]
    finally:
        link.unlink()


def test_uploads_are_limited_and_stay_in_their_folder(server):
    assert upload(server, b"0" * 21_000_000)[0] == 413
    status, text = upload(server, b"x", name="../../../evil.png")
    assert status == 200
    uploads = server.folder / "outputs" / "app" / "uploads"
    assert json.loads(text)[0].startswith(str(uploads.resolve()))
    assert not list(server.folder.parent.glob("evil.png"))


@pytest.fixture(scope="module")
def client(server):
    """A program that asks."""
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(server.address, verbose=False)


def test_a_program_draws_a_written_blend(server, client):
    from share_diffusion.drawing import read_settings

    path = client.predict("a robot", "watercolor:0.8 + robot:-0.3", 7, "", 3, 2.0, 64, 64, api_name="/blend")
    settings = read_settings(path)
    assert (settings["blend"], settings["seed"], settings["steps"]) == ("watercolor:0.8 + robot:-0.3", 7, 3)
    assert str(server.folder) not in json.dumps(settings)


def test_a_program_lists_the_concepts(server, client):
    from share_diffusion.file import listing

    listed = [concept["name"] for concept in client.predict(api_name="/concepts")]
    assert listed[:3] == ["watercolor", "robot", "blueprint"]
    assert listed == [entry["name"] for entry in listing(server.file).concepts]  # with what other tests have learned


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({1: "nobody:1"}, "nobody"),
        ({1: "robot:1e9"}, "beyond"),
        ({1: "robot:nan"}, "robot"),
        ({4: 1_000_000}, "steps"),
        ({6: 16_384}, "width"),
        ({2: -5}, "seed"),
    ],
)
def test_a_program_that_asks_too_much_is_told_why(server, client, changed, word):
    values = ["a robot", "robot:1", 7, "", 3, 2.0, 64, 64]
    for index, value in changed.items():
        values[index] = value
    with pytest.raises(Exception, match=word) as caught:
        client.predict(*values, api_name="/blend")
    assert str(server.folder) not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_only_two_endpoints_are_public(client):
    assert sorted(client.view_api(return_format="dict")["named_endpoints"]) == ["/blend", "/concepts"]


def test_a_file_that_nobody_uploaded_is_not_read(server):
    config = json.loads(ask(server, "GET", "/config")[1])
    file = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "restore-file")
    event = next(entry for entry in config["dependencies"] if [file, "change"] in entry["targets"])
    data = [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, *([None] * (len(event["inputs"]) - 1))]
    body = json.dumps({"data": data, "fn_index": event["id"], "session_hash": "x"}).encode()
    status, text = ask(server, "POST", "/gradio_api/run/predict", body, Content_Type="application/json")
    assert status >= 400 or "error" in text
    assert "root:" not in text


def test_more_clients_than_the_queue_holds_wait_or_are_told(client):
    """Thirty at once: those that fit in the queue are all served, the others hear that it is full."""
    from app.__main__ import QUEUE

    jobs = [client.submit("a robot", "robot:1", seed, "", 12, 2.0, 64, 64, api_name="/blend") for seed in range(30)]
    outcomes = []
    for job in jobs:
        try:
            outcomes.append(job.result(timeout=600).endswith(".png"))
        except Exception as error:
            outcomes.append(str(error))
    served = [outcome for outcome in outcomes if outcome is True]
    told = [outcome for outcome in outcomes if outcome is not True]
    assert len(served) >= QUEUE
    assert told
    assert all("full" in outcome for outcome in told)
