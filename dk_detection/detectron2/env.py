"""For DETECTRON2_ENV_MODULE=dk_detection.detectron2.env: Detectron2's own train_net.py then reads our YAML keys."""

from detectron2.config import defaults

from dk_detection.detectron2.config import add_dk_config


def setup_environment() -> None:
    """Adds our keys to the defaults that `get_cfg` copies. Detectron2 calls this when it is imported."""
    add_dk_config(defaults._C)
