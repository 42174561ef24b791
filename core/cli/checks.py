"""The doctor's checks, one function each. None raises: what cannot be found out becomes a line that says so."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from ..errors import DeviceError, SourceError

State = Literal["ok", "warn", "missing", "broken"]

# What each extra that this version makes use of is for, in the words of someone who has never heard of it.
EXTRAS = {
    "cu13": "running on NVIDIA GPUs with a driver for CUDA 13",
    "cu12": "running on NVIDIA GPUs with an older driver, for CUDA 12",
    "hub": "fetching models from the Hugging Face hub (hf://…)",
    "structured": "outputs in a form that is asked for: JSON schema, regular expression, choice, grammar",
    "testing": "checking a plugin of your own (polyhead.testing)",
    "docs": "pictures of polyhead bench throughput (--plot)",
}
_MOST_FILES = 100_000


@dataclass(frozen=True, slots=True)
class Check:
    """One line: its state, what was looked at, what was found, and what to do where something can be done."""

    state: State
    name: str
    detail: str
    help: str = ""


def all_checks() -> Iterator[Check]:
    """Every check, in the order of a reader's interest."""
    checks: tuple[Callable[[], Iterator[Check]], ...] = (
        check_python,
        check_packages,
        check_machine,
        check_numpy,
        check_gpu,
        check_device,
        check_compiler,
        check_extras,
        check_cache,
        check_plugins,
    )
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            yield Check("warn", check.__name__.removeprefix("check_"), f"could not be checked: {error}")


def check_python() -> Iterator[Check]:
    from .. import __version__

    yield Check("ok", "polyhead", f"{__version__} in {os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}")
    version = f"{platform.python_implementation()} {platform.python_version()}, {platform.platform()}"
    yield Check("ok", "Python", f"{version}, {sys.executable}")


def check_packages() -> Iterator[Check]:
    """What polyhead cannot do without."""
    needed = [name for name, extra in requirements() if extra is None]
    found = {name: _version(name) for name in needed}
    absent = [name for name, version in found.items() if version is None]
    if absent:
        yield Check(
            "broken", "packages", f"{', '.join(absent)} not installed", "pip install --force-reinstall polyhead"
        )
    elif not needed:
        yield Check("warn", "packages", "polyhead is not installed as a package, so its needs are not known")
    else:
        yield Check("ok", "packages", ", ".join(f"{name} {version}" for name, version in found.items()))


def check_machine() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("ok", "CPU", f"{cores} of {os.cpu_count()} cores may be used, {platform.machine()}")
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * page / 1e9
        free = os.sysconf("SC_AVPHYS_PAGES") * page / 1e9
    except (ValueError, OSError, AttributeError):
        yield Check("warn", "memory", "this system does not say how much there is")
    else:
        yield Check("ok", "memory", f"{total:.1f} GB, {free:.1f} GB unused")


def check_numpy() -> Iterator[Check]:
    try:
        import numpy as np
    except Exception as error:
        yield Check("broken", "NumPy", f"cannot be imported: {error}", "pip install --force-reinstall numpy")
        return
    try:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        detail = f"BLAS {blas.get('name')} {blas.get('version')}"
    except (KeyError, TypeError):
        detail = "its BLAS is not known"
    yield Check("ok", "NumPy", f"{np.__version__}, {detail}")


def check_gpu() -> Iterator[Check]:
    """The driver, asked directly: its library is there wherever a GPU can be used."""
    from ..runtime.cuda.probe import MINIMUM_CC, probe

    found = probe()
    if found.driver is None:
        yield Check(
            "missing", "NVIDIA driver", "not found (no libcuda); models run on the CPU",
            "on a machine with an NVIDIA GPU, install its driver",
        )  # fmt: skip
        return
    if found.problem:
        yield Check(
            "warn", "NVIDIA driver", f"{found.problem}; models run on the CPU",
            "see whether nvidia-smi works; in a container, start it with access to the GPU",
        )  # fmt: skip
        return
    smi = _smi()
    yield Check("ok", "NVIDIA driver", f"{f'{smi}, ' if smi else ''}for CUDA up to {found.driver[0]}.{found.driver[1]}")
    for info in found.devices:
        known = f"{info.name}, compute capability {info.cc[0]}.{info.cc[1]}, {info.total / 1e9:.1f} GB"
        old = info.cc < MINIMUM_CC
        remark = f", too old: {MINIMUM_CC[0]}.{MINIMUM_CC[1]} is needed" if old else ""
        yield Check("warn" if old else "ok", f"cuda:{info.index}", known + remark)


def check_device() -> Iterator[Check]:
    from ..devices import resolve_device

    yield Check("ok", "device", f"'auto' means {resolve_device('auto')[1]}")


def check_compiler() -> Iterator[Check]:
    """NVRTC and CUDA's headers, found by compiling a kernel with them."""
    from ..runtime.cuda.compile_all import ARCHITECTURES, compile_small, find_toolkit

    name = "CUDA compiler"
    try:
        toolkit = find_toolkit()
    except DeviceError as error:
        detail, _, fix = str(error).partition(". Run: ")
        yield Check("missing", name, f"{detail}; models run on the CPU", fix)
        return
    sm = next(iter(gpu_architectures()), ARCHITECTURES[0])
    found = "NVRTC {}.{}".format(*toolkit.version) + f", headers in {toolkit.headers}"
    try:
        seconds = compile_small(sm)
    except DeviceError as error:
        reason = " ".join(str(error).split())
        yield Check("warn", name, f"{found}; a small kernel fails: {reason}", "install one version of CUDA's packages")
        return
    yield Check("ok", name, f"{found}; a small kernel for {sm} took {seconds:.2f} s")


def check_extras() -> Iterator[Check]:
    """Optional parts: which are complete, and the command that completes the others."""
    parts: dict[str, list[str]] = {extra: [] for extra in EXTRAS}
    for name, extra in requirements():
        if extra in parts:
            parts[extra].append(name)
    for extra, names in parts.items():
        found = {name: _version(name) for name in names}
        absent = [name for name, version in found.items() if version is None]
        there = ", ".join(f"{name} {version}" for name, version in found.items() if version is not None)
        if not names:
            continue
        if not absent:
            yield Check("ok", f"extra {extra}", there)
        else:
            detail = f"for {EXTRAS[extra]}; not installed: {', '.join(absent)}"
            yield Check("missing", f"extra {extra}", detail, f"pip install 'polyhead[{extra}]'")


def check_cache() -> Iterator[Check]:
    from ..sources import cache_folder

    help_ = "set POLYHEAD_CACHE to a folder that you may write to"
    try:
        folder = cache_folder()
    except SourceError as error:
        yield Check("warn", "model cache", str(error), help_)
        return
    if not folder.exists():
        parent = next(parent for parent in folder.parents if parent.exists())
        if os.access(parent, os.W_OK):
            yield Check("ok", "model cache", f"{folder}, made when the first model is fetched")
        else:
            yield Check("warn", "model cache", f"{folder} cannot be made: {parent} is not writable", help_)
        return
    files = size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # Gone since it was listed.
                continue
            files += 1
        if files > _MOST_FILES:
            break
    more = "over " if files > _MOST_FILES else ""
    free = shutil.disk_usage(folder).free / 1e9
    detail = f"{folder}, {more}{size / 1e6:,.1f} MB in {files} files, {free:.1f} GB free on its disk"
    writable = os.access(folder, os.W_OK)
    yield (
        Check("ok", "model cache", detail) if writable else Check("warn", "model cache", f"{detail}; read-only", help_)
    )


def check_plugins() -> Iterator[Check]:
    """Built-in plugins must work; one of a stranger that does not is only a warning."""
    from ..plugins import discover

    plugins = discover(warn=False).plugins
    if not any(plugin.distribution == "polyhead" for plugin in plugins):
        yield Check(
            "broken", "plugins", "the built-in ones are not registered", "pip install --force-reinstall polyhead"
        )
    for plugin in plugins:
        if plugin.state == "FAILED":
            own = plugin.distribution == "polyhead"
            fix = "pip install --force-reinstall polyhead" if own else f"pip install --upgrade {plugin.distribution}"
            reason = " ".join(plugin.reason.split())
            yield Check("broken" if own else "warn", f"plugin {plugin.name}", f"{plugin.distribution}: {reason}", fix)
        else:
            names = ", ".join(name for item in plugin.architectures for name in item.gguf_names)
            detail = f"{plugin.distribution} {plugin.version}{f', for {names}' if names else ''}"
            yield Check("ok", f"plugin {plugin.name}", detail)


def gpu_architectures() -> list[str]:
    """What kernels are compiled for on this machine's GPUs, each once; empty without one that can be used."""
    from ..runtime.cuda.device import sm_name
    from ..runtime.cuda.probe import MINIMUM_CC, probe

    return list(dict.fromkeys(sm_name(info.cc) for info in probe().devices if info.cc >= MINIMUM_CC))


def requirements(distribution: str = "polyhead") -> list[tuple[str, str | None]]:
    """(package, extra that needs it or None) as the installed distribution says; empty where it is not installed."""
    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        name = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", line)
        if name:
            found.append((name[0], extra[1] if extra else None))
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _smi() -> str | None:
    """The driver's own version, which only its tool tells."""
    path = shutil.which("nvidia-smi")
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None
