"""The page of a report: well-formed, safe, readable, and as a browser shows it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import reported
import torch
from hypothesis import given
from hypothesis import strategies as st
from reported import small
from torch import nn

import normsearch
from normsearch import Refusal
from normsearch.dependence import BatchDependence
from normsearch.reporting import Document, charts, page, sections
from normsearch.reporting.gates import gates_of
from normsearch.reports import Environment, Profile
from normsearch.text import percent, visible

# The page

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><script>alert(1)</script>",
    "</title><b>",
    "</svg><b>",
    "<!--",
    "]]>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;&amp;",
    "javascript:alert(1)",
    "https://example.com/x.js",
    "right\u202eleft\u2066\u200f",
    "zero\u200bwidth\x00\x1b[2J",
    "very.long." * 40,
    "(",
)


def hostile() -> Document:
    names = list(HOSTILE)
    profile = Profile(1, 1.0, 0.5, 2.0, 10, Environment("cpu", "float32", 1, "2", "3"))
    rows = [
        sections.LayerRow(
            site=name,
            layer=name,
            channels=None,
            method=name,
            changed=True,
            exact=False,
            depth=number,
            converted=0.1 * number,
            calibrated=0.05 * number,
            reason=name,
            notes=(name, name),
        )
        for number, name in enumerate(names)
    ]
    dependence = BatchDependence(None, 0.0, None, None, names[0])
    return Document(
        title="".join(names),
        environment=Environment(names[0], names[1], 1, names[2], names[3]),
        normsearch=names[1],
        created=names[1],
        sections=(
            sections.Summary(
                sites=2,
                changed=1,
                methods=dict.fromkeys(names, 1),
                exact=False,
                batch_independent=False,
                parameters=(1, 2),
                batches=1,
                converted=sections.Moved(relative_l2=0.5, kl=0.1, top1_agreement=0.5),
            ),
            sections.Metric(name=names[0], original=1.0, converted=0.5),
            sections.CalibrationPart(
                before=0.1,
                after=0.05,
                steps=(sections.CalibrationStep(name=names[1], error=None, kept=True, steps=1, seconds=1.0),),
                whitened=tuple(names),
                batches=2,
                held_out=1,
            ),
            sections.Layers(rows=tuple(rows)),
            sections.HeatMap(
                methods=tuple(names),
                threshold=0.5,
                rows=tuple(
                    sections.HeatRow(
                        site=name,
                        drift=(None, None, *(0.3,) * (len(names) - 2)),
                        refused=(0,),
                        chosen=2,
                        vetoed=(3,),
                    )
                    for name in names
                ),
            ),
            sections.Gates(
                mixtures=tuple(
                    sections.Mixture(site=name, mean=(0.2, 0.3, 0.5), variance=(0.0, 0.0, 1.0))
                    for name in names
                ),
                gates=tuple(
                    sections.Gate(site=name, channels=3, mean=0.5, least=0.0, most=1.0, histogram=(1, 0, 2))
                    for name in names
                ),
            ),
            sections.Cost(before=profile, after=profile),
            sections.Dependence(before=dependence, after=dependence),
            sections.Notes(
                notes=tuple(sections.Note(text=name, about=name) for name in names),
                refusals=tuple(Refusal(name, name, name, name) for name in names),
            ),
        ),
    )


#: What has no end tag.
VOID = {"meta", "link", "input", "br", "wbr", "img"}


SVG = {"svg", "title", "desc", "line", "polyline", "circle", "rect", "text"}


ALLOWED = VOID - {"img"} | SVG | {
    *("html", "head", "style", "body", "header", "main", "footer", "nav", "section", "h1", "h2", "h3"),
    *("p", "a", "b", "bdi", "small", "span", "div", "figure", "figcaption", "fieldset", "legend", "label"),
    *("ul", "li", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "time"),
}  # fmt: skip


class Reader(HTMLParser):
    """Reads a page, checks that every element is closed, and keeps what a test wants to know."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data!r}")


def whole() -> Document:
    """A report with everything in it."""
    return reported.report(reported.network(), reported.inputs())[0]


@pytest.mark.parametrize("make", [hostile, whole, small])
def test_page_is_well_formed_and_holds_no_other_elements(make: Callable[[], Document]) -> None:
    text = make().to_html()
    read = Reader(text)
    assert text.startswith("<!doctype html>\n")
    assert {tag for tag, _ in read.elements} <= {tag.lower() for tag in ALLOWED}
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in read.elements:
        for name, value in attributes.items():
            # No code and no style in attributes; links stay on the page.
            assert not name.startswith("on"), (tag, name)
            assert name not in ("style", "src", "srcset", "action", "formaction", "xlink:href"), (tag, name)
            if name == "href":
                assert value == "data:," or (value is not None and value[1:] in ids), value
            if name in ("aria-labelledby", "aria-describedby"):
                assert value in ids, value
    assert "{{" not in text.replace("{{ 7 * 7 }}{% raw %}", "")


def test_hostile_names_are_shown_as_they_are() -> None:
    text = hostile().to_html()
    read = "".join(Reader(text).texts)
    for name in HOSTILE:
        assert visible(name) in read.replace("\n", ""), name
    for character in "\u202e\u2066\u200f\u200b\x00\x1b":
        assert character not in text
    # The page's own URLs apart, addresses are text.
    assert not re.search(r"""(src|href|url\()\s*=?\s*["']?(https?:)?//""", text)


def test_page_needs_no_network_and_allows_its_own_style_alone() -> None:
    text = hostile().to_html()
    read = Reader(text)
    (policy,) = [
        attributes["content"] for tag, attributes in read.elements if attributes.get("http-equiv") is not None
    ]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert not re.search(r"@import|url\(|expression|@font-face", style)


def test_page_is_for_everybody() -> None:
    elements = Reader(hostile().to_html()).elements
    tags = [tag for tag, _ in elements]
    assert [tags.count(tag) for tag in ("h1", "main", "header", "footer", "nav")] == [1] * 5
    assert ("html", {"lang": "en"}) in elements
    for number, (tag, attributes) in enumerate(elements):
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        if tag == "svg":
            assert attributes["role"] == "img"
            assert [t for t, _ in elements[number + 1 : number + 3]] == ["title", "desc"]
        if attributes.get("class", "") is not None and "scroll" in (attributes.get("class") or "").split():
            # What scrolls can be reached with the keyboard, and has a name.
            assert attributes["tabindex"] == "0"
            assert "aria-labelledby" in attributes


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """WCAG's contrast ratio of two colours."""
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_have_contrast_in_light_and_dark() -> None:
    style = re.findall(r"<style>(.*?)</style>", small().to_html(), re.DOTALL)[0]
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        pairs = [(f"t{n}", f"h{n}") for n in range(len(page.HEAT) + 1)]
        for text in ("text", "muted", "accent"):
            pairs += [(text, ground) for ground in ("page", "panel", "band")]
        pairs += [("muted", "refused"), ("muted", "refused-line")]
        for text, ground in pairs:
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground, colours[text])
        # Lines, bars and frames: 3 is enough.
        for mark in ("s0", "s1", "p0", "p1", "p2"):
            assert contrast(colours[mark], colours["panel"]) >= 3, mark
        for number in range(len(page.HEAT) + 1):
            assert contrast(colours["frame"], colours["panel"]) >= 3, number


def test_five_hundred_sites_stay_small_and_filterable() -> None:
    row = small().sections[0].rows[0]  # type: ignore[union-attr]
    rows = tuple(
        replace(row, site=f"stage.{n // 10}.norm{n}", depth=n, converted=n / 500) for n in range(500)
    )
    text = replace(small(), sections=(sections.Layers(rows=rows),)).to_html()
    assert len(text) < 500_000
    classes = [attributes.get("class") for tag, attributes in Reader(text).elements if tag == "tr"]
    assert sum("drifted" in (c or "") for c in classes) == 449
    assert 'id="rows-drifted"' in text
    assert ":has(#rows-drifted:checked)" in text


def test_blocks_are_cut_by_as_few_parts_as_tell_them_apart() -> None:
    assert charts.blocks(["bn1", "layer1.0.a", "layer1.1.b", "layer2.0"]) == [
        ("bn1", 1),
        ("layer1", 2),
        ("layer2", 1),
    ]
    assert charts.blocks(["features.0.a", "features.0.b", "features.1.a", "features.2.c"]) == [
        ("features.0", 2),
        ("features.1", 1),
        ("features.2", 1),
    ]


@given(st.floats(-1e9, 1e9))
def test_percentages_are_within_their_digits(value: float) -> None:
    text = percent(value)
    if text == "< 0.01 %":
        assert 0 < value < 1e-4
        return
    shown = float(text.removesuffix(" %").replace(",", ""))
    assert shown == pytest.approx(100 * value, rel=6e-3, abs=6e-3)


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--hide-scrollbars"),
)


def browse(path: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    words = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *options, path.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)


def messages(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
def test_browser_finds_nothing_to_complain_about(tmp_path: Path) -> None:
    for name, found in (
        ("hostile", hostile()),
        ("whole", whole()),
    ):
        page_file = tmp_path / f"{name}.html"
        page_file.write_text(found.to_html(), "utf-8")
        done = browse(page_file, tmp_path / "profile", "--dump-dom")
        assert messages(done) == []
        assert "</html>" in done.stdout
    # What the policy forbids would be heard of.
    forbidden = (
        (tmp_path / "whole.html").read_text("utf-8").replace("</body>", "<script>alert(1)</script></body>")
    )
    (tmp_path / "forbidden.html").write_text(forbidden, "utf-8")
    assert "Content Security Policy" in "".join(
        messages(browse(tmp_path / "forbidden.html", tmp_path / "profile", "--dump-dom"))
    )


#: Frames of given widths, since a window has a least one; the title tells each one's and its content's.
_FRAMES = """<!doctype html><title></title>{frames}
<script>
addEventListener("load", () => {{
  const widths = [...document.querySelectorAll("iframe")].map(frame =>
    [frame.contentWindow.innerWidth, frame.contentDocument.documentElement.scrollWidth]);
  document.title = JSON.stringify(widths);
}});
</script>"""


def width_of_frames(pages: Sequence[tuple[int, str]], folder: Path) -> list[tuple[int, int]]:
    """Return the inner width of a frame for each page, and that of the page in it."""
    frames = []
    for width, text in pages:
        # Without its policy, under which no style in an attribute counts.
        source = escape(re.sub(r"<meta http-equiv=[^>]*>", "", text))
        frames.append(f'<iframe width="{width}" height="900" style="border:0" srcdoc="{source}"></iframe>')
    (folder / "x.html").write_text(_FRAMES.format(frames="".join(frames)), "utf-8")
    done = browse(folder / "x.html", folder / "profile", "--window-size=1400,1000", "--dump-dom")
    (title,) = re.findall(r"<title>(\[.*?\])</title>", done.stdout)
    return [(inner, content) for inner, content in json.loads(title)]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
def test_page_never_scrolls_sideways(tmp_path: Path) -> None:
    wide = '<div style="width: 2000px">too wide</div></main>'
    pages = (
        (hostile().to_html(), True),
        (whole().to_html(), True),
        (whole().to_html().replace("</main>", wide), False),
    )
    cases = [(width, text, fits) for width in (320, 390, 768, 1280) for text, fits in pages]
    found = width_of_frames([(width, text) for width, text, _ in cases], tmp_path)
    for (width, _, fits), (inner, content) in zip(cases, found, strict=True):
        assert inner == width
        assert (content <= inner) == fits


def test_sparse_mixtures_are_shown_as_they_are_used() -> None:
    converted = normsearch.convert(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), {"1": "sparse_switchable(steps=1)"}
    )
    converted(torch.randn(2, 3, 6, 6))
    found = gates_of(converted, ["1"])
    assert found is not None
    assert found.mixtures[0].mean == found.mixtures[0].variance
    assert sorted(found.mixtures[0].mean) == [0, 0, 1]
