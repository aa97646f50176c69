"""How long is a callback in a `fit`, and what has it left when the `fit` failed? Lists of callbacks on the stack tell.

Keras tells no callback when `fit` ends in an error. But a list of callbacks that is a local variable somewhere on the stack belongs
to a `fit` (or `evaluate`, or `predict`) that is running. When a `fit` is gone, so is its list: at once, or when Python collects
cycles, since TensorFlow leaves one of frames where it traces.
"""

import sys
from typing import Any

import keras


class Last(keras.callbacks.Callback):
    """Stands at the end of the list: what other callbacks do to the weights when a `fit` ends is done when it is called."""

    def __init__(self, finish: Any, callbacks: list[Any]) -> None:
        super().__init__()
        self.finish, self.callbacks = finish, callbacks

    def on_train_end(self, logs: Any = None) -> None:
        """Ends the `fit` for the callback that it stands there for, and goes: the list may be the user's own."""
        self.finish()
        if self.callbacks[-1] is self:
            self.callbacks.pop()


def running_lists(callback: Any) -> list[Any]:
    """The lists that this callback is called in now, the innermost first: several, if another callback evaluates inside `fit`."""
    found: list[Any] = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        for value in list(frame.f_locals.values()):
            if isinstance(value, keras.callbacks.CallbackList) and any(one is callback for one in value.callbacks):
                found.append(value)
        frame = frame.f_back
    return found


def is_running(calls: Any) -> bool:
    """Whether the list behind a weak reference is called now; without one, as in a loop of one's own, nobody can tell."""
    frame: Any = sys._getframe(1)
    while calls is not None and frame is not None:
        if any(value is calls() for value in list(frame.f_locals.values()) if isinstance(value, keras.callbacks.CallbackList)):
            return True
        frame = frame.f_back
    return calls is None


def take_back(model: keras.Model) -> None:
    """Gives a model its own functions back, where a lent one was never called."""
    for attribute in ("train_function", "test_function", "predict_function"):
        while (own := getattr(getattr(model, attribute, None), "lent_for", None)) is not None:
            setattr(model, attribute, own)


def leave(model: Any, name: str, value: Any) -> None:
    """Takes what a `fit` that is gone has left off a model."""
    if (found := model()) is not None and vars(found).get(name) is value:
        vars(found).pop(name)
        take_back(found)
