"""Make OpenVINO's folder of a checkpoint, with float32 weights: CHECKPOINT FOLDER."""

import sys
from pathlib import Path

sys.modules["torchvision"] = None  # not needed, and one that is built for another torch would stop transformers

from optimum.exporters.openvino import main_export  # noqa: E402
from optimum.intel import OVConfig  # noqa: E402

main_export(
    sys.argv[1],
    output=Path(sys.argv[2]),
    task="text-to-image",
    local_files_only=True,
    ov_config=OVConfig(dtype="fp32"),
    convert_tokenizer=True,
)
