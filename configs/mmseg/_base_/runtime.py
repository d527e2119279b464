_base_ = 'mmseg::_base_/default_runtime.py'

custom_imports = dict(imports=['dk_detection.mmengine'])
env_cfg = dict(cudnn_benchmark=False)  # images differ in size; a search for each size would cost more than it gains
