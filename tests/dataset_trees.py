"""Builds tiny copies of the datasets in the layouts in which they are really distributed.

Nothing in them is symmetric, and every affine is scaled, shifted and turned in its own way, so that
a flipped, transposed or shifted axis shows.
"""

import json
import locale
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from foundation.data import paper_datasets
from foundation.data.hooks import EIGHT_ORGANS
from foundation.taxonomy import TOTALSEGMENTATOR

DATASETS = paper_datasets()

SHAPE = (9, 8, 6)
DICOM_AFFINE = np.array(  # columns run to the left, rows to the back, slices to the head
    [[-0.8, 0, 0, 31.5], [0, -0.7, 0, 17.25], [0, 0, 2.5, -140.0], [0, 0, 0, 1]]
)


@dataclass
class Expected:
    """What reading a case must give. masks: source label → where it lies (X, Y, Z)."""

    id: str
    ct: np.ndarray
    affine: np.ndarray
    masks: dict[str, np.ndarray]
    annotated: tuple[str, ...]
    split: str | None = None
    image: Path = field(default_factory=Path)
    labels: Path = field(default_factory=Path)


def make_ct(seed: int, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """Random HU, air and bone included, int16."""
    return np.random.default_rng(seed).integers(-1000, 1500, shape).astype(np.int16)


def make_labels(seed: int, values: Iterable[int], shape: Sequence[int] = SHAPE) -> np.ndarray:
    """A label map with each value at random places, uint8."""
    values = [0, *values]
    labels = np.random.default_rng(seed + 100).choice(values, shape).astype(np.uint8)
    labels.flat[: len(values)] = values  # all are present
    return labels


def make_affine(seed: int, codes: str = "RAS") -> np.ndarray:
    """An affine for a file whose axes run as `codes` say, tilted by a few degrees."""
    rng = np.random.default_rng(seed + 200)
    a, b = rng.uniform(0.02, 0.06, 2)
    tilt = np.array([[1, -a, 0], [a, 1, -b], [0, b, 1]])
    tilt /= np.linalg.norm(tilt, axis=0)
    affine = np.eye(4)
    turn = np.zeros((3, 3))
    for axis, code in enumerate(codes):
        turn["RLAPSI".index(code) // 2, axis] = 1 if code in "RAS" else -1
    affine[:3, :3] = tilt @ turn @ np.diag([0.75, 0.8, 1.25])
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return affine


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def masks_of(labels: np.ndarray) -> dict[str, np.ndarray]:
    return {str(value): labels == value for value in np.unique(labels) if value}


def write_dicom(
    folder: Path,
    voxels: np.ndarray,
    affine: np.ndarray = DICOM_AFFINE,
    *,
    name: Callable[[int], str] = "1-{:03d}.dcm".format,
    series: str = "1.2.3.4",
    modality: str = "CT",
    compress: str = "",
    places: Sequence[int] | None = None,
) -> list[Path]:
    """Write voxels (X, Y, Z) as one file a slice, numbered from the head down as scanners do.

    name: of the file with a given number, from 0. places: slice indices to write, all by default.
    Returns the files in the order of the slices.
    """
    sitk = pytest.importorskip("SimpleITK")
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :2], axis=0)
    directions = (lps[:3, :2] / spacing).T.ravel()
    paths = []
    for z in range(voxels.shape[2]) if places is None else places:
        number = voxels.shape[2] - 1 - z
        image = sitk.GetImageFromArray(np.ascontiguousarray(voxels[:, :, z].T))
        image.SetSpacing(spacing.tolist())
        for tag, value in {
            "0008|0060": modality,
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{series}.{z + 1}",
            "0020|000d": "1.2.3",
            "0020|000e": series,
            "0020|0013": str(number + 1),
            "0020|0032": "\\".join(f"{mm:.6f}" for mm in lps[:3, :3] @ [0, 0, z] + lps[:3, 3]),
            "0020|0037": "\\".join(f"{cosine:.8f}" for cosine in directions),
            "0028|1052": "-1024" if modality == "CT" else "0",
            "0028|1053": "1",
        }.items():
            image.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.KeepOriginalImageUIDOn()
        if compress:
            writer.UseCompressionOn()
            writer.SetCompressor(compress)
        final = folder / name(number)
        temporary = final.with_name("slice.dcm")
        writer.SetFileName(str(temporary))
        before = locale.setlocale(locale.LC_ALL)
        writer.Execute(image)
        locale.setlocale(locale.LC_ALL, before)  # the writer leaves "C" behind
        paths.append(temporary.rename(final))
    return paths


# --- one builder per dataset: writes its tree, returns what must be read back --------------------


def _pairs(
    root: Path,
    dataset: str,
    cases: dict[str, tuple[str, str]],
    codes: str = "LPS",
    annotated: Callable[[str], tuple[str, ...]] | None = None,
) -> list[Expected]:
    """NIfTI images and labels. cases: id → path of the image, path of the labels."""
    expected = []
    for seed, (id_, (image, labels)) in enumerate(cases.items()):
        ct, affine = make_ct(seed), make_affine(seed, codes)
        values = [int(key) for key in DATASETS[dataset].label_map]
        label_map = make_labels(seed, values)
        case = Expected(id_, ct, affine, masks_of(label_map), DATASETS[dataset].annotated)
        if annotated:
            case.annotated = annotated(id_)
        case.image = write_nifti(root / image, ct, affine)
        case.labels = write_nifti(root / labels, label_map, affine)
        expected.append(case)
    return expected


def btcv(root: Path) -> list[Expected]:
    names = {n: (f"img/img{n}.nii.gz", f"label/label{n}.nii.gz") for n in ("0001", "0061")}
    few = EIGHT_ORGANS
    return _pairs(
        root, "01", names, "LAS", lambda n: few if n == "0061" else DATASETS["01"].annotated
    )


def pancreas_ct(root: Path) -> list[Expected]:
    expected = []
    for seed, number in enumerate(("0001", "0002")):
        ct, labels = make_ct(seed), make_labels(seed, DATASETS["02"].label_map)
        series = root / f"Pancreas-CT/PANCREAS_{number}/11-24-2015-PANCREAS/Pancreas-{seed}"
        write_dicom(series, ct, series=f"1.2.{seed + 1}")
        # The labels' rows run the other way than those of the DICOM files; the affine says so.
        turned = DICOM_AFFINE.copy()
        turned[:3, 3] += turned[:3, 1] * (SHAPE[1] - 1)
        turned[:3, 1] *= -1
        file = write_nifti(
            root / f"TCIA_pancreas_labels-02-05-2017/label{number}.nii.gz",
            labels[:, ::-1].astype(np.float64),
            turned,
        )
        case = Expected(number, ct, DICOM_AFFINE, masks_of(labels), DATASETS["02"].annotated)
        case.image, case.labels = series, file
        expected.append(case)
    (root / "Pancreas-CT/LICENSE").write_text("terms of use")
    return expected


def chaos(root: Path) -> list[Expected]:
    picture = pytest.importorskip("PIL.Image")
    expected = []
    for seed, number in enumerate(("1", "10")):
        ct, liver = make_ct(seed), make_labels(seed, (1,)) > 0
        folder = root / f"Train_Sets/CT/{number}"
        write_dicom(folder / "DICOM_anon", ct, name="i{:04d},0000b.dcm".format)
        ground = folder / "Ground"
        ground.mkdir()
        for z in range(SHAPE[2]):  # numbered as the slices: from the head down
            rows = (liver[:, :, z].T * 255).astype(np.uint8)
            picture.fromarray(rows).save(ground / f"liver_GT_{SHAPE[2] - 1 - z:03d}.png")
        case = Expected(number, ct, DICOM_AFFINE, {"1": liver}, ("liver",))
        case.image, case.labels = folder / "DICOM_anon", ground
        expected.append(case)
    write_dicom(root / "Train_Sets/MR/1/T2SPIR/DICOM_anon", make_ct(5), modality="MR")
    return expected


def lits(root: Path) -> list[Expected]:
    names = {
        n: (f"Training Batch {b}/volume-{n}.nii", f"Training Batch {b}/segmentation-{n}.nii")
        for b, n in ((1, "2"), (2, "10"))
    }
    return _pairs(root, "04", names, "RAS")


def kits(root: Path) -> list[Expected]:
    names = {
        n: (f"data/{n}/imaging.nii.gz", f"data/{n}/segmentation.nii.gz")
        for n in ("case_00000", "case_00001")
    }
    return _pairs(root, "05", names, "IPL")  # its arrays are stored slice by slice


def ircadb(root: Path) -> list[Expected]:
    keys = list(DATASETS["06"].label_map)
    expected = []
    for seed, number in enumerate(("1", "10")):
        ct, there = make_ct(seed), keys if seed else [k for k in keys if k != "spleen"]
        folder = root / f"3Dircadb1.{number}"
        image = folder / "PATIENT_DICOM" / ("PATIENT_DICOM" if seed else "")  # as unzippers do
        write_dicom(image, ct, name="image_{}".format)
        masks = {}
        for i, name in enumerate([*there, "livertumor01", "bone"]):
            mask = make_labels(10 * seed + i, (1,)) > 0
            stored = (mask * 255).astype(np.int16)
            write_dicom(
                folder / "MASKS_DICOM" / name, stored, name="image_{}".format, modality="OT"
            )
            masks |= {str(name): mask} if name in keys else {}
        annotated = tuple(
            c for c in DATASETS["06"].annotated if seed or c != "spleen"
        )  # no mask of the spleen: unknown, not absent
        case = Expected(number, ct, DICOM_AFFINE, masks, annotated)
        case.image, case.labels = image, folder / "MASKS_DICOM"
        expected.append(case)
    return expected


def word(root: Path) -> list[Expected]:
    names = {
        f"word_000{i}": (f"images{s}/word_000{i}.nii.gz", f"labels{s}/word_000{i}.nii.gz")
        for i, s in ((1, "Tr"), (2, "Val"))
    }
    write_nifti(root / "imagesTs/word_0003.nii.gz", make_ct(3), make_affine(3))
    return _pairs(root, "07", names, "LPS")


def abdomenct_1k(root: Path) -> list[Expected]:
    names = {
        n: (f"AbdomenCT-1K-ImagePart1/Case_{n}_0000.nii.gz", f"Mask/Case_{n}.nii.gz")
        for n in ("00001", "00002")
    }
    return _pairs(root, "08", names, "LAS")


def write_index(root: Path, **lists: list[tuple[str, str]]) -> None:
    content = {
        name: [{"image": f"./{image}", "label": f"./{label}"} for image, label in pairs]
        for name, pairs in lists.items()
    }
    (root / "dataset.json").write_text(json.dumps({"name": root.name, **content, "test": []}))


def amos(root: Path) -> list[Expected]:
    names = {
        n: (f"images{s}/{n}.nii.gz", f"labels{s}/{n}.nii.gz")
        for n, s in (("amos_0001", "Tr"), ("amos_0500", "Va"))
    }
    expected = _pairs(root / "amos22", "09", names, "LAS")
    mr = ("imagesTr/amos_0507.nii.gz", "labelsTr/amos_0507.nii.gz")
    for file in mr:
        write_nifti(root / "amos22" / file, make_labels(7, (1,)), make_affine(7))
    write_index(root / "amos22", training=[names["amos_0001"], mr], validation=[names["amos_0500"]])
    return expected


def msd(dataset: str, task: str) -> Callable[[Path], list[Expected]]:
    """A builder for one task of the Decathlon, beside another one."""

    def build(root: Path) -> list[Expected]:
        stem = task.partition("_")[2].lower()
        names = {
            n: (f"imagesTr/{n}.nii.gz", f"labelsTr/{n}.nii.gz") for n in (f"{stem}_2", f"{stem}_10")
        }
        expected = _pairs(root / task, dataset, names, "RAS")
        for image, label in names.values():  # macOS leaves these in the archives
            for path in (image, label):
                file = (root / task / path).with_name("._" + Path(path).name)
                file.write_bytes(b"\0\5\x16\7")
        write_index(root / task, training=list(names.values()))
        write_index_of_other = root / "Task02_Heart"
        write_index_of_other.mkdir()
        write_index(write_index_of_other, training=[])
        return expected

    return build


def ct_org(root: Path) -> list[Expected]:
    names = {
        n: (f"OrganSegmentations/volume-{n}.nii.gz", f"OrganSegmentations/labels-{n}.nii.gz")
        for n in ("0", "12")
    }
    expected = _pairs(root, "12", names, "LPS")
    labels = nib.load(expected[0].labels)
    voxels = np.asanyarray(labels.dataobj).copy()
    voxels[-1, -1, -1], voxels[-2, -1, -1] = 5, 6  # bones and brain have no class
    write_nifti(expected[0].labels, voxels, labels.affine)
    expected[0].masks = masks_of(voxels)
    return expected


def organ12(root: Path) -> list[Expected]:
    names = {
        n: (f"img/Organ12_{n}_0000.nii.gz", f"label/Organ12_{n}.nii.gz") for n in ("0001", "0002")
    }
    return _pairs(root, "13", names, "LAS")


def totalsegmentator(dataset: str) -> Callable[[Path], list[Expected]]:
    def build(root: Path) -> list[Expected]:
        expected = []
        for seed, (id_, split) in enumerate((("s0011", "train"), ("s0864", "test"))):
            ct, affine = make_ct(seed), make_affine(seed)
            masks = {
                name: make_labels(seed * 100 + i, (1,)) > 0
                for i, name in enumerate([*DATASETS[dataset].label_map, "vertebrae_L1"])
            }
            masks["gallbladder"] = np.zeros(SHAPE, bool)  # taken out: empty, not unknown
            for name, mask in masks.items():
                file = root / id_ / "segmentations" / f"{name}.nii.gz"
                write_nifti(file, mask.astype(np.uint8), affine)
            masks = {n: m for n, m in masks.items() if n in TOTALSEGMENTATOR}
            case = Expected(id_, ct, affine, masks, DATASETS[dataset].annotated, split)
            case.image = write_nifti(root / id_ / "ct.nii.gz", ct, affine)
            case.labels = root / id_ / "segmentations"
            expected.append(case)
        rows = [f"{each.id};50;m;{each.split}" for each in expected]
        (root / "meta.csv").write_text("\n".join(["image_id;age;gender;split", *rows]))
        return expected

    return build


TREES: dict[str, Callable[[Path], list[Expected]]] = {
    "01": btcv,
    "02": pancreas_ct,
    "03": chaos,
    "04": lits,
    "05": kits,
    "06": ircadb,
    "07": word,
    "08": abdomenct_1k,
    "09": amos,
    "10_03": msd("10_03", "Task03_Liver"),
    "10_06": msd("10_06", "Task06_Lung"),
    "10_07": msd("10_07", "Task07_Pancreas"),
    "10_08": msd("10_08", "Task08_HepaticVessel"),
    "10_09": msd("10_09", "Task09_Spleen"),
    "10_10": msd("10_10", "Task10_Colon"),
    "12": ct_org,
    "13": organ12,
    "15": totalsegmentator("15"),
    "15_v2": totalsegmentator("15_v2"),
}


def copy_tree(source: Path, target: Path) -> Path:
    """The folder `source` copied to `target`."""
    shutil.copytree(source, target)
    return target
