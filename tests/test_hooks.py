"""The private methods of transformers' Trainer that zotune goes through: they are what `zotune.trainer.hooks` takes them to be."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import metadata
from pathlib import Path

import pytest
import transformers as tf
from packaging.specifiers import SpecifierSet

import zotune
from zotune.trainer import hooks

SOURCES = Path(zotune.__file__).parent
PROJECT = SOURCES.parent.parent


def parameters(name):
    return tuple(inspect.signature(getattr(tf.Trainer, name)).parameters)[1:]


@pytest.mark.parametrize("name", [*hooks.SIGNATURES, *hooks.PUBLIC])
def test_the_installed_trainer_has_the_methods_that_are_overridden_or_called(name):
    assert parameters(name) == {**hooks.SIGNATURES, **hooks.PUBLIC}[name]


def test_every_private_method_that_is_overridden_is_in_the_table():
    own = {n for n in vars(hooks.HookedTrainer) if n.startswith("_") and not n.startswith("__")}
    assert own <= set(hooks.SIGNATURES)
    assert hasattr(tf.TrainingArguments, "n_gpu")
    assert "_n_gpu" in inspect.getsource(tf.TrainingArguments)


def test_no_other_file_of_the_trainers_names_a_private_method_of_it():
    private = {n for n in dir(tf.Trainer) if n.startswith("_") and not n.startswith("__")} | {"_n_gpu"}
    assert set(hooks.SIGNATURES) <= private
    found = []
    for path in (*SOURCES.glob("trainer/*.py"), *SOURCES.glob("run/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "name", None)
            if name in private and path.name != "hooks.py":
                found.append(f"{path.relative_to(SOURCES)}:{getattr(node, 'lineno', 0)} {name}")
    assert not found


def test_the_version_that_is_tested_is_within_the_bounds_and_there_is_one_above():
    wanted = re.search(r'^  "transformers(>=[^"]+)",', (PROJECT / "pyproject.toml").read_text(), re.M)
    tested = re.search(r"^transformers==(\S+)$", (PROJECT / "constraints.txt").read_text(), re.M)
    assert wanted is not None
    assert tested is not None
    bounds = SpecifierSet(wanted[1])
    assert tested[1] in bounds
    assert metadata.version("transformers") in bounds
    assert any(one.operator == "<" for one in bounds)
