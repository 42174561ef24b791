"""A model's address is read strictly: nothing in it can become an option, leave a folder or mean two things."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from polyhead.errors import SourceError
from polyhead.sources import HubModel, LocalModel, PackageModel, parse_reference


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("a/b.gguf", LocalModel("a/b.gguf")),
        ("~/x", LocalModel("~/x")),
        ("./hf://x", LocalModel("./hf://x")),
        ("hf://org/repo/file.gguf", HubModel("org/repo", None, "file.gguf", None)),
        ("hf://org/repo/sub/dir/f-Q4.GGUF", HubModel("org/repo", None, "sub/dir/f-Q4.GGUF", None)),
        ("hf://org/r-1.0@main/f.gguf", HubModel("org/r-1.0", "main", "f.gguf", None)),
        ("hf://org/repo:q4_k_m", HubModel("org/repo", None, None, "q4_k_m")),
        ("hf://org/repo@v1:UD-Q4_K_XL", HubModel("org/repo", "v1", None, "UD-Q4_K_XL")),
        ("pypi://my.pkg==1!2.0rc1+cu/pkg/m.gguf", PackageModel("my.pkg", "1!2.0rc1+cu", "pkg/m.gguf")),
    ],
)
def test_the_forms_of_an_address(text: str, means: object) -> None:
    assert parse_reference(text) == means


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "1 to 4096 printable"),
        ("a\nb", "1 to 4096 printable"),
        ("x" * 5000, "1 to 4096 printable"),
        ("http://host/m.gguf", "knows no http://"),
        ("file:///m.gguf", "knows no file://"),
        ("hf://repo/m.gguf", "expected hf://org/repo/file.gguf"),
        ("hf://org/repo", "expected hf://org/repo/file.gguf"),
        ("hf://org/repo@/m.gguf", "expected hf://org/repo/file.gguf"),
        ("hf://org/repo:", "expected hf://org/repo/file.gguf"),
        ("hf://-org/repo/m.gguf", "expected hf://org/repo/file.gguf"),
        ("hf://org/repo/m.bin", "does not name a .gguf file"),
        ("hf://org/repo/../m.gguf", "not a plain path"),
        ("pypi://pkg/m.gguf", "no version; write pypi://pkg==VERSION/m.gguf"),
        ("pypi://pkg>=1/m.gguf", "expected pypi://"),
        ("pypi://pkg==*/m.gguf", "expected pypi://"),
        ("pypi://pkg[all]==1/m.gguf", "expected pypi://"),
        ("pypi://--index-url=x==1/m.gguf", "expected pypi://"),
        ("pypi://pkg==1;x/m.gguf", "expected pypi://"),
        ("pypi://pkg==1/", "expected pypi://"),
        ("pypi://pkg==1//etc/m.gguf", "not a plain path"),
        ("pypi://pkg==1/a/../../m.gguf", "not a plain path"),
        ("pypi://pkg==1/a\\..\\m.gguf", "not a plain path"),
        ("pypi://pkg==1/m.txt", "does not name a .gguf file"),
    ],
)
def test_what_is_no_address_is_refused(text: str, says: str) -> None:
    with pytest.raises(SourceError, match=re.escape(says)):
        parse_reference(text)


@given(st.sampled_from(["hf://", "pypi://"]), st.text("abc-._/@:=\\ ~", max_size=30))
def test_no_address_has_a_part_that_is_an_option_or_leaves_its_folder(scheme: str, rest: str) -> None:
    try:
        found = parse_reference(f"{scheme}{rest}.gguf")
    except SourceError:
        return
    assert not isinstance(found, LocalModel)
    names = [found.repo, found.file] if isinstance(found, HubModel) else [found.package, found.version, found.member]
    for part in (part for name in names if name for part in name.split("/")):
        assert part not in ("", ".", "..")
        assert not part.startswith("-")
