"""Figure 1: cosines, groups and what is measured of them, on embeddings whose answer is known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_scripts import script

from foundation import CLASSES, UsageError

pytest.importorskip("sklearn")
figure1 = script("figure1_similarity")


def test_each_class_has_one_group_and_lesions_that_of_their_organ() -> None:
    grouped = [name for names in figure1.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(each.name for each in CLASSES if each.kind == "organ")
    group = dict(zip((each.name for each in CLASSES), figure1.groups(), strict=True))
    assert group["kidney_tumor"] == group["kidney_cyst"] == group["kidney_left"]
    assert group["lung_tumor"] == group["lung_right"] != group["liver_tumor"]


def test_centring_removes_what_all_embeddings_share() -> None:
    own = torch.eye(4)[:, [0, 1, 2, 3, 0]]
    shared = own + 100.0
    assert figure1.cosines(shared, centred=False).min() > 0.999
    centred = figure1.cosines(shared, centred=True)
    np.testing.assert_allclose(centred, figure1.cosines(own, centred=True), atol=1e-4)
    assert centred[0, 1] < 0


@pytest.mark.slow
def test_embeddings_that_follow_the_groups_are_told_from_those_that_do_not() -> None:
    labels = figure1.groups()
    grouped = torch.eye(labels.max() + 1)[labels] + 0.01 * torch.eye(len(labels), 7)
    found = figure1.describe(figure1.cosines(grouped, centred=False), labels)
    assert found["within"].value > 0.99 and found["between"].value < 0.05
    assert found["difference"].low > 0.9
    assert found["silhouette"].value > 0.9 and found["random groupings"].value < 0.01
    torch.manual_seed(0)
    noise = figure1.cosines(torch.randn(32, 64), centred=False)
    found = figure1.describe(noise, labels)
    assert found["difference"].low < 0 < found["difference"].high
    assert found["random groupings"].value > 0.05


@pytest.mark.slow
def test_one_hot_vectors_know_nothing_of_anatomy() -> None:
    found = figure1.describe(figure1.cosines(torch.eye(32), centred=False), figure1.groups())
    assert found["within"].value == found["between"].value == found["silhouette"].value == 0
    assert found["random groupings"].value == 1


def test_a_tensor_of_embeddings_is_read(tmp_path: Path) -> None:
    rows = torch.arange(64.0).reshape(32, 2)
    torch.save(rows.half(), tmp_path / "txt_encoding.pth")
    assert torch.equal(figure1.read_embeddings(tmp_path / "txt_encoding.pth"), rows)
    torch.save(rows[:5], tmp_path / "few.pth")
    with pytest.raises(UsageError, match=r"shape \(5, 2\); give \(32, D\)"):
        figure1.read_embeddings(tmp_path / "few.pth")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot be read"):
        figure1.read_embeddings(tmp_path / "bad.pth")


def test_the_prompts_of_weights_are_read() -> None:
    rows = figure1.read_embeddings(Path("universal-ct"))
    assert rows.shape == (32, 384)
