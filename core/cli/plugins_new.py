"""A new plugin package: its names, made from one, and its files, from the templates in scaffold/.

Knows nothing of what is installed, nor of what the files say.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

from ..errors import ConfigError

_NAME = re.compile(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*")
_LONGEST = 60
_FILES = {
    "pyproject.toml.tmpl": "pyproject.toml",
    "README.md.tmpl": "README.md",
    "plugin.py.tmpl": "$module.py",
    "test.py.tmpl": "tests/test_$name.py",
}


@dataclass(frozen=True, slots=True)
class Names:
    """What a package of one architecture is called, made from the architecture's name in model files."""

    gguf_name: str

    @classmethod
    def of(cls, text: str) -> Names:
        """From ``new-arch`` or ``polyhead-new-arch``. Raises ConfigError for what cannot be a package's name."""
        name = text.removeprefix("polyhead-").removeprefix("polyhead_")
        if not _NAME.fullmatch(name) or len(name) > _LONGEST:
            raise ConfigError(
                f"{text[:80]!r} cannot name a plugin: take what general.architecture says in the model files, at most "
                f"{_LONGEST} small letters, digits, and single '-', '_' or '.' between them, beginning with a letter"
            )
        return cls(name)

    @property
    def name(self) -> str:
        """Of the entry point and the architecture; an identifier but for keywords."""
        return re.sub(r"[-.]", "_", self.gguf_name)

    @property
    def distribution(self) -> str:
        return "polyhead-" + re.sub(r"[_.]", "-", self.gguf_name)

    @property
    def module(self) -> str:
        return f"polyhead_{self.name}"

    @property
    def camel(self) -> str:
        return "".join(part.capitalize() for part in self.name.split("_"))

    def fill(self, template: str) -> str:
        """The template with every name in its place."""
        return Template(template).substitute(
            gguf_name=self.gguf_name,
            name=self.name,
            distribution=self.distribution,
            module=self.module,
            camel=self.camel,
            class_name=f"{self.camel}Model",  # never a keyword, nor a name of polyhead.arch
        )


def write(names: Names, directory: Path) -> Path:
    """Writes the package into a new folder below ``directory`` and returns it: all of its files or none.

    Raises ConfigError where the folder exists already or cannot be made.
    """
    folder = directory / names.distribution
    templates = resources.files(__package__) / "scaffold"
    try:
        if folder.exists() or folder.is_symlink():
            raise ConfigError(f"{folder} exists already; remove it, or choose another place with --directory")
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".polyhead-") as work:
            made = Path(work) / "package"
            for template, name in _FILES.items():
                path = made / names.fill(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(names.fill((templates / template).read_text(encoding="utf-8")), encoding="utf-8")
            made.rename(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder
