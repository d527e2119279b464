"""The hook that shows what a network in training looks at."""

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.engine import HookBase, SimpleTrainer

from dk_detection.detectron2.visualize_hook import DkVisualizeHook, hooks_for_pictures
from dk_detection.errors import UserError
from tests.detectron2.small import batch, detector

EXCHANGE = [{"layer": "mdconv", "select": "backbone.bottom_up.res[34].*.conv2"}]


class Watch(HookBase):
    """What the event storage holds after each iteration, as a writer finds it."""

    def __init__(self):
        self.images, self.scalars = [], []

    def after_step(self):
        self.images.append(list(self.trainer.storage._vis_data))
        self.scalars.append(dict(self.trainer.storage.latest()))
        self.trainer.storage.clear_images()


def test_pictures_and_norms_go_to_the_event_storage():
    model = detector(exchange=EXCHANGE).train()
    frozen = model.backbone.bottom_up.res2.eval()
    data = batch()
    trainer = SimpleTrainer(model, [data] * 3, torch.optim.SGD(model.parameters(), 1e-3))
    hook = DkVisualizeHook(model, data[0], period=2, layer="backbone.bottom_up.res4.5.conv2", levels=1)
    watch = Watch()
    trainer.register_hooks([hook, watch])
    # The trainer puts its model into training mode; a part that is kept out of it stays out.
    trainer.before_train = lambda: frozen.eval()
    trainer.train(0, 3)
    assert [len(images) for images in watch.images] == [0, 1, 0]
    put = watch.scalars
    ((name, picture, iteration),) = watch.images[1]
    assert (name, iteration) == ("dk_sampling", 1)
    assert picture.shape[0] == 3
    assert picture.std() > 10
    assert not any(key.startswith("offset_norm") for key in put[0])
    norm, at = put[1]["offset_norm/backbone.bottom_up.res3.0.conv2"]
    assert norm > 0
    assert at == 1
    # The network trains on as it was.
    assert model.training
    assert not frozen.training


def test_an_image_without_objects_leaves_norms_alone():
    model = detector("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0, exchange=EXCHANGE).train()
    data = {"image": batch()[0]["image"]}
    trainer = SimpleTrainer(model, [batch()], torch.optim.SGD(model.parameters(), 1e-3))
    trainer.register_hooks([DkVisualizeHook(model, data, period=1)])
    trainer.train(0, 1)
    assert trainer.storage.latest()["offset_norm/backbone.bottom_up.res4.0.conv2"][0] > 0
    assert not trainer.storage._vis_data


def test_a_config_asks_for_it():
    model, data = detector(exchange=EXCHANGE), batch()
    assert not hooks_for_pictures(model, [data], {})
    assert not hooks_for_pictures(model, [data], {"period": 0, "levels": 3})
    (hook,) = hooks_for_pictures(model, [data, batch()], {"period": 7, "levels": 2})
    assert (hook.period, hook.settings["levels"], hook.detector.network) == (7, 2, model)
    assert hook.data is data[0]
    with pytest.raises(UserError, match=r"pictures of what the network looks at: .*'depth'"):
        hooks_for_pictures(model, [data], {"period": 7, "depth": 2})
