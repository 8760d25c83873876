"""What features hold at the highest beside plain passes of the same rows: at most one layer's gradients of each row.

Models of 1, 2 and 4 layers in a block have the same largest layer and ever more parameters. Every figure is the rise of
resident memory in a process of its own; `bound` is 1.3 × gradient rows × the largest layer's parameters in float32.

    python benchmarks/peak_memory.py
"""

import argparse
import json
import subprocess
import sys

import numpy as np
import torch
from build_cost import DRAWS, SCHEDULE, SIZE, Called
from diffusers import UNet2DModel

from influence import diffusion, gradients, keys
from influence.gradients import Inputs, Output
from influence.memory import peak
from influence.projection import countsketch

CPU = torch.device("cpu")


def measure(what: str, layers: int, rows: int, dim: int) -> dict[str, int]:
    """Bytes by which memory rises at its highest, and the sizes of the model."""
    unet = UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(32, 64, 64),
        layers_per_block=layers,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    network, parameters = Called(unet).eval(), dict(unet.named_parameters())
    shape = (rows, 3, SIZE, SIZE)
    x0, eps, xi = (torch.from_numpy(keys.normal(("memory", name), shape)) for name in ("x0", "eps", "xi"))
    t = torch.from_numpy(keys.integers(("memory", "t"), rows, 1000))
    inputs = Inputs(diffusion.noised(SCHEDULE, x0, t, eps), t, None)
    outputs = [
        Output(lambda f, x0, t, eps: diffusion.losses(SCHEDULE, f, x0, t, eps) / DRAWS, (x0, t, eps), DRAWS),
        Output(lambda f, xi: (f * xi).flatten(1).sum(1), (xi,), 1),
    ]
    sketch = countsketch({name: tuple(p.shape) for name, p in parameters.items()}, dim=dim, seed=0, device=CPU)

    def plain() -> None:
        prediction = network(inputs.x_t, t, None)
        diffusion.losses(SCHEDULE, prediction, x0, t, eps).mean().backward(retain_graph=True)
        (prediction * xi).mean().backward()
        unet.zero_grad()

    def hooks() -> None:
        gradients.per_sample_gradients(network, parameters, inputs, outputs, sketch, engine="hooks")

    with torch.no_grad():
        network(inputs.x_t[:1], t[:1], None)  # what a first use loads belongs to both
    before = peak(lambda: None, CPU)
    high = peak({"plain": plain, "hooks": hooks}[what], CPU)
    sizes = [p.numel() for p in parameters.values()]
    return {"rise": high - before, "parameters": sum(sizes), "largest": 4 * max(sizes)}


def main() -> None:
    """Measure each in a new process, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="rows (image, draw) in a forward")
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.rows, options.dim)))
        return
    count = options.rows + options.rows // DRAWS
    print("| parameters | plain passes | features | more | bound |\n|---|---|---|---|---|")
    for layers in (1, 2, 4):
        rises = {}
        for what in ("plain", "hooks"):
            command = [sys.executable, __file__, "--rows", str(options.rows), "--dim", str(options.dim)]
            command += ["--one", what, str(layers)]
            found = [
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                for _ in range(options.rounds)
            ]
            rises[what] = float(np.median([f["rise"] for f in found]))
        cells = (rises["plain"], rises["hooks"], rises["hooks"] - rises["plain"], 1.3 * count * found[0]["largest"])
        print(f"| {found[0]['parameters']:,} | " + " | ".join(f"{c / 2**20:.0f} MiB" for c in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
