"""What the command line says of itself before it is asked to do anything."""

from __future__ import annotations

import re

import pytest

from zotune import options as config
from zotune.cli.app import COMMANDS, run
from zotune.options.groups import APART, OTHERS, grouped


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_stands_once_in_the_help_with_what_is_said_of_it(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run([command, "--help"]) == 0
    said = capsys.readouterr().out
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", said).split())
    for name, field in COMMANDS[command].model_fields.items():
        flag = "--" + name.replace("_", "-")
        assert len(re.findall(rf"│ {flag} ", said)) == 1, flag
        assert (field.description or "").split(" [")[0].split()[0] in words
    assert "[default: by scheme and model size]" in words or command not in ("train", "sweep")  # brackets are no markup


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_of_a_command_is_in_one_group(command):
    kind = COMMANDS[command]
    assert sorted(name for names in grouped(kind).values() for name in names) == sorted(kind.model_fields)


def test_options_that_are_set_apart_are_options_and_none_of_a_run_is_without_a_heading():
    known = set(config.TrainConfig.model_fields)
    assert not [name for names in APART.values() for name in names if name not in known]
    assert OTHERS not in grouped(config.TrainConfig)


def test_train_shows_its_groups_and_an_example(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["train", "--help"]) == 0
    said = capsys.readouterr().out
    for title in grouped(config.TrainConfig):
        assert f"─ {title} ─" in said
    assert "zotune train --model HuggingFaceTB/SmolLM2-135M-Instruct" in said


def test_list_alone_says_what_there_are_lists_of(capsys):
    assert run(["list"]) == 0
    said = capsys.readouterr().out
    for kind, name in (("methods", "zo-sgd"), ("schemes", "lora"), ("tasks", "sst2"), ("engines", "dual")):
        assert f"zotune list {kind}" in said
        assert name in said


@pytest.mark.parametrize(("asked", "meant"), [("adamw", "fo-adam"), ("AdamW", "fo-adam"), ("mezo", "zo-sgd")])
def test_a_method_by_another_tool_s_name_is_told_by_ours(asked, meant, capsys):
    assert run(["train", "--model", "x", "--task", "sst2", "--output", "y", "--method", asked]) == 2
    assert f"did you mean '{meant}'?" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "said"), [("bench run", "one for each GPU, else 1"), ("tasks cp", "NAME.yaml")])
def test_a_default_in_brackets_is_text_wherever_it_stands(command, said, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run([*command.split(), "--help"]) == 0
    assert f"[default: {said}]" in capsys.readouterr().out
