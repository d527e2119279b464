"""Pictures and figures of what a network looks at, while it is trained."""

from mmdet.registry import HOOKS
from mmdet.structures.bbox import get_box_tensor
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper


@HOOKS.register_module(force=True)
class DkVisualizeHook(Hook):
    """Shows every n iterations what the network looks at in an image of the batch, and how far its offsets go.

    The picture, `dk_sampling`, and the norms, `offset_norm/<layer>`, go to the run's visualizer, and so to each of its
    backends; the largest norm is `offset_norm` in the log. Norms are root mean squares: in pixels of the layer's input,
    for RoI pooling in units of gamma * RoI size, for deformable kernels, `<layer>/kernel`, in cells of the scope. A
    config adds::

        custom_hooks = [dict(type='DkVisualizeHook', interval=500)]
        visualizer = dict(vis_backends=[dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')])

    Args:
        interval: Number of iterations from one picture to the next.
        layer, levels: As `DkContactSheetHook`'s.
        score_thr: Predictions with a lower score are not drawn.
    """

    def __init__(self, interval: int = 500, layer: str | None = None, levels: int = 3, score_thr: float = 0.3) -> None:
        self.interval = interval
        self.settings = dict(layer=layer, levels=levels, score=score_thr)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.rank != 0 or not self.every_n_train_iters(runner, self.interval):
            return
        # Here, so that a training that draws nothing needs nothing to draw with.
        from dk_detection.mmdet.visualize import MMDetDetector
        from dk_detection.visualization import kinds, pictures

        network = runner.model.module if is_model_wrapper(runner.model) else runner.model
        detector = MMDetDetector(network, classes=runner.visualizer.dataset_meta.get("classes"))
        instances = data_batch["data_samples"][0].gt_instances
        figure, norms = kinds.training_picture(
            detector,
            data_batch["inputs"][0],
            get_box_tensor(instances.bboxes),
            instances.labels,
            kinds.Options(**self.settings, say=runner.logger.warning),
        )
        step = runner.iter + 1
        if figure is not None:
            runner.visualizer.add_image("dk_sampling", pictures.to_array(figure), step)
        if norms:
            runner.visualizer.add_scalars({f"offset_norm/{name}": value for name, value in norms.items()}, step)
            runner.message_hub.update_scalar("train/offset_norm", max(norms.values()))
