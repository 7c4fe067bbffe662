"""The service over real sockets and pipes: answers, limits, who may ask, how it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from support.cli import child_environment
from support.indexed_repo import SHAPES, small_repo

CHILD = Path(__file__).parents[1] / "support" / "serve_child.py"


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    repo = small_repo(tmp_path_factory.mktemp("serve"))
    repo.index()
    return repo


def start(repo, settings: dict, seconds: float = 0.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(CHILD), str(repo.out), json.dumps(settings), str(seconds)],
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def serving(repo, seconds: float = 0.0, **settings):
    child = start(repo, {"port": 0, **settings}, seconds)
    line = child.stdout.readline()
    assert line, child.communicate()[1]
    try:
        yield urlsplit(json.loads(line)["listening"]).netloc
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=30)
    assert child.returncode == 0, errors
    assert "failed 0" in errors


@pytest.fixture(scope="module")
def address(repo):
    with serving(repo, max_query_characters=200, max_body_bytes=2000, timeout_seconds=3) as address:
        yield address


def ask(address, method="GET", path="/health", body=None, headers=None, host=None):
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.putrequest(method, path, skip_host=True)
        connection.putheader("Host", host or address)
        data = (
            body
            if isinstance(body, bytes)
            else json.dumps(body).encode()
            if body is not None
            else b""
        )
        given = (
            {"Content-Type": "application/json", **(headers or {})}
            if method == "POST"
            else (headers or {})
        )
        if method == "POST" and "Content-Length" not in given and "Transfer-Encoding" not in given:
            given["Content-Length"] = str(len(data))
        for name, value in given.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(data)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_get_and_post_give_what_search_gives(repo, address):
    status, found = ask(address, path=f"/search?q={quote('area of a circle')}&top_k=3&blocks=false")
    assert status == 200
    local = repo.ask("area of a circle", top_k=3, blocks=False)
    assert [hit["symbol"] for hit in found["hits"]] == [hit.symbol for hit in local.hits]
    assert found["hits"][0]["score"] == pytest.approx(local.hits[0].score)
    body = {"query": "area of a circle", "top_k": 3, "blocks": False}
    status, posted = ask(address, "POST", "/search", body)
    assert status == 200
    assert posted["hits"] == found["hits"]
    assert posted["stale_files"] == 0


def test_filters_over_http(address):
    status, found = ask(
        address,
        path="/search?q=item&language=javascript&language=go&kind=method&path=web/&mode=lexical",
    )
    assert status == 200
    assert [hit["symbol"] for hit in found["hits"]] == ["Queue.push"]


def test_nothing_found_is_an_answer(address):
    status, found = ask(address, path="/search?q=zzzz&mode=lexical")
    assert (status, found["hits"]) == (200, [])


def test_status_and_health(address):
    status, health = ask(address)
    assert (status, health["status"]) == (200, "ok")
    status, about = ask(address, path="/status")
    assert (status, about["coverage"]) == (200, 1.0)


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "message"),
    [
        ("GET", "/nothing", None, {}, 404, "there are /search, /status and /health"),
        ("GET", "/../../etc/passwd", None, {}, 404, "there are /search"),
        ("GET", "/search", None, {}, 400, "query"),
        ("GET", "/search?q=", None, {}, 400, "the query is empty"),
        ("GET", "/search?q=a&color=red", None, {}, 400, "'color' is not one of"),
        ("GET", "/search?q=a&q=b", None, {}, 400, "q is given 2 times"),
        ("GET", "/search?q=a&top_k=many", None, {}, 400, "top_k='many' is not a number"),
        ("GET", "/search?q=a&top_k=101", None, {}, 400, "top_k: 101 is above the limit of 100"),
        ("GET", "/search?q=a&top_k=0", None, {}, 400, "top_k=0 must be from 1 to 1000"),
        ("GET", "/search?q=a&vector_weight=nan", None, {}, 400, "vector_weight"),
        ("GET", "/search?q=a&blocks=maybe", None, {}, 400, "must be true or false"),
        ("GET", "/search?q=a&mode=magic", None, {}, 400, "mode"),
        ("GET", "/search?q=a&path=!", None, {}, 400, "path='!' is not a pattern"),
        ("GET", "/search?q=a&maxsim=true", None, {}, 400, "holds no block vectors"),
        ("GET", "/search?q=" + "a" * 201, None, {}, 400, "query: 201 is above the limit of 200"),
        ("POST", "/status", {}, {}, 405, "answers GET only"),
        ("POST", "/search", {"query": "a", "index": "/etc"}, {}, 400, "index"),
        ("POST", "/search", {"query": 5}, {}, 400, "query"),
        ("POST", "/search", {"query": "a", "top_k": "5"}, {}, 400, "top_k"),
        ("POST", "/search", {"query": "a", "paths": ["x"] * 33}, {}, 400, "paths: 33 is above"),
        ("POST", "/search", ["a"], {}, 400, "the body must be an object"),
        ("POST", "/search", b"{", {}, 400, "the body is not JSON"),
        ("POST", "/search", b"[" * 1900, {}, 400, "the body is not JSON"),
        ("POST", "/search", b"\xff\xfe", {}, 400, "the body is not JSON"),
        ("POST", "/search", {"query": "a" * 3000}, {}, 413, "the body is above 2,000 bytes"),
        ("POST", "/search", b"", {"Content-Length": "9" * 30}, 413, "the body is above"),
        ("POST", "/search", b"", {"Content-Length": "-1"}, 411, "send the body's Content-Length"),
        ("POST", "/search", b"0\r\n\r\n", {"Transfer-Encoding": "chunked"}, 411, "Content-Length"),
        (
            "POST",
            "/search",
            {"query": "a"},
            {"Content-Type": "text/plain"},
            415,
            "application/json",
        ),
        ("DELETE", "/search", None, {}, 501, "Unsupported method"),
    ],
)
def test_bad_requests_are_refused_and_say_why(
    address, method, path, body, headers, status, message
):
    given, answer = ask(address, method, path, body, headers)
    assert given == status, answer
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("host", "headers", "allowed"),
    [
        (None, {}, True),
        ("localhost", {}, True),
        ("LOCALHOST:7531", {}, True),
        ("[::1]:80", {}, True),
        ("evil.example:7531", {}, False),
        ("127.0.0.1.evil.example", {}, False),
        ("192.168.0.7", {}, False),
        ("localhost@evil.example", {}, False),
        (None, {"Origin": "http://localhost:3000"}, True),
        (None, {"Origin": "http://evil.example"}, False),
        (None, {"Origin": "null"}, False),
        (None, {"Sec-Fetch-Site": "cross-site"}, False),
        (None, {"Sec-Fetch-Site": "same-origin"}, True),
    ],
)
def test_pages_of_other_sites_may_not_ask(address, host, headers, allowed):
    for path in ("/health", "/search?q=area&mode=lexical"):
        status, _ = ask(address, path=path, host=host, headers=headers)
        assert status == (200 if allowed else 403)


def raw(address: str, data: bytes, *, pause: float = 0.0, pieces: int = 1) -> bytes:
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        size = max(1, len(data) // pieces)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for start in range(0, len(data), size):
                connection.sendall(data[start : start + size])
                time.sleep(pause)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                received += chunk
        return received


def test_no_or_two_hosts_long_lines_and_noise(address):
    assert b" 403 " in raw(address, b"GET /health HTTP/1.0\r\n\r\n")
    two = b"GET /health HTTP/1.0\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert b" 403 " in raw(address, two)
    assert b" 414 " in raw(address, b"GET /" + b"a" * 70_000 + b" HTTP/1.0\r\n\r\n")
    many = b"GET /health HTTP/1.0\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(200)) + b"\r\n"
    assert b" 431 " in raw(address, many)
    raw(address, b"\x00\xff\x16\x03\x01 noise\r\n\r\n")
    assert ask(address)[0] == 200


def test_a_client_that_drips_is_cut_off_in_time(address):
    start = time.monotonic()
    request = b"GET /health HTTP/1.0\r\nHost: localhost\r\nX-Slow: " + b"a" * 400
    raw(address, request, pause=0.02, pieces=400)
    assert time.monotonic() - start < 14
    body = b"POST /search HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body += b"Content-Length: 500\r\n\r\n{"
    start = time.monotonic()
    assert raw(address, body) == b""
    assert 2 < time.monotonic() - start < 8  # timeout_seconds=3
    assert ask(address)[0] == 200


def test_more_requests_than_places_are_told_to_come_again(repo):
    with serving(repo, seconds=0.5, max_requests=2) as address:
        statuses: list[int] = []

        def one() -> None:
            statuses.append(ask(address, path="/search?q=area")[0])

        threads = [threading.Thread(target=one) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert ask(address)[0] == 200  # health needs no place
        for thread in threads:
            thread.join()
    assert sorted(set(statuses)) == [200, 503]
    assert statuses.count(200) >= 2


def test_more_connections_than_allowed_are_closed(repo):
    with serving(repo, max_connections=3, timeout_seconds=2) as address:
        host, port = address.split(":")
        idle = [socket.create_connection((host, int(port)), timeout=10) for _ in range(3)]
        time.sleep(0.3)
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            ask(address)
        time.sleep(2.5)  # the idle ones are cut off
        assert ask(address)[0] == 200
        for connection in idle:
            connection.close()


def test_parallel_questions_get_their_own_answers(address):
    wrong: list[str] = []

    def many(query: str, symbol: str) -> None:
        for _ in range(8):
            status, found = ask(address, path=f"/search?q={quote(query)}&mode=lexical&top_k=1")
            if status == 503:
                continue
            if status != 200 or found["hits"][0]["symbol"] != symbol:
                wrong.append(f"{status} {query}")

    pairs = [
        ("surface inside the circle", "Circle.area"),
        ("receive until the peer closes", "read_all_bytes"),
        ("triangle area", "triangle_area"),
    ]
    threads = [threading.Thread(target=many, args=pair) for pair in pairs * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_update_is_served_at_once(tmp_path):
    repo = small_repo(tmp_path)
    repo.index()
    with serving(repo) as address:
        repo.write("new.py", SHAPES.replace("Circle", "Hexagon"))
        repo.index()
        found = ask(address, path="/search?q=hexagon+area&mode=lexical")[1]
        assert found["hits"][0]["symbol"].startswith("Hexagon")
        repo.index(rebuild=True)
        found = ask(address, path="/search?q=hexagon+area")[1]
        assert found["hits"][0]["symbol"].startswith("Hexagon")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_let_running_answers_finish(repo, number):
    child = start(repo, {"port": 0}, 1.0)
    address = urlsplit(json.loads(child.stdout.readline())["listening"]).netloc
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(ask(address, path="/search?q=area")[0]))
    thread.start()
    time.sleep(0.4)
    child.send_signal(number)
    _, errors = child.communicate(timeout=20)
    thread.join()
    assert child.returncode == 0, errors
    assert answers == [200]
    with pytest.raises(ConnectionError):
        ask(address)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "can be reached from other machines, and there is no login"),
        ({"host": "::"}, "can be reached from other machines"),
        ({"host": "no-such-host.invalid"}, "cannot be resolved"),
        ({"port": 70000}, "port=70000 must be from 0 to 65535"),
        ({"max_top_k": 0}, "max_top_k=0 must be from 1 to 1000"),
        ({"timeout_seconds": 0}, "timeout_seconds=0 must be above 0"),
    ],
)
def test_what_may_not_be_served(repo, settings, message):
    child = start(repo, {"port": 0, **settings})
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    assert message in errors
    assert "Traceback" not in errors


def test_a_port_in_use(repo):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        child = start(repo, {"port": taken.getsockname()[1]})
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "choose another --port" in errors


def test_remote_addresses_have_to_be_allowed_and_names_told(repo):
    with serving(repo, host="0.0.0.0", allow_remote=True, allow_host=("code.example",)) as address:
        port = address.split(":")[1]
        local = f"127.0.0.1:{port}"
        assert ask(local, host=f"10.1.2.3:{port}")[0] == 200
        assert ask(local, host="code.example")[0] == 200
        assert ask(local, host="evil.example")[0] == 403


def talk(repo, lines: list[str], **settings) -> list[dict]:
    child = start(repo, {"transport": "stdio", **settings})
    output, errors = child.communicate("".join(line + "\n" for line in lines), timeout=60)
    assert child.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines()]


def test_stdio_answers_in_order(repo):
    answers = talk(
        repo,
        [
            '{"id": 1, "method": "health"}',
            "",
            '{"id": "two", "method": "search", "params": {"query": "area of circle", "top_k": 1}}',
            '{"id": 3, "method": "status"}',
        ],
    )
    assert [answer["id"] for answer in answers] == [1, "two", 3]
    assert answers[0]["result"]["status"] == "ok"
    assert len(answers[1]["result"]["hits"]) == 1
    assert answers[2]["result"]["coverage"] == 1.0


def test_stdio_refuses_and_goes_on(repo):
    answers = talk(
        repo,
        [
            "not json",
            "[" * 5000,
            "[1]",
            '{"id": 4, "method": "steal"}',
            '{"id": 5, "method": "search", "params": {"query": "a", "color": "red"}}',
            '{"id": 6, "method": "search", "params": []}',
            '{"id": 7, "method": "search", "color": 1}',
            '{"id": 8, "method": "health", "params": {"a": 1}}',
            json.dumps({"id": 9, "method": "search", "params": {"query": "x" * 9000}}),
            json.dumps({"id": 10, "method": "search", "params": {"query": "x" * 2500}}),
            '{"id": 11, "method": "health"}',
        ],
        max_body_bytes=8000,
    )
    messages = [answer.get("error", {}).get("message", "") for answer in answers]
    wanted = [
        "not JSON", "not JSON", "must be an object", "method='steal' is not known", "color",
        "params must be an object", "unknown field 'color'", "health takes no params",
        "above 8,000 bytes", "query: 2500 is above the limit", "",
    ]  # fmt: skip
    assert len(messages) == len(wanted)
    for message, part in zip(messages, wanted, strict=True):
        assert part in message
    assert answers[-1]["result"]["status"] == "ok"


def test_stdio_ends_at_a_signal_while_waiting(repo):
    child = start(repo, {"transport": "stdio"})
    child.stdin.write('{"id": 1, "method": "health"}\n')
    child.stdin.flush()
    assert json.loads(child.stdout.readline())["id"] == 1
    child.send_signal(signal.SIGTERM)
    child.wait(timeout=20)
    child.stdin.close()
    assert child.returncode == 0
    assert child.stdout.read() == ""
    assert "requests 0" in child.stderr.read()
    child.stdout.close()
    child.stderr.close()
