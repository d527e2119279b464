"""The figures of PASCAL VOC at the thresholds of a paper."""

import os
import tempfile
from collections import defaultdict
from collections.abc import Sequence

from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import voc_eval
from detectron2.utils import comm


class DkVOCEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's evaluator of PASCAL VOC, which gives AP50, AP75 and the mean of ten thresholds, at others.

    Its figures are Detectron2's, by the same function.

    Args:
        dataset_name: A data set of PASCAL VOC's, "voc_2007_test" for example.
        percent: The thresholds of the intersection over union, in percent.
    """

    def __init__(self, dataset_name: str, percent: Sequence[int] = (50, 70)) -> None:
        super().__init__(dataset_name)
        self.percent = tuple(percent)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """{"bbox": {"AP50": ..., "AP70": ...}}, 0 to 100, means over the classes; None but in the first process."""
        found = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return None
        lines = defaultdict(list)
        for predictions in found:
            for label, of_label in predictions.items():
                lines[label] += of_label
        means = dict.fromkeys((f"AP{percent}" for percent in self.percent), 0.0)
        with tempfile.TemporaryDirectory() as folder:
            template = os.path.join(folder, "{}.txt")
            for label, name in enumerate(self._class_names):
                with open(template.format(name), "w", encoding="utf-8") as file:
                    file.write("\n".join(lines[label]))
                for percent in self.percent:
                    *_, ap = voc_eval(
                        template,
                        self._anno_file_template,
                        self._image_set_path,
                        name,
                        ovthresh=percent / 100,
                        use_07_metric=self._is_2007,
                    )
                    means[f"AP{percent}"] += 100 * float(ap) / len(self._class_names)
        return {"bbox": means}
