"""`make install`: what it puts where, what it leaves alone, and when it refuses."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tradecore import __version__

ROOT = Path(__file__).parents[1]
SYSTEM_PYTHON = "/usr/bin/python3"
LIMIT_S = 300


def install(
    root: Path, *words: str, python: str = "", wheel: str | Path = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", ROOT / "deploy" / "systemd" / "install.sh", *words],
        env={**os.environ, "DESTDIR": str(root), "PYTHON": python, "WHEEL": str(wheel)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_what_an_operator_has_edited_stays(tmp_path: Path) -> None:
    etc, units = tmp_path / "etc/tradecore", tmp_path / "etc/systemd/system"
    done = install(tmp_path, "units")
    assert done.returncode == 0, done.stderr
    assert "systemctl enable --now tradecore" in done.stderr
    secret = etc / "credentials/database_url"
    assert (mode(secret), mode(secret.parent), mode(etc / "tradecore.conf")) == (
        0o600,
        0o700,
        0o644,
    )
    edited = {
        secret: "postgresql://me:mine@db/t",
        etc / "tradecore.conf": "SUPPORTED_SYMBOLS=BTCUSDT\n",
        etc / "a.conf": "HTTP_PORT=3001\n",
        units / "tradecore.service.d" / "override.conf": "[Service]\nCPUAffinity=3\n",
    }
    for path, text in edited.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    secret.chmod(0o600)
    (units / "tradecore.service").write_text("# of the release before\n")
    assert install(tmp_path, "units").returncode == 0
    assert {path: path.read_text() for path in edited} == edited
    assert mode(secret) == 0o600
    for name in ("tradecore.service", "tradecore@.service"):
        assert (units / name).read_text() == (ROOT / "deploy/systemd" / name).read_text()


def test_the_command_takes_the_settings_of_the_service_and_of_its_instances(tmp_path: Path) -> None:
    assert install(tmp_path, "units").returncode == 0
    etc, command = tmp_path / "etc/tradecore", tmp_path / "usr/local/bin/tradecore"
    assert mode(command) == 0o755
    (etc / "tradecore.conf").write_text("RETENTION=3 years\nHTTP_PORT=3000\n")
    (etc / "a.conf").write_text("HTTP_PORT=3001")
    # What stands for the program prints what it would read.
    show = "import os, sys; from tradecore.settings import load; s = load(os.environ);"
    show += "print(s.data_dir, s.http_port, s.retention_s, s.database_url.reveal(), sys.argv[1:])"
    text = command.read_text().replace("/etc/tradecore", str(etc))
    text = text.replace(
        "/opt/tradecore/bin/python -P -m tradecore", f"{sys.executable} -c '{show}'"
    )
    command.write_text(text)

    def run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environ}
        return subprocess.run([command, *words], env=environ, capture_output=True, text=True)

    dsn = (etc / "credentials/database_url").read_text().strip()
    rest = f"{3 * 365 * 86400} {dsn} ['import', 'a b.zip']\n"
    assert run("import", "a b.zip").stdout == f"/var/lib/tradecore 3000 {rest}"
    assert run("import", "a b.zip", INSTANCE="a").stdout == f"/var/lib/tradecore-a 3001 {rest}"
    assert run("import", "a b.zip", DATA_DIR="/srv/x").stdout == f"/srv/x 3000 {rest}"
    refused = run("run", INSTANCE="a")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "systemctl start tradecore@a" in refused.stderr


def test_the_example_has_only_settings_that_exist(tmp_path: Path) -> None:
    from tradecore.settings import load

    text = (ROOT / "deploy/systemd/tradecore.conf").read_text()
    example = tmp_path / "tradecore.conf"
    lines = [line.removeprefix("#") for line in text.splitlines()]
    example.write_text("\n".join(line for line in lines if line.partition("=")[0].isupper()))
    settings = load({"SETTINGS_FILE": str(example)})
    assert settings.shards == 16
    assert settings.http_port == 3000


def test_a_python_that_the_service_could_not_run_is_refused(tmp_path: Path) -> None:
    done = install(tmp_path, python="/nowhere/python3")
    assert done.returncode == 1
    assert "is not Python 3.11 or newer" in done.stderr
    assert not (tmp_path / "opt").exists()


def test_a_python_in_a_home_folder_is_refused(tmp_path: Path) -> None:
    if not os.path.realpath(sys.base_prefix).startswith(("/root/", "/home/")):
        pytest.skip("our Python is in no home folder")
    done = install(tmp_path, python=sys.executable)
    assert done.returncode == 1
    assert "lies in a home folder" in done.stderr


def pack_wheel(folder: Path) -> Path:
    """Pack the tree, as it is compiled for our Python, into a wheel."""
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    wheel = folder / f"tradecore-{__version__}-{tag}-{tag}-{platform}.whl"
    left_out = (".pyx", ".pxd", ".c", ".pyc")
    info = f"tradecore-{__version__}.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        for top, name in ((ROOT / "tradecore", "tradecore"), (ROOT / "sql", "tradecore/sql")):
            for path in top.rglob("*"):
                if path.is_file() and path.suffix not in left_out:
                    file.write(path, f"{name}/{path.relative_to(top)}")
        metadata = f"Metadata-Version: 2.1\nName: tradecore\nVersion: {__version__}\n"
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}-{tag}-{platform}\n")
        file.writestr(f"{info}/entry_points.txt", "[console_scripts]\ntradecore=tradecore.cli:main")
        file.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.mark.timeout(LIMIT_S + 60)
def test_the_program_with_its_packages_below_another_root(tmp_path: Path) -> None:
    about = f"import ensurepip, sys; print(sys.version_info[:2] == {sys.version_info[:2]})"
    try:
        said = subprocess.run([SYSTEM_PYTHON, "-c", about], capture_output=True, text=True).stdout
    except OSError:
        said = ""
    if said.strip() != "True":
        pytest.skip(f"{SYSTEM_PYTHON} is not our version, or has no venv")
    root = tmp_path / "root"
    home = root / "opt/tradecore"
    home.mkdir(parents=True)
    (home / "of-the-release-before").touch()
    done = install(root, wheel=pack_wheel(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in home.parent.iterdir()] == ["tradecore"]
    assert not (home / "of-the-release-before").exists()
    for file in (*(home / "bin").iterdir(), home / "pyvenv.cfg"):
        assert file.is_symlink() or str(root) not in file.read_text(), file
    assert "putting it and its packages into" in done.stderr, "it takes a while"
    assert (home / "bin/tradecore").read_text().startswith("#!/opt/tradecore/bin/python\n")
    (compiled,) = home.glob("lib/python3.*/site-packages/tradecore/__pycache__/supervisor.*.pyc")
    assert b"/opt/tradecore/lib/python3." in compiled.read_bytes()
    # A settings error comes only after all of the daemon was imported by this Python.
    ran = subprocess.run(
        [home / "bin/python", "-I", "-m", "tradecore", "check"],
        env={"HTTP_PORT": "x"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert ran.returncode == 2
    assert "HTTP_PORT" in ran.stdout + ran.stderr
