"""`make docs`: writes docs/configuration.md from the schema and checks every relative link of the Markdown files."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from penstock.config.reference import reference

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(text))
    return {heading.replace(" ", "-") for heading in plain}


def broken_links(page: Path) -> list[str]:
    """Relative links of one page that lead nowhere."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in LINK.finditer(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        link = match.group(1) or match.group(2)
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if not target.exists():
            found.append(f"{page.relative_to(ROOT)}: {link} does not exist")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8")):
            found.append(f"{page.relative_to(ROOT)}: {link} has no such heading")
    return found


def main() -> int:
    page = ROOT / "docs" / "configuration.md"
    page.write_text(reference(), encoding="utf-8")
    pages = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    broken = [line for each in pages for line in broken_links(each)]
    print("\n".join(broken) if broken else f"{len(pages)} pages, every link leads somewhere; {page.name} is written")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
