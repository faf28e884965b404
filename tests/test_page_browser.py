"""The page in Chromium: what a user does, from a file to the rewritten network."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import random
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import factories_of_tests
import numpy as np
import pytest
import torch
from browsing import Tab, browser, playwright
from serving import running

import normsearch
from api import keys
from api.database import Database, sqlite_url
from benchmarks.page import deep

FACTORIES = {"deep": "benchmarks.page.deep:network", "spare": "factories_of_tests:small"}
TESTS = Path(__file__).parent
#: A search that no machine ends while a test looks at it.
LONG = {
    "trials": 50,
    "recipe": {"steps": 20_000},
    "veto": None,
    "sense": False,
    "methods": ["batch", "group"],
}
EXAMPLE = TESTS.parent / "api" / "page" / "example"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address of a running service, and a key of it."""
    playwright()
    folder = tmp_path_factory.mktemp("service")
    given = {"NORMSEARCH_OPEN": "0", "NORMSEARCH_FACTORIES": json.dumps(FACTORIES), "PYTHONPATH": str(TESTS)}
    with running(folder, **given) as port:
        database = Database(sqlite_url(folder / "data"))
        _, secret = keys.create(database, "anna", None)
        database.close()
        yield f"http://127.0.0.1:{port}", secret


@pytest.fixture(scope="module")
def conversion(service: tuple[str, str]) -> dict[str, Any]:
    """A conversion of the example that is done; with ``dataset``, what it was measured on."""
    base, secret = service

    def ask(method: str, path: str, body: bytes | dict[str, Any] | None = None) -> Any:
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
        asked = urllib.request.Request(f"{base}/v1/{path}", content, headers, method=method)
        with urllib.request.urlopen(asked) as answer:
            return json.load(answer)

    files = [(EXAMPLE / name).read_bytes() for name in ("digits.safetensors", "digits.npz")]
    weights, data = (
        ask("PUT", f"uploads?filename=again.{end}", file)["id"]
        for file, end in zip(files, ("safetensors", "npz"), strict=True)
    )
    model = ask("POST", "models", {"upload": weights, "architecture": "factories/digits"})["id"]
    dataset = ask("POST", "datasets", {"upload": data, "targets": "arr_1"})["id"]
    job = ask("POST", "conversions", {"model": model, "to": "group"})
    deadline = time.monotonic() + 300
    while job["state"] != "succeeded":
        assert job["state"] in ("queued", "running"), job
        assert time.monotonic() < deadline
        time.sleep(0.3)
        job = ask("GET", f"jobs/{job['id']}")
    return {**job, "dataset": dataset, "ask": ask}


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture
def tab(service: tuple[str, str], chrome: Any) -> Iterator[Tab]:
    """A tab that has the key."""
    base, secret = service
    context = chrome.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    tab = Tab(context, base)
    enter(tab, secret)
    yield tab
    tab.is_clean()
    context.close()


def enter(tab: Tab, secret: str) -> None:
    page = tab.open()
    page.fill("#key", secret)
    page.keyboard.press("Enter")
    tab.shows("start")


def accessible(tab: Tab) -> None:
    """Assert that axe-core finds nothing serious, light and dark."""
    for scheme in ("light", "dark"):
        tab.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        assert tab.violations() == []
    tab.page.emulate_media(color_scheme="light")


def try_example(tab: Tab) -> None:
    tab.page.click("#try")
    tab.shows("model")
    surveyed(tab)


def surveyed(tab: Tab) -> None:
    """Wait until the service has said what may stand where."""
    tab.page.wait_for_selector("#sites .body .m")
    tab.page.wait_for_selector("#sites-scroll[aria-busy=false]")


def ended(tab: Tab, state: str) -> None:
    tab.page.wait_for_selector("#job-state.succeeded, #job-state.failed, #job-state.cancelled")
    assert tab.page.inner_text("#job-state") == state


def test_key_is_asked_for(service: tuple[str, str], chrome: Any) -> None:
    base, secret = service
    context = chrome.new_context()
    tab = Tab(context, base)
    page = tab.open("#/models/mod_0")
    tab.shows("key")
    accessible(tab)
    assert page.evaluate("() => document.activeElement.id") == "key"
    page.keyboard.press("Enter")
    assert "Give the key" in page.inner_text("#key-error")
    page.fill("#key", "wrong")
    page.click("#key-form button")
    page.wait_for_function("() => document.querySelector('#key-error').textContent.includes('not valid')")
    page.fill("#key", f" {secret} ")
    page.keyboard.press("Enter")
    # It goes where it was sent, and there is no such model for this key.
    tab.shows("missing")
    assert "mod_0" in page.inner_text("#missing-text")
    accessible(tab)
    page.reload()
    tab.shows("missing")
    assert secret not in page.content()
    assert context.cookies() == []
    page.click("#forget-key")
    tab.shows("key")
    tab.is_clean()
    context.close()


def test_example_from_look_to_download(tab: Tab) -> None:
    page = tab.page
    accessible(tab)
    try_example(tab)
    assert page.inner_text("#h-model") == "digits.safetensors"
    assert page.locator("#sites .body [role=row]").count() == 11
    assert page.locator("#picture .site").count() == 11
    assert page.inner_text("#summary") == "group × 11 · 11 approximate"
    accessible(tab)

    # By pattern; what it would mean is seen at once.
    page.fill("#pattern", "blocks.2.*")
    page.select_option("#rule-method", "batch_renorm")
    page.keyboard.press("Tab")
    page.click("#add-rule")
    assert page.inner_text("#summary") == "group × 8, batch_renorm × 3 · 8 approximate"
    assert '"blocks.2.*": "batch_renorm"' in page.inner_text("#plan-code")
    assert "torch.randn(2, 1, 8, 8)" in page.inner_text("#plan-code")

    # One site, by keyboard: what is refused says why, and cannot be taken.
    page.locator("#sites button.gets").last.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#site-dialog[open]")
    accessible(tab)
    refused = page.locator("#site-methods label", has_text="instance").first
    assert "no space to normalize over" in refused.inner_text()
    assert refused.locator("input").is_disabled()
    page.locator("#site-methods input[value=frozen]").focus()
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    page.wait_for_selector("#site-dialog", state="hidden")
    assert page.evaluate("() => document.activeElement.className").startswith("gets")
    assert "frozen × 1" in page.inner_text("#summary")

    # Every site: three of them cannot have it, one of those has its own choice.
    page.select_option("#all", "instance")
    page.wait_for_function("() => document.querySelector('#summary').textContent.includes('instance × 7')")
    page.select_option("#all", "group")
    page.click("#tab-curl")
    assert "$KEY" in page.inner_text("#plan-code")
    page.keyboard.press("ArrowLeft")
    assert "normsearch convert digits.safetensors" in page.inner_text("#plan-code")

    # The choice outlives a reload.
    summary = page.inner_text("#summary")
    page.reload()
    surveyed(tab)
    assert page.inner_text("#summary") == summary

    page.click("#convert-now")
    tab.shows("job")
    ended(tab, "succeeded")
    assert "11" in page.locator(".card", has_text="Layers replaced").inner_text()
    page.locator(".card", has_text="Accuracy").wait_for()
    report = page.frame_locator("#report")
    report.locator("h2", has_text="Drift by depth").wait_for()
    # The report has its style sheet, and its links stay inside.
    assert report.locator("h1").evaluate("(one) => getComputedStyle(one).fontSize") == "32px"
    report.locator("nav a", has_text="Layers").click()
    report.locator("h2", has_text="Layers").wait_for()
    page.wait_for_function("() => document.querySelector('#report').contentWindow.innerHeight > 2000")
    page.wait_for_function("() => scrollY > 1000")
    accessible(tab)

    row = page.locator("#files tr", has_text="weights")
    with page.expect_download() as waited:
        row.locator("a").click()
    path = waited.value.path()
    assert waited.value.suggested_filename == "digits-converted.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == row.locator(".digest").inner_text()
    loaded = normsearch.load(path, normsearch.Architecture("api.engine.digits:network"), allow_factories=True)
    kinds = {str(method).partition("(")[0] for method in loaded.plan.values()}
    assert kinds == {"group", "batch_renorm", "frozen"}
    assert "from digits_converted_model import load" in page.inner_text("#load-code")

    # What folding lost comes back.
    page.fill("#run-budget", "8")
    page.fill("#run-samples", "64")
    page.click("#next button.primary")
    page.wait_for_selector("#h-job:has-text('Calibration')")
    ended(tab, "succeeded")
    assert page.locator("#job-tables tbody tr").count() >= 3
    page.click("#to-start")
    tab.shows("start")
    page.wait_for_selector("#jobs tr >> nth=1")


def test_what_is_refused_has_a_way_out(tab: Tab, tmp_path: Path) -> None:
    page = tab.page
    page.click("#upload-button")
    assert "Choose a file" in page.inner_text("#upload-error")
    odd = tmp_path / "<b>not‮a model<.pth"
    odd.write_bytes(b"nothing that torch wrote")
    page.set_input_files("#file", odd)
    # It is shown as it is: no markup, and nothing that turns the text around.
    assert page.inner_text("#file-name") == "<b>not\\u202ea model<.pth"
    page.fill("#architecture", "factories/spare")
    page.click("#upload-button")
    page.wait_for_selector("#upload-error:not([hidden])")
    assert "printable characters" in page.inner_text("#upload-error")

    page.set_input_files("#file", odd.rename(tmp_path / "<b>no model<.pth"))
    page.click("#upload-button")
    page.wait_for_selector("#upload-error:has-text('normsearch refuses this')")
    accessible(tab)

    weights = tmp_path / "spare.pth"
    torch.save(factories_of_tests.small().state_dict(), weights)
    page.set_input_files("#file", weights)
    page.fill("#architecture", "torchvision/resnet18")
    page.click("#upload-button")
    page.wait_for_selector("#upload-error:has-text('resnet18')")
    sent = [url for url in tab.asked if "/v1/uploads?" in url]
    page.fill("#architecture", "")
    page.locator("#architecture").press_sequentially("factories/sp")
    page.wait_for_selector("#architectures [role=option]")
    accessible(tab)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.input_value("#architecture") == "factories/spare"
    page.click("#upload-button")
    tab.shows("model")
    # The file was not sent again for another architecture.
    assert [url for url in tab.asked if "/v1/uploads?" in url] == sent

    # A plan that is refused cannot be run, and says why.
    surveyed(tab)
    page.select_option("#all", "own")
    page.fill("#all-own", "group(groups=0)")
    page.keyboard.press("Tab")
    page.wait_for_selector("#choose-error:has-text('groups')")
    accessible(tab)


@pytest.mark.parametrize("suffix", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_files_that_need_no_architecture(
    tab: Tab, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, written = tab.page, tmp_path / f"digits.{suffix}"
    torch.manual_seed(0)
    _write_file(factories_of_tests.digits().eval(), written)
    page.fill("#architecture", "torchvision/resnet18")
    page.set_input_files("#file", written)
    page.wait_for_selector("#complete:has-text('needs no architecture')")
    assert page.is_hidden("#architecture")
    assert page.is_hidden("#arguments")
    accessible(tab)
    page.click("#upload-button")
    tab.shows("model")
    surveyed(tab)
    # The file told the shape of its input.
    assert page.input_value("#shape") == "1x8x8"
    assert page.locator("#sites .body [role=row]").count() == 2
    assert "Architecture" not in page.inner_text("#model-facts")
    offered = page.locator("#run-tabs [role=tab]:visible").all_inner_texts()
    assert offered == ["Convert", "Measure sensitivity"]
    assert "search" in page.inner_text("#run-help").lower()
    page.select_option("#all", "group")
    page.wait_for_selector("#summary:has-text('group')")
    accessible(tab)
    # The plan as text does what it says.
    monkeypatch.chdir(tmp_path)
    page.click("#tab-python")
    exec(page.inner_text("#plan-code"), {})
    assert Path(f"converted.{suffix}").exists()
    page.click("#tab-cli")
    words = shlex.split(page.inner_text("#plan-code").replace("\\\n", " "))
    assert words[:3] == ["normsearch", "convert", f"digits.{suffix}"]
    assert "--architecture" not in words
    assert words[-2:] == ["-o", f"converted.{suffix}"]
    page.click("#convert-now")
    tab.shows("job")
    ended(tab, "succeeded")
    page.wait_for_selector("#report-part:not([hidden])")
    names = page.locator("#files th").all_inner_texts()
    assert names == [
        f"digits-converted.{suffix}",
        *(f"digits-{one}" for one in ("plan.json", "report.json", "report.html")),
    ]
    with page.expect_download() as waited:
        page.locator("#files a").first.click()
    waited.value.save_as(tmp_path / f"digits-converted.{suffix}")
    code = page.inner_text("#load-code")
    made: dict[str, Any] = {}
    exec(code, made)
    x = torch.randn(3, 1, 8, 8)
    if suffix == "pt2":
        found = made["model"](x)
    else:
        found = torch.from_numpy(made["session"].run(None, {"x": x.numpy()})[0])
    assert found.shape == (3, 10)
    accessible(tab)


def _write_file(network: torch.nn.Module, path: Path) -> None:
    if path.suffix == ".pt2":
        normsearch.export(network, path, torch.randn(4, 1, 8, 8))
        return
    onnx_networks = pytest.importorskip("onnx_networks", reason="needs the extra onnx")
    writer = onnx_networks.Writer("initializers")
    x = "x"
    for number, layer in enumerate(network):
        name, out = f"{number}", f"{number}.y"
        if isinstance(layer, torch.nn.BatchNorm2d):
            x = writer.batch_norm(x, name, layer)
        elif isinstance(layer, torch.nn.ReLU):
            x = writer.node("Relu", [x], out, name)
        elif isinstance(layer, torch.nn.Flatten):
            x = writer.node("Flatten", [x], out, name)
        else:
            weights = [writer.constant(f"{name}.{key}", getattr(layer, key)) for key in ("weight", "bias")]
            if isinstance(layer, torch.nn.Linear):
                x = writer.node("Gemm", [x, *weights], out, name, transB=1)
            else:
                strides = list(layer.stride)
                x = writer.node("Conv", [x, *weights], out, name, pads=[1] * 4, strides=strides)
    given, result = onnx_networks.value("x", "batch", 1, 8, 8), onnx_networks.value(x, "batch", 10)
    path.write_bytes(writer.model(17, [given], [result]).SerializeToString())


def test_job_is_followed_over_a_reload_and_cancelled_in_another_tab(
    tab: Tab, conversion: dict[str, Any]
) -> None:
    page = tab.page
    long = conversion["ask"](
        "POST", "searches", {**LONG, "model": conversion["model"], "dataset": conversion["dataset"]}
    )
    page.goto(f"{tab.base}/#/jobs/{long['id']}")
    tab.shows("job")
    page.wait_for_selector("#job-count:has-text(' of ')")
    accessible(tab)
    page.reload()
    tab.shows("job")
    page.wait_for_selector("#job-count:has-text(' of ')")
    page.wait_for_selector("#job-log:has-text('Begun')")

    other = Tab(page.context, tab.base)
    other.open()
    # A key belongs to one tab.
    other.shows("key")
    other.page.fill("#key", page.evaluate("() => sessionStorage.getItem('normsearch.key')"))
    other.page.keyboard.press("Enter")
    other.shows("start")
    other.page.locator("#jobs a", has_text="Search").first.click()
    other.shows("job")
    other.page.click("#cancel-job")
    for one in (other, tab):
        ended(one, "cancelled")
        one.page.wait_for_selector("#job-log:has-text('Cancelled; nothing of it was kept')")
        assert not one.page.is_visible("#job-progress-part")
    accessible(other)
    other.is_clean()
    other.page.close()


HOSTILE = """<!doctype html><body><h1>Report</h1><script>parent.pwned = 1</script>
<img src="http://127.0.0.1:PORT/image" onerror="parent.pwned = 1"><style>h1 { color: red }</style>
<link rel="stylesheet" href="http://127.0.0.1:PORT/style"><a href="javascript:parent.pwned=1">click</a>
<form action="http://127.0.0.1:PORT/form"><button>send</button></form><iframe src="http://127.0.0.1:PORT/frame"></iframe>
<meta http-equiv="refresh" content="0;url=http://127.0.0.1:PORT/refresh"></body>"""


def heard(listening: socket.socket) -> list[bytes]:
    """Return what was sent over each connection that was made, if anything."""
    found = []
    while True:
        try:
            connection, _ = listening.accept()
        except BlockingIOError:
            return [one for one in found if one]
        with connection:
            connection.settimeout(1)
            try:
                found.append(connection.recv(4096))
            except TimeoutError:
                found.append(b"")


def test_report_of_a_compromised_child_does_nothing(tab: Tab, conversion: dict[str, Any]) -> None:
    page = tab.page
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        stranger.setblocking(False)
        address = f"127.0.0.1:{stranger.getsockname()[1]}"
        hostile = HOSTILE.replace("127.0.0.1:PORT", address)
        page.route(
            "**/v1/artifacts/art_*", lambda route: route.fulfill(body=hostile, content_type="text/html")
        )
        page.goto(f"{tab.base}/#/jobs/{conversion['id']}")
        tab.shows("job")
        report = page.frame_locator("#report")
        report.locator("h1").wait_for()
        assert report.locator("h1").evaluate("(one) => getComputedStyle(one).color") != "rgb(255, 0, 0)"
        report.locator("a").click()
        report.locator("button").click()
        page.wait_for_timeout(1000)
        assert page.evaluate("() => window.pwned") is None
        assert "cannot be read" in page.inner_text("#job-notes")
        # What the browser tells of are requests that it refused to make: a connection that it may have opened
        # beforehand carries nothing.
        assert heard(stranger) == []
    tab.asked = [url for url in tab.asked if address not in url]
    said, tab.said = tab.said, []
    assert said
    assert all(address in line or "Content Security Policy" in line or "sandbox" in line for line in said), (
        said
    )


def test_failed_job_says_why(tab: Tab, conversion: dict[str, Any]) -> None:
    page = tab.page
    body = {"model": conversion["model"], "to": "group", "input_shape": "3x8x8"}
    failing = conversion["ask"]("POST", "conversions", body)
    page.goto(f"{tab.base}/#/jobs/{failing['id']}")
    tab.shows("job")
    ended(tab, "failed")
    assert "failed on the given inputs" in page.inner_text("#job-error")
    accessible(tab)


def test_patterns_mean_what_they_mean_in_python(tab: Tab) -> None:
    chosen = random.Random(0)

    def text(letters: str) -> str:
        return "".join(chosen.choice(letters) for _ in range(chosen.randint(0, 6)))

    cases = [(text("ab.*?[]!-1(\\"), text("ab.1-](\\")) for _ in range(3000)]
    cases += [("layer4.*", "layer4.0.bn1"), ("[[]a]", "[a]"), ("[]a]", "]"), ("[!a]*", "ba"), ("a.b", "axb")]
    module = re.search(r'href="(/page/[^"]+/choice\.js)"', tab.page.content())
    assert module is not None
    matched = tab.page.evaluate(
        "async ([path, cases]) => { const { matches } = await import(path);"
        " return cases.map(([pattern, text]) => matches(pattern, text)); }",
        [module[1], cases],
    )
    wrong = [
        (pattern, path)
        for (pattern, path), found in zip(cases, matched, strict=True)
        if found != fnmatch.fnmatchcase(path, pattern)
    ]
    assert wrong == []
    assert sum(matched) > 50


# The longest


@pytest.mark.slow
def test_resnet18_from_file_to_search(tab: Tab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    page = tab.page
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=10)
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    images = torch.randn(60, 3, 32, 32)
    np.savez(tmp_path / "images.npz", images.numpy(), np.arange(60) % 10)

    with page.expect_file_chooser() as chooser:
        page.locator("#file").focus()
        page.keyboard.press("Space")
    chooser.value.set_files(tmp_path / "resnet18.pth")
    # The architecture is guessed from the name, its arguments are the user's.
    page.wait_for_function("() => document.querySelector('#architecture').value === 'torchvision/resnet18'")
    page.click("#view-start .more summary")
    page.fill("#arguments", "num_classes=10")
    page.click("#upload-button")
    tab.shows("model")
    surveyed(tab)
    assert page.locator("#sites .body [role=row]").count() == 20
    # Random numbers of ImageNet's shape told the maps, and the picture is in the order of the data.
    assert "112×112" in page.locator("#sites .body [role=row]").first.text_content()
    order = page.locator("#picture .site").evaluate_all("(all) => all.map((one) => one.dataset.path)")
    assert order.index("layer2.0.downsample.1") > order.index("layer2.0.bn1")

    page.set_input_files("#data-file", tmp_path / "images.npz")
    page.wait_for_selector("#inputs option:has-text('images.npz, 60 samples, labelled')", state="attached")
    page.select_option("#all", "group")
    page.fill("#pattern", "layer4.*")
    page.select_option("#rule-method", "instance")
    page.click("#add-rule")
    # Maps of 1×1 have no space.
    page.wait_for_selector("#summary:has-text('refused')")
    page.wait_for_selector("#choose-error:has-text('5 sites refuse this')")
    accessible(tab)
    assert page.is_disabled("#convert-now")
    page.check("#only-refused")
    assert page.locator("#sites .body [role=row]:visible").count() == 5
    page.uncheck("#only-refused")
    page.select_option("#rule-method", "own")
    page.fill("#rule-method-own", "instance, layer")
    page.fill("#pattern", "layer4.*")
    page.click("#add-rule")
    page.wait_for_selector("#summary:has-text('layer × 5')")
    accessible(tab)
    # The plan as text does what it says.
    page.click("#tab-python")
    monkeypatch.chdir(tmp_path)
    exec(page.inner_text("#plan-code"), {})
    layers = {
        str(method).partition("(")[0] for method in normsearch.load("converted.safetensors").plan.values()
    }
    assert layers == {"group", "layer"}
    page.click("#tab-cli")
    words = shlex.split(page.inner_text("#plan-code").replace("\\\n", " "))
    assert words[:2] == ["normsearch", "convert"]
    done = subprocess.run(
        [sys.executable, "-m", *words, "--force", "--json"], check=True, capture_output=True
    )
    assert json.loads(done.stdout)
    assert {
        str(method).partition("(")[0] for method in normsearch.load("converted.safetensors").plan.values()
    } == layers
    page.click("#convert-now")
    tab.shows("job")
    ended(tab, "succeeded")
    assert "Accuracy" in page.inner_text("#job-cards")
    page.locator("#h-job a").click()
    surveyed(tab)

    page.click("#run-sensitivities")
    page.select_option("#run-which", "chosen")
    page.fill("#run-samples", "8")
    page.click("#run-panel button.primary")
    page.wait_for_selector("#h-job:has-text('Sensitivity')")
    ended(tab, "succeeded")
    page.frame_locator("#report").locator("h2", has_text="Sensitivity").wait_for()
    page.locator("#h-job a").click()
    surveyed(tab)

    page.click("#run-searches")
    for box in page.locator("#run-panel [name=methods]").all():
        box.set_checked(box.get_attribute("value") in ("batch", "group"))
    for name, value in (("trials", 3), ("steps", 2), ("confirm", 1)):
        page.fill(f"#run-{name}", str(value))
    accessible(tab)
    page.click("#run-panel button.primary")
    page.wait_for_selector("#h-job:has-text('Search')")
    ended(tab, "succeeded")
    assert page.locator("#job-tables tbody tr").count() >= 1
    page.frame_locator("#report").locator("h2", has_text="History").wait_for()
    accessible(tab)


@pytest.mark.slow
def test_five_hundred_sites_stay_usable(tab: Tab, tmp_path: Path) -> None:
    page = tab.page
    torch.save(deep.network().state_dict(), tmp_path / "deep.pth")
    page.set_input_files("#file", tmp_path / "deep.pth")
    page.fill("#architecture", "factories/deep")
    page.click("#upload-button")
    tab.shows("model")
    surveyed(tab)
    assert page.locator("#sites .body [role=row]").count() == 500
    shown = """async ([selector, kind, value]) => {
      const [element, start] = [document.querySelector(selector), performance.now()];
      element.value = value;
      element.dispatchEvent(new Event(kind, { bubbles: true }));
      await new Promise((done) => setTimeout(() => requestAnimationFrame(() => setTimeout(done)), 100));
      return performance.now() - start - 100;
    }"""
    for selector, kind, value in (
        ("#all", "change", "group"),
        ("#filter", "input", "99."),
        ("#filter", "input", ""),
    ):
        took = min(page.evaluate(shown, [selector, kind, value]) for _ in range(3))
        assert took < 500, (selector, value, took)
    page.fill("#filter", "99.")
    page.wait_for_selector("#filter-count:has-text('4 of 500 sites')")
    page.locator("#sites .body .m.exact:visible").first.click()
    page.wait_for_selector("#rules:has-text('1 site was chosen one by one')")


@pytest.mark.slow
def test_jobs_are_followed_over_a_restart(chrome: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    with running(tmp_path, NORMSEARCH_OPEN="1", port=port):
        context = chrome.new_context(viewport={"width": 1280, "height": 900})
        tab = Tab(context, base)
        page = tab.open()
        try_example(tab)
        model, dataset = page.url.rpartition("/")[2], page.input_value("#inputs")
        made = page.request.post(f"{base}/v1/searches", data={**LONG, "model": model, "dataset": dataset})
        page.goto(f"{base}/#/jobs/{made.json()['id']}")
        tab.shows("job")
        page.wait_for_selector("#job-count:has-text(' of ')")
    page.wait_for_selector("#offline:not([hidden])")
    with running(tmp_path, NORMSEARCH_OPEN="1", port=port):
        page.wait_for_selector("#offline", state="hidden")
        page.wait_for_selector("#job-log:has-text('Begun again')")
        page.click("#cancel-job")
        ended(tab, "cancelled")
    tab.is_clean()
    context.close()
