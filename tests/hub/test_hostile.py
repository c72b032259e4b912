"""Folders from anybody: a clear error or a model that works, nothing else, and in little memory."""

import copy
import json
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from tiny import adapted, tiny_model
from torch import Tensor, nn

from foundation.cli.main import main
from foundation.errors import UniversalCTError, WeightsError, printable
from foundation.files import file_sha256
from foundation.hub.adapter_files import save_adapter
from foundation.hub.cards import Card
from foundation.hub.folder import (
    ADAPTER_FILES,
    ADDED_CLASSES,
    CARD,
    CONFIG,
    PROMPTS,
    SUMMED,
    SUMS,
    WEIGHTS,
    write_sums,
)
from foundation.hub.load import from_pretrained, model_card
from foundation.hub.saved import save_pretrained
from foundation.hub.tensors import read_tensors
from foundation.model import UniversalModel, fill, without_memory
from foundation.networks.backbones import BACKBONES, build_backbone

NAN, INF = float("nan"), float("inf")
CT = (np.linspace(-900, 900, 16**3, dtype=np.float32).reshape(16, 16, 16), np.diag([1.5] * 3 + [1]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_pretrained(tiny_model(), tmp_path / "model")


def resum(folder: Path) -> None:
    """Right sums, so that only the content is wrong."""
    names = [name for name in SUMMED if (folder / name).is_file()]
    text = "".join(f"{file_sha256(folder / name)}  {name}\n" for name in names)
    (folder / SUMS).write_text(text)


def configure(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    resum(folder)


@contextmanager
def bounded(megabytes: int = 1500) -> Iterator[None]:
    """No more memory than this beside what the process has: a request for it fails at once."""
    resource = pytest.importorskip("resource")
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("this system does not tell how much memory a process has")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(pages.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- values that are no numbers (R4) --------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF])
def test_one_weight_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    state = load_file(folder / WEIGHTS)
    state["head.controller.bias"][3] = value
    save_file(state, folder / WEIGHTS)
    resum(folder)
    message = r"NaN or infinity in head\.controller\.bias \(1 of 153 values\)"
    with pytest.raises(WeightsError, match=message):
        from_pretrained(folder)


def test_integers_are_no_weights(folder: Path) -> None:
    state = {name: value.to(torch.int8) for name, value in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS)
    resum(folder)
    with pytest.raises(WeightsError, match=r"not of a type .*backbone\.\S+ is int8"):
        from_pretrained(folder)


@pytest.mark.parametrize(("value", "message"), [(NAN, "NaN or infinity"), (None, "is int32")])
def test_prompts_must_be_finite_numbers(
    folder: Path, value: float | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    if value is None:
        model.prompt_embedding = model.prompt_embedding.int()
        monkeypatch.setattr("foundation.hub.saved.stored", lambda tensor, _: tensor.clone())
    else:
        model.prompt_embedding[1, 2] = value
    save_pretrained(model, folder)
    with pytest.raises(WeightsError, match=rf"{PROMPTS}.*{message}"):
        from_pretrained(folder)


def test_values_of_an_adapter_must_be_finite(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = save_adapter(adapted(), tmp_path / "spine")
    values = load_file(folder / ADDED_CLASSES)
    name = next(name for name in values if name != "prompt_embedding")
    values[name].view(-1)[0] = NAN
    save_file(values, folder / ADDED_CLASSES)
    write_sums(folder, ADAPTER_FILES)
    model = tiny_model()
    with pytest.raises(WeightsError, match="NaN or infinity"):
        model.load_adapter(folder)
    assert model.adapters.names == () and model.classes == tiny_model().classes


def test_a_published_checkpoint_must_be_finite(tmp_path: Path) -> None:
    from published import empty_state

    state = empty_state("unet")
    name = next(name for name in state if "down_tr64.ops.0.conv1.weight" in name)
    state[name].view(-1)[0] = NAN
    torch.save({"net": state}, tmp_path / "unet.pth")
    for features_only in (False, True):
        with pytest.raises(WeightsError, match=r"NaN or infinity in \S*down\.0"):
            from_pretrained(tmp_path / "unet.pth", features_only=features_only)


def test_an_archive_that_unpacks_to_more_than_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    torch.save({"net": {"weight": torch.zeros(64 * 2**20)}}, path)  # 256 MiB of zeros
    with (
        zipfile.ZipFile(path) as plain,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    path.unlink()
    assert (tmp_path / "packed.pth").stat().st_size < 2**20
    with pytest.raises(WeightsError, match="PyTorch does not compress"):
        from_pretrained(tmp_path / "packed.pth")


# --- without memory (R8) --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone_options": {"widths": [10**9] * 3, "full": 16}},
        {"backbone_options": {"widths": [16] * 100_000, "full": 16}},
        {"backbone_options": {"widths": [8192] * 5, "full": 8192}},
        {"backbone_options": {"widths": [16] * 50, "full": 16}},
        {"backbone_options": {"widths": [-16, 16, 16], "full": 16}},
        {"backbone_options": {"widths": [0, 0, 0], "full": 0}},
        {"backbone_options": {"widths": [], "full": 16}},
        {"backbone_options": {"widths": "abc", "full": 16}},
        {"backbone_options": {"widths": {"a": 1}, "full": 16}},
        {"backbone_options": {"widths": [16, 16, 16], "full": None}},
        {"backbone_options": {"depth": 3}},
        {"backbone": "unet", "backbone_options": {"width": 8191}},
        {"branches": [{"classes": ["liver"], "kind": "side", "width": 10**9, "replaces": True}]},
        {"branches": [{"classes": ["liver"], "kind": "side", "width": 8192, "replaces": True}]},
        {"text": {"encoder": "hf:tests/none", "dim": 65_536}},
        {"classes": [{"name": f"c{n}", "prompt": "p"} for n in range(200_000)]},
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_huge_or_odd_network_is_refused_at_once(folder: Path, changes: dict[str, Any]) -> None:
    configure(folder, **changes)
    with bounded(), pytest.raises(WeightsError):
        from_pretrained(folder)


def test_what_a_network_computes_as_it_is_built_stays(tmp_path: Path) -> None:
    """Buffers that are not saved, plain tensors, and two names of one tensor."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(2, 2)
            self.register_buffer("unsaved", torch.zeros(2), persistent=False)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)
            self.two.weight = self.one.weight

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(2, 2)
            self.held = [torch.ones(2)]

    for kind in (Odd, Tied, Plain):
        state = {name: torch.full_like(value, 3.0) for name, value in kind().state_dict().items()}
        filled = fill(kind, without_memory(kind), state, "here")
        assert not any(tensor.is_meta for tensor in (*filled.parameters(), *filled.buffers()))
        assert torch.equal(filled.state_dict()["one.weight"], torch.full((2, 2), 3.0))
    tied = fill(Tied, without_memory(Tied), dict(Tied().state_dict()), "here")
    assert isinstance(tied, Tied) and tied.two.weight is tied.one.weight
    plain = fill(Plain, without_memory(Plain), dict(Plain().state_dict()), "here")
    assert isinstance(plain, Plain) and torch.equal(plain.held[0], torch.ones(2))


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "dints"])
def test_every_backbone_is_built_without_memory(name: str) -> None:
    with bounded(300):
        backbone = without_memory(lambda: build_backbone(name, 1))
    assert all(parameter.is_meta for parameter in backbone.parameters())
    # What has no memory must be in the state dict, or it would never get any.
    assert not {n for n, b in backbone.named_buffers() if b.is_meta} - set(backbone.state_dict())


def test_loading_leaves_the_random_numbers_as_they_were(folder: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    from_pretrained(folder)
    assert torch.equal(torch.rand(4), expected)


def test_a_loaded_model_does_not_look_into_the_file(folder: Path) -> None:
    model = from_pretrained(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (folder / WEIGHTS).write_bytes(b"\xff" * (folder / WEIGHTS).stat().st_size)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_tensors_are_read_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_file(folder / WEIGHTS)
    monkeypatch.setattr("foundation.hub.tensors._READ_BYTES", 100)
    found = read_tensors(folder / WEIGHTS)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_a_checkpoint_whose_tensors_share_memory_is_no_tied_network() -> None:
    shared = torch.ones(2, 2)
    state = {"0.weight": shared, "0.bias": torch.ones(2), "1.weight": shared, "1.bias": shared[0]}
    make: Callable[[], nn.Module] = lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))  # noqa: E731
    filled = fill(make, without_memory(make), state, "here")
    places = {tensor.untyped_storage().data_ptr() for tensor in filled.parameters()}
    assert len(places) == 4


# --- cards and texts (R8, R9, R16) ----------------------------------------------------------------


def bomb(levels: int = 9) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("front", "message"),
    [
        (bomb(), "more than 200000 values"),
        ("a: &a [*a]", "within its own anchor"),
        ("a: " + "[" * 60 + "]" * 60, "more than 50 levels"),
        ("a: " + "[" * 100_000, "not YAML"),
        ("? [a, b]\n: c", "not YAML|names to values"),
        ("a: {3: b}", "names to values"),
        ("a: 2026-02-31", "not YAML"),
        ("a: " + "1" * 5000, "not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not YAML"),
    ],
)
def test_a_card_that_would_take_memory_without_end_is_refused(front: str, message: str) -> None:
    with bounded(500), pytest.raises(WeightsError, match=message):
        Card.parse("mine", f"---\n{front}\n---\n", "here")


def test_aliases_of_a_card_may_be_few() -> None:
    card = Card.parse("mine", "---\na: &a [1, 2]\nb: *a\n---\n", "here")
    assert card.metadata == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("name", [CONFIG, SUMS, CARD])
def test_a_description_that_is_no_text_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\xff\xfe\x00")
    if name != SUMS:
        resum(folder)
    with pytest.raises(WeightsError, match=rf"{name} cannot be read as text"):
        model_card(folder) if name == CARD else from_pretrained(folder)
    assert main(["info", str(folder)]) == (0 if name == SUMS else 1)


def test_text_of_a_folder_does_not_steer_the_terminal(
    folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(folder, licence_notice="Free.\n\x1b]0;owned\x07\x1b[2J\u202eevil")
    from_pretrained(folder)
    assert "Free.\n\\x1b]0;owned\\x07\\x1b[2J\\u202eevil" in caplog.text
    (folder / CARD).write_text("---\nlicense: mit\x85\n---\n# \x1b[31mred\n", encoding="utf-8")
    main(["info", str(folder)])
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err and "\\x1b[31mred" in shown.out
    assert printable("ü\n\tβ") == "ü\n\tβ"


def test_a_card_with_another_source_is_refused(folder: Path) -> None:
    (folder / CARD).write_text("---\nuniversal_ct: {source: [1]}\n---\n")
    assert main(["info", str(folder)]) == 1


# --- any folder (R9) ------------------------------------------------------------------------------

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 10**9, -(10**9), 2**63, 1e-9, 16.5, 1e308, NAN, INF, -INF),
    *("", " ", "x" * 100_000, "liver", "../../../../tmp/evil", "\x1b[2J", "\ud800", "V" * 3),
    *([], {}, [[]], [None], [1, 2], [1e308] * 3, [10**9] * 3, ["a"] * 3, [16] * 100_000),
    *({"a": 1}, {"": ""}, [[1, 2, 3]], [[250, -175]], [[NAN, 1]], {"widths": [16] * 3}),
)


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything inside a configuration."""
    if here:
        yield here
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(each, (*here, key))


def put(config: Any, place: tuple[Any, ...], value: Any) -> None:
    *way, last = place
    for key in way:
        config = config[key]
    config[last] = value


def break_config(folder: Path, rng: random.Random) -> None:
    path = folder / CONFIG
    config = json.loads(path.read_text())
    every = list(places(config))
    put(config, rng.choice(every), copy.deepcopy(rng.choice(HOSTILE)))
    if rng.random() < 0.2:
        config["backbone_options"] = {"widths": copy.deepcopy(rng.choice(HOSTILE)), "full": 16}
    if rng.random() < 0.3 and isinstance(config.get("branches"), list | None):
        config.setdefault("branches", []).append(
            {
                "classes": rng.choice([["liver"], [], ["spleen", "spleen"], "liver", [5]]),
                "kind": rng.choice(["head", "side", "prompt", 1]),
                "width": rng.choice(HOSTILE),
                "replaces": True,
            }
        )
    path.write_text(json.dumps(config))


def break_text(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice([CONFIG, CARD, SUMS])
    content = bytearray(path.read_bytes())
    choice = rng.randrange(6)
    if choice == 0:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif choice == 1:
        del content[rng.randrange(len(content)) :]
    elif choice == 2:
        content = bytearray(rng.randbytes(200))
    elif choice == 3:
        content = bytearray(b"[" * 100_000)
    elif choice == 4:
        content = bytearray(b'{"format_version": ' + b"1" * 5000 + b"}")
    else:
        content = bytearray(f"---\n{bomb()}\n---\n".encode())
    path.write_bytes(content)


def break_tensors(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice([WEIGHTS, PROMPTS])
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    choice = rng.randrange(7)
    if choice == 0:
        content[8 + rng.randrange(header)] ^= 1 << rng.randrange(8)
    elif choice == 1:
        content[:8] = rng.choice([0, 1, 2**32, 2**63, 2**64 - 1]).to_bytes(8, "little")
    elif choice == 2:
        del content[rng.randrange(len(content)) :]
    elif choice == 3:
        content = bytearray(rng.randbytes(5000))
    elif choice == 4:
        shape = f'"shape":[{10 ** rng.randrange(3, 18)}]'
        text = content[8 : 8 + header].decode()
        start = text.index('"shape":[')
        text = text[:start] + shape + text[text.index("]", start) + 1 :]
        raw = text.encode()
        content = bytearray(len(raw).to_bytes(8, "little") + raw + content[8 + header :])
    else:
        state: dict[str, Tensor] = load_file(path)
        name = rng.choice(sorted(state))
        kind = rng.choice([torch.int8, torch.bool, torch.float16, torch.int64, torch.float64])
        state[name] = rng.choice(
            [state[name].to(kind), state[name][:0], state[name] * NAN, state[name].reshape(-1, 1)]
        )
        content = bytearray(save(state, {"format": "pt"}))
    path.write_bytes(content)


def try_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Load, show and use a folder: "works" or "refused", and never a traceback."""
    assert main(["info", str(folder)]) in (0, 1, 2)
    assert "Traceback" not in capsys.readouterr().err
    try:
        model = from_pretrained(folder)
        assert isinstance(model, UniversalModel)
        model.segment(CT, device="cpu", progress=False)
    except UniversalCTError as error:
        assert str(error) and "\n\n" not in str(error)
        return "refused"
    return "works"


def fuzz(folder: Path, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    rng = random.Random(seed)
    target = tmp_path / str(seed)
    shutil.copytree(folder, target)
    breaking = (break_config, break_config, break_text, break_tensors)[seed % 4]
    breaking(target, rng)
    if breaking is not break_text or rng.random() < 0.5:
        resum(target)
    with bounded():
        result = try_folder(target, capsys)
    shutil.rmtree(target)
    return result


@pytest.mark.filterwarnings("ignore")
def test_some_hostile_folders(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [fuzz(folder, seed, tmp_path, capsys) for seed in range(20)]
    assert results.count("refused") >= 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_hundred_hostile_folders(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [fuzz(folder, seed, tmp_path, capsys) for seed in range(100, 300)]
    assert results.count("refused") >= 100
    assert set(results) == {"refused", "works"}
