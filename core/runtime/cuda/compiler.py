"""CUDA C++ to machine code: kernels/*.cu through NVRTC to a cubin for one architecture, kept on disk.

Knows nothing of launching. Needs no GPU until a kernel is loaded.

A source file may include headers of the same folder; they are pasted in, so that the text (with the options and NVRTC's
version) is the key of the cache, and a changed header never meets an old cubin. ``#line`` keeps errors honest.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ...errors import DeviceError, SourceError
from .driver import INSTALL, load, translated

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)".*$')
_ONCE = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+once[ \t]*$")
_NAME = re.compile(r"PH_[A-Z0-9_]+")
_VALUE = re.compile(r"[\w.+-]+")
_CACHE_LIMIT = 512 << 20
_CHECKSUM = 32

Defines = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Cubin:
    """Machine code of one file and set of macros. ``log`` is what NVRTC and ptxas said, empty where it was cached."""

    code: bytes
    log: str
    cached: bool


def define_macros(macros: Mapping[str, object]) -> Defines:
    """Macros as NVRTC takes them, sorted. True is 1; None and False leave a macro undefined, as ``#ifdef`` wants it.

    Raises DeviceError for a name without the prefix PH_ (others collide with NVIDIA's headers) or a strange value.
    """
    defines = []
    for name, value in sorted(macros.items()):
        if value is None or value is False:
            continue
        text = "1" if value is True else str(value)
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(text):
            raise DeviceError(f"-D{name}={text} is not a kernel's macro; names are PH_ and capitals, values one word")
        defines.append((name, text))
    return tuple(defines)


class Compiler:
    """Compiles for one architecture and holds what was loaded. Compiling is thread-safe, loading is not."""

    def __init__(self, sm: str, cache: Path | None = None, *, use_cache: bool = True) -> None:
        """``sm`` is such as sm_90a. ``cache`` is a folder for cubins, by default one in polyhead's cache folder."""
        self.sm = sm
        self.use_cache = use_cache
        self._folder = cache
        self._cache: Any = None
        self._headers: tuple[str, bytes] | None = None
        self._sources: dict[str, str] = {}
        self._texts: dict[str, str] = {}
        self._loaded: dict[tuple[str, Defines], Any] = {}

    def add_source(self, file: str, text: str) -> None:
        """Makes a plugin's source known under a name of its own; it may include prelude.cuh.

        Raises DeviceError where the name is taken by another text.
        """
        if self._sources.get(file, text) != text or _packaged(file) is not None:
            raise DeviceError(f"there is another kernel source called {file}; put the plugin's name in front")
        self._sources[file] = text

    def source(self, file: str) -> str:
        """The text of a source file with its own headers pasted in. Raises DeviceError where one is missing."""
        text = self._texts.get(file)
        if text is None:
            text = self._texts[file] = "".join(self._paste(file, set(), file))
        return text

    def compile(self, file: str, macros: Mapping[str, object], *, report: bool = False) -> Cubin:
        """The cubin of a file, from the disk if it is there. ``report`` compiles anyway, with ptxas's resource usage.

        Raises DeviceError with NVRTC's log where the source does not compile.
        """
        return self._compile(file, define_macros(macros), report=report)

    def compile_many(self, wanted: Iterable[tuple[str, Mapping[str, object]]], workers: int | None = None) -> int:
        """Compiles several (file, macros) side by side into the cache and returns how many were not there before.

        Without a cache folder they are kept in memory. NVRTC works outside Python's lock.
        """
        unique = {(file, define_macros(macros)): None for file, macros in wanted}
        todo = [key for key in unique if key not in self._loaded]
        if not todo:
            return 0
        self.start()
        with ThreadPoolExecutor(min(len(todo), workers or os.cpu_count() or 1)) as pool:
            cubins = list(pool.map(lambda key: self._compile(*key), todo))
        for (file, defines), cubin in zip(todo, cubins, strict=True):
            self._loaded[file, defines] = load("cuda.core").ObjectCode.from_cubin(cubin.code, name=file)
        return sum(not cubin.cached for cubin in cubins)

    def get(self, file: str, kernel: str, /, **macros: object) -> Any:
        """A kernel of ``kernels/<file>`` as cuda.core's Kernel, ready to launch on the current device.

        Raises DeviceError where it does not compile or load, or the file has no such kernel.
        """
        defines = define_macros(macros)
        code = self._loaded.get((file, defines))
        if code is None:
            code = self._load(file, defines)
        with translated(f"{self._title(file, defines)} has no kernel {kernel}"):
            return code.get_kernel(kernel)

    def close(self) -> None:
        """Forgets what was loaded; the driver unloads a module when its last kernel is gone."""
        self._loaded.clear()

    def _load(self, file: str, defines: Defines) -> Any:
        make = load("cuda.core").ObjectCode.from_cubin
        code = make(self._compile(file, defines).code, name=file)
        with translated(f"{self._title(file, defines)} cannot be loaded"):
            _ = code.handle
        self._loaded[file, defines] = code
        return code

    def _compile(self, file: str, defines: Defines, *, report: bool = False) -> Cubin:
        self.start()
        core = load("cuda.core")
        assert self._headers is not None
        folder, digest = self._headers
        text = self.source(file)
        doing = f"{self._title(file, defines)} does not compile for {self.sm}"
        log = StringIO()
        with translated(doing):
            options = core.ProgramOptions(
                name=file,
                arch=self.sm,
                std="c++17",
                include_path=folder,
                define_macro=list(defines) or None,
                ptxas_options=["-v"] if report else None,
            )
        key = None
        if self._cache is not None and not report:
            make_key = load("cuda.core.utils").make_program_cache_key
            key = make_key(code=text, code_type="c++", options=options, target_type="cubin", extra_digest=digest)
            if code := self._read(key):
                return Cubin(code, "", cached=True)
        try:
            program = core.Program(text, "c++", options)
            code = bytes(program.compile("cubin", logs=log).code)
        except Exception as error:
            text = str(error).replace("\0", "").strip()
            raise DeviceError(f"{doing}:\n{text}") from error
        if key is not None:
            self._write(key, code)
        return Cubin(code, log.getvalue().replace("\0", "").strip(), cached=False)

    def _read(self, key: bytes) -> bytes | None:
        try:
            held = self._cache.get(key)
        except OSError:
            return None
        # The driver takes a cubin without its length, so a damaged one could end the process: a checksum follows it.
        if not held or hashlib.sha256(held[:-_CHECKSUM]).digest() != held[-_CHECKSUM:]:
            return None
        return bytes(held[:-_CHECKSUM])

    def _write(self, key: bytes, code: bytes) -> None:
        try:
            self._cache[key] = code + hashlib.sha256(code).digest()
        except OSError:
            self._cache = None  # A full or read-only disk costs time at the next start, nothing else.

    def start(self) -> None:
        """Finds NVRTC, CUDA's headers and the cache; the first compilation does so otherwise. Raises DeviceError."""
        if self._headers is not None:
            return
        load("cuda.bindings.nvrtc")
        folder = find_headers()
        if self.use_cache and self._cache is None:
            from ...sources.cache import cache_folder

            try:
                path = self._folder if self._folder is not None else cache_folder() / "kernels"
                self._cache = load("cuda.core.utils").FileStreamProgramCache(path, max_size_bytes=_CACHE_LIMIT)
            except (OSError, SourceError):  # no folder to write to: kernels are compiled each time
                self._cache = None
        self._headers = (str(folder), _fingerprint(folder))

    def _paste(self, file: str, seen: set[str], wanted_by: str) -> Iterable[str]:
        seen.add(file)
        text = self._sources.get(file)
        if text is None:
            text = _packaged(file)
        if text is None:
            raise DeviceError(f"{wanted_by} wants the kernel source {file}, which does not exist")
        yield f'#line 1 "{file}"\n'
        for number, line in enumerate(text.splitlines(), 1):
            if _ONCE.match(line):
                yield "\n"
            elif not (match := _INCLUDE.match(line)):
                yield f"{line}\n"
            else:
                if match[1] not in seen:
                    yield from self._paste(match[1], seen, file)
                yield f'#line {number + 1} "{file}"\n'

    def _title(self, file: str, defines: Defines) -> str:
        return f"{file} ({' '.join(f'{name}={value}' for name, value in defines) or 'no macros'})"


def find_headers() -> Path:
    """The folder of CUDA's headers (cuda_fp16.h): of the wheels, a conda environment, $CUDA_PATH or the system.

    Raises DeviceError with the ``pip install`` line where there is none.
    """
    candidates: list[str | None] = []
    find = getattr(load("cuda.pathfinder"), "find_nvidia_header_directory", None)
    if find is not None:
        try:
            candidates.append(find("cudart"))
        except Exception:  # A version that does not know this library; the places below remain.
            candidates.append(None)
    roots = [os.environ.get(name) for name in ("CUDA_PATH", "CUDA_HOME")] + ["/usr/local/cuda"]
    candidates += [os.path.join(root, "include") for root in roots if root]
    for candidate in candidates:
        if candidate and (Path(candidate) / "cuda_fp16.h").is_file():
            return Path(candidate)
    raise DeviceError(f"CUDA's headers (cuda_fp16.h) are not installed. Run: {INSTALL}, or set CUDA_PATH")


def _fingerprint(folder: Path) -> bytes:
    """Changes when the toolkit's headers do: the names and sizes of all, and the version that cuda.h states."""
    state = hashlib.sha256()
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_file():
            state.update(f"{entry.name}:{entry.stat().st_size}\n".encode())
    version = folder / "cuda.h"
    if version.is_file():
        found = re.search(r"#define\s+CUDA_VERSION\s+(\d+)", version.read_text(errors="replace"))
        state.update(found[1].encode() if found else b"")
    return state.digest()


def _packaged(file: str) -> str | None:
    if "/" in file or "\\" in file or not file.endswith((".cu", ".cuh")):
        return None
    item = importlib.resources.files(__package__) / "kernels" / file
    return item.read_text(encoding="utf-8") if item.is_file() else None
