from .expected_dice import Calibration as Calibration
from .expected_dice import calibrate as calibrate
from .writing import write_label_map as write_label_map
