"""A network of nine layers that splits into branches."""

from torch import Tensor, nn


class Shallow9(nn.Module):
    """Nine 3x3 convolutions, the last three once for each branch (Differentiable Kernel Evolution, 2019, Section 7).

    The paper says: nine layers, a theoretical receptive field of 78x78, two branches from the 7th layer on, which start
    alike, without dilation. What it leaves open is chosen here. The layers 1 and 7 have strides 1 and 2; behind the
    first and the third is a maximum over 2x2; that makes 78 pixels and stride 8. Each convolution is followed by a
    normalisation and a ReLU.

    Args:
        branches: How many there are.
        width: Channels of the first layer. The layers 2 and 3 have twice, 4 to 6 four times, 7 to 9 eight times as
            many.

    Attributes:
        out_channels, out_strides: Of each of the features.

    Raises:
        ValueError: An argument is below 1.
    """

    def __init__(self, *, branches: int = 2, width: int = 16) -> None:
        super().__init__()
        for name, value in (("branches", branches), ("width", width)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {value}")
        self.shared = nn.Sequential(
            _layer(3, width),
            nn.MaxPool2d(2, ceil_mode=True),
            _layer(width, 2 * width),
            _layer(2 * width, 2 * width),
            nn.MaxPool2d(2, ceil_mode=True),
            _layer(2 * width, 4 * width),
            _layer(4 * width, 4 * width),
            _layer(4 * width, 4 * width),
        )
        self.branches = nn.ModuleList(
            nn.Sequential(
                _layer(4 * width, 8 * width, stride=2), _layer(8 * width, 8 * width), _layer(8 * width, 8 * width)
            )
            for _ in range(branches)
        )
        self.out_channels, self.out_strides = (8 * width,) * branches, (8,) * branches

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """[N, 3, H, W] to the map of each branch, [N, out_channels, H / 8, W / 8], sizes rounded up."""
        x = self.shared(input)
        return tuple(branch(x) for branch in self.branches)


def _layer(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
