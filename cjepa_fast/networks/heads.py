import torch.nn as nn

from cjepa_fast.losses.second_moment import GlobalBatchNorm
from cjepa_fast.losses.second_moment import Projector as _P


class Projector(_P):
    def __init__(self, width, widths):
        nn.Module.__init__(self)
        modules = []
        for index, out in enumerate(widths):
            modules.append(nn.Linear(width, out, bias=False))
            width = out
            if index < len(widths) - 1:
                modules += [GlobalBatchNorm(out), nn.ReLU()]
        self.layers = nn.Sequential(*modules)
