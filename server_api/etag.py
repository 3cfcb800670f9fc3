"""Entity tags (RFC 9110, section 8.8.3): ours are strong, made of a content's SHA-256."""


def etag(digest: str) -> str:
    """Returns the strong entity tag for content of SHA-256 `digest`."""
    return f'"{digest}"'


def matches(if_none_match: str | None, tag: str) -> bool:
    """Returns whether the If-None-Match header says the client has `tag` (weak comparison, as section 13.1.2 asks)."""
    if if_none_match is None:
        return False
    given = [item.strip().removeprefix("W/") for item in if_none_match.split(",")]
    return tag in given or "*" in given
