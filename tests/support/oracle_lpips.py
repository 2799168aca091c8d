"""LPIPS v0.1 in plain torch.nn, with the module names of the files that a user downloads.

`TorchvisionNet` has the state dict of torchvision's AlexNet or VGG16 (a narrow classifier stands for the real one),
`LinLayers` the one of `lpips/weights/v0.1/*.pth`, and `package_state` joins them as the package's own module does.
"""

import torch
from torch import Tensor, nn

# `features`, module by module: a convolution as (channels in, out, kernel, stride, padding), a pooling as its window.
ALEX = [
    (3, 64, 11, 4, 2), "relu", 3,
    (64, 192, 5, 1, 2), "relu", 3,
    (192, 384, 3, 1, 1), "relu",
    (384, 256, 3, 1, 1), "relu",
    (256, 256, 3, 1, 1), "relu", 3,
]  # fmt: skip
ALEX_TAPS = (1, 4, 7, 9, 11)
ALEX_CLASSIFIER = {1: (9216, 4), 4: (4, 4), 6: (4, 10)}


def _vgg16() -> list:
    layers, channels = [], 3
    for width, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            layers += [(channels, width, 3, 1, 1), "relu"]
            channels = width
        layers.append(2)
    return layers


VGG = _vgg16()
VGG_TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
VGG_CLASSIFIER = {0: (25088, 4), 3: (4, 4), 6: (4, 10)}

NETWORKS = {"alex": (ALEX, ALEX_TAPS, ALEX_CLASSIFIER), "vgg": (VGG, VGG_TAPS, VGG_CLASSIFIER)}
CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


class TorchvisionNet(nn.Module):
    """The network as torchvision names it; the forward pass gives the five feature maps."""

    def __init__(self, network: str):
        super().__init__()
        layers, self.taps, classifier = NETWORKS[network]
        self.features = nn.Sequential(*map(_module, layers))
        self.classifier = nn.ModuleDict({str(i): nn.Linear(*sizes) for i, sizes in classifier.items()})

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for index, layer in enumerate(self.features[: self.taps[-1] + 1]):
            x = layer(x)
            if index in self.taps:
                maps.append(x)
        return maps


def _module(layer: object) -> nn.Module:
    if layer == "relu":
        return nn.ReLU()
    return nn.MaxPool2d(layer, 2) if isinstance(layer, int) else nn.Conv2d(*layer)


class LinLayer(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))


class LinLayers(nn.Module):
    """`lin0.model.1.weight` to `lin4.model.1.weight`."""

    def __init__(self, network: str):
        super().__init__()
        for index, channels in enumerate(CHANNELS[network]):
            self.add_module(f"lin{index}", LinLayer(channels))


class LPIPS(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> distances (B,). Random and seeded; every feature map is well alive."""

    def __init__(self, network: str, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.backbone, self.lins = TorchvisionNet(network), LinLayers(network)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if name.startswith("lins."):
                    parameter.copy_(noise.abs())
                elif name.endswith("bias"):
                    parameter.copy_(0.1 * noise)
                else:
                    parameter.copy_(noise * (2 / parameter[0].numel()) ** 0.5)
        self.eval()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        shift = first.new_tensor([-0.030, -0.088, -0.188]).reshape(3, 1, 1)
        scale = first.new_tensor([0.458, 0.448, 0.450]).reshape(3, 1, 1)
        distance = first.new_zeros(len(first))
        pairs = zip(
            self.backbone((first - shift) / scale), self.backbone((second - shift) / scale), strict=True
        )
        for lin, (a, b) in zip(self.lins.children(), pairs, strict=True):
            weighted = lin.model((_unit_length(a) - _unit_length(b)) ** 2)
            distance = distance + weighted.mean((1, 2, 3))
        return distance

    def package_state(self) -> dict[str, Tensor]:
        """The state dict of the lpips package's module: sliced network, lin layers twice, the scaling layer."""
        taps = self.backbone.taps
        state = {
            "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1),
            "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1),
        }
        for name, tensor in self.backbone.features.state_dict().items():
            slice_ = 1 + sum(int(name.split(".")[0]) > tap for tap in taps)
            state[f"net.slice{slice_}.{name}"] = tensor
        for name, tensor in self.lins.state_dict().items():
            state[name] = tensor
            state[name.replace("lin", "lins.")] = tensor
        return state


def _unit_length(x: Tensor) -> Tensor:
    norm = x.square().sum(1, keepdim=True).sqrt()
    return x / (norm + 1e-10)
