"""Where the text of a setting comes from: the environment, SETTINGS_FILE, NAME_FILE, a credential.

Whatever cannot be read raises ValueError, which says what and why.
"""

from collections.abc import Mapping
from pathlib import Path

_FILE_MAX_BYTES = 65536


def from_file(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what SETTINGS_FILE gives, which wins: lines NAME=value, as systemd reads them."""
    path = plain_text("SETTINGS_FILE", environ)
    if not path or not path.isprintable():  # what is wrong with it is said where it is read
        return {}
    given: dict[str, str] = {}
    for number, line in enumerate(_file_text("SETTINGS_FILE", Path(path)).splitlines(), 1):
        text = line.strip()
        if not text or text[0] in "#;":
            continue
        name, equals, value = text.removeprefix("export ").partition("=")
        name, value = name.strip(), value.strip()
        if not equals or not name:
            raise ValueError(f"SETTINGS_FILE {path}, line {number}: give NAME=value")
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        given[name] = value
    return given


def plain_text(name: str, environ: Mapping[str, str]) -> str:
    """Return the text of a variable, "" when it is not set."""
    return environ.get(name, "").strip()


def secret_text(name: str, environ: Mapping[str, str]) -> str:
    """Return the text of NAME, of the file that NAME_FILE names, or of the systemd credential."""
    text = plain_text(name, environ)
    path = plain_text(f"{name}_FILE", environ)
    if text and path:
        raise ValueError(f"{name} and {name}_FILE are both set: keep one of them")
    if text:
        return text
    if path:
        return _file_text(f"{name}_FILE", Path(path))
    if folder := plain_text("CREDENTIALS_DIRECTORY", environ):
        # The last is how systemd names the files of a folder that is loaded as "tradecore".
        for known in (name, name.lower(), f"tradecore_{name.lower()}"):
            credential = Path(folder, known)
            try:
                there = credential.exists()
            except OSError as error:
                what = f"the credential of {name} is in {folder}, which cannot be read"
                raise ValueError(f"{what}: {error.strerror}; try it with sudo") from None
            if there:
                return _file_text(f"the credential of {name}", credential)
    return ""


def _file_text(what: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_MAX_BYTES + 1)
        text = data.decode().strip()
    except OSError as error:
        raise ValueError(f"{what} is {path}, which cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{what} is {path}, which is not UTF-8 text") from None
    if not text or len(data) > _FILE_MAX_BYTES:
        raise ValueError(f"{what} is {path}, which is {'too long' if text else 'empty'}")
    return text
