"""Backbones by name."""

import pytest

from dk_detection.complexity.backbones import count_backbone
from dk_detection.complexity.counting import total
from dk_detection.errors import UserError


def test_by_name():
    # The figures that torchvision's documentation gives for it: 25557032 parameters, 4.09 GFLOPs.
    parts = count_backbone("resnet50")
    assert [part.name for part in parts] == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert total(parts).parameters == 25557032
    assert round(total(parts).multiply_adds / 1e9, 2) == 4.09


def test_layers_and_shape():
    rigid = total(count_backbone("mobilenet-v2", (64, 96)))
    last = "features.17.conv.1.0"
    mdconv = total(count_backbone("mobilenet-v2", (64, 96), [dict(layer="mdconv", select=last)]))
    more = [dict(layer="mdconv", select=last), dict(layer="dk", select="features.1[45].conv.1.0", scope_size=5)]
    both = total(count_backbone("mobilenet-v2", (64, 96), more))
    branch = 960 * 27 * 9  # 2 x 3 positions
    assert mdconv.parameters - rigid.parameters == branch + 27
    assert mdconv.multiply_adds - rigid.multiply_adds == 6 * (branch + 960 * 9 * 3)
    assert both.parameters > mdconv.parameters and both.multiply_adds > mdconv.multiply_adds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="resnet50dw"), "there is no backbone 'resnet50dw'; there are resnet50-dw, mobilenet-v2, aligned-"),
        (dict(name="fasterrcnn_resnet50_fpn"), "there is no backbone"),
        (dict(name="resnet50-dw", exchange=[dict(layer="dcn", select="*")]), "counted: no layer has the token 'dcn'"),
        (
            dict(name="resnet50-dw", exchange=[dict(layer="dk", select="layer*.conv2", scope=5)]),
            "resnet50-dw cannot be counted: .*'scope'",
        ),
        (dict(name="resnet18", exchange=[dict(layer="dk", select="layer9.*")]), "matches no rigid nn.Conv2d"),
        (dict(name="resnet18", exchange=[dict(layer="dk")]), "resnet18 cannot be counted: exchange needs select"),
        (dict(name="alexnet", shape=(8, 8)), "alexnet cannot be counted: .*too small"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        count_backbone(**arguments)
