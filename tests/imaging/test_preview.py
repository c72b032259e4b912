"""The preview shows the right slices, the right way round, in true proportions."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread

from foundation.errors import UsageError
from foundation.imaging import preview
from foundation.imaging.frame import Frame
from foundation.imaging.legend import colours, display_name
from foundation.imaging.preview import arrange, informative_slices, save_preview
from foundation.imaging.probabilities import ProbabilityMap
from foundation.imaging.result import Segmentation
from foundation.imaging.volumes import Volume, read_ct

SHAPE = (40, 30, 20)
MM = (1.0, 1.5, 4.0)


def ct_and_masks(codes: str = "RAS"):
    """Air with a body; the liver is the patient's right, front and upper part."""
    hu = np.full(SHAPE, -1000, np.float32)
    hu[5:35, 5:25] = 40
    liver = np.zeros(SHAPE, np.uint8)
    liver[25:35, 15:25, 12:18] = 1
    affine = np.diag([*MM, 1])
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
    )
    image = nib.Nifti1Image(hu, affine).as_reoriented(turn)
    mask = nib.Nifti1Image(liver, affine).as_reoriented(turn)
    return read_ct(image), {"liver": np.asarray(mask.dataobj) > 0}


def drawn(ct, masks, tmp_path, monkeypatch):
    """What `save_preview` hands to the drawing, and the picture."""
    seen = {}
    draw = preview._draw

    def spy(panels, overlays, legend, title):
        seen.update(panels=panels, overlays=overlays, legend=legend)
        return draw(panels, overlays, legend, title)

    monkeypatch.setattr(preview, "_draw", spy)
    path = save_preview(ct, masks, tmp_path / "new" / "preview.png")
    assert [p.name for p in path.parent.iterdir()] == ["preview.png"]
    return seen, imread(path)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SLA"])
def test_orientation_is_radiological(tmp_path, monkeypatch, codes):
    seen, _ = drawn(*ct_and_masks(codes), tmp_path, monkeypatch)
    axial, coronal, sagittal = (np.argwhere(o[..., 3]).mean(axis=0) for o in seen["overlays"])
    rows, columns = np.array(SHAPE)[[1, 0]] / 2
    assert axial[1] < columns and axial[0] < rows  # right of the patient: left; front: top
    assert coronal[1] < columns and coronal[0] < SHAPE[2] / 2  # head: top
    assert sagittal[1] < rows and sagittal[0] < SHAPE[2] / 2  # front: left
    assert [panel.left_mark for panel in seen["panels"]] == ["R", "R", "A"]


@pytest.mark.parametrize("codes", ["RAS", "SLA"])
def test_proportions_follow_the_spacing(tmp_path, monkeypatch, codes):
    seen, _ = drawn(*ct_and_masks(codes), tmp_path, monkeypatch)
    axial, coronal, sagittal = seen["panels"]
    assert (axial.aspect, coronal.aspect) == pytest.approx((1.5, 4.0))
    assert sagittal.aspect == pytest.approx(4 / 1.5)
    assert (coronal.width_mm, coronal.height_mm) == pytest.approx((40, 80))


def test_picture_is_coloured_where_the_organ_is(tmp_path, monkeypatch):
    _, picture = drawn(*ct_and_masks(), tmp_path, monkeypatch)
    red, green, blue = (picture[..., channel] for channel in range(3))
    coloured = np.abs(red - blue) > 0.1
    assert 0.01 < coloured.mean() < 0.5
    _, grey = drawn(ct_and_masks()[0], {}, tmp_path, monkeypatch)
    assert not (np.abs(grey[..., 0] - grey[..., 2]) > 0.1).any()
    assert (green > 0).any()


def test_legend_names_the_classes_and_their_volumes(tmp_path, monkeypatch):
    ct, masks = ct_and_masks()
    masks["my_structure"] = masks["liver"] & (np.indices(SHAPE)[2] < 14)
    masks["spleen"] = np.zeros(SHAPE, bool)
    seen, _ = drawn(ct, masks, tmp_path, monkeypatch)
    ml = masks["liver"].sum() * 6 / 1000
    assert [text for text, _ in seen["legend"]] == [
        f"Liver  {ml:.1f} ml",
        f"My structure  {ml / 3:.1f} ml",
    ]
    assert seen["legend"][0][1] == colours(["liver"])["liver"]
    assert display_name("kidney_left") == "Left kidney"
    assert len(set(colours([f"part_{i}" for i in range(8)]).values())) > 4  # own names differ


def a_result(ct) -> Segmentation:
    """Three boxes, one of which is the liver's; one reaches the border, one class is empty."""
    frame = Frame.of(ct, (2.0, 2.0, 4.0))
    rng = np.random.default_rng(0)
    corners = {"liver": (5, 4, 8), "spleen": (0, 0, 0), "aorta": (12, 10, 2)}
    maps = {
        name: ProbabilityMap(rng.integers(80, 256, (7, 9, 6)).astype(np.uint8), corner)
        for name, corner in corners.items()
    }
    classes = (*maps, "stomach")
    return Segmentation(
        volume=ct, frame=frame, maps=maps, classes=classes,
        label_values={name: value for value, name in enumerate(classes, 1)},
        parents=dict.fromkeys(classes),
    )  # fmt: skip


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SLA", "PIR"])
def test_a_result_is_drawn_from_its_boxes_as_from_its_masks(tmp_path, monkeypatch, codes):
    """No mask and no CT is unfolded as a whole, and the picture is the same to the pixel."""
    ct, _ = ct_and_masks(codes)
    result = a_result(ct)
    from_masks, picture = drawn(
        ct, {name: result.mask(name) for name in result.classes}, tmp_path / "masks", monkeypatch
    )

    def whole(*_: object) -> None:
        raise AssertionError("unfolded as a whole")

    monkeypatch.setattr(Segmentation, "mask", whole)
    monkeypatch.setattr(Volume, "array", property(whole))
    from_boxes, same = drawn(ct, result, tmp_path / "boxes", monkeypatch)
    for before, after in zip(from_masks["panels"], from_boxes["panels"], strict=True):
        assert np.array_equal(before.image, after.image) and before.title == after.title
    for before, after in zip(from_masks["overlays"], from_boxes["overlays"], strict=True):
        assert np.array_equal(before[..., 3], after[..., 3]) and after[..., 3].any()
    assert [text for text, _ in from_boxes["legend"]] == [t for t, _ in from_masks["legend"]]
    assert [shade for _, shade in from_boxes["legend"]] == [
        result.colours[name] for name in result.present
    ]
    assert picture.shape == same.shape


@pytest.mark.parametrize("codes", ["RAS", "PIR"])
def test_the_panels_are_slices_of_the_ct(tmp_path, monkeypatch, codes):
    reference, masks = ct_and_masks("RAS")
    ct, turned = ct_and_masks(codes)
    seen, _ = drawn(ct, turned, tmp_path, monkeypatch)
    x, y, z = informative_slices([preview.areas_of(masks["liver"])], SHAPE)
    hu = reference.array
    expected = [hu[:, :, z], hu[:, y], hu[x]]
    for panel, plane in zip(seen["panels"], expected, strict=True):
        assert np.array_equal(panel.image, plane[::-1, ::-1].T)


def test_areas_are_counts_of_each_slice():
    mask = np.random.default_rng(0).random((5, 6, 7)) < 0.3
    found = preview.areas_of(mask)
    assert [areas.tolist() for areas in found] == [
        [int(mask.take(i, axis).sum()) for i in range(mask.shape[axis])] for axis in range(3)
    ]


def test_slices_show_most_structures():
    areas = np.zeros((2, 3, 10))
    areas[0, :, 2:9] = 1000  # a large structure
    areas[1, :, 7] = 5  # and a small one
    assert informative_slices([tuple(a) for a in areas], (10, 10, 10)) == (7, 7, 7)
    assert informative_slices([], (10, 8, 6)) == (5, 4, 3)


def test_the_panels_of_a_slab_are_below_each_other():
    width, height, grid = arrange([1.1, 6.0, 5.5], 14.0)
    assert (grid["nrows"], grid["ncols"]) == (3, 1)
    assert width == 7 and min(grid["height_ratios"]) > 1  # inches: side by side they had 1.1
    assert height > sum(grid["height_ratios"])  # room for the titles
    assert arrange([1.1, 0.9, 0.8], 14.0)[2]["nrows"] == 1


def test_a_dollar_in_a_name_is_a_dollar(tmp_path, monkeypatch):
    ct, masks = ct_and_masks()
    ct = replace(ct, path=Path("$\\frac$.nii.gz"))
    seen, _ = drawn(ct, {"$\\frac$": masks["liver"]}, tmp_path, monkeypatch)
    assert seen["legend"][0][0].startswith("$\\frac$")


def test_no_masks_and_many_masks_draw(tmp_path, monkeypatch):
    ct, masks = ct_and_masks()
    drawn(ct, {}, tmp_path, monkeypatch)
    many = {f"part_{i}": masks["liver"] for i in range(32)}
    _, picture = drawn(ct, many, tmp_path, monkeypatch)
    assert picture.shape[1] < 3000


def test_global_matplotlib_state_is_left_alone(tmp_path):
    backend = matplotlib.rcParams._get_backend_or_none()
    save_preview(*ct_and_masks(), tmp_path / "p.png")
    assert matplotlib.rcParams._get_backend_or_none() == backend


def test_wrong_arguments(tmp_path):
    ct, _ = ct_and_masks()
    with pytest.raises(UsageError, match=r"\.png"):
        save_preview(ct, {}, tmp_path / "p.jpg")
    with pytest.raises(UsageError, match="shape"):
        save_preview(ct, {"liver": np.ones((3, 3, 3), bool)}, tmp_path / "p.png")
    assert not list(tmp_path.iterdir())
