"""What did the teacher say? Its answers on disk, written once, and read by every later epoch, trial and run."""

from keras_kd.recording.recorded import Recording, record_teacher
from keras_kd.teachers import RecordedBatch

__all__ = ["RecordedBatch", "Recording", "record_teacher"]
