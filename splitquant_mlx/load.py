from splitquant_mlx.loader import *  # noqa  (to be removed)
