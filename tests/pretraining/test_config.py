"""Configurations of pretraining: strict, overridable, and the same after writing and reading."""

from pathlib import Path

import pytest
import yaml
from tiny_store import tiny_config

from foundation.errors import UsageError
from foundation.pretraining.config import RunConfig
from foundation.pretraining.reading import (
    differences,
    dump,
    load_config,
    plain,
    shipped,
    smoke,
    with_store,
)
from foundation.training.sources import PhantomsConfig, ScansConfig, SynthesisConfig


def given(**changes: object) -> RunConfig:
    return load_config(tiny_config(**changes))


@pytest.mark.parametrize("name", ["swin_unetr", "unet", "universal-ct", "universal-ct-longer"])
def test_a_shipped_configuration_reads_and_writes(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    path = tmp_path / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load_config(path) == config
    assert name in shipped()


def test_the_papers_values() -> None:
    swin, unet = load_config("swin_unetr"), load_config("unet")
    for config in (swin, unet):
        (stage,) = config.stages
        assert stage.patch_size == (96, 96, 96) and stage.spacing_mm == 1.5
        assert stage.batch_size == 6
        assert config.optimizer.learning_rate == 4e-4 and config.optimizer.weight_decay == 1e-5
        assert config.schedule.kind == "cosine" and config.model.text == "clip"
        assert config.model.hu_windows == ((-175.0, 250.0),)
        datasets = [name for source in config.sources for name in source.datasets]
        assert len(datasets) == len(set(datasets)) == 16
        assert {source.weight for source in config.sources} == {1.0}
        zoomed = {
            name
            for source in config.sources
            for name in source.datasets
            if source.augmentation.zoom_probability
        }
        assert zoomed == {name for name in datasets if name.startswith("10_")}
    assert (swin.model.backbone, unet.model.backbone) == ("swin_unetr", "unet")
    assert unet.model.backbone_options == {}


def test_the_embedded_models_second_pass_sees_other_patches() -> None:
    first, second = load_config("universal-ct"), load_config("universal-ct-longer")
    assert second.seed != first.seed and second.initialise_from
    assert second.sources == first.sources and second.model == first.model
    assert second.validation == first.validation and second.stages[-1].all_cases


def test_tumour_datasets_have_their_crops() -> None:
    config = load_config("swin_unetr")
    crops = {name: source.crops for source in config.sources for name in source.datasets}
    for name, crop in crops.items():
        if name in ("04", "10_03", "10_07", "10_08"):
            assert (crop.background, crop.foreground, crop.organ, crop.tumor) == (1, 0, 1, 5)
        else:
            assert (crop.background, crop.foreground, crop.organ, crop.tumor) == (1, 2, 0, 0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.learning_rate=1", "unknown key 'optimiser'. Did you mean 'optimizer'"),
        ("optimizer.learnin_rate=1", "unknown key 'learnin_rate'. Did you mean 'learning_rate'"),
        ("sources.0.kind=scan", "kind is 'scan'. Did you mean 'scans'"),
        ("sources.5.weight=1", "no item '5'"),
        ("stages.0.patch_size=[16,16]", "expected 3 values"),
        ("stages.0.steps=0", "steps is 0; it must be 1 or more"),
        ("stages.1.all_cases=true", "nothing is held out"),
        ("stages.0.all_cases=true", "such stages come last"),
        ("stages.0.steps=two", "expected int"),
        ("stages.0.steps=true", "expected int"),
        ("model.text=bert", "choose from clip, minilm, biobert, biolinkbert, one-hot"),
        ("model.spare_places=-1", "spare_places is -1; it is 0 or more"),
        ("optimizer.layer_decay=1.5", r"layer_decay is 1.5; not in \(0, 1\]"),
        ("validation.fold=5", "fold is 5, not 0 to 4"),
        ("ema=1", "ema is 1.0"),
        ("stages=[]", "at least one"),
        ("name=7", "expected str. Put it in quotes"),
        ("seed", "is not key=value"),
        ("name.first=1", "has no parts"),
        ("name=[", "the value is not YAML"),
        ("optimizer.learning_rate='1e-3'", "optimizer.learning_rate is '1e-3'; expected float"),
        ("optimizer.learning_rate=.nan", "expected a finite float"),
        ("sources.0=3", r"sources\[0\] is 3; expected keys and values"),
    ],
)
def test_what_is_wrong_is_refused(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(tiny_config(), [override])


def test_overrides() -> None:
    overrides = ["optimizer.learning_rate=4e-4", "stages.1.steps=9", "model.text=minilm"]
    config = load_config(tiny_config(), [*overrides, "validation.fold=2"])
    assert config.optimizer.learning_rate == 4e-4
    assert [stage.steps for stage in config.stages] == [2, 9] and config.steps == 11
    assert config.model.text == "minilm" and config.validation.fold == 2


def test_classes_by_name_or_with_prompts() -> None:
    model = tiny_config()["model"]
    named = {"name": "femur", "prompt": "A computerized tomography of a femur"}
    config = given(model={**model, "classes": ["liver", named]})
    assert [each.name for each in config.model.classes] == ["liver", "femur"]
    assert config.model.classes[1].prompt.endswith("femur")


def test_the_given_mapping_stays_as_it_is() -> None:
    values = tiny_config()
    before = yaml.safe_dump(values)
    load_config(values, ["optimizer.learning_rate=1", "stages.0.steps=7", "model.classes=[liver]"])
    assert yaml.safe_dump(values) == before


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = tiny_config(store=Path("store"))
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "mine.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = load_config("configs/mine.yaml")
    assert config.store == str(folder / "store")
    assert load_config("configs/mine.yaml", ["store=here"]).store == str(tmp_path / "here")
    assert with_store(config, "there").store == str(tmp_path / "there")
    assert with_store(config, None) is config


def test_a_file_can_extend_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny_config()), encoding="utf-8")
    (tmp_path / "other.yaml").write_text("extends: base.yaml\nmodel: {text: minilm}\nema: null\n")
    base, other = load_config(tmp_path / "base.yaml"), load_config(tmp_path / "other.yaml")
    assert other.model.text == "minilm" and other.model.backbone == base.model.backbone
    assert other.ema is None and other.stages == base.stages
    (tmp_path / "loop.yaml").write_text("extends: loop.yaml\n")
    with pytest.raises(UsageError, match="extends itself"):
        load_config(tmp_path / "loop.yaml")


def test_a_missing_configuration_is_named() -> None:
    with pytest.raises(UsageError, match=r"'universalct'\. Did you mean 'universal-ct'"):
        load_config("universalct")


def test_what_may_change_on_a_resume() -> None:
    config = given()
    longer = load_config(
        tiny_config(), ["stages.1.steps=50", "schedule.decay=0.2", "workers=3", "save_every=9"]
    )
    assert differences(config, longer) == []
    other = load_config(
        tiny_config(), ["seed=2", "optimizer.learning_rate=1", "stages.1.batch_size=3"]
    )
    assert differences(config, other) == ["optimizer.learning_rate", "seed", "stages.1.batch_size"]
    one_stage = given(stages=tiny_config()["stages"][:1])
    assert "stages.1.batch_size" in differences(config, one_stage)


def test_rendered_patches_are_cubes() -> None:
    stages = [{"steps": 1, "patch_size": [16, 16, 32]}]
    assert given(stages=stages).stages[0].patch_size == (16, 16, 32)
    with pytest.raises(UsageError, match="cubic"):
        given(stages=stages, sources=[{"kind": "phantoms"}])


def test_smoke_needs_nothing_from_outside() -> None:
    config = smoke(load_config("swin_unetr"), divisor=32)
    assert config.sources == (PhantomsConfig(count=1),) and config.steps == 2
    assert config.model.text == "one-hot" and config.store is None
    assert config.stages[0].patch_size == (64, 64, 64)
    assert plain(config)["validation"]["fold"] is None


def test_kinds_of_sources() -> None:
    sources = [{"kind": "scans"}, {"kind": "synthesis"}, {"kind": "phantoms", "count": 2}]
    built = given(sources=sources).sources
    assert built == (ScansConfig(), SynthesisConfig(), PhantomsConfig(count=2))
