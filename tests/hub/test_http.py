"""Push and pull over HTTP, through huggingface_hub's own client, against a local server."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, Repository
from huggingface_hub import constants
from tiny import logits, tiny_model

import foundation.hub.load as hub
from foundation.errors import HubError, UsageError, WeightsError
from foundation.evaluation import Figure, append_record, new_record, read_records
from foundation.hub.cards import Card
from foundation.hub.download import Access
from foundation.hub.folder import CARD, CONFIG, EVAL_RESULTS, RECORDS, REQUIRED, WEIGHTS
from foundation.hub.load import from_pretrained, model_card
from foundation.hub.saved import save_pretrained
from foundation.hub.upload import push_to_hub

NAME = "lab/tiny"
TOKEN = "hf_tests"


@pytest.fixture
def published(server: HubServer, tmp_path: Path) -> Repository:
    """`lab/tiny` with a saved model in it."""
    folder = save_pretrained(tiny_model(), tmp_path / "saved")
    repository = server.repositories[NAME] = Repository()
    repository.commit({path.name: path.read_bytes() for path in folder.iterdir()})
    return repository


def test_push_and_pull_give_the_same_model(server: HubServer) -> None:
    model = tiny_model()
    url = push_to_hub(model, NAME, token=TOKEN)
    repository = server.repositories[NAME]
    assert url.endswith(f"/{NAME}/commit/{repository.branches['main']}")
    assert len(repository.commits) == 2, "the empty first commit and one with all files"
    assert set(repository.files("main")) == {*REQUIRED, CARD}
    assert torch.equal(logits(from_pretrained(NAME)), logits(model))
    assert model_card(NAME).metadata["library_name"] == "universal-ct"


def test_what_was_measured_goes_with_the_weights(server: HubServer, tmp_path: Path) -> None:
    push_to_hub(tiny_model(), NAME, token=TOKEN)
    assert hub.model_records(NAME) is None
    folder = save_pretrained(tiny_model(), tmp_path / "saved")
    record = new_record("agreement", "real", figures=[Figure("dice/mean", 0.5)], seconds=1)
    append_record(folder / RECORDS, record)
    (folder / EVAL_RESULTS).mkdir()
    (folder / EVAL_RESULTS / "case.yaml").write_text("[]")
    push_to_hub(from_pretrained(folder), NAME, token=TOKEN)
    files = server.repositories[NAME].files("main")
    assert set(files) == {*REQUIRED, CARD, RECORDS, f"{EVAL_RESULTS}/case.yaml"}
    path = hub.model_records(NAME)
    assert path is not None and read_records(path) == [record]
    assert hub.model_folder(NAME).joinpath(WEIGHTS).is_file()


def test_push_to_a_branch_leaves_main_alone(server: HubServer) -> None:
    push_to_hub(tiny_model(0), NAME, token=TOKEN)
    push_to_hub(tiny_model(1), NAME, token=TOKEN, revision="v2")
    assert torch.equal(logits(from_pretrained(NAME)), logits(tiny_model(0)))
    assert torch.equal(logits(from_pretrained(f"{NAME}@v2")), logits(tiny_model(1)))


def test_push_without_the_right_is_refused(server: HubServer) -> None:
    server.writers = {"somebody else"}
    with pytest.raises(HubError, match=r"refuses access to lab/tiny \(403\).*HF_TOKEN"):
        push_to_hub(tiny_model(), NAME, token=TOKEN)


def test_weights_that_must_not_be_changed_are_not_published(server: HubServer) -> None:
    model = tiny_model(licence="cc-by-nc-nd-4.0")
    with pytest.raises(UsageError, match="private=True"):
        push_to_hub(model, NAME, token=TOKEN)
    assert not server.log
    push_to_hub(model, NAME, token=TOKEN, private=True)
    assert torch.equal(logits(from_pretrained(NAME)), logits(model))
    # `private` has no effect on a repository that is there already.
    server.repositories["lab/public"] = Repository()
    with pytest.raises(UsageError, match="to a repository that is private"):
        push_to_hub(model, "lab/public", token=TOKEN, private=True)
    assert not server.repositories["lab/public"].commits


def test_a_given_card_is_the_readme(server: HubServer) -> None:
    card = Card("mine", {"license": "mit", "universal_ct": {}}, "# Mine\n")
    push_to_hub(tiny_model(), NAME, token=TOKEN, card=card)
    assert server.repositories[NAME].files("main")[CARD].decode() == card.render()
    assert model_card(NAME).text == "# Mine\n"


def test_second_load_asks_once_and_fetches_nothing(
    server: HubServer, published: Repository
) -> None:
    from_pretrained(NAME)
    assert len(server.bodies()) == len(REQUIRED)
    server.log.clear()
    from_pretrained(NAME)
    assert not server.bodies()
    assert [request.method for request in server.log] == ["HEAD"]


def test_a_changed_file_alone_is_fetched_again(server: HubServer, published: Repository) -> None:
    from_pretrained(NAME)
    server.log.clear()
    changed = tiny_model(1)
    push_to_hub(changed, NAME, token=TOKEN)
    assert torch.equal(logits(from_pretrained(NAME)), logits(changed))
    fetched = server.bodies()
    assert not any(path.endswith(CONFIG) for path in fetched), "its ETag is the same"
    assert len(fetched) == 3, "weights, prompt embeddings and sums"


def test_token_stays_with_the_hub(server: HubServer, published: Repository) -> None:
    from_pretrained(NAME, token=TOKEN)
    elsewhere = [request for request in server.log if request.path.startswith("/cdn/")]
    assert elsewhere
    assert all("authorization" not in request.headers for request in elsewhere)
    heads = [request for request in server.log if request.method == "HEAD"]
    assert all(r.headers.get("authorization") == f"Bearer {TOKEN}" for r in heads)


def test_broken_download_resumes(
    server: HubServer, published: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client keeps whole chunks; ours must fit into the tiny file several times.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.cuts = [20_000]
    assert torch.equal(logits(from_pretrained(NAME)), logits(tiny_model()))
    resumed = [r.headers["range"] for r in server.log if "range" in r.headers]
    assert len(resumed) == 1
    start = int(resumed[0].removeprefix("bytes=").rstrip("-"))
    assert 0 < start <= 20_000


def test_download_that_breaks_for_good_leaves_nothing_half(
    server: HubServer, published: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.cuts = [0] * 20
    with pytest.raises(HubError, match=r"Exchanging model\.safetensors .* failed"):
        from_pretrained(NAME)
    assert not list(Path(constants.HF_HUB_CACHE).rglob(f"*{WEIGHTS}"))
    server.cuts = []
    assert torch.equal(logits(from_pretrained(NAME)), logits(tiny_model()))


@pytest.mark.parametrize("switch", ["local_files_only", "HF_HUB_OFFLINE"])
def test_offline_uses_the_cache_or_says_what_is_missing(
    server: HubServer, published: Repository, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    def load() -> torch.Tensor:
        return logits(from_pretrained(NAME, local_files_only=switch == "local_files_only"))

    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", switch == "HF_HUB_OFFLINE")
        with pytest.raises(HubError, match=rf"config\.json .*not in the cache.*{switch}"):
            load()
    from_pretrained(NAME)
    server.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", switch == "HF_HUB_OFFLINE")
    assert torch.equal(load(), logits(tiny_model()))
    assert not server.log


def test_cache_dir_is_used_instead_of_the_common_one(
    server: HubServer, published: Repository, tmp_path: Path
) -> None:
    from_pretrained(NAME, cache_dir=tmp_path / "mine")
    assert (tmp_path / "mine" / "models--lab--tiny").is_dir()
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_revisions(server: HubServer, published: Repository, tmp_path: Path) -> None:
    first = published.branches["main"]
    push_to_hub(tiny_model(1), NAME, token=TOKEN)
    assert torch.equal(logits(from_pretrained(NAME, revision=first)), logits(tiny_model(0)))
    assert torch.equal(logits(from_pretrained(f"{NAME}@main")), logits(tiny_model(1)))
    with pytest.raises(HubError, match=r"lab/tiny has no revision 'v9'.*commits/main"):
        from_pretrained(NAME, revision="v9")
    with pytest.raises(UsageError, match="do not agree"):
        from_pretrained(f"{NAME}@main", revision="v9")


def test_gated_repository(
    server: HubServer,
    published: Repository,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    published.gated = True
    with pytest.raises(HubError, match=r"\(401\): it is gated.*Accept its terms at .*lab/tiny"):
        from_pretrained(NAME)
    caplog.set_level("DEBUG")
    with pytest.raises(HubError, match=r"\(403\): it is gated.*HF_TOKEN") as refused:
        from_pretrained(NAME, token=TOKEN)
    assert TOKEN not in f"{refused.value} {refused.value.__cause__} {Access(token=TOKEN)!r}"
    assert not [each for each in caplog.records if TOKEN in each.getMessage()]
    published.accepted.add(TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert torch.equal(logits(from_pretrained(NAME)), logits(tiny_model()))


def test_unknown_repository(server: HubServer) -> None:
    with pytest.raises(HubError, match=r"no such public repository.*\(401\).*private.*HF_TOKEN"):
        from_pretrained("lab/nothing")
    with pytest.raises(HubError, match="Did you mean 'universal-ct-unet'"):
        from_pretrained("lab/universal-ct-unet")


def test_repository_without_a_model(server: HubServer) -> None:
    server.repositories[NAME] = Repository()
    server.repositories[NAME].commit({CARD: b"# Not a model\n"})
    with pytest.raises(HubError, match=r"lab/tiny has no config\.json"):
        from_pretrained(NAME)


def test_half_a_model_on_the_hub(server: HubServer, published: Repository) -> None:
    files = published.files("main")
    del files["SHA256SUMS"]
    server.repositories["lab/half"] = Repository()
    server.repositories["lab/half"].commit(files)
    with pytest.raises(HubError, match="lab/half has no SHA256SUMS"):
        from_pretrained("lab/half")


def test_damaged_on_the_hub(server: HubServer, published: Repository) -> None:
    weights = bytearray(published.files("main")[WEIGHTS])
    weights[-1] ^= 1
    published.commit({WEIGHTS: bytes(weights)})
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged.*SHA-256"):
        from_pretrained(NAME)


def test_hub_out_of_reach(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    nobody = "http://127.0.0.1:9"  # the discard port: nothing listens
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    template = nobody + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(HubError, match=r"127\.0\.0\.1:9 cannot be reached.*HTTPS_PROXY"):
        from_pretrained(NAME)


def test_published_weights_are_converted_once(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The whole way but for the conversion itself, which `test_convert` tests."""
    model = tiny_model(3)
    calls = []

    def convert(checkpoint: dict[str, torch.Tensor]) -> hub.Converted:
        calls.append(checkpoint)
        return hub.Converted("unet", model.state_dict(), model.prompt_embedding)

    monkeypatch.setattr(hub, "convert_state_dict", convert)
    monkeypatch.setattr(hub, "read_checkpoint", lambda path: {"bytes": path.read_bytes()})
    config = replace(model.config, licence_notice="Not for sale.")
    monkeypatch.setattr(hub, "published_config", lambda backbone, classes: config)
    repository = server.repositories["ljwztc/CLIP-Driven-Universal-Model"] = Repository()
    repository.commit({"clip_driven_universal_unet.pth": b"first"})

    loaded = from_pretrained("universal-ct-unet")
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.config.name, loaded.config.licence) == ("universal-ct-unet", "cc-by-nc-nd-4.0")
    kept = list(Path(constants.HF_ASSETS_CACHE).rglob(WEIGHTS))
    assert len(kept) == 1
    recorded = json.loads((kept[0].parent / CONFIG).read_text())
    assert (recorded["licence"], recorded["licence_notice"]) == (
        "cc-by-nc-nd-4.0",
        "Not for sale.",
    )
    assert caplog.messages == ["universal-ct-unet: Not for sale."]
    caplog.clear()
    assert torch.equal(logits(from_pretrained("universal-ct-unet")), logits(model))
    assert caplog.messages == ["universal-ct-unet: Not for sale."], "at every load"
    assert calls == [{"bytes": b"first"}]

    kept[0].write_bytes(b"damaged")
    from_pretrained("universal-ct-unet")
    assert len(calls) == 2 and "cached copy is bad" in caplog.text
    repository.commit({"clip_driven_universal_unet.pth": b"second"})
    from_pretrained("universal-ct-unet")
    assert calls[-1] == {"bytes": b"second"}, "another source file is converted anew"


@pytest.mark.slow
def test_environment_variables(server: HubServer, published: Repository, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, as a user sets them."""
    published.gated = True
    published.accepted.add(TOKEN)
    script = (
        "import json, sys; from foundation import from_pretrained;"
        f"print(json.dumps(from_pretrained({NAME!r}).classes))"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    common = {**clean, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}

    def load(**variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script]
        environment = {**common, "NO_PROXY": "127.0.0.1,localhost", **variables}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    online = load(HF_ENDPOINT=server.endpoint, HF_TOKEN=TOKEN)
    assert json.loads(online.stdout) == list(tiny_model().classes), online.stderr
    assert (tmp_path / "home" / "hub" / "models--lab--tiny").is_dir()
    server.log.clear()
    offline = load(HF_ENDPOINT=server.endpoint, HF_HUB_OFFLINE="1")
    assert json.loads(offline.stdout) == list(tiny_model().classes), offline.stderr
    assert not server.log
