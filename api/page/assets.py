"""What the page consists of: files read once, whose address changes with their content."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from api.settings import Settings

_HERE = Path(__file__).parent
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".npz": "application/octet-stream",
    ".safetensors": "application/octet-stream",
}
#: A network and digits that anyone may try the service with.
EXAMPLE_WEIGHTS, EXAMPLE_DATA = "digits.safetensors", "digits.npz"


@dataclass(frozen=True)
class Asset:
    """A file that the page needs."""

    content: bytes
    media_type: str


class Assets:
    """The files of the page, held in memory.

    Attributes:
        files: by name.
        version: changes when any of them does; part of their addresses, so that they may be cached for good.

    """

    def __init__(self) -> None:
        found = [*(_HERE / "static").iterdir(), *(_HERE / "example").iterdir()]
        self.files = {
            path.name: Asset(path.read_bytes(), _TYPES[path.suffix])
            for path in sorted(found)
            if path.suffix in _TYPES
        }
        digest = hashlib.sha256()
        for name, asset in self.files.items():
            digest.update(name.encode() + hashlib.sha256(asset.content).digest())
        self.version = digest.hexdigest()[:16]

    @cached_property
    def policy(self) -> str:
        """The content security policy of the page.

        Reports are shown in frames without scripts, which inherit it: their style sheet is named by its hash.
        """
        return "; ".join(
            (
                "default-src 'none'",
                "script-src 'self'",
                f"style-src 'self' 'sha256-{_report_style()}'",
                "img-src 'self' data:",
                "connect-src 'self'",
                "frame-src blob:",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
                "require-trusted-types-for 'script'",
                "trusted-types 'none'",
            )
        )

    def html(self, settings: Settings) -> bytes:
        """Return the page; only the operator's settings make it differ."""
        environment = Environment(
            loader=FileSystemLoader(_HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return (
            environment.get_template("page.html")
            .render(
                base=f"/page/{self.version}",
                modules=sorted(name for name in self.files if name.endswith(".js")),
                needs_key=not settings.open,
                upload_bytes=int(settings.upload_bytes),
                upload_limit=settings.upload_bytes.human_readable(),
                example_weights=EXAMPLE_WEIGHTS,
                example_data=EXAMPLE_DATA,
            )
            .encode()
        )


def _report_style() -> str:
    # The library is found, not imported: the service never has torch in its own process.
    library = find_spec("normsearch")
    assert library is not None
    assert library.origin is not None
    style = Path(library.origin).parent / "reporting" / "templates" / "page.css"
    loader = Environment(trim_blocks=True, lstrip_blocks=True)
    text = loader.from_string(style.read_text("utf-8")).render()
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
