"""How does a model leave Keras, and does the file say the same? LiteRT and ONNX files, which are run before they are written."""

from keras_kd.export.litert import open_litert, run_litert, to_litert
from keras_kd.export.onnx import to_onnx
from keras_kd.export.results import ExportReport

__all__ = ["ExportReport", "open_litert", "run_litert", "to_litert", "to_onnx"]
