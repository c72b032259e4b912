"""Any network with a `config` and `forward(image, channels)` is segmented and scored like ours."""

from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets.unet import UNet
from torch import Tensor, nn
from tuning_trees import SPACING_MM, write_folders

from foundation.config import ClassSpec, NetworkConfig, Preprocessing
from foundation.data.naming import NewClass
from foundation.errors import UsageError
from foundation.evaluation.scoring import evaluate
from foundation.inference.predict import segment_volume
from foundation.tuning.data import TuningData, read_data

CLASSES = ("vertebrae_L1", "hip_left", "hip_right")
PRE = Preprocessing(
    spacing_mm=(SPACING_MM,) * 3,
    patch_size=(16, 16, 16),
    hu_windows=((-1000.0, 1000.0),),
    hu_mean_std=((40.0, 300.0),),
)


class Wrapped(nn.Module):
    """A network of MONAI's, with what ours asks of one."""

    def __init__(self, net: nn.Module, activation: Any) -> None:
        super().__init__()
        self.net = net
        self.config = NetworkConfig(
            name="monai",
            classes=tuple(map(ClassSpec, CLASSES)),
            preprocessing=PRE,
            activation=activation,
            divisor=4,
        )

    def forward(self, image: Tensor, channels: Any = None) -> Tensor:
        logits: Tensor = self.net(image)
        softmax = self.config.activation == "softmax"
        return logits if softmax or channels is None else logits[:, channels]


class Unfit(Wrapped):
    """Gives whatever its network gives."""

    def forward(self, image: Tensor, channels: Any = None) -> Tensor:
        logits: Tensor = self.net(image)
        return logits


def wrapped(activation: str) -> Wrapped:
    count = len(CLASSES) + (activation == "softmax")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet(3, 1, count, channels=(8, 16, 16), strides=(2, 2))
        return Wrapped(net, activation).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TuningData:
    root = tmp_path_factory.mktemp("scans")
    return read_data(
        write_folders(root / "scans", cases=3),
        classes=[NewClass(name, labels=(name,)) for name in CLASSES],
        work=root / "work",
        spacing_mm=SPACING_MM,
        workers=1,
        progress=False,
    )


@pytest.mark.filterwarnings("ignore:The given tuple")  # all of it is body
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_network_of_monai_is_segmented(activation: str) -> None:
    network = wrapped(activation)
    hu = np.random.default_rng(0).uniform(-170, 250, (16, 16, 16)).astype(np.float32)
    hu[0] = -170  # all of it is body, and one window
    found = segment_volume(
        network, (hu, np.diag([SPACING_MM] * 3 + [1.0])), postprocess=False, progress=False
    )
    with torch.no_grad():
        logits = network((torch.from_numpy(hu)[None, None] - 40) / 300)[0]
    winner = logits.argmax(0)
    for channel, name in enumerate(CLASSES):
        mask = winner == channel + 1 if activation == "softmax" else logits[channel] > 0
        assert 0 < mask.sum() < mask.numel()
        assert np.mean(found.mask(name) == mask.numpy()) > 0.99  # steps of 1/255


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_network_of_monai_is_evaluated(activation: str, data: TuningData) -> None:
    scores = evaluate(wrapped(activation), data.train, postprocess=False, progress=False)
    assert set(scores.classes) <= set(CLASSES) and len(scores.cases) == len(data.train)
    assert 0 < (scores.mean(scores.classes) or 0) < 1


def test_training_is_left_as_it_was() -> None:
    network = wrapped("sigmoid").train()
    hu = np.full((16, 16, 16), 40.0, np.float32)
    hu[0] = -1000
    segment_volume(network, (hu, np.eye(4) * SPACING_MM), postprocess=False, progress=False)
    assert network.training and network.net.training


@pytest.mark.parametrize(
    ("given", "wanted", "message"),
    [
        ("sigmoid", "softmax", r"\(1, 3, 16, 16, 16\), not \(1, 4, .* background and all classes"),
        ("softmax", "sigmoid", r"\(1, 4, 16, 16, 16\), not \(1, 3, .* returns those asked"),
    ],
)
def test_logits_that_do_not_fit_the_configuration_are_refused(
    given: str, wanted: str, message: str
) -> None:
    network = Unfit(wrapped(given).net, wanted)
    hu = np.full((16, 16, 16), 40.0, np.float32)
    hu[0] = -1000
    with pytest.raises(UsageError, match=message):
        segment_volume(network, (hu, np.eye(4) * SPACING_MM), progress=False)


def test_a_network_needs_no_weights() -> None:
    """Nothing but the contract is read."""

    class Bright(nn.Module):
        config = NetworkConfig(name="bright", classes=(ClassSpec("bone"),))

        def forward(self, image: Tensor, channels: Any = None) -> Tensor:
            return 100 * (image - 0.9)

    hu = np.full((20, 20, 20), -1000, np.float32)
    hu[5:15, 5:15, 5:15] = 250
    found = segment_volume(Bright(), (hu, np.eye(4) * 1.5), progress=False)
    assert np.array_equal(found.mask("bone"), hu == 250)
