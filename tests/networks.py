"""Networks as tests of conversion and of checkpoints need them."""

from torch import nn


def settled(net: nn.Module) -> nn.Module:
    """A network as after training: no statistic of a batch normalisation is that of the start."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.1)
    net.eval()  # mmdet's ResNet returns None here
    return net
