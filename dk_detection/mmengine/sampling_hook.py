"""Adds to the figures of an evaluation how much the network deforms."""

from contextlib import ExitStack

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from dk_detection.visualization import SamplingFigures, listening


@HOOKS.register_module(force=True)
class DkSamplingHook(Hook):
    """Adds the figures of `SamplingFigures` to the metrics of each validation, as "sampling/offset" and so on."""

    priority = "HIGHEST"  # before MMEngine takes note of the metrics

    def before_val_epoch(self, runner) -> None:
        self.seen, self.stack = SamplingFigures(), ExitStack()

    def before_val_iter(self, runner, batch_idx, data_batch=None) -> None:
        self.calls = self.stack.enter_context(listening(runner.model))

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.stack.close()
        self.seen.update(self.calls)

    def after_val_epoch(self, runner, metrics=None) -> None:
        metrics.update({f"sampling/{name}": value for name, value in self.seen.figures().items()})
