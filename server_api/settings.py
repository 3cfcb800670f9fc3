"""Every setting of the server in one table: read by the server, by `spafl serve --help` and by the documentation."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from spafl.errors import SettingsError
from spafl.manifest import MAX_BUNDLE_BYTES

ENV_PREFIX = "SPAFL_"

Secret = Annotated[SecretStr, Field(min_length=20, max_length=200)]


class Settings(BaseSettings):
    """What an operator may set. Options of `spafl serve` come first, then SPAFL_* in the environment."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    data: Path = Field(Path("spafl-server"), description="Directory for the database and the bundles.")
    database: str | None = Field(
        None, description="Database URL; default: sqlite, the file server.db in the data directory."
    )
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    tls_cert: Path | None = Field(None, description="Certificate chain (PEM) to serve https with.")
    tls_key: Path | None = Field(None, description="Private key (PEM) of the certificate.")
    admin_token: Secret | None = Field(
        None, description="The admin token, instead of one made on the first start (20 characters or more)."
    )
    enrolment_key: Secret | None = Field(
        None, description="The enrolment key, instead of one made on the first start (20 characters or more)."
    )
    max_bundle_bytes: int = Field(
        MAX_BUNDLE_BYTES, ge=1, le=MAX_BUNDLE_BYTES, description="Largest bundle upload, in bytes."
    )
    retry_after: float = Field(
        5.0,
        gt=0,
        le=3600,
        description="Seconds a device that has to wait is told to wait; each answer varies them by half.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both or neither")
        if self.admin_token is not None and self.admin_token == self.enrolment_key:
            raise ValueError("admin_token and enrolment_key are the same: every device would be an admin")
        return self

    @classmethod
    def given(cls, **options: Any) -> "Settings":
        """Returns the settings with `options` that are not None above the environment's and the defaults.

        Raises:
            SettingsError: a value cannot be used; secrets are not repeated.
        """
        try:
            return cls(**{name: value for name, value in options.items() if value is not None})
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = f"setting {first['loc'][0]}: " if first["loc"] else ""
            raise SettingsError(f"{where}{first['msg']}") from None


SETTINGS = {name: field.description or "" for name, field in Settings.model_fields.items()}
"""Setting -> one line of help. As an environment variable its name is upper case behind SPAFL_."""
