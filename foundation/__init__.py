"""universal-ct: one text-driven model for 25 organs and 6 kinds of tumour in CT.

from foundation import from_pretrained

model = from_pretrained("universal-ct")
print(model.segment("ct.nii.gz").volumes_ml)
"""

import lazy_loader

__version__ = "0.1.0"

# Names load on first use, so that `universal-ct --help` imports no torch: see `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
