"""The floors of ARCHITECTURE.md: a file imports only what stands before it in the list there."""

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tradecore"

_CIMPORT = re.compile(
    r"""^[ \t]* (?:
        from [ \t]+ ([\w.]+) [ \t]+ c?import [ \t]+ (\([^)]*\) | [^\n\#]+)
        | c?import [ \t]+ ([\w., \t]+)
    )""",
    re.MULTILINE | re.VERBOSE,
)


def modules() -> dict[str, list[Path]]:
    """All modules as "ring" or "feed/endpoint", each with its files (.py, .pyx, .pxd, .pyi)."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.p*")):
        if path.suffix in (".py", ".pyx", ".pxd", ".pyi") and path.name != "__init__.py":
            name = path.relative_to(PACKAGE).with_suffix("").as_posix()
            found.setdefault(name, []).append(path)
    return found


MODULES = modules()


def floors(text: str) -> dict[str, tuple[int, int]]:
    """Read the block: "2 ring conflator" = floor 2; "simulate/*" = a package without order."""
    block = re.search(r"^```floors\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert block, "ARCHITECTURE.md has no ```floors block"
    places: dict[str, tuple[int, int]] = {}
    for place, (floor, entry) in enumerate(
        (int(line.split()[0]), entry)
        for line in block[1].splitlines()
        for entry in line.split()[1:]
    ):
        for name in MODULES if entry.endswith("/*") else [entry]:
            if name == entry or name.startswith(entry.removesuffix("*")):
                assert name in MODULES, f"{name} is in the list and not in the package"
                assert name not in places, f"{name} is in the list twice"
                places[name] = floor, place
    return places


PLACES = floors((ROOT / "ARCHITECTURE.md").read_text())


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of ours that a file imports, wherever in the file it does."""
    text = path.read_text()
    if path.suffix in (".py", ".pyi"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield from ours(alias.name, ())
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name} has a relative import"
                yield from ours(node.module or "", [alias.name for alias in node.names])
    else:
        for source, names, plain in _CIMPORT.findall(text):
            if plain:
                for name in plain.split(","):
                    yield from ours(name.split()[0], ())
            else:
                assert not source.startswith("."), f"{path.name} has a relative import"
                parts = (part.split() for part in names.strip("() \n").split(","))
                yield from ours(source, [part[0] for part in parts if part])


def ours(source: str, names: Sequence[str]) -> Iterator[str]:
    top, *rest = source.split(".")
    if top != "tradecore":
        return
    if (name := "/".join(rest)) in MODULES:
        yield name
    for inner in names:
        if (name := "/".join([*rest, inner])) in MODULES:
            yield name


EDGES = sorted(
    {(name, used) for name, paths in MODULES.items() for path in paths for used in imports(path)}
    - {(name, name) for name in MODULES}
)


def package(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def test_every_module_has_its_place() -> None:
    assert MODULES.keys() - PLACES.keys() == set(), "add them to the list in ARCHITECTURE.md"


def test_no_upward_import() -> None:
    upward = [
        f"{name} (floor {PLACES[name][0]}) imports {used} (floor {PLACES[used][0]})"
        for name, used in EDGES
        if {name, used} <= PLACES.keys() and PLACES[used] > PLACES[name]
    ]
    assert upward == []


def test_feed_and_store_meet_only_below() -> None:
    meeting = [edge for edge in EDGES if {package(edge[0]), package(edge[1])} == {"feed", "store"}]
    assert meeting == []


def test_the_simulated_exchange_shares_nothing_with_the_daemon() -> None:
    allowed = {"errors", "clock", "log", "settings", "values"}
    used = {used for name, used in EDGES if package(name) == "simulate"}
    assert {name for name in used if package(name) != "simulate"} <= allowed


def test_the_walk_sees_imports_of_all_kinds() -> None:
    """Guards the other tests: an empty graph would pass them all."""
    assert ("_fastparse", "_rows") in EDGES, "a cimport"
    assert ("cli", "supervisor") in EDGES, "an import inside a function"
    assert ("cli", "log") in EDGES, "from tradecore import log"
    assert ("commands", "store/verify") in EDGES, "an import for annotations"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from tradecore._rows cimport trade_row_t", ["_rows"]),
        ("from tradecore cimport (\n    _rows,\n    clock,\n)", ["_rows", "clock"]),
        ("    cimport tradecore._rows as r, libc.stdint", ["_rows"]),
        ("from libc.stdint cimport int64_t", []),
    ],
)
def test_cimports(tmp_path: Path, source: str, names: list[str]) -> None:
    path = tmp_path / "x.pyx"
    path.write_text(f"import cython\n{source}\n")
    assert list(imports(path)) == names
