"""The generated world: read as any dataset, labelled in part, no body twice, the same each time."""

from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
from benchmark_scripts import script

from foundation import UsageError, get_dataset


@pytest.fixture(scope="module")
def world() -> ModuleType:
    return script("world")


@pytest.fixture(scope="module")
def folder(world: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "one"
    world.build_world(folder, "smoke", progress=False)
    return folder


@pytest.mark.slow
def test_every_dataset_is_read_by_its_yaml(world: ModuleType, folder: Path) -> None:
    opened = world.build_world(folder, "smoke", progress=False)
    for part in world.DATASETS:
        dataset = get_dataset(str(folder / f"{part.name}.yaml"))
        cases = dataset.find(folder / part.name)
        assert len(cases) == world.SCALES["smoke"].count(part)
        assert set(cases[0].annotated) == set(part.classes)
    assert set(opened.datasets("train")) & {"test", "structures"} == set()


@pytest.mark.slow
def test_large_organs_are_those_of_the_test_scans(world: ModuleType, folder: Path) -> None:
    opened = world.build_world(folder, "smoke", progress=False)
    assert {"liver", "lung_left"} <= set(opened.large_organs)
    assert not {"celiac_trunk", "adrenal_gland_left"} & set(opened.large_organs)
    value = world.TISSUES.index("spleen")
    spleens = []
    for path in (folder / "test" / "labels").iterdir():
        voxels = int((np.asanyarray(nib.load(path).dataobj) == value).sum())
        spleens += [voxels * opened.spacing_mm**3 / 1000] if voxels else []
    assert opened.volumes_ml["spleen"] == pytest.approx(np.mean(spleens), abs=0.01)


@pytest.mark.slow
def test_labels_hold_only_what_is_annotated(world: ModuleType, folder: Path) -> None:
    part = next(p for p in world.DATASETS if p.name == "kidney")
    dataset = get_dataset(str(folder / "kidney.yaml"))
    meant = set()
    for path in (folder / "kidney" / "labels").iterdir():
        values = set(np.unique(np.asanyarray(nib.load(path).dataobj)).tolist()) - {0}
        meant |= {name for names in dataset.classes_of(map(str, values)).values() for name in names}
    assert "kidney_tumor" in meant and meant <= set(part.classes)


@pytest.mark.slow
def test_a_tumour_of_the_right_kidney_lies_in_it(world: ModuleType, folder: Path) -> None:
    for path in (folder / "kidney" / "labels").iterdir():
        image = nib.load(path)
        labels = np.asanyarray(image.dataobj)
        for value, (_, organ) in enumerate(world.SIDED, start=len(world.TISSUES)):
            if organ.startswith("kidney") and (labels == value).any():
                x_mm = (image.affine @ [*np.argwhere(labels == value).mean(axis=0), 1])[0]
                assert (x_mm > 0) == organ.endswith("_right")


@pytest.mark.slow
def test_no_two_scans_show_the_same_body(folder: Path) -> None:
    images = [np.asanyarray(nib.load(p).dataobj).tobytes() for p in folder.glob("*/images/*")]
    assert len(set(images)) == len(images) > 20


@pytest.mark.slow
def test_the_same_seed_gives_the_same_world(
    world: ModuleType, folder: Path, tmp_path: Path
) -> None:
    one = world.build_world(folder, "smoke", progress=False)
    other = world.build_world(tmp_path / "again", "smoke", progress=False)
    assert one.sha256 == other.sha256
    with pytest.raises(UsageError, match="another world"):
        world.build_world(folder, "smoke", seed=2, progress=False)
    (tmp_path / "full").mkdir()
    with pytest.raises(UsageError, match="is no world"):
        world.build_world(tmp_path / "full", "smoke", progress=False)
