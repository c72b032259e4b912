from .config import RunConfig as RunConfig
from .folds import Folds as Folds
from .folds import make_folds as make_folds
from .folds import read_folds as read_folds
from .reading import load_config as load_config
from .reading import with_store as with_store
from .run import Pretraining as Pretraining
from .run import pretrain as pretrain
