"""What Torch-Pruning leaves of the network of surgery.py, with the same weights; without training.

Runs in an environment of its own: `pip install torch==2.13.0 torch-pruning==1.6.1 numpy`. `surgery.py --torch PYTHON` starts it:

    PYTHON benchmarks/surgery_torch.py in.npz out.json

`in.npz` holds the weights of the Keras model by layer, test images and labels, and what the Keras model gives for the first of
them: the PyTorch network must give the same before it is pruned.
"""

import copy
import json
import pathlib
import sys

import numpy as np
import torch
import torch_pruning
from torch import nn

SIZES = {"conv0": 14, "conv1": 14, "conv2": 14, "conv4": 7, "conv5": 7}  # of what each convolution gives
IMPORTANCES = {
    "magnitude": torch_pruning.importance.MagnitudeImportance(p=2, group_reduction="first"),
    "group norm": torch_pruning.importance.GroupMagnitudeImportance(p=2),
}


class Network(nn.Module):
    """The network of surgery.py."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        for name in SIZES:
            kernel = torch.from_numpy(weights[f"{name}/0"].transpose(3, 2, 0, 1).copy())
            convolution = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, stride=2 if name == "conv0" else 1, bias=False)
            convolution.weight.data = kernel
            norm = nn.BatchNorm2d(kernel.shape[0], eps=1e-3)
            parts = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            for index, part in enumerate(parts):
                part.data = torch.from_numpy(weights[f"{name.replace('conv', 'norm')}/{index}"].copy())
            self.add_module(name, convolution)
            self.add_module(name.replace("conv", "norm"), norm)
        self.head = nn.Linear(*weights["head/0"].shape)
        self.head.weight.data = torch.from_numpy(weights["head/0"].T.copy())
        self.head.bias.data = torch.from_numpy(weights["head/1"].copy())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images `(batch, 1, 28, 28)`."""
        for name in SIZES:
            if name == "conv4":
                x = nn.functional.max_pool2d(x, 2)
            # "same" of Keras: with strides 2 only at the right and at the bottom
            x = nn.functional.pad(x, (0, 1, 0, 1) if name == "conv0" else (1, 1, 1, 1))
            x = torch.relu(getattr(self, name.replace("conv", "norm"))(getattr(self, name)(x)))
        return self.head(x.mean((2, 3)))


def macs(network: Network) -> int:
    """Multiply-accumulates of one image, counted as keras_kd does: of the kernels."""
    convolutions = sum(size**2 * getattr(network, name).weight.numel() for name, size in SIZES.items())
    return convolutions + network.head.weight.numel()


def given(network: Network, images: np.ndarray) -> np.ndarray:
    """Outputs, in inference."""
    with torch.no_grad():
        return np.concatenate(
            [network.eval()(torch.from_numpy(images[at : at + 1000])).numpy() for at in range(0, len(images), 1000)]
        )


def pruned(network: Network, method: str, everywhere: bool, share: float) -> Network:
    """With the smallest pruning ratio that keeps at most a share of the multiply-accumulates; the ratio is found by bisection."""
    low, high, best = 0.0, 0.95, None
    for _ in range(12):
        ratio, one = (low + high) / 2, copy.deepcopy(network)
        torch_pruning.pruner.BasePruner(
            one,
            torch.zeros(1, 1, 28, 28),
            importance=IMPORTANCES[method],
            global_pruning=everywhere,
            pruning_ratio=ratio,
            max_pruning_ratio=0.95,
            ignored_layers=[one.head],
        ).step()
        if macs(one) <= share * macs(network):
            high, best = ratio, one
        else:
            low = ratio
    if best is None:
        raise RuntimeError(f"No ratio keeps at most {share:.0%} of the multiply-accumulates.")
    return best


def main(source: str, target: str) -> int:
    """Prunes at each share, and writes the accuracies."""
    held = dict(np.load(source))
    network = Network(held)
    difference = float(np.abs(given(network, held["images"][: len(held["outputs"])]) - held["outputs"]).max())
    if difference > 1e-3:
        raise RuntimeError(f"The network must give what the Keras model gives. Largest difference: {difference}.")
    found: dict[str, object] = {"torch": torch.__version__, "torch_pruning": torch_pruning.__version__, "difference": difference}
    for method in IMPORTANCES:
        for everywhere in (False, True):
            for share in held["shares"].tolist():
                one = pruned(network, method, everywhere, share)
                right = given(one, held["images"]).argmax(-1) == held["labels"]
                name = f"{share}/Torch-Pruning, {method}, {'all layers together' if everywhere else 'same share in each layer'}"
                found[name] = {"accuracy": round(100 * float(right.mean()), 3), "macs": round(macs(one) / macs(network), 5)}
    pathlib.Path(target).write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
