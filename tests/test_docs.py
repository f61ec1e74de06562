"""Every example in a docstring, in the README and in the notebooks is run."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import numoe
import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(numoe.__path__, "numoe.")
    if not m.name.endswith("__main__") and not m.name.endswith("_core")
)


@pytest.mark.parametrize("name", ["numoe", *MODULES])
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(set(numoe.__all__) - {"losses", "metrics", "optim", "reference", "testing"}))
def test_public_functions_have_a_docstring_with_an_example(name):
    thing = getattr(numoe, name)
    assert thing.__doc__
    if callable(thing) and not isinstance(thing, type) and thing.__module__ != "numoe._core":
        assert ">>>" in thing.__doc__ or "See Also" in thing.__doc__


def test_readme_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert blocks
    examples = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "README.md", "README.md", 0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert runner.run(examples).failed == 0


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_run(path, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    client.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
