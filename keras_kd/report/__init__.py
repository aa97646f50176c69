"""What did compression change? Models side by side: measured, as a table, a picture, JSON and a page for the browser."""

from keras_kd.report.card import model_card
from keras_kd.report.comparison import compare
from keras_kd.report.entries import Entry, Gain, plot, table
from keras_kd.report.results import Comparison, LayerRow, ModelRow

__all__ = ["Comparison", "Entry", "Gain", "LayerRow", "ModelRow", "compare", "model_card", "plot", "table"]
