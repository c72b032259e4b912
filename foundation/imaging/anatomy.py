"""What is usual in an adult: volumes, attenuation and place of organs.

The ranges are wide on purpose: outside of them a mask is more often wrong than the person unusual.
Where no source gives a range, there is none, and nothing is said.

Volumes: ICRP Publication 89 (2002), reference masses of the adult man and woman at 1.05 g/ml: half
of the woman's to twice the man's. Spleen, upper end: Kim et al., Radiology 2021, of 2,989 healthy
liver donors. Lungs, each: from half of the woman's functional residual capacity to 1.3 times the
man's total lung capacity (ICRP 89), of which either side has 45 to 55 %.
Attenuation: wide by choice, from fatty or unenhanced tissue to the arterial phase.
Places: mean of five open label maps; of femoral heads, hepatic vessels and celiac trunk, of 24
generated phantoms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Usual:
    """What is usual of one class.

    Attributes:
        volume_ml: Least and greatest volume of a whole organ; None where no source gives them.
        mean_hu: Least and greatest mean attenuation.
        z_mm: Where its centre lies along the body, upwards from the liver's; None for lesions.
        half_mm: Half of its extent along the body.
    """

    volume_ml: tuple[float, float] | None = None
    mean_hu: tuple[float, float] | None = None
    z_mm: float | None = None
    half_mm: float = 0.0


# name | volume ml, from to | mean HU, from to | centre above the liver's, mm | half height, mm
_TABLE = """
spleen                       |   62   322 |  -10  250 |   -5 | 50
kidney_right                 |   66   295 |  -20  350 |  -64 | 50
kidney_left                  |   66   295 |  -20  350 |  -57 | 52
gallbladder                  |            |  -20  150 |  -60 | 26
esophagus                    |   17    76 | -300  150 |   83 | 64
liver                        |  667  3430 |  -30  250 |    0 | 75
stomach                      |            | -600  300 |  -12 | 55
aorta                        |            |   10  600 |    0 | 120
inferior_vena_cava           |            |   10  450 |  -30 | 110
portal_vein_and_splenic_vein |            |   10  350 |  -28 | 26
pancreas                     |   57   267 |  -60  200 |  -45 | 38
adrenal_gland_right          |  3.1  13.4 |  -60  200 |  -11 | 16
adrenal_gland_left           |  3.1  13.4 |  -60  200 |  -17 | 18
duodenum                     |            | -200  200 |  -75 | 43
hepatic_vessel               |            |    0  350 |    4 | 41
lung_right                   |  600  5000 | -980 -400 |   75 | 110
lung_left                    |  600  5000 | -980 -400 |   75 | 110
colon                        |            | -700  300 | -125 | 150
intestine                    |            | -200  300 | -155 | 110
rectum                       |            | -400  300 | -280 | 60
urinary_bladder              |            |  -20 1500 | -290 | 26
prostate                     |            |  -20  200 | -335 | 15
femur_head_left              |            |  100  900 | -270 | 20
femur_head_right             |            |  100  900 | -270 | 20
celiac_trunk                 |            |   10  600 |  -11 | 5
kidney_tumor                 |            | -100  300 |      |
liver_tumor                  |            | -50   250 |      |
pancreas_tumor               |            | -50   250 |      |
hepatic_vessel_tumor         |            | -50   250 |      |
lung_tumor                   |            | -700  250 |      |
colon_tumor                  |            | -100  250 |      |
kidney_cyst                  |            | -50   150 |      |
"""


def _pair(cell: str) -> tuple[float, float] | None:
    numbers = [float(text) for text in cell.split()]
    return (numbers[0], numbers[1]) if numbers else None


def _read_table() -> Iterable[tuple[str, Usual]]:
    for row in _TABLE.strip().splitlines():
        name, volume, hu, place, half = (cell.strip() for cell in row.split("|"))
        centre = float(place) if place else None
        yield name, Usual(_pair(volume), _pair(hu), centre, float(half) if half else 0.0)


USUAL: Mapping[str, Usual] = dict(_read_table())
