"""The documentation: generated parts, links, and the commands and code in its blocks."""

import ast
import contextlib
import functools
import importlib
import io
import json
import re
import shlex

import pytest
import yaml
from helpers.toys import REPOSITORY

import locft_easyedit
from locft_easyedit.__main__ import main
from locft_easyedit.delta.delta import Delta
from locft_easyedit.hparams import LocFTBFHyperParams, shipped_yamls, typed_values
from locft_easyedit.hparams_rules import broken_rules

README = REPOSITORY / "README.md"
PAGES = [README, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md"]
PAGES += sorted((REPOSITORY / "docs").glob("*.md"))
RESULTS = sorted((REPOSITORY / "benchmarks" / "results").glob("*.json"))
HYDRA_COMMANDS = ("edit", "locate", "compare", "plan")
# Programs of others, whose arguments are theirs to check.
OTHER_MODULES = ("nltk.downloader",)

BY_NAME = {"ids": lambda path: path.name}


@pytest.fixture
def build_docs(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    return importlib.import_module("build_docs")


# Generated parts


def test_generated_parts_are_up_to_date(build_docs, capsys):
    assert build_docs.main(["--check"]) == 0, capsys.readouterr().out


def test_check_names_a_page_that_differs(build_docs, monkeypatch, tmp_path, capsys):
    page = tmp_path / "README.md"
    text = "a\n<!-- generated: usage -->\nold\n<!-- end -->\nb\n"
    page.write_text(text)
    monkeypatch.setattr(build_docs, "ROOT", tmp_path)
    assert build_docs.main(["--check"]) == 1
    assert capsys.readouterr().out.startswith("README.md: differs")
    assert page.read_text() == text
    assert build_docs.main([]) == 0
    assert "locft edit" in page.read_text()
    assert page.read_text().startswith("a\n<!--")
    assert page.read_text().endswith("<!-- end -->\nb\n")
    assert build_docs.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- generated: nothing -->\n<!-- end -->\n", "`nothing` is no generated block"),
        ("<!-- generated: results/none -->\n<!-- end -->\n", "has no file"),
        ("<!-- generated: usage -->\n", "no `<!-- end -->`"),
    ],
)
def test_bad_blocks_are_refused(build_docs, tmp_path, text, message):
    with pytest.raises(build_docs.DocsError, match=re.escape(message)):
        build_docs.built_page(text, tmp_path)


def test_every_key_is_in_the_table(build_docs):
    table = build_docs.hyperparameters_table()
    for name in LocFTBFHyperParams.__dataclass_fields__:
        row = re.search(rf"^\| `{name}` \| (.*) \|$", table, re.MULTILINE)
        kind, default, meaning, _ = re.split(r" \| ", row.group(1), maxsplit=3)
        assert kind
        assert default
        assert meaning.strip()


def test_meanings_are_read_from_the_docstring(build_docs):
    text = "It.\n\nAttributes:\n    a: One: `{}`\n        and more.\n    b: Two."
    assert build_docs.attributes_of(text) == {"a": "One: `{}` and more.", "b": "Two."}


def test_the_tree_names_every_module(build_docs):
    lines = build_docs.tree(REPOSITORY).split("\n")
    named = [line.split()[0] for line in lines if line.strip() and line[0] != "`"]
    package = REPOSITORY / "locft_easyedit"
    files = [path for path in package.rglob("*.py") if path.name != "__init__.py"]
    assert {path.name for path in files} <= set(named)
    in_package = named[: next(i for i, name in enumerate(named[1:], 1) if lines[i + 1][0] != " ")]
    assert sum(name.endswith(".py") for name in in_package) == len(files)


def test_the_tree_is_indented_and_described(build_docs, tmp_path, monkeypatch):
    monkeypatch.setattr(build_docs, "TREE", ("p", "gone"))
    for name, text in {
        "p/__init__.py": '"""A package."""',
        "p/a.py": '"""The first.\n\nMore.\n"""',
        "p/q/__init__.py": '"""A room."""',
        "p/q/b.py": '"""The second."""',
        "p/data/t/loader.py": '"""A loader."""',
        "p/empty/x.txt": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "gone").mkdir()
    assert build_docs.tree(tmp_path) == (
        "```text\n"
        "p/             A package\n"
        "  a.py         The first\n"
        "  data/t/\n"
        "    loader.py  A loader\n"
        "  q/           A room\n"
        "    b.py       The second\n"
        "```\n"
    )
    (tmp_path / "p/a.py").write_text("")
    with pytest.raises(build_docs.DocsError, match=r"a\.py has no docstring"):
        build_docs.tree(tmp_path)


# Results


def test_results_are_shown(build_docs):
    found = {
        "title": "T",
        "kind": "measured",
        "how": "So.",
        "machine": "a CPU",
        "commands": ["make demo"],
        "recorded": {"date": "2026-01-02", "commit": "abc"},
        "columns": [{"name": "a|b"}, {"name": "x", "digits": 1}, {"name": "n"}],
        "rows": [["one", [1.25, 0.5], 1234], ["two", None, 0.5]],
        "notes": ["A note."],
    }
    assert build_docs.results_block(found, "f") == (
        "**T.** So. Measured on a CPU, 2026-01-02 (commit `abc`).\n\n"
        "```bash\nmake demo\n```\n\n"
        "| a\\|b | x | n |\n| --- | --- | --- |\n"
        "| one | 1.2 ± 0.5 | 1,234 |\n| two | - | 0.5 |\n\n- A note.\n"
    )
    found["rows"].append(["three"])
    with pytest.raises(build_docs.DocsError, match="f: a row has 1 cells, not 3"):
        build_docs.results_block(found, "f")
    del found["rows"]
    with pytest.raises(build_docs.DocsError, match="f lacks rows"):
        build_docs.results_block(found, "f")


def test_every_file_of_results_is_shown_on_a_page():
    shown = set(re.findall(r"<!-- generated: results/(\S+) -->", "".join(map(text_of, PAGES))))
    assert shown == {path.stem for path in RESULTS}


@pytest.mark.parametrize("path", RESULTS, **BY_NAME)
def test_results_say_how_they_were_measured(path):
    found = json.loads(text_of(path))
    assert found["kind"] in ("measured", "planned")
    assert found["how"].endswith(".")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["recorded"]["date"])
    assert "machine" in found or found["kind"] == "planned" or found["commands"]
    names = [column["name"] for column in found["columns"]]
    assert len(set(names)) == len(names)


# Links


def text_of(path):
    return path.read_text(encoding="utf-8")


def prose_of(text):
    """Returns a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors_of(text):
    """Returns the anchors of a page's headings, as GitHub makes them."""
    anchors = set()
    for heading in re.findall(r"^#+ (.*)$", prose_of(text), re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        anchors.add(kept)
    return anchors


def test_anchors():
    text = "# A `b`: c's d\n```\n# no\n```\n## [0.1] - x\n"
    assert anchors_of(text) == {"a-b-cs-d", "01---x"}


@pytest.mark.parametrize("page", PAGES, **BY_NAME)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(text_of(page))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors_of(text_of(path))):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, **BY_NAME)
def test_paths_in_the_text_exist(page):
    spans = re.findall(
        r"`(?:python )?((?:benchmarks|examples|scripts|hparams)/[^`\s]*)", text_of(page)
    )
    missing = [span for span in spans if not (REPOSITORY / span).exists()]
    assert not missing


def test_every_page_is_in_the_readme_and_the_index():
    for page in sorted((REPOSITORY / "docs").glob("*.md")):
        if page.name != "index.md":
            assert f"(docs/{page.name})" in text_of(README)
            assert f"({page.name})" in text_of(page.parent / "index.md")


def test_the_readme_is_short():
    assert text_of(README).count("\n") <= 250


# Code blocks


def blocks_of(page, language):
    text = text_of(page)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def blocks(language):
    return [
        pytest.param(block, id=f"{page.name}-{i}")
        for page in PAGES
        for i, block in enumerate(blocks_of(page, language))
    ]


def commands_of(block):
    """Returns the command lines of a shell block, continued lines joined."""
    return [line for line in block.replace("\\\n", " ").split("\n") if line.strip()]


@functools.cache
def help_of(command):
    """Returns what `locft COMMAND --help` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return printed.getvalue()


@functools.cache
def named_configs():
    return set(shipped_yamls())


def check_command(line):
    """Checks that a shell command, as far as it is this project's, exists with its arguments."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    assert words, line
    program, rest = words[0], words[1:]
    if program == "export":
        assert all("=" in word for word in rest)
    elif program == "locft":
        check_locft(rest)
    elif program == "python" and rest[0] == "-m":
        assert rest[1] in ("locft_easyedit", *OTHER_MODULES)
        if rest[1] == "locft_easyedit":
            check_locft(rest[2:])
    elif program == "python":
        check_script(rest)
    elif program in ("accelerate", "torchrun"):
        at = rest.index("-m")
        assert rest[at + 1] == "locft_easyedit"
        if "--config_file" in rest:
            assert (REPOSITORY / rest[rest.index("--config_file") + 1]).is_file()
        check_locft(rest[at + 2 :])
    elif program == "sbatch":
        assert (REPOSITORY / rest[0]).is_file()
        check_locft(rest[1:])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", text_of(REPOSITORY / "Makefile"), re.MULTILINE)
        assert rest[0] in targets
        for word in rest[1:]:
            variable, _, value = word.partition("=")
            assert re.search(rf"\b{variable}\b", text_of(REPOSITORY / "Makefile"))
            assert not value.startswith("tests/") or (REPOSITORY / value).exists()
    elif program == "pip":
        for extra in re.findall(r"^\.\[(.*)\]$", "\n".join(rest), re.MULTILINE):
            assert re.search(
                rf"^{extra} = \[", text_of(REPOSITORY / "pyproject.toml"), re.MULTILINE
            )
    else:
        pytest.fail(f"unknown program in `{line}`")


def check_script(words):
    """Checks that one of our scripts is there, and that it or a module beside it has the flags."""
    path = REPOSITORY / words[0]
    assert path.is_file(), words[0]
    sources = "".join(map(text_of, (REPOSITORY / "benchmarks").rglob("*.py"))) + text_of(path)
    for word in words[1:]:
        if word.startswith("--"):
            # The name alone is in the table of arguments that the benchmarks share.
            named = f'"{word}"' in sources or f'"{word[2:]}"' in sources
            assert named, f"{words[0]} {word}"
        elif word.startswith("benchmarks/"):
            assert (REPOSITORY / word).is_file(), word


def check_locft(words):
    """Checks a command of `locft` with its configuration, keys and, of hyper-parameters, values."""
    command, rest = words[0], words[1:]
    text = help_of(command) if command != "run" else ""
    if command == "run":
        assert rest[0].endswith(".py")
        return
    assert text, command
    if command == "delta":
        assert f"locft delta {rest[0]} " in text
    if command in HYDRA_COMMANDS:
        at = rest.index("--config-name")
        name = rest[at + 1]
        assert name in named_configs() or name.endswith(".yaml"), name
        rest = rest[:at] + rest[at + 2 :]
    for word in rest:
        key, sign, value = word.partition("=")
        if not sign or "/" in key or key.startswith(("peers.", "hydra.")):
            continue
        if command in HYDRA_COMMANDS and key in LocFTBFHyperParams.__dataclass_fields__:
            typed, problems = typed_values({key: yaml.safe_load(value)})
            assert not problems + broken_rules(typed), word
        else:
            assert re.search(rf"\b{key}=", text), f"locft {command} {word}"


@pytest.mark.parametrize(
    "line",
    [
        "locft nothing",
        "locft edit --config-name nothing data=FILE",
        "locft edit --config-name smollm2-135m dta=FILE",
        "locft edit --config-name smollm2-135m lr=-1",
        "locft delta burn edit.safetensors",
        "python benchmarks/nothing.py",
        "make nothing",
        "make test NOTHING=1",
        "pip install .[nothing]",
        "torchrun -m other edit",
    ],
)
def test_bad_commands_are_noticed(line):
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        check_command(line)


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands_exist(block):
    for line in commands_of(block):
        check_command(line)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_use_what_there_is(block):
    """They compile; what they import or use of the package is there, and so are the files."""
    modules = {"locft_easyedit": locft_easyedit, "Delta": Delta}
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "locft_easyedit":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), alias.name
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = modules.get(node.value.id)
            assert owner is None or hasattr(owner, node.attr), ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "LocFTBFHyperParams":
            keys = {keyword.arg for keyword in node.keywords}
            assert keys <= set(LocFTBFHyperParams.__dataclass_fields__)
        elif isinstance(node, ast.Constant) and str(node.value).startswith("hparams/"):
            assert (REPOSITORY / node.value).is_file()


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_blocks_are_hyper_parameters(block):
    typed, problems = typed_values(yaml.safe_load(block))
    assert not problems + broken_rules(typed)


def test_every_block_has_a_language_that_is_checked():
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", text_of(page), re.MULTILINE)
        assert set(fences[::2]) <= {"bash", "python", "yaml", "text", "bibtex"}, page.name
        assert set(fences[1::2]) <= {""}, page.name


# Citation and changes


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load(text_of(REPOSITORY / "CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert str(citation["version"]) == locft_easyedit.__version__
    assert citation["preferred-citation"]["title"] == "Fine-tuning Done Right in Model Editing"
    assert locft_easyedit.__version__ in text_of(REPOSITORY / "CHANGELOG.md")
