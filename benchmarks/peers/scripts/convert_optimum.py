"""Make optimum-onnx's folder of a checkpoint: CHECKPOINT FOLDER."""

import sys

from optimum.exporters.onnx import main_export

main_export(sys.argv[1], output=sys.argv[2], task="text-to-image", local_files_only=True, do_validation=False)
