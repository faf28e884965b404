"""The page as the service sends it: its headers, its files, and what its script may not do."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from serving import served
from starlette.testclient import TestClient

PAGE = Path(__file__).parent.parent / "api" / "page"
SCRIPTS = {path.name: path.read_text("utf-8") for path in (PAGE / "static").glob("*.js")}


class Elements(HTMLParser):
    """Every start tag of a page, with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    with served(tmp_path_factory.mktemp("page"), open=True) as client:
        yield client


@pytest.fixture(scope="module")
def elements(client: TestClient) -> list[tuple[str, dict[str, str | None]]]:
    return Elements(client.get("/").text).found


def test_policy_allows_its_own_files_alone(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["trusted-types"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    # Everything else keeps the policy under which nothing runs.
    assert "sandbox" in client.get("/v1/models").headers["content-security-policy"]


def test_nothing_is_inline(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    for tag, attributes in elements:
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "style"
        if tag == "script":
            assert attributes["src"]


def test_unchanged_pages_are_not_sent_again(client: TestClient) -> None:
    first = client.get("/")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304
    assert again.content == b""
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200
    assert client.head("/").headers["etag"] == first.headers["etag"]


def test_files_are_kept_for_good_and_change_their_address(
    client: TestClient, elements: list[tuple[str, dict[str, str | None]]]
) -> None:
    own = [
        attributes.get("src") or attributes.get("href")
        for tag, attributes in elements
        if tag in ("script", "link")
    ]
    assert len(own) == len(SCRIPTS) + 2
    for address in own:
        answer = client.get(str(address))
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
    kind = client.get(str(next(address for address in own if str(address).endswith("main.js"))))
    assert kind.headers["content-type"] == "text/javascript; charset=utf-8"
    version = str(own[0]).split("/")[2]
    assert client.get("/page/0000000000000000/main.js").status_code == 404
    assert client.get(f"/page/{version}/..%2frouter.py").status_code == 404
    assert client.get(f"/page/{version}/page.html").status_code == 404


def test_first_paint_takes_under_100_ms_of_the_server(client: TestClient) -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        client.get("/")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1


def test_ids_that_scripts_use_are_there_once(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert sorted(ids) == sorted(set(ids))
    # What a script makes by itself is named there.
    made = set(re.findall(r"\bid: `?\"?([\w-]+)", "".join(SCRIPTS.values())))
    for name, text in SCRIPTS.items():
        for used in re.findall(r"byId\(\"([\w-]+)\"\)", text):
            assert used in ids or used in made, f"{name} uses #{used}"
    for _, attributes in elements:
        for attribute in ("for", "aria-controls", "aria-labelledby", "aria-describedby"):
            for used in (attributes.get(attribute) or "").split():
                assert used in ids, f"{attribute}={used}"


def test_names_are_never_markup() -> None:
    for name, text in SCRIPTS.items():
        for sink in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "Function(",
            "srcdoc",
        ):
            assert sink not in text, f"{name} has {sink}"


def test_key_is_asked_for_only_where_one_is_needed(client: TestClient, tmp_path: Path) -> None:
    def hidden(found: list[tuple[str, dict[str, str | None]]], identifier: str) -> bool:
        return next("hidden" in attributes for _, attributes in found if attributes.get("id") == identifier)

    is_open = Elements(client.get("/").text).found
    assert hidden(is_open, "view-key")
    assert not hidden(is_open, "view-start")
    with served(tmp_path) as keyed:
        found = Elements(keyed.get("/").text).found
    assert not hidden(found, "view-key")
    assert hidden(found, "view-start")


def test_address_is_no_part_of_the_api(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert not [path for path in paths if path == "/" or path.startswith("/page")]
