"""Hooks of mkdocs.yml: pages that are made of the code and of files outside docs/.

index.md is README.md, changelog.md is CHANGELOG.md, reference/python.md has the public names of
bertdist, and reference/NAME.md every flag of the command NAME, from the dataclasses that its parser
is made of. Links to files that are no page (the
examples, tests) become their path in the repository.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bertdist
from bertdist.cli import COMMANDS
from bertdist.core.flags import Flag, flags_of

ROOT = Path(__file__).resolve().parent.parent
DECISIONS = ROOT / "docs" / "decisions"
FROM_ROOT = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}  # page -> file
_NOT_FLAGS = "This page is made of the code; `bertdist {name} --help all` prints the same."


def on_config(config: Any) -> Any:
    """The pages of a folder, for the entries of the navigation that name one."""
    made = {
        "decisions/": [f"decisions/{path.name}" for path in sorted(DECISIONS.glob("*.md"))],
        "reference/": ["reference/python.md", *(f"reference/{name}.md" for name in COMMANDS)],
    }
    for entry in config.nav:
        for title, pages in entry.items():
            entry[title] = made.get(pages, pages) if isinstance(pages, str) else pages
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the made pages."""
    from mkdocs.structure.files import File

    for page, source in FROM_ROOT.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=relative_to_docs(text)))
    files.append(File.generated(config, "reference/python.md", content=python_page()))
    for name in COMMANDS:
        files.append(File.generated(config, f"reference/{name}.md", content=flag_page(name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files that are not on the site."""
    return without_other_links(markdown, Path(page.file.src_uri).parent)


def relative_to_docs(text: str) -> str:
    """Links of a file beside docs/, as a page in docs/ has them: those out of docs/ with `../`."""

    def moved(match: re.Match[str]) -> str:
        target = match[1]
        return f"]({target.removeprefix('docs/') if target.startswith('docs/') else f'../{target}'}"

    text = re.sub(r"\]\((?!\w+:|#|/)([^)\s]+)", moved, text)
    return re.sub(r'(src|srcset)="docs/', r'\1="', text)  # pictures


def without_other_links(markdown: str, folder: Path) -> str:
    """`[a loop](../examples/own_loop.py)` -> a loop (`examples/own_loop.py`), and pages of the
    repository that have another address here.

    folder: of the page, below docs/.
    """
    pages = {ROOT / source: page for page, source in FROM_ROOT.items()}

    def moved(match: re.Match[str]) -> str:
        path, _, anchor = match[2].partition("#")
        target = (ROOT / "docs" / folder / path).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return match[0]
        if target in pages:
            up = "../" * len(folder.parts)
            return f"[{match[1]}]({up}{pages[target]}{'#' * bool(anchor)}{anchor})"
        return f"{match[1]} (`{target.relative_to(ROOT)}`)"

    return re.sub(r"(?<!!)\[([^\]\n]*)\]\((?!\w+:|#)([^)\s]+)\)", moved, markdown)


def flag_page(name: str) -> str:
    """Every flag of a command, as a page."""
    command = COMMANDS[name]
    groups: dict[str, list[Flag]] = {}
    for section in command.sections:
        groups.setdefault(section._argument_group_name, []).extend(flags_of(section))
    lines = [f"# bertdist {name}", "", command.about, "", _NOT_FLAGS.format(name=name), ""]
    for group, flags in groups.items():
        lines += [f"## {group.capitalize()}", "", *_definitions(flags)]
    return "\n".join(lines)


def python_page() -> str:
    """The public names of bertdist, from their docstrings."""
    modules = {name: bertdist._MODULES.get(name, "bertdist") for name in bertdist.__all__}
    order = [name for name in bertdist._MODULES if name in modules]
    order += [name for name in modules if name not in order and not name.startswith("_")]
    lines = ["# Python", "", "All that `import bertdist` offers.", ""]
    for name in order:
        lines += [f"::: {modules[name]}.{name}", ""]
    return "\n".join(lines)


def _definitions(flags: Iterable[Flag]) -> Iterable[str]:
    for flag in flags:
        value = f" {flag.value}" if flag.value else ""
        yield f"### `--{flag.name}{value}` {{ #{flag.name} }}"
        yield ""
        facts = [f"One of: {', '.join(flag.choices)}."] if flag.choices else []
        if flag.default not in (None, "", False) and "Default:" not in flag.help:
            facts.append(f"Default: {flag.default}.")
        yield " ".join([_escaped(flag.help), *map(_escaped, facts)])
        yield ""


def _escaped(text: str) -> str:
    """Plain text as Markdown."""
    return re.sub(r"([*_<>\[\]`])", r"\\\1", text)
