"""Writes what the documentation has from the code and from stored results; `--check` compares.

    python scripts/build_docs.py
    python scripts/build_docs.py --check

README.md and docs/*.md hold blocks between `<!-- generated: NAME -->` and `<!-- end -->`. NAME is
one of

- `hyperparameters`: a table of every key of `LocFTBFHyperParams`, from the dataclass, its
  docstring and the rules that its values must keep;
- `tree`: every Python file of the package, the benchmarks, the examples and the scripts, with the
  first line of its docstring;
- `usage`: the commands, as `locft --help` prints them;
- `results/NAME`: the table of `benchmarks/results/NAME.json`, with how it was measured.

A file of results holds one table:

    {"title": ..., "kind": "measured" or "planned", "how": the setting in sentences,
     "machine": optional, "commands": optional list, "recorded": {"date": ..., "commit": ...},
     "columns": [{"name": ..., "digits": optional}, ...], "rows": [[cell, ...], ...],
     "notes": optional list}

A cell is a number (shown with the column's `digits`), a pair [mean, standard deviation], a text, or
null where there is nothing. With `--check` nothing is written, and the exit status is 1 if a block
differs from what would be written.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Folders of the tree: the package with everything below it, the others with their own files.
TREE = ("locft_easyedit", "benchmarks", "examples", "scripts")

_BLOCK = re.compile(r"<!-- generated: (\S+) -->\n(.*?)<!-- end -->\n", re.DOTALL)
_FIELD = re.compile(r"^(\w+): (.*)$")
_REQUIRED_RESULT_KEYS = ("title", "kind", "how", "recorded", "columns", "rows")


class DocsError(ValueError):
    """A block or a file of results that cannot be turned into text."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the generated blocks, or with `--check` names the files whose blocks differ."""
    parser = argparse.ArgumentParser(description="Builds the generated parts of the documentation.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail on differences")
    options = parser.parse_args(arguments)
    differing = []
    for path in pages(ROOT):
        text = path.read_text(encoding="utf-8")
        built = built_page(text, ROOT)
        if built == text:
            continue
        differing.append(path.relative_to(ROOT).as_posix())
        if not options.check:
            path.write_text(built, encoding="utf-8")
    for name in differing:
        sys.stdout.write(f"{name}: {'differs; run `make docs`' if options.check else 'written'}\n")
    return int(options.check and bool(differing))


def pages(root: Path) -> list[Path]:
    """Returns the pages that may hold generated blocks."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def built_page(text: str, root: Path) -> str:
    """Returns a page with its blocks as they would be written now.

    Args:
        text: The page.
        root: The repository's folder.

    Raises:
        DocsError: A block has an unknown name, or its results cannot be shown.
    """
    opened = re.findall(r"<!-- generated: \S+ -->", text)
    if len(opened) != len(_BLOCK.findall(text)):
        raise DocsError("a generated block has no `<!-- end -->` on a line of its own. Add it.")

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- generated: {name} -->\n{generated(name, root)}<!-- end -->\n"

    return _BLOCK.sub(block, text)


def generated(name: str, root: Path) -> str:
    """Returns what belongs into the block of this name; it ends with a newline.

    Raises:
        DocsError: There is no such block.
    """
    if name.startswith("results/"):
        path = root / "benchmarks" / f"{name}.json"
        if not path.is_file():
            raise DocsError(f"`{name}` has no file {path}. Choose one of benchmarks/results.")
        return results_block(json.loads(path.read_text(encoding="utf-8")), str(path))
    builders: dict[str, Callable[[], str]] = {
        "hyperparameters": hyperparameters_table,
        "tree": lambda: tree(root),
        "usage": usage,
    }
    if name not in builders:
        raise DocsError(f"`{name}` is no generated block. Use {', '.join(builders)} or results/.")
    return builders[name]()


# Tables


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; a `|` within a cell is escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    return line(header) + line(["---"] * len(header)) + "".join(line(row) for row in rows)


# Results


def results_block(found: Mapping[str, Any], source: str) -> str:
    """Returns title, setting, commands, table and notes of a file of results.

    Args:
        found: What the file holds.
        source: Its name, for errors.

    Raises:
        DocsError: A key is missing, or a row has not a cell for each column.
    """
    missing = [key for key in _REQUIRED_RESULT_KEYS if key not in found]
    if missing:
        raise DocsError(f"{source} lacks {', '.join(missing)}. Add what is missing.")
    columns, rows = found["columns"], found["rows"]
    for row in rows:
        if len(row) != len(columns):
            raise DocsError(f"{source}: a row has {len(row)} cells, not {len(columns)}: {row}.")
    when = found["recorded"]
    place = f" on {found['machine']}" if "machine" in found else ""
    setting = f"**{found['title']}.** {found['how']} {found['kind'].capitalize()}{place}"
    setting += f", {when['date']} (commit `{when['commit']}`)."
    text = _filled(setting) + "\n"
    if found.get("commands"):
        text += "```bash\n" + "".join(map(_wrapped, found["commands"])) + "```\n\n"
    shown = [
        [_cell(cell, column) for cell, column in zip(row, columns, strict=True)] for row in rows
    ]
    text += markdown_table([column["name"] for column in columns], shown)
    notes = [_filled(note, "- ", "  ") for note in found.get("notes", [])]
    return text + ("\n" + "".join(notes) if notes else "")


def _filled(text: str, first: str = "", others: str = "") -> str:
    """Returns a paragraph in lines of 100 columns, with these beginnings."""
    return "".join(f"{line}\n" for line in _lines(text, 100, first, others))


def _wrapped(command: str) -> str:
    """Returns a shell command on as many lines as it needs, each but the last continued."""
    return " \\\n".join(_lines(command, 98, "", "    ")) + "\n"


def _lines(text: str, width: int, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _cell(value: Any, column: Mapping[str, Any]) -> str:
    """Returns a cell as it is shown; see the module's docstring for what it may be."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        mean, deviation = value
        return f"{_cell(mean, column)} ± {_cell(deviation, column)}"
    digits = column.get("digits")
    return f"{value:,}" if digits is None else f"{value:,.{digits}f}"


# Hyper-parameters


def hyperparameters_table() -> str:
    """Returns a row for every key: its type, default, meaning, and what its value must be."""
    from locft_easyedit.hparams import LocFTBFHyperParams
    from locft_easyedit.hparams_rules import OR_AUTO, rules

    meanings = attributes_of(inspect.getdoc(LocFTBFHyperParams) or "")
    # A rule may name another key's value; this one makes the rule of `fp16` a sentence.
    conditions: dict[str, list[str]] = {}
    for key, _, text in rules({"dtype": "bfloat16"}):
        if text not in conditions.setdefault(key, []):
            conditions[key].append(text)
    rows = []
    for field in dataclasses.fields(LocFTBFHyperParams):
        kind = _type_in_words(str(field.type), field.name)
        kind += ", or `auto`" if field.name in OR_AUTO else ""
        rows.append(
            [
                f"`{field.name}`",
                kind,
                _default_of(field),
                meanings[field.name],
                "<br>".join(conditions.get(field.name, [])),
            ]
        )
    return markdown_table(
        ["key", "type", "default", "meaning", "rules, as an error tells them"], rows
    )


def attributes_of(docstring: str) -> dict[str, str]:
    """Returns the texts of a Google docstring's `Attributes:` section by name."""
    section = docstring.partition("Attributes:\n")[2]
    lines = textwrap.dedent(section).split("\n")
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        match = _FIELD.match(line)
        if match:
            name = match.group(1)
            found[name] = match.group(2)
        elif line.startswith(" ") and name:
            found[name] += " " + line.strip()
    return found


def _type_in_words(annotation: str, name: str) -> str:
    words = {
        "int": "whole number",
        "float": "number",
        "bool": "true or false",
        "str": "text",
        "List[str]": "list of texts",
        "Union[int, str]": "whole number or text",
    }
    own = {"layers": "list of whole numbers", "lr": "number", "model_name": "text"}
    optional = re.fullmatch(r"Optional\[(.*)\]", annotation)
    inner = optional.group(1) if optional else annotation
    kind = own.get(name) or words.get(inner, "text or list of texts")
    return f"{kind}, or null" if optional else kind


def _default_of(field: dataclasses.Field[Any]) -> str:
    from locft_easyedit.hparams import REQUIRED_IN_FILE

    if field.name in REQUIRED_IN_FILE:
        return "required"
    value = field.default
    return "`" + ("null" if value is None else json.dumps(value).strip('"')) + "`"


def usage() -> str:
    """Returns what `locft --help` prints, as a block."""
    from locft_easyedit.__main__ import USAGE

    return f"```text\n{USAGE.rstrip()}\n```\n"


# The tree of files


def tree(root: Path) -> str:
    """Returns the files below the folders of `TREE` that there are, with their docstrings."""
    entries = [entry for name in TREE for entry in _entries(root / name, name, 0)]
    width = max(len(name) for name, _ in entries) + 2
    lines = "".join(f"{name:{width}}{text}".rstrip() + "\n" for name, text in entries)
    return f"```text\n{lines}```\n"


def _entries(folder: Path, name: str, level: int) -> Iterator[tuple[str, str]]:
    """Yields indented name and docstring of a folder, its files, and the folders below it."""
    files = sorted(folder.glob("*.py"))
    folders = [child for child in sorted(folder.iterdir()) if child.is_dir()] if files else []
    if not files:
        return
    package = folder / "__init__.py"
    yield "  " * level + f"{name}/", first_line(package) if package.is_file() else ""
    for file in files:
        if file != package:
            yield "  " * (level + 1) + file.name, first_line(file)
    for child in folders:
        # A folder of tasks or data may have its Python files one level further down.
        nested = [below for below in sorted(child.glob("*/")) if list(below.glob("*.py"))]
        if list(child.glob("*.py")):
            yield from _entries(child, child.name, level + 1)
        else:
            for below in nested:
                yield from _entries(below, f"{child.name}/{below.name}", level + 1)


def first_line(path: Path) -> str:
    """Returns the first line of a module's docstring, without a full stop at its end.

    Raises:
        DocsError: The module has no docstring.
    """
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise DocsError(f"{path} has no docstring. Begin it with a line that says what it is for.")
    return docstring.split("\n")[0].removesuffix(".")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
