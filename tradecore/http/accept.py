"""What a client takes, from its Accept headers (RFC 9110, 12.5)."""

from collections.abc import Iterator


def choices(header: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yield each choice in lower case, its parameters, and its weight; 0.0 is not at all.

    A weight that is no number counts as 0.0.
    """
    for part in header.lower().split(","):
        name, *texts = (text.strip() for text in part.split(";"))
        pairs = (text.partition("=")[::2] for text in texts)
        parameters = {key.strip(): value.strip() for key, value in pairs}
        yield name, parameters, _weight(parameters.pop("q", "1"))


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
