"""What do integers make of a model? Models with rounded weights and activations, as `callbacks.Quantization` trains them."""

from keras_kd.quantized.model import QuantizedModel

__all__ = ["QuantizedModel"]
