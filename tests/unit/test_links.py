"""Links and pictures in the documentation lead somewhere: files exist, and so do headings. Nothing is fetched."""

from __future__ import annotations

import pathlib
import re
import urllib.parse
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "docker", "examples", "sglang_lsa", "tests")
PAGES = sorted([ROOT / "README.md", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
LINK = re.compile(r"\]\(([^()\s]+(?:\([^()\s]*\)[^()\s]*)*)(?:\s+\"[^\"]*\")?\)")
"""The end of ``[text](target "title")`` or of a picture; a target may have parentheses in it."""


def prose(text: str) -> str:
    """A page without its code, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S))


def anchors(text: str) -> set[str]:
    """What headings can be linked by, as GitHub makes it of them, and ids of HTML elements."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # a link counts by its text
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    repeated = {f"{slug}-{n}" for slug, times in found.items() for n in range(1, times + 1)}
    return {*found, *repeated, *re.findall(r"<\w+[^>]*\b(?:id|name)=\"([^\"]+)\"", text)}


def problems(page: pathlib.Path, text: str) -> Iterator[str]:
    """What is wrong with the links of a page."""
    body = prose(text)
    for target in [*LINK.findall(body), *re.findall(r"<(?:img|a)\b[^>]*\b(?:src|href)=\"([^\"]+)\"", body)]:
        url = urllib.parse.urlsplit(target)
        if url.scheme:
            host = url.hostname or ""
            if url.scheme not in ("http", "https") or not re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", host):
                yield f"{target} is no address"
            continue
        path = (page.parent / urllib.parse.unquote(url.path)).resolve() if url.path else page
        if not path.exists():
            yield f"{target} does not exist"
        elif not path.is_relative_to(ROOT) and ROOT in page.parents:
            yield f"{target} is outside of the repository"
        elif url.fragment and path.suffix == ".md":
            linked = text if path == page else path.read_text()
            if url.fragment not in anchors(linked):
                yield f"{target}: no heading is linked by #{url.fragment}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    assert not list(problems(page, page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_brackets_belong_to_links(page: pathlib.Path) -> None:
    """A link that the pattern above would not see is not left unchecked."""
    body = prose(page.read_text())
    assert body.count("](") == len(LINK.findall(body))


PAGE = """# One `two` (three)
## [Linked](a.md) heading
## Twice
## Twice
<a id="here"></a>
```
# no heading [no](missing.md)
```
"""


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("[a](a.md)", None),
        ("![picture](a.md)", None),
        ("[a](missing.md)", "missing.md does not exist"),
        ("![a](missing.png)", "missing.png does not exist"),
        ("`[a](missing.md)`", None),
        ("[![a](missing.png)](a.md)", "missing.png does not exist"),
        ("[a](#one-two-three)", None),
        ("[a](#linked-heading)", None),
        ("[a](#twice-1)", None),
        ("[a](#twice-2)", "#twice-2: no heading is linked by #twice-2"),
        ("[a](#no-heading-no)", "#no-heading-no: no heading is linked by #no-heading-no"),
        ("[a](#here)", None),
        ("[a](a.md#first)", None),
        ("[a](a.md#second)", "a.md#second: no heading is linked by #second"),
        ("[a](https://example.org/x_(y)?z#w)", None),
        ("[a](https:/example.org)", "https:/example.org is no address"),
        ("[a](http://)", "http:// is no address"),
        ('<img src="missing.png">', "missing.png does not exist"),
    ],
)
def test_what_is_found(tmp_path: pathlib.Path, link: str, problem: str | None) -> None:
    (tmp_path / "a.md").write_text("# First\n")
    page = tmp_path / "page.md"
    text = f"{PAGE}\n{link}\n"
    page.write_text(text)
    assert list(problems(page, text)) == ([problem] if problem else [])
