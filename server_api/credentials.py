"""Tokens: made here, stored as SHA-256, shown once."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import SecretStr

from server_api.errors import Unauthorized
from server_api.settings import Settings
from server_api.store import Principal, Role, Store
from spafl.canonical import sha256_hex
from spafl.errors import SettingsError

_PREFIX: dict[Role, str] = {"admin": "spafl-admin-", "device": "spafl-device-", "enrolment": "spafl-enrol-"}


@dataclass(frozen=True, slots=True)
class Issued:
    """Secrets made by this start, to be shown once; None if there was one already."""

    admin_token: str | None = None
    enrolment_key: str | None = None


def new_token(role: Role) -> str:
    """Returns a fresh secret of 256 random bits whose prefix names its role, so that secret scanners know it."""
    return _PREFIX[role] + secrets.token_urlsafe(32)


def digest(token: str) -> str:
    """Returns what is stored of a token: its SHA-256. Tokens are random, so no salt or slow hash is needed."""
    return sha256_hex(token.encode())


class Keyring:
    """Whom a token belongs to, remembered for `REMEMBERED` seconds so that devices at work cost no look-up.

    A token that was replaced may so be accepted that much longer by a process that did not replace it.
    """

    REMEMBERED = 300.0
    _MOST = 100_000

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._known: dict[str, tuple[Principal, float]] = {}

    def remembered(self, token: str) -> Principal | None:
        """Returns whom `token` belongs to if that was looked up lately; never waits."""
        principal, until = self._known.get(digest(token), (None, 0.0))
        return principal if self._clock() < until else None

    def identify(self, token: str) -> Principal:
        """Returns whom `token` belongs to.

        Raises:
            Unauthorized: nobody.
        """
        key = digest(token)
        principal = self._store.principal(key)
        if principal is None:
            raise Unauthorized("this token is not known here: check it, or enrol again")
        if len(self._known) >= self._MOST:
            self._known.clear()
        self._known[key] = (principal, self._clock() + self.REMEMBERED)
        return principal


def issue(
    store: Store, settings: Settings, *, new_admin: bool = False, new_enrolment: bool = False
) -> Issued:
    """Returns the secrets made now: on the first start both, later those asked for anew.

    A new one replaces the old. One given in the settings is stored instead and never shown.

    Raises:
        SettingsError: one is given in the settings and asked for anew.
    """
    return Issued(
        admin_token=_issue(store, "admin", settings.admin_token, new_admin),
        enrolment_key=_issue(store, "enrolment", settings.enrolment_key, new_enrolment),
    )


def _issue(store: Store, role: Role, given: SecretStr | None, anew: bool) -> str | None:
    if given is not None:
        if anew:
            raise SettingsError(
                f"the {role} secret is set by SPAFL_*: change it there instead of asking anew"
            )
        store.replace_tokens(role, digest(given.get_secret_value()))
        return None
    if store.has_token(role) and not anew:
        return None
    token = new_token(role)
    store.replace_tokens(role, digest(token))
    return token
