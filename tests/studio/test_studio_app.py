"""Who is let in, and what the served studio gives to whoever asks it over HTTP."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polylens.errors import MissingExtraError, UsageError
from polylens.studio.app import PASSWORD_VARIABLE, make_app, read_password
from polylens.studio.folders import Folders
from polylens.studio.guard import is_local


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtraError, match=r"polylens\[studio\]"):
        make_app(Folders(Path("runs")))
    code, _, err = run("studio")
    assert code == 2
    assert "polylens[studio]" in err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "box.lan"])
def test_others_are_let_in_by_password_alone(
    host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Any
) -> None:
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    assert not is_local(host)
    with pytest.raises(UsageError, match="--password-file"):
        read_password(host, None)
    code, _, err = run("studio", "--host", host)
    assert code == 2
    assert "must ask for a password" in err
    monkeypatch.setenv(PASSWORD_VARIABLE, "")
    with pytest.raises(UsageError):
        read_password(host, None)
    monkeypatch.setenv(PASSWORD_VARIABLE, "of the environment")
    assert read_password(host, None) == "of the environment"
    file = tmp_path / "password"
    file.write_text("of the file\nmore\n")
    assert read_password(host, file) == "of the file"
    file.write_text("\n")
    with pytest.raises(UsageError, match="empty"):
        read_password(host, file)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_this_machine_needs_none(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    assert is_local(host)
    assert read_password(host, None) is None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a report, and a secret beside the runs."""
    place = tmp_path_factory.mktemp("studio")
    (place / "secret.txt").write_text("SECRET")
    (place / "runs/first").mkdir(parents=True)
    (place / "runs/first/resolved.yaml").write_text("{}")
    (place / "runs/first/report.html").write_text("<!doctype html>REPORT")
    (place / "runs/leak").mkdir()
    (place / "runs/leak/report.html").symlink_to(place / "secret.txt")
    (place / "runs/away").symlink_to(place)
    return place


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[Any]:
    """Speaks HTTP to the studio, Gradio and all, as a program that does not tidy addresses."""
    pytest.importorskip("gradio")
    from starlette.testclient import TestClient

    app = make_app(Folders(place / "runs"))
    with TestClient(app, base_url="http://127.0.0.1:7860") as client:
        yield client


def test_the_page_names_no_other_site(client: Any) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for address in ("fonts.googleapis", "cdn", "gradio.s3", "huggingface.co"):
        assert address not in page.text
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False
    assert "://" not in client.get("/theme.css").text.replace("http://www.w3.org/2000/svg", "")


def test_a_report_is_shown_in_a_box_of_its_own(client: Any) -> None:
    found = client.get("/runs/first/report")
    assert found.text == "<!doctype html>REPORT"
    assert found.headers["content-security-policy"].startswith("sandbox allow-scripts")


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file={secret}",
        "/gradio_api/file={run}/report.html",
        "/gradio_api/file/{secret}",
        "/gradio_api/%66ile={secret}",
        "/gradio_api/file=..%2f..%2fsecret.txt",
        "/file={secret}",
        "/static/..%2f..%2f..%2f..%2f{secret}",
        "/assets/%2e%2e/%2e%2e/{secret}",
        "/runs/first/..%2f..%2f..%2fsecret.txt",
        "/runs/..%2f/report",
        "/runs/%2e%2e/secret.txt",
        "/runs/away/report",
        "/runs/leak/report",
        "/runs/first/resolved.yaml",
        "/runs/first/delta",
        "/runs/nothing/report",
    ],
)
def test_no_file_but_results_is_read_over_http(client: Any, place: Path, path: str) -> None:
    address = path.format(secret=place / "secret.txt", run=place / "runs/first")
    found = client.get(address)
    assert found.status_code in (403, 404)
    assert "SECRET" not in found.text


def test_nothing_is_written_over_http(client: Any, place: Path) -> None:
    before = sorted(place.rglob("*"))
    for path in ("/gradio_api/upload", "/gradio_api/vibe-edit/", "/gradio_api/upload?upload_id=x"):
        found = client.post(path, files={"files": ("../../x.txt", b"x")})
        assert found.status_code == 403
    assert sorted(place.rglob("*")) == before


def test_events_check_what_they_are_sent(client: Any, place: Path) -> None:
    """Whoever speaks to Gradio's queue without a page gets no further than a page does."""
    config = client.get("/config").json()
    sent = 0
    for event in config["dependencies"]:
        n_inputs = len(event["inputs"])
        for value in (
            "../secret.txt",
            "away",
            "leak",
            str(place),
            {"path": str(place / "secret.txt")},
        ):
            joined = client.post(
                "/gradio_api/queue/join",
                json={
                    "data": [value] * n_inputs,
                    "fn_index": event["id"],
                    "session_hash": f"s{event['id']}",
                },
            )
            sent += joined.status_code == 200
        with client.stream(
            "GET", "/gradio_api/queue/data", params={"session_hash": f"s{event['id']}"}
        ) as stream:
            text = "".join(stream.iter_text())
        assert "SECRET" not in text
        assert "root:" not in text
    assert sent > 0
    assert not (place / "runs" / ".studio" / "away").exists()


def test_a_password_stands_before_everything(place: Path) -> None:
    pytest.importorskip("gradio")
    from starlette.testclient import TestClient

    app = make_app(Folders(place / "runs"), password="geheim", local=False)
    secret = "Basic " + base64.b64encode(b"any:geheim").decode()
    with TestClient(app, base_url="http://box.lan:7860") as client:
        for path in ("/", "/config", "/theme.css", "/runs/first/report", "/gradio_api/info"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"authorization": secret}).status_code == 200
