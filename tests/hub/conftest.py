"""A hub of our own for the tests of the hub."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import HubServer
from huggingface_hub import constants


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server, and the client of this process pointed at it with a cache of its own.

    The client reads HF_* once, when it is imported, so its constants are set here;
    `test_environment_variables` sets the variables themselves, for a process of its own.
    """
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with HubServer() as running:
        values = {
            "ENDPOINT": running.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": running.endpoint
            + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_ASSETS_CACHE": str(tmp_path / "assets"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,  # its protocol is not HTTP of files
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value, raising=False)
        _forget_connections()
        yield running
        _forget_connections()


def _forget_connections() -> None:
    # Named `reset_sessions` before huggingface_hub 1.0.
    for name in ("close_session", "reset_sessions"):
        getattr(huggingface_hub.utils, name, lambda: None)()
