"""What the build adds: README as the first page, the settings from the code, files that pages link to."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from imu_ray import JobConfig
from imu_ray.config import settings_table

ROOT = Path(__file__).parents[1]
LINK = r"(?<=\]\()"
# A link or image whose target lies outside docs/, as it reads there.
OUTSIDE = re.compile(LINK + r"\.\./([^)#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the README as the first page, and each file of the repository that a page links to."""
    readme = re.sub(LINK + r"(?!https?:|#|docs/)", "../", (ROOT / "README.md").read_text())
    index = re.sub(LINK + "docs/", "", readme)
    files.append(File.generated(config, "index.md", content=index))
    texts = [index, *(page.read_text() for page in (ROOT / "docs").glob("*.md"))]
    for path in sorted({path for text in texts for path in OUTSIDE.findall(text)}):
        files.append(File.generated(config, f"repository/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put the settings in their place, and point links out of docs/ at the copies, and those of the copies back."""
    if page.file.src_uri.startswith("repository/"):
        return re.sub(LINK + "docs/", "../" * page.file.src_uri.count("/"), markdown)
    if "<!-- settings -->" in markdown:
        markdown = markdown.replace("<!-- settings -->", _settings())
    return OUTSIDE.sub(r"repository/\1", markdown)


def _settings() -> str:
    """A table for each group of settings."""
    header, rule, *rows = settings_table(JobConfig).splitlines()
    groups: dict[str, list[str]] = {}
    for row in rows:
        section, dot, _ = row.removeprefix("| `").partition("`")[0].partition(".")
        groups.setdefault(section if dot else "A run", [header, rule]).append(row)
    return "\n\n".join(f"## {section}\n\n" + "\n".join(table) for section, table in groups.items())
