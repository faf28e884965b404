"""What the environment says: every setting of the service, read once."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import fsspec
import sqlalchemy as sa
from pydantic import ByteSize, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from api.database import sqlite_url

_FACTORY_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_GIB = 2**30
#: The network of the page's example, `factories/digits`.
EXAMPLE = "api.engine.digits:network"
Bytes = Annotated[ByteSize, Field(ge=0)]


class Settings(BaseSettings):
    """Settings: NORMSEARCH_ and a field's name in capitals; docs/service.md has the table."""

    model_config = SettingsConfigDict(env_prefix="NORMSEARCH_", frozen=True, hide_input_in_errors=True)

    data: Path = Field(Path("normsearch-data"), description="folder of the database and of every file")
    database_url: SecretStr | None = Field(
        None,
        description="`postgresql://USER:PASSWORD@HOST/NAME`; default: SQLite in the data folder",
    )
    files: str | None = Field(
        None,
        description="where uploads and artifacts lie: `s3://BUCKET/FOLDER` (extra `s3`), or another file "
        "system that fsspec knows; default: the data folder",
    )
    files_options: dict[str, Any] = Field(
        default_factory=dict,
        repr=False,
        description='its options as JSON, `{"key": "…", "secret": "…", "endpoint_url": "…"}`; for what is '
        "missing its library looks where it always does",
    )
    copies_bytes: Bytes = Field(
        ByteSize(10 * _GIB),
        description="with `NORMSEARCH_FILES`: disk for copies that children read, beyond those in use",
    )
    open: bool = Field(False, description="1: no API keys, for loopback addresses alone")
    factories: dict[str, str] = Field(
        default_factory=dict,
        description='networks of your own as JSON, `{"crepe": "package.module:factory"}`; asked for as '
        "`factories/crepe`",
    )
    metrics_token: SecretStr | None = Field(
        None, description="bearer token for `/metrics`; default: loopback clients alone"
    )
    requests_per_minute: int = Field(
        600, ge=1, description="requests per API key, and per address without one"
    )
    upload_bytes: Bytes = Field(ByteSize(4 * _GIB), description="largest upload")
    quota_bytes: Bytes = Field(ByteSize(20 * _GIB), description="what one API key may store")
    reserve_bytes: Bytes = Field(
        ByteSize(_GIB), description="disk space left free: an upload that would need it is refused with 507"
    )
    slowest_bytes_per_second: int = Field(
        16_384, ge=1, description="an upload slower than this, after 30 s of grace, is ended with 408"
    )
    children: int = Field(
        default_factory=lambda: os.cpu_count() or 1,
        ge=1,
        description="child processes at a time; default: processors",
    )
    child_threads: int = Field(1, ge=1, description="threads of one child's arithmetic")
    child_memory_bytes: Bytes = Field(
        ByteSize(8 * _GIB), description="address space that a child may add to what it starts with"
    )
    child_file_bytes: Bytes = Field(ByteSize(8 * _GIB), description="largest file that a child may write")
    child_seconds: float = Field(300, gt=0, description="time that a child may take")
    wait_seconds: float = Field(
        120, gt=0, description="time that a request waits for a free child before it is answered with 503"
    )
    workers: int = Field(
        1,
        ge=0,
        le=64,
        description="worker processes beside the server; 0 where `python -m api worker` runs elsewhere",
    )
    job_seconds: float = Field(3600, gt=0, description="time that a child of a job may take")
    unfinished_jobs: int = Field(100, ge=1, description="jobs that an API key may have waiting or running")
    convert_seconds: float = Field(
        60, ge=0, description="time that `POST /v1/convert` waits for its job before it answers with 202"
    )
    search_trials: int = Field(200, ge=2, description="most trials of a search")
    search_parts: int = Field(
        4, ge=1, description="trials of one search at a time, over all workers; with SQLite it is one"
    )
    keep_jobs_days: float = Field(30, gt=0, description="how long finished jobs are kept")
    keep_artifacts_days: float = Field(30, gt=0, description="how long artifacts are kept")
    keep_uploads_days: float = Field(
        30, gt=0, description="how long uploads, models and datasets are kept that nothing was made from"
    )

    @field_validator("database_url")
    @classmethod
    def _database(cls, value: SecretStr | None) -> SecretStr | None:
        try:
            driver = None if value is None else sa.make_url(value.get_secret_value()).drivername
        except (sa.exc.ArgumentError, ValueError):
            driver = ""
        if driver not in (None, "sqlite", "postgresql", "postgresql+psycopg"):
            raise ValueError("write postgresql://USER:PASSWORD@HOST/NAME, or sqlite:///PATH")
        return value

    @field_validator("files")
    @classmethod
    def _system(cls, value: str | None) -> str | None:
        protocol, separator, folder = (value or "").partition("://")
        if value is None:
            return None
        try:
            fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{error}; for s3: pip install 'normsearch[s3]'") from error
        if not separator or not folder or protocol in ("file", "local"):
            raise ValueError(
                "write PROTOCOL://PLACE, for example s3://bucket/normsearch; a folder goes in NORMSEARCH_DATA"
            )
        return value.rstrip("/")

    @field_validator("factories")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name, factory in value.items():
            if not _FACTORY_NAME.fullmatch(name) or not _FACTORY.fullmatch(factory):
                raise ValueError(
                    f"{name!r}: {factory!r} is not NAME (a-z, digits, . _ -) and package.module:factory"
                )
        return value

    @property
    def networks(self) -> dict[str, str]:
        """The operator's factories, and the one of the example that the page offers."""
        return {"digits": EXAMPLE, **self.factories}

    def as_json(self) -> str:
        """Return every setting, secrets included, as another process of the service reads it."""
        given = {
            name: value.get_secret_value() if isinstance(value, SecretStr) else value
            for name in type(self).model_fields
            if (value := getattr(self, name)) is not None
        }
        return json.dumps(given, default=str)

    def url(self) -> str:
        """Return the URL of the database; SQLite in the data folder where none is given."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return sqlite_url(self.data)
