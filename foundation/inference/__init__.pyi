from .sliding_window import window_size as window_size
from .sliding_window import window_starts as window_starts
