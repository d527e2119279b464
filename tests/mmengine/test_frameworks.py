"""The layers and networks in MMPretrain and MMSegmentation, where MMDetection is not installed."""

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("mmengine", reason="MMEngine is not installed")


def run_without_mmdet(code: str) -> None:
    code = "import sys\nsys.modules['mmdet'] = None\nimport dk_detection.mmengine\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_mmpretrain():
    pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")
    run_without_mmdet("""
        import torch
        from mmengine.registry import DefaultScope
        from mmpretrain.registry import MODELS
        from mmpretrain.structures import DataSample
        from dk_detection.layers import DeformKernelConv2d, LocalDeformKernel2d

        def check(scope, backbone, in_channels, layer, number):
            head = dict(type='LinearClsHead', num_classes=4, in_channels=in_channels)
            model = dict(
                type='mmpretrain.ImageClassifier', backbone=backbone, neck=dict(type='GlobalAveragePooling'), head=head)
            with DefaultScope.overwrite_default_scope(scope):
                net = MODELS.build(model)
            assert sum(isinstance(m, layer) for m in net.modules()) == number
            net.init_weights()
            samples = [DataSample().set_gt_label(i) for i in range(2)]
            net.loss(torch.rand(2, 3, 65, 63), samples)['loss'].backward()
            # Distributed training waits for the gradient of every parameter.
            assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
            net.eval()
            assert [s.pred_score.shape for s in net.predict(torch.rand(2, 3, 65, 63))] == [(4,), (4,)]

        exchange = dict(layer='dk', select='layer4.*.conv2')
        small = dict(type='DkDeformable', depth=18, stem_channels=8, base_channels=8, exchange=exchange)
        check('mmpretrain', small | dict(network='ResNet'), 64, LocalDeformKernel2d, 2)
        check(None, small | dict(network='ResNet', _scope_='mmpretrain'), 64, LocalDeformKernel2d, 2)
        check(None, small | dict(network='mmpretrain.ResNet'), 64, LocalDeformKernel2d, 2)
        check('mmpretrain', dict(type='DkDeformable', network='DkResNetDW', blocks=(1, 1, 1, 1), exchange=exchange),
              2048, LocalDeformKernel2d, 1)
        check('mmpretrain', dict(type='DkDeformable', network='DkMobileNetV2', width_mult=0.25,
              exchange=dict(layer='dkdconv', select='features.1[5-7].conv.1.0')), 1280, DeformKernelConv2d, 3)
    """)


def test_mmsegmentation():
    pytest.importorskip("mmseg", reason="MMSegmentation is not installed")
    run_without_mmdet("""
        import torch
        from mmengine.config import ConfigDict
        from mmengine.registry import init_default_scope
        from mmengine.structures import PixelData
        from mmseg.registry import MODELS
        from mmseg.structures import SegDataSample
        from dk_detection.layers import DeformConv2d

        init_default_scope('mmseg')
        net = MODELS.build(ConfigDict(
            type='EncoderDecoder',
            data_preprocessor=dict(type='SegDataPreProcessor'),
            backbone=dict(
                type='ResNetV1c', depth=50, dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1), contract_dilation=True,
                stem_channels=8, base_channels=8, dcn=dict(type='DkDeformConv2d'),
                stage_with_dcn=(False, False, False, True)),
            decode_head=dict(
                type='ASPPHead', in_channels=256, in_index=3, channels=8, dilations=(1, 2), num_classes=3,
                norm_cfg=dict(type='BN'), align_corners=False),
            train_cfg=dict(), test_cfg=dict(mode='whole')))
        layers = [m for m in net.modules() if isinstance(m, DeformConv2d)]
        assert [layer.dilation for layer in layers] == [(2, 2), (4, 4), (4, 4)]
        net.init_weights()
        sample = SegDataSample(metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96)))
        sample.gt_sem_seg = PixelData(data=torch.randint(3, (1, 64, 96)))
        net.loss(torch.rand(2, 3, 64, 96), [sample, sample])['decode.loss_ce'].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        net.eval()
        assert net.predict(torch.rand(1, 3, 64, 96))[0].pred_sem_seg.data.shape == (1, 64, 96)
    """)


def test_missing_mmengine_is_said():
    code = "import sys\nsys.modules['mmengine'] = None\ntry:\n import dk_detection.mmengine\n"
    code += "except ImportError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("dk_detection.mmengine needs MMEngine")
    assert "pip install" in done.stdout
