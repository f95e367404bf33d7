"""A hub's name where there is no network: said in a moment, by the host that cannot be reached."""

from __future__ import annotations

import socket
import time

import huggingface_hub.constants as constants
import pytest

from zotune.errors import InputError
from zotune.models import hub
from zotune.models.loading import load_config, load_tokenizer
from zotune.tasks.rows import read_hub


@pytest.fixture
def without_network(monkeypatch):
    """No name is known and nothing answers; the hub's client believes itself online, as it is at a user's."""
    asked = []

    def refuse(address, timeout=None):
        asked.append(address)
        raise socket.gaierror(-2, "Name or service not known")

    import datasets

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    hub.unreached.cache_clear()
    yield asked
    hub.unreached.cache_clear()


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_a_model_s_name_without_network_is_one_line_and_one_try(load, without_network, caplog):
    for _ in range(2):
        with pytest.raises(InputError, match="the hub cannot be reached; give a folder"):
            load("nobody/no-model")
    assert without_network == [("huggingface.co", 443)]
    assert "Name or service not known" in caplog.text
    assert constants.HF_HUB_OFFLINE


def test_a_data_set_s_name_without_network_is_one_line(without_network):
    with pytest.raises(InputError, match="offline, give rows by --data-dir or --data"):
        read_hub("nobody/no-rows", None)
    assert len(without_network) == 1


def test_a_folder_asks_for_no_network(without_network, tmp_path):
    hub.look_first(str(tmp_path))
    assert not without_network
    assert not constants.HF_HUB_OFFLINE


def test_where_a_proxy_is_asked_or_the_hub_answers_nothing_changes(without_network, monkeypatch):
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:3128"})
    hub.look_first("nobody/no-model")
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout=None: socket.socket())
    hub.look_first("nobody/no-model")
    assert not constants.HF_HUB_OFFLINE


def test_a_name_server_that_is_silent_is_not_waited_for(without_network, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout=None: time.sleep(60))
    monkeypatch.setattr(hub, "SECONDS", 0.05)
    hub.look_first("nobody/no-model")
    assert constants.HF_HUB_OFFLINE
